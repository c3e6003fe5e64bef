"""Studies over many runs: coordinate checks, and tables of sweeps."""
