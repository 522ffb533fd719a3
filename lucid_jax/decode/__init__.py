"""Decoding on a cache: sampling, and generation in one compiled loop."""

from lucid_jax.decode.generation import (
    Generation,
    LanguageModel,
    generate,
    generate_uncached,
    stream,
    stream_uncached,
)
from lucid_jax.decode.sampling import Sampling, sample

__all__ = [
    "Generation",
    "LanguageModel",
    "Sampling",
    "generate",
    "generate_uncached",
    "sample",
    "stream",
    "stream_uncached",
]
