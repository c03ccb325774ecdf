"""medinr: implicit neural representations of medical images and of the deformations between them."""
