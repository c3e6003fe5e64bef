"""Comparisons of many runs: coordinate checks, and tables of sweeps."""
