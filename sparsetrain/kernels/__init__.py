"""Numeric kernels: arrays in, arrays out. They know nothing of patterns, layers or configurations."""
