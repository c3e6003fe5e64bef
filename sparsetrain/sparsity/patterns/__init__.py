"""Which positions of a matrix hold weights: patterns, how they are drawn, counted, read and saved."""
