"""What kernels are written in: vectors, tiles, named arguments, and how all of it is compiled, checked and run."""
