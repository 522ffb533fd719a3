"""Stateful caches with the `lucid.nn` API, and flax modules that take a cache."""

from lucid_jax.attention.rope import rope
from lucid_jax.nn.cache import (
    Cache,
    DynamicKVCache,
    EncoderDecoderCache,
    KVCache,
    StaticKVCache,
)
from lucid_jax.nn.mha import MultiHeadAttention

__all__ = [
    "Cache",
    "DynamicKVCache",
    "EncoderDecoderCache",
    "KVCache",
    "MultiHeadAttention",
    "StaticKVCache",
    "rope",
]
