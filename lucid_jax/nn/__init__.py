"""Stateful caches with the `lucid.nn` API, and flax modules that take a cache."""

from lucid_jax.attention.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling, rope
from lucid_jax.nn.base import Cache
from lucid_jax.nn.cache import KVCache, SpecKVCache
from lucid_jax.nn.encoder_decoder import EncoderDecoderCache
from lucid_jax.nn.kinds import DynamicKVCache, SlidingKVCache, StaticKVCache
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
    "SlidingKVCache",
    "SpecKVCache",
    "StaticKVCache",
    "YarnScaling",
    "rope",
]
