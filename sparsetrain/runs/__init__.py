"""What a run directory is: its files, who may write to it, what identifies the run, its checkpoints and metrics."""
