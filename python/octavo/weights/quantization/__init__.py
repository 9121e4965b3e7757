"""What a checkpoint's config says of its quantised weights: a family of configs a file."""
