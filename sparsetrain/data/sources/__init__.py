"""Where documents come from: what a source is, and the sources ``file`` and ``hub``.

A file of this directory that calls `register_source` is imported with `sparsetrain.data`, and so adds a source.
"""
