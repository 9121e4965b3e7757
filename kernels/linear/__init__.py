"""Products with weight matrices, a file a weight format; which kernel takes how many tokens stands in the tables."""
