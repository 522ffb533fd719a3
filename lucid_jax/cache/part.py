"""What attention reads: `Part`, a run of slots walked block by block, and `Region`, who sees what.

A layer is one part, or several: quantized slots and a full-precision residual, what was stored before
a chunk and the chunk itself. Stored positions are int32 [S], [B, S] or [B, H, S].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from jax import lax

from lucid_jax.cache.forms import Form, Stored

Slots = Callable[[jax.Array, int], jax.Array]  # (begin, size) to something about those slots


@dataclasses.dataclass(frozen=True)
class Part:
    """Slots that attention walks through.

    Attributes:
        key: stored keys, leaves (B, H, S, ...).
        value: stored values, leaves (B, H, S, ...).
        key_form: how the keys are stored.
        value_form: how the values are stored.
        size: S.
        start: the first slot to read, int32 [].
        stop: one past the last slot to read, int32 [].
        positions: absolute positions of slots, int32 [S], [B, S] or [B, H, S]; -1 if dead.
        index: which entry of a mask's last axis a slot is, int32 [S] or [B, S].
        visible: bool of query positions [B or 1, 1, 1, T, 1] and stored ones [B or 1, H or 1, 1, 1, S]:
            when a query may read this part's copy of a token; None for always.
        in_order: whether `index` of consecutive slots is consecutive and the same in all rows.
    """

    key: Stored
    value: Stored
    key_form: Form
    value_form: Form
    size: int
    start: jax.Array
    stop: jax.Array
    positions: Slots
    index: Slots
    visible: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    in_order: bool = False

    @property
    def stride(self) -> int:
        """Tokens that share an entry of the coarsest leaf: blocks are cut at its multiples."""
        return max(self.size // leaf.shape[2] for leaf in jax.tree.leaves((self.key, self.value)))

    def block(self, begin: jax.Array, size: int) -> tuple[Stored, Stored]:
        """Stored keys and values of slots [begin, begin + size), whole groups."""

        def cut(leaf: jax.Array) -> jax.Array:
            stride = self.size // leaf.shape[2]
            return lax.dynamic_slice_in_dim(leaf, begin // stride, size // stride, axis=2)

        return jax.tree.map(cut, self.key), jax.tree.map(cut, self.value)


@dataclasses.dataclass(frozen=True)
class Region:
    """Stored tokens that queries of given positions may see, and where both stand in the cache.

    Attributes:
        sees: bool of query and stored positions, shaped as for `Part.visible`; None for all.
        query_place: places in the cache of query positions [T] or [B, T], for RoPE by place.
        key_place: places of stored tokens, from their positions and slots' `index`.
        slots: only the first so many slots of the layer can hold such tokens; None if any can.
    """

    sees: Callable[[jax.Array, jax.Array], jax.Array] | None
    query_place: Callable[[jax.Array], jax.Array]
    key_place: Callable[[jax.Array, jax.Array], jax.Array]
    slots: int | None = None


def wide(counter: jax.Array) -> jax.Array:
    """A counter [] or [B] as [1 or B, 1, 1, 1, 1], to compare with what `visible` and `sees` get."""
    return counter.reshape(-1, 1, 1, 1, 1)
