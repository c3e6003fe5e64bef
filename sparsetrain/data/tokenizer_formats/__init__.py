"""Tokenizers of other formats, each converted to the content of a ``tokenizer.json``."""

from sparsetrain.data.tokenizer_formats.read import Found, read_tokenizer

__all__ = ["Found", "read_tokenizer"]
