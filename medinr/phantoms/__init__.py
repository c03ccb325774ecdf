"""Writers of synthetic data sets with known truth."""
