"""Pure loss functions, one file each."""
