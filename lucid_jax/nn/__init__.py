"""Stateful caches with the `lucid.nn` API, and flax modules that take a cache."""

from lucid_jax.attention.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling, rope
from lucid_jax.nn.cache import (
    Cache,
    DynamicKVCache,
    EncoderDecoderCache,
    KVCache,
    StaticKVCache,
)
from lucid_jax.nn.mha import MultiHeadAttention
from lucid_jax.nn.norm import Norm

__all__ = [
    "Cache",
    "DynamicKVCache",
    "EncoderDecoderCache",
    "KVCache",
    "LinearScaling",
    "Llama3Scaling",
    "MultiHeadAttention",
    "Norm",
    "Rope",
    "StaticKVCache",
    "YarnScaling",
    "rope",
]
