"""Stateful caches with the `lucid.nn` API, and flax modules that take a cache."""

from lucid_jax.attention.rope import Linear, Llama3, Rope, Yarn, rope
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
    "Linear",
    "Llama3",
    "MultiHeadAttention",
    "Norm",
    "Rope",
    "StaticKVCache",
    "Yarn",
    "rope",
]
