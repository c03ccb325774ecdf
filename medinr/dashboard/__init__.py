"""What an experiment's runs have in common, to look at: a page from local files, a workspace of Weights & Biases."""
