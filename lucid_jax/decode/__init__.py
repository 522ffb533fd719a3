"""Decoding on a cache: sampling, generation, beam search and speculation, each in one compiled loop."""

from lucid_jax.decode.beam import BeamResult, beam_search
from lucid_jax.decode.conversation import Conversation
from lucid_jax.decode.drafts import NGram, Tree
from lucid_jax.decode.generation import Generation, generate, stream
from lucid_jax.decode.language_model import LanguageModel
from lucid_jax.decode.prompt_cache import Prefilled, PromptCache
from lucid_jax.decode.prompts import unpad
from lucid_jax.decode.sampling import Sampling, sample
from lucid_jax.decode.speculative import Speculation, speculate
from lucid_jax.decode.uncached import generate_uncached, stream_uncached

__all__ = [
    "BeamResult",
    "Conversation",
    "Generation",
    "LanguageModel",
    "NGram",
    "Prefilled",
    "PromptCache",
    "Sampling",
    "Speculation",
    "Tree",
    "beam_search",
    "generate",
    "generate_uncached",
    "sample",
    "speculate",
    "stream",
    "stream_uncached",
    "unpad",
]
