"""Weights of 4 or 8 bits for storage and inference: numbers in groups, packed indices, layers and `quantize`.

The format is our own. torchao, the usual library, has no place for the values and the index of an unstructured sparse
matrix, unties an embedding from its head before it quantizes them, and would be a heavy dependency for the little that
remains.
"""

from sparsetrain.quantization.layers import QuantizedEmbedding, QuantizedLinear, QuantizedSparseLinear
from sparsetrain.quantization.quantize import quantize

__all__ = ["QuantizedEmbedding", "QuantizedLinear", "QuantizedSparseLinear", "quantize"]
