"""The command line ``sparsetrain VERB [overrides]``. The table `verbs.VERBS` lists the verbs."""

from sparsetrain.cli.main import main

__all__ = ["main"]
