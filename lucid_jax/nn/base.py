"""`Cache`: what every stateful cache can do."""

from __future__ import annotations

import abc

import jax
from flax import nnx
from jax.typing import ArrayLike


class Cache(nnx.Pytree, abc.ABC):
    """What every stateful cache can do; the type to annotate with."""

    @abc.abstractmethod
    def update(
        self,
        key: ArrayLike,
        value: ArrayLike,
        layer_idx: int,
        cache_position: ArrayLike | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Stores new tokens of a layer and returns all its keys and values."""

    @abc.abstractmethod
    def reset(self) -> None:
        """Forgets everything."""

    @abc.abstractmethod
    def batch_select_indices(self, indices: ArrayLike) -> None:
        """Keeps batch rows `indices`, in that order; rows may repeat or be dropped."""

    def reorder_cache(self, beam_idx: ArrayLike) -> None:
        """`batch_select_indices` by its beam-search name."""
        self.batch_select_indices(beam_idx)

    @abc.abstractmethod
    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each batch row `repeats` times: rows 0, 0, ..., 1, 1, ..."""

    @abc.abstractmethod
    def crop(self, max_length: int) -> None:
        """Keeps the latest `max_length` tokens of every layer."""

    @abc.abstractmethod
    def get_max_cache_shape(self) -> int | None:
        """The most tokens a row can hold, or None if there is no such bound."""
