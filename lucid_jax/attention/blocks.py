"""Blocks of slots: how many slots one holds, and the loops that go through a run block by block.

Cost follows the slots in use and not the capacity; few slots most of which are in use are read at once,
so there it is at most twice as much. Shapes as in softmax.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from lucid_jax.attention.protocol import platform
from lucid_jax.attention.softmax import (
    Block,
    Care,
    Reader,
    RowsByLeaf,
    Running,
    softmax_block,
)
from lucid_jax.cache.buffers import Rows
from lucid_jax.cache.packing import Packed
from lucid_jax.cache.reading import SlotRun


class Sizes(NamedTuple):
    """What a block may be."""

    least: int  # slots, whatever else
    most: int  # slots
    tokens: int  # the most numbers of its keys, of all rows and heads
    scores: int  # the most numbers, of all rows, heads and queries


# On CPU a turn of the loop costs as much as some ten thousand numbers, and what a block holds is to be
# in the cores' caches: of 64 to 2048 slots these are the best, or nearly, from 1 row of 2 heads of 64
# to 64 rows of 8 heads of 128, for one query and for 512. A TPU reads a block where it lies: by its
# compiler's estimates the longer it is the better, while scores fit its memory. A GPU copies it first.
SIZES = {
    "cpu": Sizes(64, 512, 1 << 19, 1 << 20),
    "tpu": Sizes(256, 4096, 1 << 26, 1 << 24),
}
OTHERS_SIZES = Sizes(256, 512, 1 << 26, 1 << 24)
FEW_SCORES = 1 << 22  # of a block that is hardly ever read, as memory for them is always taken

Carry = TypeVar("Carry")


class Blocks(Protocol):
    """How the slots of a run that are in use are gone through."""

    def __call__(
        self,
        slot_run: SlotRun,
        rows: RowsByLeaf,
        body: Callable[[Carry, Block], Carry],
        carry: Carry,
        /,
    ) -> Carry:
        """Runs `body(carry, block)` over blocks that hold slots `slot_run.start` to `slot_run.stop`.

        `rows` are the queries, which say how large a block of so many slots is.
        """
        ...


class Way(Protocol):
    """A way forward; hashable."""

    @property
    def care(self) -> Care:
        """With how much of it."""
        ...

    def over(self, read: Reader, rows: RowsByLeaf, stored: Packed, running: Running, /) -> Running:
        """Goes on with a softmax over what is stored in a run."""
        ...


class ByBlocks(NamedTuple):
    """The way of a running softmax: which blocks, and with how much care."""

    blocks: Blocks
    care: Care

    def over(self, read: Reader, rows: RowsByLeaf, stored: Packed, running: Running) -> Running:
        """Goes on with a softmax, block by block."""
        body = partial(softmax_block, read, rows, stored, self.care)
        return self.blocks(read.slot_run, rows, body, running)


def block_size(rows: RowsByLeaf) -> int:
    """Slots of a block for queries (B, H, R, D), a power of two."""
    sizes = SIZES.get(platform(), OTHERS_SIZES)
    batch, heads, queries, _ = next(iter(rows.values())).shape
    dim = sum(x.shape[-1] for x in rows.values())
    each = max(batch * heads, 1)
    size = min(sizes.most, sizes.tokens // (each * dim), sizes.scores // (each * queries))
    return 1 << (max(size, sizes.least).bit_length() - 1)


def at_once_or_each_block(
    slot_run: SlotRun, rows: RowsByLeaf, body: Callable[[Carry, Block], Carry], carry: Carry
) -> Carry:
    """A decode step's way: all slots at once if they are few and most are in use, else by blocks.

    A block is copied out of its leaf before it is multiplied, which takes XLA on CPU as long as the
    products do; of the whole leaf only values are, to mask those that are dead. It is read in a loop of
    one turn: not by a choice, which under vmap would always do both, nor right after its append, as XLA
    then appends to a copy of it too.
    """
    one_block = block_size(rows) >= slot_run.size
    if platform() != "cpu" or not (one_block or _can_be_read_at_once(slot_run, rows)):
        return each_block(slot_run, rows, body, carry)
    used = slot_run.stop - slot_run.start
    most = used > 0 if one_block else 2 * used > slot_run.size

    def whole(turn: tuple[jax.Array, Carry]) -> tuple[jax.Array, Carry]:
        going, carry = turn
        return going & False, body(carry, Block(jnp.int32(0), slot_run.start, slot_run.size))

    carry = lax.while_loop(lambda turn: turn[0], whole, (most, carry))[1]
    if one_block:
        return carry
    rest = slot_run.replace(stop=jnp.where(most, slot_run.start, slot_run.stop))
    return each_block(rest, rows, body, carry)


def _can_be_read_at_once(slot_run: SlotRun, rows: RowsByLeaf) -> bool:
    """Whether all slots are no more than a block may hold, and lie as they are multiplied."""
    one = next(iter(rows.values()))
    batch, heads, queries, _ = one.shape
    each = batch * heads * slot_run.size
    few = each * sum(x.shape[-1] for x in rows.values()) <= SIZES["cpu"].tokens
    ready = all(
        form.differentiable and form.dtype == one.dtype
        for name, form in slot_run.forms
        if name in rows or name == slot_run.mixed
    )
    return few and each * queries <= SIZES["cpu"].scores and ready and slot_run.buffer == Rows()


def each_block(
    slot_run: SlotRun, rows: RowsByLeaf, body: Callable[[Carry, Block], Carry], carry: Carry
) -> Carry:
    """Blocks of `block_size` slots one by one; the last may overlap the one before."""
    return _blocks_of(block_size(rows), slot_run, body, carry)


def tokens_of_small_block(rows: int) -> int:
    """Tokens, of so many queries each, whose scores with a block of `each_small_block` are few."""
    return max(FEW_SCORES // max(rows * SIZES.get(platform(), OTHERS_SIZES).least, 1), 8)


def each_small_block(
    slot_run: SlotRun, rows: RowsByLeaf, body: Callable[[Carry, Block], Carry], carry: Carry
) -> Carry:
    """The same for what is hardly ever done, and takes its memory all the same: the least blocks."""
    return _blocks_of(SIZES.get(platform(), OTHERS_SIZES).least, slot_run, body, carry)


def _blocks_of(
    slots: int, slot_run: SlotRun, body: Callable[[Carry, Block], Carry], carry: Carry
) -> Carry:
    size = min(max(slots // slot_run.stride, 1) * slot_run.stride, slot_run.size)
    oldest = slot_run.start // slot_run.stride * slot_run.stride

    def step(turn_and_carry: tuple[jax.Array, Carry]) -> tuple[jax.Array, Carry]:
        turn, carry = turn_and_carry
        low = oldest + turn * size
        return turn + 1, body(carry, Block(jnp.minimum(low, slot_run.size - size), low, size))

    if size == slot_run.size:
        # One block holds it: no loop, at whose turns XLA on CPU waits for its threads (16 us a layer of
        # the shipped model with 4 new tokens).
        return step((jnp.int32(0), carry))[1]
    # Counted in ones: XLA gets the trip count of a constant loop wrong if the step does not divide
    # its range, and then drops turns (openxla/xla#48454).
    turns = -(-(slot_run.stop - oldest) // size)
    return lax.while_loop(lambda carry: carry[0] < turns, step, (jnp.int32(0), carry))[1]
