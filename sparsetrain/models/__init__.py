"""Decoder-only transformers whose hidden matrices may be sparse, and soft prompts for them."""

from sparsetrain.models.config import ModelConfig
from sparsetrain.models.kv_cache import KVCache
from sparsetrain.models.positions import alibi_slopes
from sparsetrain.models.prompted import Prompted
from sparsetrain.models.soft_prompt import SoftPrompt
from sparsetrain.models.transformer import Transformer, matrix_traits, tensor_traits

__all__ = [
    "KVCache",
    "ModelConfig",
    "Prompted",
    "SoftPrompt",
    "Transformer",
    "alibi_slopes",
    "matrix_traits",
    "tensor_traits",
]
