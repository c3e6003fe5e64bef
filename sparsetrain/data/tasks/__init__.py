"""Labelled tasks: what a task is, its examples as batches, and the tasks ``section_roles`` and ``pubmedqa``.

A file of this directory that calls `register_task` is imported with `sparsetrain.data`, and so adds a task.
"""
