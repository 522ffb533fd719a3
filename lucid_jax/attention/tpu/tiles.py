"""Queries in tiles, each a row of its own to the kernel: which queries, and what they see.

A few queries are one tile, and what each sees comes as an array. Of a prompt's that would be as large
as its scores, so there the kernel is told positions, of slots and where runs seen begin and end.
Shapes: rows (B, H, G * T, D); of each of n tiles R = G * T / n.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lucid_jax.attention.kernel_inputs import added_to_scores
from lucid_jax.attention.mask import Mask, positions_by_head
from lucid_jax.attention.softmax import Reader
from lucid_jax.cache.tiles import LANES, ROWS

FEW = 128  # queries of a KV head that are one tile
MOST = 512  # of a tile: a block of slots is read once for all of them
MOST_NUMBERS = 1 << 17  # of them, of all KV heads that are read together


class Seen(NamedTuple):
    """Which queries see which slots: an array says it, or positions, or both; `m` slots are of blocks.

    Of few queries the array says all of it.
    """

    some: jax.Array  # bool (B * n or n, blocks): whether a query of a tile sees a slot of a block
    added: jax.Array | None  # float32 (B or 1, H or 1, group or 1, T or 1, m); -inf hides
    at: jax.Array | None  # int32 (B or 1, H or 1, 1, 1, m), positions of slots; -1 if dead
    runs: jax.Array | None  # int32 (B * n or n, 2 * runs, R by 128), where they begin and end


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How queries of a KV head, G groups of T, are cut into tiles: by T, so that a tile sees little.

    Attributes:
        group: G; a few queries are one group.
        tokens: T.
        each: of them, those of a tile, a multiple of 8, or of 16.
    """

    group: int
    tokens: int
    each: int

    @classmethod
    def of(cls, group: int, tokens: int, numbers: int) -> Tiles:
        """For blocks of so many KV heads, times the numbers of a query."""
        if group * tokens <= FEW:
            return cls(1, group * tokens, -(-group * tokens // ROWS) * ROWS)
        least = 2 * ROWS  # of bfloat16
        most = max(min(MOST, MOST_NUMBERS // numbers) // group // least * least, least)
        count = -(-tokens // most)
        return cls(group, tokens, -(-tokens // (count * least)) * least)

    @property
    def count(self) -> int:
        """Tiles of a row."""
        return -(-self.tokens // self.each)

    @property
    def rows(self) -> int:
        """R."""
        return self.group * self.each

    @property
    def padded(self) -> int:
        """T of whole tiles."""
        return self.count * self.each

    def whole(self, rows: jax.Array) -> jax.Array:
        """Rows (B, H, G * T, D) of whole tiles, zeros after T."""
        batch, heads, _, width = rows.shape
        x = rows.reshape(batch, heads, self.group, self.tokens, width)
        return _padded(x, 3, self._rest, 0).reshape(batch, heads, -1, width)

    def own(self, rows: jax.Array) -> jax.Array:
        """Of rows of whole tiles, (B, H, G * T, ...), those that are asked for."""
        batch, heads, _, *width = rows.shape
        x = rows.reshape(batch, heads, self.group, self.padded, *width)
        return x[:, :, :, : self.tokens].reshape(batch, heads, -1, *width)

    def by_rows(self, x: jax.Array) -> jax.Array:
        """A number for each query of tiles, (B * n, H, R), by rows: (B, H, G * T), of whole tiles."""
        x = x.reshape(-1, self.count, x.shape[1], self.group, self.each)
        return x.transpose(0, 2, 3, 1, 4).reshape(len(x), x.shape[2], -1)

    def seen(self, read: Reader, slots: int) -> Seen:
        """Who sees what, of blocks of so many slots."""
        if self.group * self.tokens <= FEW:
            added = self._in_blocks(added_to_scores(read, self.tokens)[:, :, None], slots)
            some = jnp.any(~jnp.isneginf(added), axis=(1, 2, 3))
            return Seen(jnp.any(some.reshape(len(some), -1, slots), axis=-1), added, None, None)
        mask, slot_run = read.mask, read.slot_run
        seen = jnp.any(mask.seen(slot_run, read.sight), axis=(1, 2))
        seen = _padded(_padded(seen, 1, self._rest, False), 2, -slot_run.size % slots, False)
        seen = seen.reshape(len(seen), self.count, self.each, -1, slots)
        some = jnp.any(seen, axis=(2, 4))
        at = positions_by_head(slot_run, jnp.int32(0), slot_run.size)[:, :, None, None]
        asked = mask.position.reshape(-1, self.tokens)
        runs = jnp.stack(
            [x for run in mask.runs_seen(slot_run, read.sight, asked) for x in run], axis=1
        )
        runs = _padded(runs, 2, self._rest, 0).reshape(*runs.shape[:2], self.count, 1, self.each)
        runs = jnp.broadcast_to(runs, (*runs.shape[:3], self.group, self.each))
        runs = jnp.moveaxis(runs, 2, 1).reshape(-1, runs.shape[1], self.rows)
        return Seen(
            some.reshape(-1, some.shape[-1]),
            self._given(read, slots),
            _padded(at, 4, -slot_run.size % slots, -1),
            _padded(runs, 2, -self.rows % LANES, 0),
        )

    def _given(self, read: Reader, slots: int) -> jax.Array | None:
        """What a mask and a bias by index add to scores."""
        visible, bias = read.mask.visible_of(read.slot_run), read.mask.bias_of(read.slot_run)
        if visible is None and bias is None:
            return None
        added = jnp.zeros((), jnp.float32) if bias is None else bias.astype(jnp.float32)
        if visible is not None:
            added = jnp.where(visible, added, -jnp.inf)
        shape = (*added.shape[:4], read.slot_run.size)
        return self._in_blocks(jnp.broadcast_to(added, shape), slots)

    def _in_blocks(self, added: jax.Array, slots: int) -> jax.Array:
        """Added (B or 1, H or 1, G or 1, T or 1, S), of whole tiles and blocks."""
        if added.shape[3] > 1:
            added = _padded(added, 3, self._rest, -jnp.inf)
        return _padded(added, 4, -added.shape[4] % slots, -jnp.inf)

    @property
    def _rest(self) -> int:
        return -self.tokens % self.each


def bytes_added(mask: Mask, tiles: Tiles, heads: int, slots: int) -> int:
    """Bytes of a block of what a mask and a bias by index add to scores of a tile."""
    shapes = [x.shape for x in (mask.visible, mask.bias) if x is not None]
    count = max((x[1] for x in shapes), default=1)
    tokens = max((x[2] for x in shapes), default=1)
    by_head = heads if count > 1 else 1
    by_group = tiles.group if count > mask.num_kv_heads else 1
    return by_head * by_group * (tiles.each if tokens > 1 else 1) * slots * 4


def _padded(x: jax.Array, axis: int, more: int, value: float | bool) -> jax.Array:
    """An array with entries of a value after those of an axis."""
    widths = [(0, more if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)
