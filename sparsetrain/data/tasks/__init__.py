"""Labelled tasks: the class `Task`, batches of examples, and the tasks ``section_roles`` and ``pubmedqa``.

`sparsetrain.data` imports every file of this directory, so a file that calls `register_task` here adds a task.
"""
