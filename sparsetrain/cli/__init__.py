"""``sparsetrain VERB [overrides]``: the command line. Its verbs stand in one table, `verbs.VERBS`."""

from sparsetrain.cli.main import main

__all__ = ["main"]
