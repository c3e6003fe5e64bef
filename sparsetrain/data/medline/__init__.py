"""MEDLINE: the source ``medline``, the parser of its XML, and where a sentence of an abstract ends."""
