"""Sources of documents: the class `Source`, and the sources ``file`` and ``hub``.

`sparsetrain.data` imports every file of this directory, so a file that calls `register_source` here adds a source.
"""
