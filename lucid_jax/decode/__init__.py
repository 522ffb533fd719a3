"""Decoding on a cache: sampling, generation and beam search, each in one compiled loop."""

from lucid_jax.decode.beam import BeamResult, beam_search
from lucid_jax.decode.generation import (
    Generation,
    LanguageModel,
    generate,
    generate_uncached,
    stream,
    stream_uncached,
)
from lucid_jax.decode.prompt_cache import Prefilled, PromptCache
from lucid_jax.decode.sampling import Sampling, sample

__all__ = [
    "BeamResult",
    "Generation",
    "LanguageModel",
    "Prefilled",
    "PromptCache",
    "Sampling",
    "beam_search",
    "generate",
    "generate_uncached",
    "sample",
    "stream",
    "stream_uncached",
]
