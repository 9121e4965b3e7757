"""`octavo quantize`: checkpoints in 4 and 8 bits out of 16-bit ones."""
