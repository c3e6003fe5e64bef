"""MEDLINE: the source ``medline``, the parser of its XML, and the splitting of abstracts into sentences."""
