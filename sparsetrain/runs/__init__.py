"""Run directories: their files and locks, the identity of a run, checkpoints and metrics."""
