"""How the product of a batch and a sparse matrix is computed, and which way is the fastest one for a layer."""
