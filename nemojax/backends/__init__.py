"""What differs between machines: chip facts now; kernels, precision and compiler flags beside them."""
