"""A decode step on CPU: row by row up to the end of each, where that reads clearly fewer slots.

All rows together go to the end of the longest.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from lucid_jax.attention.blocks import ByBlocks, at_once_or_each_block, block_size, each_block
from lucid_jax.attention.protocol import platform
from lucid_jax.attention.softmax import Care, Reader, RowsByLeaf, Running
from lucid_jax.cache.buffers import Rows
from lucid_jax.cache.packing import Packed
from lucid_jax.cache.reading import SlotRun
from lucid_jax.cache.tiles import divided_by_compiler


class RowByRow(NamedTuple):
    """The way of a decode step: rows together, or each by itself up to its own end."""

    care: Care

    def over(self, read: Reader, rows: RowsByLeaf, stored: Packed, running: Running) -> Running:
        """Goes on with a softmax over what is stored in a run."""
        together, slot_run = ByBlocks(at_once_or_each_block, self.care), read.slot_run
        if not _may_go_apart(slot_run, rows, stored):
            return together.over(read, rows, stored, running)
        count, ends = running.top.shape[0], slot_run.ends()
        size, size_alone = block_size(rows), block_size(_of_rows(rows, 0))
        all_read = count * (-(-slot_run.stop // size) * size)
        alone = jnp.sum(-(-ends // size_alone) * size_alone, dtype=jnp.int32)
        apart = 5 * alone < 4 * all_read
        # By loops of no turns and not a choice, which under vmap would always do both.
        stop = jnp.where(apart, slot_run.start, slot_run.stop)
        left = dataclasses.replace(read, slot_run=slot_run.replace(stop=stop))
        running = together.over(left, rows, stored, running)
        way = ByBlocks(each_block, self.care)

        def go_on(row: jax.Array, running: Running) -> Running:
            before = Running(*(_of(x, row) for x in running))
            mine = _reader_of(read, ends, row)
            after = way.over(mine, _of_rows(rows, row), stored, before)
            put = lax.dynamic_update_slice_in_dim
            return Running(*(put(x, new, row, 0) for x, new in zip(running, after, strict=True)))

        done: Running = lax.fori_loop(
            jnp.int32(0), jnp.where(apart, jnp.int32(count), 0), go_on, running
        )
        return done


def _may_go_apart(slot_run: SlotRun, rows: RowsByLeaf, stored: Packed) -> bool:
    """Whether rows have ends of their own, in more slots than one block of them all holds."""
    if platform() != "cpu" or slot_run.size <= block_size(rows):
        return False
    if slot_run.slots.high.ndim == 0 or len(slot_run.slots.high) == 1:
        return False
    return not any(map(divided_by_compiler, jax.tree.leaves(stored)))


@struct.dataclass
class _OneRow(Rows):
    """One row of a buffer, as a buffer that is only read."""

    of: Rows
    row: jax.Array

    def sizes(self, leaf: jax.Array) -> tuple[int, int, int]:
        return (1, *self.of.sizes(leaf)[1:])

    def read(self, leaf: jax.Array, begin: jax.Array, size: int) -> jax.Array:
        return self.of.read_row(leaf, self.row, begin, size)


def _reader_of(read: Reader, ends: jax.Array, row: jax.Array) -> Reader:
    """What the queries of one row read of the same leaves."""
    run, mask, sight = read.slot_run, read.mask, read.sight
    slots, index = run.slots, run.index
    slots = slots.replace(
        low=_of(slots.low, row),
        high=_of(slots.high, row),
        start=_of(slots.start, row),
        reach=_of(slots.reach, row),
        held=None if slots.held is None else _of(slots.held, row, shared=1),
        evicted=None if slots.evicted is None else _of(slots.evicted, row),
    )
    index = dataclasses.replace(
        index, start=_of(index.start, row), position=_of(index.position, row)
    )
    run = run.replace(buffer=_OneRow(run.buffer, row), slots=slots, index=index, stop=ends[row])
    visible, bias = (
        x if x is None or len(x) == 1 else _of(x, row) for x in (mask.visible, mask.bias)
    )
    mask = mask.replace(position=_of(mask.position, row, shared=1), visible=visible, bias=bias)
    sight = dataclasses.replace(
        sight, query_index=_of(sight.query_index, row, shared=1), key_from=_of(sight.key_from, row)
    )
    return dataclasses.replace(read, slot_run=run, mask=mask, sight=sight)


def _of_rows(rows: RowsByLeaf, row: jax.Array | int) -> RowsByLeaf:
    return {name: _of(x, row) for name, x in rows.items()}


def _of(x: jax.Array, row: jax.Array | int, shared: int = 0) -> jax.Array:
    """The entry of one row, on an axis of 1; what has only `shared` axes is of all rows."""
    return x if x.ndim <= shared else lax.dynamic_slice_in_dim(x, row, 1, axis=0)
