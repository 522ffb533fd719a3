"""A chunk of a prompt: what `PromptCache` keeps, and how it is named."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from flax import struct

from lucid_jax.cache.cut_and_join import Segment

ROOT = ""  # the name of what comes before every prompt


@struct.dataclass
class Content:
    """A chunk of tokens of some prompt, and what they added to its cache; NumPy arrays."""

    tokens: Any  # int32 [chunk]
    hidden: Any  # (1, E), of the last of them
    segments: tuple[Segment, ...]  # of each layer, B = 1

    if TYPE_CHECKING:

        def replace(self, **updates: Any) -> Self:
            """A copy with some fields changed; flax adds it."""


def name_of(before: str, tokens: np.ndarray) -> str:
    """The name of a chunk after another: a chain of SHA-256 hashes, so of all tokens up to its end."""
    return hashlib.sha256(before.encode() + tokens.astype("<i4").tobytes()).hexdigest()
