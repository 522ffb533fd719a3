"""What decoders ask of a model, and how their compiled loops take it: its structure and its parameters.

nnx describes a structure, which is static, by nested records. Hashing and comparing those of a small
model takes a quarter of a millisecond, at each jit call; here it is done once, by `split`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import jax
from flax import nnx

from lucid_jax.cache.layouts.base import LayerSpec
from lucid_jax.cache.state import CacheState


class LanguageModel(Protocol):
    """What decoders ask of a model: an nnx module with these methods."""

    @property
    def config(self) -> Any:
        """Has `vocab_size`."""

    @property
    def rope_by_place(self) -> bool:
        """Whether it counts positions in the cache, and so takes no `positions=`."""

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Per layer, how many positions back a token sees; None for all."""

    def hidden(
        self,
        tokens: jax.Array,
        cache: Any = None,
        *,
        lengths: Any = None,
        positions: Any = None,
        mask: Any = None,
    ) -> Any:
        """Tokens (B, T) to hidden states (B, T, E) and the cache, None without one.

        Args:
            tokens: int32 (B, T), to follow what the cache holds.
            cache: a state that `init_cache` made.
            lengths: int32 (B,), ragged caches: how many of each row's tokens are real.
            positions: int32 (B, T), where they are not the cache's next.
            mask: bool (B, 1, T, capacity), which slots a token sees.
        """

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states (B, T, E) to logits (B, T, V)."""

    def cache_spec(self, max_length: int, *, slack: int = 0) -> LayerSpec | Sequence[LayerSpec]:
        """What to keep of texts of up to `max_length` tokens; raises for a length it cannot read.

        With `slack`, windows of which so many tokens can be taken back.
        """

    def init_cache(self, spec: Any, batch_size: int, *, ragged: bool = False) -> CacheState:
        """An empty cache for this model."""


class ModelStructure:
    """The structure of an nnx module, hashable; equal ones are one object, see `split`."""

    def __init__(self, definition: Any):
        """Takes what `nnx.split` gives first."""
        self._definition = definition
        self._hash = hash(definition)

    def __hash__(self) -> int:
        """The definition's, kept."""
        return self._hash

    def __eq__(self, other: object) -> bool:
        """Whether two modules have the same structure."""
        if not isinstance(other, ModelStructure):
            return NotImplemented
        return self is other or (
            self._hash == other._hash and self._definition == other._definition
        )

    def merge(self, params: Any) -> Any:
        """The module with some parameters."""
        return nnx.merge(self._definition, params)


# Those in use, perhaps by jit's caches alone: what nobody has any more is forgotten.
_KNOWN: weakref.WeakKeyDictionary[ModelStructure, weakref.ref[ModelStructure]] = (
    weakref.WeakKeyDictionary()
)


def split(model: Any) -> tuple[ModelStructure, Any]:
    """A module's structure and its parameters.

    Args:
        model: any nnx module.

    Returns:
        The structure, the same object for modules of equal structure, and an nnx state.

    Example:
        >>> structure, params = split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        >>> other, _ = split(nnx.Linear(2, 3, rngs=nnx.Rngs(1)))
        >>> other is structure, structure.merge(params).in_features
        (True, 2)
    """
    definition, params = nnx.split(model)
    structure = ModelStructure(definition)
    return _KNOWN.setdefault(structure, weakref.ref(structure))() or structure, params
