"""Moving and writing token slots of one storage leaf, shape (B, H, C, ...), C slots per row.

Every function touches O(slots written), never O(C), and compiles to in-place updates of a donated
or loop-carried leaf. Slot numbers are int32, `[...]` for all rows alike or `[B, ...]` per row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

_ZERO_BLOCK = 64  # slots cleared per loop turn
_MOVE_BLOCK = 256  # slots moved per loop turn
_TAIL_BLOCK = 32  # the same, where only the latest few are to be moved


def _along_slots(mask: jax.Array, leaf: jax.Array) -> jax.Array:
    """Shapes a mask [W] or [B, W] to broadcast against a (B, H, W, ...) leaf."""
    batch = mask.shape[0] if mask.ndim == 2 else 1
    return mask.reshape(batch, 1, mask.shape[-1], *(1,) * (leaf.ndim - 3))


def span(begin: jax.Array, size: int) -> jax.Array:
    """Slot numbers `begin ... begin + size - 1`: int32 [size], or [B, size] for begin [B]."""
    shape = (*begin.shape, size)
    return begin[..., None] + lax.broadcasted_iota(jnp.int32, shape, begin.ndim)


def take(leaf: jax.Array, slots: jax.Array) -> jax.Array:
    """Reads slots [W] or [B, W] of a leaf; numbers out of range are clamped (mask them later)."""
    if slots.ndim == 1:
        return jnp.take(leaf, slots, axis=2, mode="clip")
    return jax.vmap(lambda row, s: jnp.take(row, s, axis=1, mode="clip"))(leaf, slots)


def write_window(
    leaf: jax.Array, tokens: jax.Array, begin: jax.Array, fresh: jax.Array
) -> jax.Array:
    """Writes a window of consecutive slots, keeping what is there where `fresh` is False.

    The old window is read and written back rather than skipped with `lax.cond`, whose no-op branch
    copies the whole leaf on some XLA versions.

    Args:
        leaf: (B, H, C, ...) storage.
        tokens: (B, H, W, ...) new content, W <= C, already aligned to the window.
        begin: int32 [] or [B], first slot of the window, in [0, C - W].
        fresh: bool [W] or [B, W], window slots to overwrite.
    """
    size = tokens.shape[2]
    if begin.ndim == 0:
        old = lax.dynamic_slice_in_dim(leaf, begin, size, axis=2)
        new = jnp.where(_along_slots(fresh, leaf), tokens, old)
        return lax.dynamic_update_slice_in_dim(leaf, new, begin, axis=2)
    old = jax.vmap(lambda row, i: lax.dynamic_slice_in_dim(row, i, size, axis=1))(leaf, begin)
    new = jnp.where(_along_slots(fresh, leaf), tokens, old)
    write = jax.vmap(lambda row, x, i: lax.dynamic_update_slice_in_dim(row, x, i, axis=1))
    return write(leaf, new, begin)


def write_at(leaf: jax.Array, tokens: jax.Array, slots: jax.Array) -> jax.Array:
    """Scatters tokens to distinct slots [T] or [B, T]; a slot number of C drops its token."""
    if slots.ndim == 1:
        return leaf.at[:, :, slots].set(tokens, mode="drop")
    return jax.vmap(lambda row, x, s: row.at[:, s].set(x, mode="drop"))(leaf, tokens, slots)


def last_wins(slots: jax.Array, dropped: int) -> jax.Array:
    """Replaces all but the last occurrence of each slot by `dropped`, along the last axis.

    Scatter leaves the order of duplicate writes to the backend, so duplicates must not reach it.

    Example:
        >>> last_wins(jnp.array([3, 1, 3]), dropped=8)
        Array([8, 1, 3], dtype=int32)
    """
    if slots.shape[-1] == 1:
        return slots
    order = jnp.argsort(slots, axis=-1, stable=True)
    ordered = jnp.take_along_axis(slots, order, axis=-1)
    repeated = ordered[..., 1:] == ordered[..., :-1]
    repeated = jnp.concatenate([repeated, jnp.zeros_like(ordered[..., :1], bool)], axis=-1)
    rank = jnp.argsort(order, axis=-1)
    return jnp.where(jnp.take_along_axis(repeated, rank, axis=-1), dropped, slots)


def clear(leaf: jax.Array, start: jax.Array, stop: jax.Array) -> jax.Array:
    """Zeroes slots [start, stop), each int32 [] or [B]."""
    capacity = leaf.shape[2]
    size = min(capacity, _ZERO_BLOCK)
    zeros = jnp.zeros((*leaf.shape[:2], size, *leaf.shape[3:]), leaf.dtype)

    def more(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.any(start + carry[0] * size < stop)

    def body(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        turn, leaf = carry
        low = start + turn * size
        begin = jnp.clip(low, 0, capacity - size)
        slot = span(begin, size)
        fresh = (slot >= low[..., None]) & (slot < stop[..., None])
        return turn + 1, write_window(leaf, zeros, begin, fresh)

    return lax.while_loop(more, body, (jnp.int32(0), leaf))[1]


def shift_left(leaf: jax.Array, shift: jax.Array, kept: jax.Array) -> jax.Array:
    """Moves slot `j + shift` to slot `j` for all `j < kept`; shift and kept are int32 [] or [B].

    Ascending blocks make it safe in place: a block is read at or after everything written so far.
    """
    capacity = leaf.shape[2]
    size = min(capacity, _MOVE_BLOCK)
    turns = -(-jnp.max(jnp.where(shift > 0, kept, 0)) // size)

    def body(turn: jax.Array, leaf: jax.Array) -> jax.Array:
        low = turn * size
        begin = jnp.minimum(low, capacity - size)
        moved = take(leaf, span(begin + shift, size))
        return write_window(leaf, moved, begin, span(begin, size) >= low)

    return lax.fori_loop(0, turns, body, leaf)


def pull(leaf: jax.Array, source: jax.Array, kept: jax.Array) -> jax.Array:
    """Moves slot `source[b, h, j]` to slot j for all `j < kept` (int32 []), heads independently.

    Sources, int32 (B, H, C), ascend, so that ascending blocks are safe in place, as in `shift_left`.
    """
    capacity = leaf.shape[2]
    size = min(source.shape[2], _MOVE_BLOCK)

    def body(turn: jax.Array, leaf: jax.Array) -> jax.Array:
        low = turn * size
        begin = jnp.minimum(low, source.shape[2] - size)
        index = lax.dynamic_slice_in_dim(source, begin, size, axis=2)
        index = jnp.clip(index, 0, capacity - 1).reshape(*index.shape, *(1,) * (leaf.ndim - 3))
        moved = jnp.take_along_axis(leaf, index, axis=2)
        return write_window(leaf, moved, begin, span(begin, size) >= low)

    return lax.fori_loop(0, -(-kept // size), body, leaf)


def select_rows(
    leaf: jax.Array, rows: jax.Array, stop: jax.Array, start: jax.Array | None = None
) -> jax.Array:
    """Gathers batch rows, int32 [B'], of the slots below `stop` (int32 []); the rest is not moved.

    With as many rows as before, the result reuses the leaf's memory block by block. Then slots below
    `start` (int32 []) may be left alone too; what is to be moved is taken to be little.
    """
    capacity = leaf.shape[2]
    size = min(capacity, _MOVE_BLOCK if start is None else _TAIL_BLOCK)
    first = jnp.int32(0) if start is None else start
    same = rows.shape[0] == leaf.shape[0]
    # A different row count cannot be done in place, so it reads one leaf and fills another.
    out = leaf if same else jnp.zeros((rows.shape[0], *leaf.shape[1:]), leaf.dtype)

    def body(turn: jax.Array, out: jax.Array) -> jax.Array:
        low = first + turn * size
        begin = jnp.minimum(low, capacity - size)
        block = lax.dynamic_slice_in_dim(out if same else leaf, begin, size, axis=2)
        moved = jnp.take(block, rows, axis=0, mode="clip")
        if not same:
            return lax.dynamic_update_slice_in_dim(out, moved, begin, axis=2)
        # The last block may overlap the one before, whose rows have moved already.
        return write_window(out, moved, begin, span(begin, size) >= low)

    return lax.fori_loop(0, -(-(stop - first) // size), body, out)


def put_rows(leaf: jax.Array, new: jax.Array, rows: jax.Array, stop: jax.Array) -> jax.Array:
    """Copies batch row i of `new` to row `rows[i]` of `leaf`, the slots below `stop` (int32 []).

    Rows, int32 [B'], are distinct; one outside [0, B) is left out. The leaves may differ in slots.
    """
    capacity = min(leaf.shape[2], new.shape[2])
    size = min(capacity, _MOVE_BLOCK)
    count = rows.shape[0]

    def body(turn: jax.Array, leaf: jax.Array) -> jax.Array:
        row, begin = turn % count, jnp.minimum(turn // count * size, capacity - size)
        to = jnp.clip(rows[row], 0, leaf.shape[0] - 1)
        rest = (0,) * (leaf.ndim - 3)
        shape = (1, leaf.shape[1], size, *leaf.shape[3:])
        moved = lax.dynamic_slice(new, (row, 0, begin, *rest), shape)
        old = lax.dynamic_slice(leaf, (to, 0, begin, *rest), shape)
        return lax.dynamic_update_slice(
            leaf, jnp.where(to == rows[row], moved, old), (to, 0, begin, *rest)
        )

    return lax.fori_loop(0, -(-stop // size) * count, body, leaf)
