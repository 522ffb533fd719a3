"""Buffers: where rows' slots lie in an array. `Rows`: a leaf is (B, H, S, ...), S slots a row.

Every verb reads and writes slots by these methods alone, leaf by leaf. Each touches O(slots written),
never O(S), and compiles to in-place updates of a donated or loop-carried leaf. Slot numbers are int32,
[...] for all rows alike or [B, ...] per row. Another buffer overrides what names an axis of the leaf:
the methods before `slots`; what comes after it follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from lucid_jax.cache.carry import varying_as
from lucid_jax.cache.gradient import with_gradient_of
from lucid_jax.cache.slots import along_slots, span
from lucid_jax.cache.tiles import lies_on_lanes, unmoved

_ZERO_BLOCK = 64  # slots cleared per loop turn
_MOVE_BLOCK = 256  # slots moved per loop turn
_TAIL_BLOCK = 32  # the same, where only the latest few are to be moved
_LEAST = 4  # slots that are written together


@struct.dataclass
class Rows:
    """Every row has slots of its own, side by side."""

    lead: ClassVar[int] = 0  # axes of a leaf before (B, H, S, ...)

    @property
    def counter_lead(self) -> int:
        """Axes of counters before rows."""
        return 0

    def sizes(self, leaf: jax.Array) -> tuple[int, int, int]:
        """B, H and S of a leaf."""
        batch, heads, slots = leaf.shape[:3]
        return batch, heads, slots

    def own(self, leaf: jax.Array) -> jax.Array:
        """What is this layer's of a leaf, (B, H, S, ...), whole."""
        return leaf

    def with_own(self, leaf: jax.Array, own: jax.Array) -> jax.Array:
        """The leaf with what is this layer's replaced, whole; `own` may have other rows."""
        return own

    def read(self, leaf: jax.Array, begin: jax.Array, size: int) -> jax.Array:
        """Slots [begin, begin + size) of all rows, begin int32 []: (B, H, size, ...)."""
        return lax.dynamic_slice_in_dim(leaf, begin, size, axis=2)

    def write(self, leaf: jax.Array, tokens: jax.Array, begin: jax.Array) -> jax.Array:
        """Writes tokens (B, H, W, ...) to slots [begin, begin + W) of all rows, begin int32 []."""
        return self._pasted(leaf, tokens, _at(leaf, jnp.int32(0), begin))

    def take(self, leaf: jax.Array, slots: jax.Array) -> jax.Array:
        """Reads slots [W] or [B, W]; numbers out of range are clamped (mask them later)."""
        if slots.ndim == 1:
            return jnp.take(leaf, slots, axis=2, mode="clip")
        return jax.vmap(lambda row, s: jnp.take(row, s, axis=1, mode="clip"))(leaf, slots)

    def take_by_head(self, leaf: jax.Array, slots: jax.Array) -> jax.Array:
        """Reads slots (B, H, W), of each head others; they must be in range."""
        index = slots.reshape(*slots.shape, *(1,) * (leaf.ndim - 3))
        return jnp.take_along_axis(leaf, index, axis=2)

    def write_rows(self, leaf: jax.Array, tokens: jax.Array, begin: jax.Array) -> jax.Array:
        """Writes tokens (B, H, W, ...) to slots [begin, begin + W) of each row, int32 [B].

        A row whose window reaches past the last slot stays as it was. Nothing is read: a window that is
        read row by row makes XLA copy the whole leaf on TPU.
        """
        rest = tuple(range(1, leaf.ndim))
        windows = lax.ScatterDimensionNumbers(
            update_window_dims=rest,
            inserted_window_dims=(),
            scatter_dims_to_operand_dims=(2,),
            operand_batching_dims=(0,),
            scatter_indices_batching_dims=(0,),
        )
        return scatter(leaf, begin[:, None], tokens, windows)

    def scatter_at(self, leaf: jax.Array, tokens: jax.Array, slots: jax.Array) -> jax.Array:
        """`write_at` as one scatter, of slot numbers of which also the dropped ones are distinct."""
        rows = (0,) * (slots.ndim - 1)  # one window per token; the slot axis stays, of size 1
        windows = lax.ScatterDimensionNumbers(
            update_window_dims=(*range(len(rows), 2), *range(3, leaf.ndim + 1)),
            inserted_window_dims=(),
            scatter_dims_to_operand_dims=(2,),
            operand_batching_dims=rows,
            scatter_indices_batching_dims=rows,
        )
        return scatter(leaf, slots[..., None], jnp.expand_dims(tokens, 3), windows)

    def read_row(self, leaf: jax.Array, row: jax.Array, begin: jax.Array, size: int) -> jax.Array:
        """Slots [begin, begin + size) of one row, both int32 []: (1, H, size, ...)."""
        shape = (1, leaf.shape[1], size, *leaf.shape[3:])
        return lax.dynamic_slice(leaf, _at(leaf, row, begin), shape)

    def write_row(
        self, leaf: jax.Array, tokens: jax.Array, row: jax.Array, begin: jax.Array
    ) -> jax.Array:
        """Writes tokens (1, H, W, ...) to slots [begin, begin + W) of one row."""
        return self._pasted(leaf, tokens, _at(leaf, row, begin))

    def empty(self, leaf: jax.Array, rows: int) -> jax.Array:
        """A leaf of zeros like this one, for another number of rows."""
        return jnp.zeros((rows, *leaf.shape[1:]), leaf.dtype)

    # --- the same for every buffer -------------------------------------------------------------

    def _pasted(self, leaf: jax.Array, new: jax.Array, at: tuple[jax.Array, ...]) -> jax.Array:
        """A leaf into which something of as many axes is written, in place in any loop."""

        def paste(leaf: jax.Array, new: jax.Array, *at: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice(leaf, new, at)

        return unmoved(paste, leaf, new, *at, slot_axis=self.lead + 2)

    def slots(self, leaf: jax.Array) -> int:
        """S of a leaf: tokens that share an entry have one slot there."""
        return self.sizes(leaf)[2]

    def distinct(self, leaf: jax.Array, slots: jax.Array) -> jax.Array:
        """Slot numbers of which also those that are dropped are distinct, as the scatter is told."""
        capacity = self.slots(leaf)
        order = lax.broadcasted_iota(jnp.int32, slots.shape, slots.ndim - 1)
        return jnp.where(slots < capacity, slots, capacity + order)

    def write_at(self, leaf: jax.Array, tokens: jax.Array, slots: jax.Array) -> jax.Array:
        """Writes tokens to distinct slots [T] or [B, T]; a slot number of S drops its token."""
        slots = self.distinct(leaf, slots)
        if slots.ndim > 1:
            return self.scatter_at(leaf, tokens, slots)
        written: jax.Array = lax.platform_dependent(
            leaf, tokens, slots, tpu=self._write_each, default=self.scatter_at
        )
        return written

    def _write_each(self, leaf: jax.Array, tokens: jax.Array, slots: jax.Array) -> jax.Array:
        """Token by token: for a scatter to the same slots of all rows XLA on TPU copies the leaf."""
        last = self.slots(leaf) - 1

        def one(leaf: jax.Array, x: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            number, slot = x
            token = Rows().read(tokens, number, 1)
            begin = jnp.minimum(slot, last)
            return self.write_window(leaf, token, begin, slot[None] <= last), None

        each = (lax.iota(jnp.int32, len(slots)), slots)
        written: jax.Array = lax.scan(one, varying_as(leaf, tokens, slots), each)[0]
        return written

    def write_window(
        self, leaf: jax.Array, tokens: jax.Array, begin: jax.Array, fresh: jax.Array
    ) -> jax.Array:
        """Writes a window of consecutive slots, keeping what is there where `fresh` is False.

        The old window is read and written back rather than skipped with `lax.cond`, whose no-op branch
        copies the whole leaf on some XLA versions.

        Args:
            leaf: the storage.
            tokens: (B, H, W, ...) new content, W <= S, already aligned to the window.
            begin: int32 [], first slot of the window, in [0, S - W].
            fresh: bool [W] or [B, W], window slots to overwrite.
        """
        args = (leaf, tokens, begin, fresh)
        if tokens.shape[2] >= min(_LEAST, self.slots(leaf)):
            return self._write_window(*args)
        written: jax.Array = lax.platform_dependent(
            *args, tpu=self._write_wider_window, default=self._write_window
        )
        return written

    def _write_window(
        self, leaf: jax.Array, tokens: jax.Array, begin: jax.Array, fresh: jax.Array
    ) -> jax.Array:
        old = self.read(leaf, begin, fresh.shape[-1])
        return self.write(leaf, jnp.where(along_slots(fresh, old), tokens, old), begin)

    def _write_wider_window(
        self, leaf: jax.Array, tokens: jax.Array, begin: jax.Array, fresh: jax.Array
    ) -> jax.Array:
        """For fewer slots XLA on TPU lays a leaf out anew, and copies it around the loop it is in."""
        slots, width = self.slots(leaf), fresh.shape[-1]
        least = min(slots, _LEAST)
        wide = jnp.minimum(begin, slots - least)
        source = span(wide - begin, least)  # the token for each slot of the wider window
        index = jnp.clip(source, 0, width - 1)
        fresh = jnp.take(fresh, index, axis=-1)
        fresh &= jnp.broadcast_to(source == index, fresh.shape)
        # One token need not be looked up: it goes to each slot of the window that is fresh.
        tokens = Rows().take(tokens, index) if width > 1 else tokens
        return self._write_window(leaf, tokens, wide, fresh)

    def clear(self, leaf: jax.Array, start: jax.Array, stop: jax.Array) -> jax.Array:
        """Zeroes slots [start, stop), each int32 [] or [B]."""
        return _clear(leaf, self, start, stop)

    def shift_left(self, leaf: jax.Array, shift: jax.Array, kept: jax.Array) -> jax.Array:
        """Moves slot `j + shift` to slot `j` for all `j < kept`; shift and kept are int32 [] or [B]."""
        return _shift_left(leaf, self, shift, kept)

    def pull(self, leaf: jax.Array, source: jax.Array, kept: jax.Array) -> jax.Array:
        """Moves slot `source[b, h, j]` to slot j for all `j < kept` (int32 []), heads independently.

        Sources, int32 (B, H, C), ascend.
        """
        return _pull(leaf, self, source, kept)

    def select(
        self,
        leaf: jax.Array,
        rows: jax.Array,
        stop: jax.Array,
        start: jax.Array | None = None,
    ) -> jax.Array:
        """Gathers batch rows, int32 [B'], of the slots below `stop` (int32 []); the rest is not moved.

        With as many rows as before, the result reuses the leaf's memory block by block. Then slots
        below `start` (int32 []) may be left alone too; what is to be moved is taken to be little.
        """
        return _select(leaf, self, rows, stop, start)

    def put(self, leaf: jax.Array, new: jax.Array, rows: jax.Array, stop: jax.Array) -> jax.Array:
        """Copies batch row i of `new` to row `rows[i]` of `leaf`, the slots below `stop` (int32 []).

        Rows, int32 [B'], are distinct; one outside [0, B) is left out. The leaves may differ in slots.
        """
        return _put(leaf, new, self, rows, stop)


def _at(leaf: jax.Array, row: jax.Array, begin: jax.Array) -> tuple[jax.Array, ...]:
    zero = jnp.int32(0)  # a Python int would be int64 under jax_enable_x64
    return (row, zero, begin, *(zero,) * (leaf.ndim - 3))


def scatter(
    leaf: jax.Array, start: jax.Array, new: jax.Array, windows: lax.ScatterDimensionNumbers
) -> jax.Array:
    """Writes windows that do not overlap and drops those which do not lie inside the leaf.

    XLA for TPUs makes a loop over windows of it, in which a leaf lies in the order of its axes. Where
    that is not how it lies outside, for its slots lie on the lanes, the leaf would be copied whole: so
    there it is written with its last two axes turned, which moves nothing.
    """
    write = partial(_scatter, windows=windows)
    *others, slot_axis = windows.scatter_dims_to_operand_dims
    if slot_axis != leaf.ndim - 2 or not lies_on_lanes(leaf.shape[-1], leaf.shape[-2]):
        return write(leaf, start, new)

    def on_lanes(leaf: jax.Array, start: jax.Array, new: jax.Array) -> jax.Array:
        turned = windows._replace(scatter_dims_to_operand_dims=(*others, leaf.ndim - 1))
        leaf, new = jnp.swapaxes(leaf, -1, -2), jnp.swapaxes(new, -1, -2)
        return jnp.swapaxes(_scatter(leaf, start, new, turned), -1, -2)

    written: jax.Array = lax.platform_dependent(leaf, start, new, tpu=on_lanes, default=write)
    return written


def _scatter(
    leaf: jax.Array, start: jax.Array, new: jax.Array, windows: lax.ScatterDimensionNumbers
) -> jax.Array:
    drop = lax.GatherScatterMode.FILL_OR_DROP
    return lax.scatter(leaf, start, new, windows, unique_indices=True, mode=drop)


def turned(tokens: jax.Array, by: jax.Array) -> jax.Array:
    """Tokens (B, H, W, ...) turned around, so that number `by % W` (int32 []) comes first.

    Read as a window: numbers that are looked up make XLA on TPU copy the leaf that they are written to.
    """
    width = tokens.shape[2]
    return Rows().read(jnp.concatenate([tokens, tokens], axis=2), by % width, width)


# --- loops over blocks of slots, each with the gradient of the same map written at once ------------


def _clear_at_once(leaf: jax.Array, rows: Rows, start: jax.Array, stop: jax.Array) -> jax.Array:
    own = rows.own(leaf)
    slot = span(jnp.zeros_like(start), own.shape[2])
    gone = (slot >= start[..., None]) & (slot < stop[..., None])
    return rows.with_own(leaf, jnp.where(along_slots(gone, own), jnp.zeros((), leaf.dtype), own))


@with_gradient_of(_clear_at_once)
def _clear(leaf: jax.Array, rows: Rows, start: jax.Array, stop: jax.Array) -> jax.Array:
    leaf = varying_as(leaf, start, stop)
    if not start.ndim:
        return _clear_alike(leaf, rows, start, stop)
    # XLA on TPU makes a loop over the zeros of a scatter, slot by slot of row by row.
    cleared: jax.Array = lax.platform_dependent(
        leaf,
        start,
        stop,
        tpu=lambda *x: _clear_alike(x[0], rows, *x[1:]),
        default=lambda *x: _clear_each(x[0], rows, *x[1:]),
    )
    return cleared


def _clear_alike(leaf: jax.Array, rows: Rows, start: jax.Array, stop: jax.Array) -> jax.Array:
    """By windows of all rows, which begin where the next slot is that has to be cleared in any."""
    slots = rows.slots(leaf)
    size = min(slots, _ZERO_BLOCK)
    zeros = jnp.zeros_like(rows.read(leaf, jnp.int32(0), size))

    def next_from(low: Any) -> jax.Array:
        begin = jnp.maximum(start, low)
        return jnp.min(jnp.where(begin < stop, begin, slots))

    def body(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, leaf = carry
        begin = jnp.minimum(low, slots - size)
        slot = span(jnp.broadcast_to(begin, start.shape), size)
        fresh = (slot >= start[..., None]) & (slot < stop[..., None])
        return next_from(low + size), rows.write_window(leaf, zeros, begin, fresh)

    return lax.while_loop(lambda carry: carry[0] < slots, body, (next_from(0), leaf))[1]


def _clear_each(leaf: jax.Array, rows: Rows, start: jax.Array, stop: jax.Array) -> jax.Array:
    """By windows of each row's own, start and stop being [B]."""
    slots = rows.slots(leaf)
    size = min(slots, _ZERO_BLOCK)
    zeros = jnp.zeros_like(rows.read(leaf, jnp.int32(0), size))

    def more(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.any(start + carry[0] * size < stop)

    def body(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        turn, leaf = carry
        low = start + turn * size
        slot = span(jnp.clip(low, 0, slots - size), size)
        fresh = (slot >= low[:, None]) & (slot < stop[:, None])
        return turn + 1, rows.write_at(leaf, zeros, jnp.where(fresh, slot, slots))

    return lax.while_loop(more, body, (jnp.int32(0), leaf))[1]


def _shift_at_once(leaf: jax.Array, rows: Rows, shift: jax.Array, kept: jax.Array) -> jax.Array:
    own = rows.own(leaf)
    slot = span(jnp.zeros_like(shift), own.shape[2])
    moved = (slot < kept[..., None]) & (shift > 0)[..., None]
    shifted = rows.take(leaf, slot + shift[..., None])
    return rows.with_own(leaf, jnp.where(along_slots(moved, own), shifted, own))


@with_gradient_of(_shift_at_once)
def _shift_left(leaf: jax.Array, rows: Rows, shift: jax.Array, kept: jax.Array) -> jax.Array:
    # Slots that are read by their numbers make XLA on TPU copy the whole leaf at each turn. On CPU
    # that is the faster way, if by little.
    on_tpu = _shift_alike
    if shift.ndim:
        width = math.prod(leaf.shape[rows.lead + 3 :])
        on_tpu = _shift_by_bits if lies_on_lanes(width, rows.slots(leaf)) else _shift_each
    shifted: jax.Array = lax.platform_dependent(
        varying_as(leaf, shift, kept),
        shift,
        kept,
        tpu=lambda *x: on_tpu(x[0], rows, *x[1:]),
        default=lambda *x: _shift_by_number(x[0], rows, *x[1:]),
    )
    return shifted


def _shift_in_order(
    leaf: jax.Array,
    rows: Rows,
    shift: jax.Array,
    kept: jax.Array,
    shifted: Callable[[jax.Array, jax.Array, int], jax.Array],
) -> jax.Array:
    """Ascending blocks make it safe in place: a block is read at or after everything written so far.

    `shifted(leaf, begin, size)` reads what belongs into slots [begin, begin + size).
    """
    slots = rows.slots(leaf)
    size = min(slots, _MOVE_BLOCK)
    turns = -(-jnp.max(jnp.where(shift > 0, kept, 0)) // size)

    def body(turn: jax.Array, leaf: jax.Array) -> jax.Array:
        low = turn * size
        begin = jnp.minimum(low, slots - size)
        moved = shifted(leaf, begin, size)
        return rows.write_window(leaf, moved, begin, span(begin, size) >= low)

    done: jax.Array = lax.fori_loop(0, turns, body, leaf)
    return done


def _shift_by_number(leaf: jax.Array, rows: Rows, shift: jax.Array, kept: jax.Array) -> jax.Array:
    """Slots are read by their numbers, which may differ from row to row."""

    def shifted(leaf: jax.Array, begin: jax.Array, size: int) -> jax.Array:
        return rows.take(leaf, span(begin + shift, size))

    return _shift_in_order(leaf, rows, shift, kept, shifted)


def _shift_alike(leaf: jax.Array, rows: Rows, shift: jax.Array, kept: jax.Array) -> jax.Array:
    """Windows are read."""

    def shifted(leaf: jax.Array, begin: jax.Array, size: int) -> jax.Array:
        return _window_from(leaf, rows, begin + shift, size)

    return _shift_in_order(leaf, rows, shift, kept, shifted)


def _window_from(leaf: jax.Array, rows: Rows, begin: jax.Array, size: int) -> jax.Array:
    """Slots from `begin` on, and past the last one anything: that window is shifted within itself."""
    source = jnp.minimum(begin, rows.slots(leaf) - size)
    block = rows.read(leaf, source, size)
    return Rows().read(jnp.concatenate([block, block], axis=2), begin - source, size)


def _shift_by_bits(leaf: jax.Array, rows: Rows, shift: jax.Array, kept: jax.Array) -> jax.Array:
    """By 1, 2, 4, ... slots, each time the rows whose shift, int32 [B], has that part.

    Where slots lie along a TPU's lanes, a block that goes to a slot of each row's own makes XLA lay the
    whole leaf out anew. This reads and writes at the same slots in all rows.
    """
    slots = rows.slots(leaf)
    size = min(slots, _MOVE_BLOCK)
    goes = (shift > 0) & (kept > 0)
    blocks = -(-jnp.max(jnp.where(goes, shift + kept, 0)) // size)
    bits = 32 - lax.clz(jnp.max(jnp.where(goes, shift, 0)))

    def body(turn: jax.Array, leaf: jax.Array) -> jax.Array:
        bit, block = turn // blocks, turn % blocks
        low = block * size
        begin = jnp.minimum(low, slots - size)
        moved = _window_from(leaf, rows, begin + (jnp.int32(1) << bit), size)
        fresh = goes & ((shift >> bit) % 2 > 0)
        return rows.write_window(
            leaf, moved, begin, fresh[:, None] & (span(begin, size) >= low)[None]
        )

    done: jax.Array = lax.fori_loop(0, bits * blocks, body, leaf)
    return done


def _shift_each(leaf: jax.Array, rows: Rows, shift: jax.Array, kept: jax.Array) -> jax.Array:
    """Takes blocks that lie alike in all rows to where each row wants them, shift and kept being [B].

    Where a row's first token stands inside a block, that is shifted within itself. What then follows
    it lands in slots whose tokens have gone, and is overwritten by the next block or never seen.
    """
    slots = rows.slots(leaf)
    size = min(slots, _MOVE_BLOCK)

    def move(leaf: jax.Array, low: Any, size: int) -> jax.Array:
        block = rows.read(leaf, low, size)
        twice = jnp.concatenate([block, block], axis=2)
        before = jnp.clip(shift - low, 0, size)
        moved = Rows().write_rows(twice, block, size - before)[:, :, size:]
        goes = (shift > 0) & (shift < low + size)
        return rows.write_rows(leaf, moved, jnp.where(goes, jnp.maximum(low - shift, 0), slots))

    stop = -(-jnp.max(jnp.where(shift > 0, shift + kept, 0)) // size)
    whole, rest = divmod(slots, size)
    turns = jnp.minimum(stop, whole)
    leaf = lax.fori_loop(0, turns, lambda turn, leaf: move(leaf, turn * size, size), leaf)
    if rest:
        leaf = lax.fori_loop(whole, stop, lambda _, leaf: move(leaf, slots - rest, rest), leaf)
    return leaf


def _pull_at_once(leaf: jax.Array, rows: Rows, source: jax.Array, kept: jax.Array) -> jax.Array:
    slots = rows.slots(leaf)
    slot = lax.broadcasted_iota(jnp.int32, (1, 1, slots), 2)
    source = jnp.pad(source, [(0, 0), (0, 0), (0, slots - source.shape[2])])
    index = jnp.clip(jnp.where(slot < kept, source, slot), 0, slots - 1)
    return rows.with_own(leaf, rows.take_by_head(leaf, index))


@with_gradient_of(_pull_at_once)
def _pull(leaf: jax.Array, rows: Rows, source: jax.Array, kept: jax.Array) -> jax.Array:
    """Sources ascend, so that ascending blocks are safe in place, as in `_shift_left`."""
    slots = rows.slots(leaf)
    size = min(source.shape[2], _MOVE_BLOCK)

    def body(turn: jax.Array, leaf: jax.Array) -> jax.Array:
        low = turn * size
        begin = jnp.minimum(low, source.shape[2] - size)
        index = lax.dynamic_slice_in_dim(source, begin, size, axis=2)
        moved = rows.take_by_head(leaf, jnp.clip(index, 0, slots - 1))
        return rows.write_window(leaf, moved, begin, span(begin, size) >= low)

    turns = -(-kept // size)
    pulled: jax.Array = lax.fori_loop(0, turns, body, varying_as(leaf, source, kept))
    return pulled


def _select_at_once(
    leaf: jax.Array,
    rows: Rows,
    chosen: jax.Array,
    stop: jax.Array,
    start: jax.Array | None = None,
) -> jax.Array:
    own = rows.own(leaf)
    slot = lax.iota(jnp.int32, own.shape[2])
    moved = (slot >= (0 if start is None else start)) & (slot < stop)
    stays = own if len(chosen) == len(own) else jnp.zeros((), own.dtype)
    taken = jnp.take(own, chosen, axis=0, mode="clip")
    return rows.with_own(leaf, jnp.where(along_slots(moved, own), taken, stays))


@with_gradient_of(_select_at_once)
def _select(
    leaf: jax.Array,
    rows: Rows,
    chosen: jax.Array,
    stop: jax.Array,
    start: jax.Array | None = None,
) -> jax.Array:
    slots = rows.slots(leaf)
    size = min(slots, _MOVE_BLOCK if start is None else _TAIL_BLOCK)
    first = jnp.int32(0) if start is None else start
    same = len(chosen) == rows.sizes(leaf)[0]
    # A different row count cannot be done in place, so it reads one leaf and fills another.
    out = leaf if same else rows.empty(leaf, len(chosen))

    def body(turn: jax.Array, out: jax.Array) -> jax.Array:
        low = first + turn * size
        begin = jnp.minimum(low, slots - size)
        block = rows.read(out if same else leaf, begin, size)
        moved = jnp.take(block, chosen, axis=0, mode="clip")
        if not same:
            return rows.write(out, moved, begin)
        # The last block may overlap the one before, whose rows have moved already.
        return rows.write_window(out, moved, begin, span(begin, size) >= low)

    out = varying_as(out, leaf, chosen, first, stop)
    selected: jax.Array = lax.fori_loop(0, -(-(stop - first) // size), body, out)
    return selected


def _put_at_once(
    leaf: jax.Array, new: jax.Array, rows: Rows, target: jax.Array, stop: jax.Array
) -> jax.Array:
    own, others = rows.own(leaf), rows.own(new)
    both = min(own.shape[2], others.shape[2])
    moved = along_slots(lax.iota(jnp.int32, both) < stop, own)
    old = jnp.take(own[:, :, :both], jnp.clip(target, 0, len(own) - 1), axis=0)
    # A negative row is none, and would count from the end; those left out are distinct too.
    none = (target < 0) | (target >= len(own))
    target = jnp.where(none, len(own) + lax.iota(jnp.int32, len(target)), target)
    put = own.at[target, :, :both].set(
        jnp.where(moved, others[:, :, :both], old), mode="drop", unique_indices=True
    )
    return rows.with_own(leaf, put)


@with_gradient_of(_put_at_once, leaves=2)
def _put(
    leaf: jax.Array, new: jax.Array, rows: Rows, target: jax.Array, stop: jax.Array
) -> jax.Array:
    batch, _, slots = rows.sizes(leaf)
    slots = min(slots, rows.slots(new))
    size = min(slots, _MOVE_BLOCK)
    count = target.shape[0]

    def body(turn: jax.Array, leaf: jax.Array) -> jax.Array:
        row, begin = turn % count, jnp.minimum(turn // count * size, slots - size)
        to = jnp.clip(target[row], 0, batch - 1)
        moved, old = rows.read_row(new, row, begin, size), rows.read_row(leaf, to, begin, size)
        return rows.write_row(leaf, jnp.where(to == target[row], moved, old), to, begin)

    leaf = varying_as(leaf, new, target, stop)
    filled: jax.Array = lax.fori_loop(0, -(-stop // size) * count, body, leaf)
    return filled
