"""Model families, one a file, over the building blocks of `octavo.layers`."""
