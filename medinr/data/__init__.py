"""What all data modules share: pairs, the MONAI pipeline, the base class, lung masks, file layouts."""
