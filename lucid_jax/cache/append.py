"""Appending: tokens are taken in (encoded, counted), then put where the layout says.

All or nothing: what does not fit is not stored, in a row of its own where rows are ragged.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lucid_jax.cache import derive, tail
from lucid_jax.cache.buffers import Rows, turned
from lucid_jax.cache.carry import varying_as
from lucid_jax.cache.layouts.contiguous import Contiguous
from lucid_jax.cache.packing import Packed, Tokens, decoded, encoded
from lucid_jax.cache.reading import (
    SlotMap,
    SlotRun,
    copy_of,
    index_map,
    slot_map,
    slot_run_of,
    slot_runs,
)
from lucid_jax.cache.slots import span
from lucid_jax.cache.tokens import POSITIONS, TokenLayer


@dataclasses.dataclass(frozen=True)
class Chunk:
    """New tokens ready to be stored, as attention may read them and `put` takes them.

    Attributes:
        leaves: W encoded tokens of consecutive positions, by name, (B, H, W, ...).
        first: absolute position of the first of them, int32 [] or [B].
        stored: how many of them go into slots now, int32 [] or [B].
        count: tokens this chunk appends, int32 [] or [B].
        ok: bool [] or [B]; where False nothing is stored.
        exact: whether all W go into slots wherever ok.
        raw: with a tail, the new tokens in full precision.
    """

    leaves: Packed
    first: jax.Array
    stored: jax.Array
    count: jax.Array
    ok: jax.Array
    exact: bool
    raw: tail.Raw | None


def append(layer: TokenLayer, tokens: Tokens, counts: jax.Array | None) -> TokenLayer:
    """Appends T tokens, or the first `counts` int32 [B] of each row's T; all or nothing."""
    return put(layer, take_in(layer, tokens, counts))


def append_fitting(layer: TokenLayer, tokens: Tokens) -> TokenLayer:
    """`append` of T tokens to an aligned layer where the host knows that they fit.

    With nothing to choose XLA on CPU takes it for cheap, and runs it at once rather than on another
    thread: waiting for that takes longer than the work.
    """
    if not layer.in_order or layer.tracked:
        return append(layer, tokens, None)
    begin = layer.slot_of(layer.position)
    stop = layer.position + _count(tokens)
    new = encoded(layer.packing.forms, tokens)
    return layer.replace(
        leaves=jax.tree.map(lambda leaf, x: layer.buffer.write(leaf, x, begin), layer.leaves, new),
        position=stop,
        reach=jnp.maximum(layer.reach, stop),
    )


def take_in(layer: TokenLayer, tokens: Tokens, counts: jax.Array | None) -> Chunk:
    """Encodes T new tokens to follow what is stored."""
    packing, new = layer.packing, _count(tokens)
    count = jnp.full_like(layer.position, new) if counts is None else counts
    ok = (count >= 0) & (count <= new) & layer.fits(count)
    count = jnp.where(ok, count, 0)
    tokens = packing.admit(tokens)
    if layer.tail is None:
        return Chunk(
            leaves=encoded(packing.forms, tokens),
            first=layer.position,
            stored=count,
            count=count,
            ok=ok,
            exact=counts is None,
            raw=None,
        )
    first = packing.flushed(layer.position)
    raw = encoded(packing.raw_forms, tokens)
    stored = packing.flushed(layer.position + count) - first

    def quantized() -> Packed:
        window = _window(layer, first, raw)
        groups = tail.whole_groups(window, first, layer.start, packing.codec.unit, new)
        return encoded(packing.forms, decoded(packing.raw_forms, groups))

    # Most steps complete no group: then there is nothing to quantize, which is most of their work.
    shapes = jax.eval_shape(quantized)
    zeros = varying_as(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), layer, raw)
    return Chunk(
        leaves=lax.cond(jnp.any(stored > 0), quantized, lambda: zeros),
        first=first,
        stored=stored,
        count=count,
        ok=ok,
        exact=False,
        raw=raw,
    )


def _window(layer: TokenLayer, first: jax.Array, raw: tail.Raw) -> tail.Raw:
    """Raw tokens of positions from `first` on: those of the tail, then new ones."""
    assert layer.tail is not None
    return tail.window(layer.buffer, layer.tail, first, layer.position, raw)


def _count(tokens: Tokens) -> int:
    """T."""
    return next(iter(tokens.values())).shape[2]


def _width(layer: TokenLayer, leaves: Packed) -> int:
    """W: how many slots the leaves of a chunk are for."""
    mixed: jax.Array = jax.tree.leaves(leaves[layer.packing.mixed])[0]
    return mixed.shape[2]


def put(layer: TokenLayer, chunk: Chunk) -> TokenLayer:
    """Stores a chunk's tokens and counts them."""
    most = f"the capacity of {layer.capacity}" if layer.bounded else "what int32 can count"
    counted = layer.advanced(chunk.count, chunk.ok, f"append past {most}; nothing was written")
    chunk = _after(counted, chunk)
    new = dict(chunk.leaves)
    width = _width(layer, new)
    if layer.tracked:
        position = span(chunk.first, width).reshape(-1, 1, width)
        shape = (layer.batch_size, layer.num_kv_heads, width)
        new[POSITIONS] = jnp.broadcast_to(position, shape)
    # Simulated ones are numbers as they came, and carry gradients, which no loop of traced length does.
    if layer.packing.codec.unit > 1 and not layer.packing.differentiable:
        leaves = _put_groups(layer, chunk, new)
    else:
        write = _write_dense if layer.layout.dense else _write_around
        leaves = jax.tree.map(
            lambda leaf, tokens: write(layer, chunk, width, leaf, tokens), layer.leaves, new
        )
    last = layer.tail
    if last is not None:
        assert chunk.raw is not None
        last = tail.put(layer.buffer, last, chunk.raw, layer.position, chunk.count)
    return counted.replace(leaves=leaves, tail=last)


def _after(counted: TokenLayer, chunk: Chunk) -> Chunk:
    """The chunk with where it goes as counted from the new position, on NVIDIA's GPUs.

    XLA would keep a copy of the old one for what reads it after the new one is written in its place,
    which is a kernel more.
    """
    if chunk.raw is not None:
        return chunk

    def again(position: jax.Array, count: jax.Array, *_: jax.Array) -> tuple[jax.Array, ...]:
        position, count = lax.optimization_barrier((position, count))
        return position - count, count, count > 0

    first, count, ok = lax.platform_dependent(
        counted.position,
        chunk.count,
        chunk.first,
        chunk.ok,
        cuda=again,
        default=lambda _, count, first, ok: (first, count, ok),
    )
    return dataclasses.replace(chunk, first=first, stored=count, count=count, ok=ok)


def _write_dense(
    layer: TokenLayer, chunk: Chunk, width: int, leaf: jax.Array, tokens: jax.Array
) -> jax.Array:
    """One `dynamic_update_slice`, or a scatter if rows are ragged."""
    buffer, slots = layer.buffer, layer.num_slots
    first = layer.slot_of(chunk.first)
    if not layer.ragged:
        size = min(width, slots)
        begin = jnp.clip(first, 0, slots - size)
        source = span(begin, size) - first  # the token for each slot of the window
        # Tokens that only a tail holds yet may reach past the end; then the window starts early and
        # its tokens move right. A full chunk that fits never does.
        if not chunk.exact:
            tokens = Rows().take(tokens, source)
        fresh = (source >= 0) & (source < chunk.stored)
        return buffer.write_window(leaf, tokens, begin, fresh)
    if chunk.exact:
        return buffer.write_rows(leaf, tokens, jnp.where(chunk.ok, first, slots))
    source = span(jnp.zeros_like(first), width)
    slot = jnp.where(source < chunk.stored[:, None], first[:, None] + source, slots)
    return buffer.write_at(leaf, tokens, slot)


def _write_around(
    layer: TokenLayer, chunk: Chunk, width: int, leaf: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Of a chunk longer than a ring only the latest tokens are stored."""

    def put(leaf: jax.Array, tokens: jax.Array) -> jax.Array:
        return _scatter_around(layer, chunk, width, leaf, tokens)

    def put_runs(leaf: jax.Array, tokens: jax.Array) -> jax.Array:
        return _write_runs_around(layer, chunk, width, leaf, tokens)

    if layer.ragged:
        return put(leaf, tokens)
    if width == 1:
        return put_runs(leaf, tokens)
    # For the scatter XLA on TPU copies the ring; for two windows XLA on CPU does.
    written: jax.Array = lax.platform_dependent(leaf, tokens, tpu=put_runs, default=put)
    return written


def _scatter_around(
    layer: TokenLayer, chunk: Chunk, width: int, leaf: jax.Array, tokens: jax.Array
) -> jax.Array:
    position = span(chunk.first, width)
    lasting = derive.lasting(layer.layout, position, layer.start, chunk.first + chunk.stored)
    # By number, as padding may lie past what int32 can count.
    real = (span(jnp.zeros_like(chunk.stored), width) < chunk.stored[..., None]) & lasting
    target = jnp.where(real, layer.slot_of(position), layer.num_slots)
    return layer.buffer.write_at(leaf, tokens, target)


def _write_runs_around(
    layer: TokenLayer, chunk: Chunk, width: int, leaf: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Windows of all rows: one where the chunk begins, and one where it goes on if it wraps."""
    slots, pinned = layer.layout.slots, layer.layout.pinned
    size, first = min(width, slots), layer.slot_of(chunk.first)
    # The slots where runs of the chunk begin, and the token that comes first there.
    runs = [(first, jnp.int32(0)), (jnp.int32(pinned), slots - first)]
    longer = width > slots - pinned
    if longer or width == 1:  # one window has all, or nothing wraps
        del runs[1]
    stop = chunk.first + chunk.stored
    for start, token in runs:
        begin = jnp.minimum(start, slots - size)
        held = derive.counted(layer.layout, span(begin, size), layer.start, stop)
        # The token for each slot of the window, if it is of this chunk, and of this run.
        source = held - chunk.first
        fresh = (source >= 0) & (source < chunk.stored)
        moved = tokens
        if longer:
            moved = Rows().take(tokens, source)
        elif len(runs) > 1:
            turn = begin - start + token
            moved = turned(tokens, turn)
            fresh &= source == span(turn, size)
        leaf = layer.buffer.write_window(leaf, moved, begin, fresh)
    return leaf


def _put_groups(layer: TokenLayer, chunk: Chunk, new: Packed) -> Packed:
    """The leaves with a chunk of whole groups, one after the other; most steps complete none.

    The slots of a group lie side by side. A group of one row is written to a window of all of them, in
    which the others stay: XLA for TPUs then needs no other layout of the leaf.
    """
    unit, buffer = layer.packing.codec.unit, layer.buffer
    # By row, or of all rows together.
    start, begin, stored = (x.reshape(-1) for x in (layer.start, chunk.first, chunk.stored))
    counts = stored // unit
    done = jnp.cumsum(counts, dtype=jnp.int32)

    def put_group(turn: jax.Array, leaves: Packed) -> Packed:
        row = jnp.sum(done <= turn, dtype=jnp.int32)
        number = turn - (done - counts)[row]
        first, stop = begin[row] + number * unit, begin[row] + stored[row]
        slot = layer.layout.slot(first, start[row])
        # Before slot 0 would be a group of which all tokens were cropped.
        lasting = derive.lasting(layer.layout, first, start[row], stop)
        real = (turn < done[-1]) & (slot >= 0) & lasting
        fresh = (lax.iota(jnp.int32, len(counts)) == row) & real

        def put_leaf(leaf: jax.Array, tokens: jax.Array) -> jax.Array:
            stride = layer.stride(leaf)
            size = unit // stride
            group = Rows().read(tokens, number * size, size)
            where = jnp.maximum(slot, 0) // stride
            mask = jnp.broadcast_to(fresh[:, None], (len(counts), size))
            return buffer.write_window(leaf, group, where, mask)

        put: Packed = jax.tree.map(put_leaf, leaves, new)
        return put

    def each(leaves: Packed) -> Packed:
        put: Packed = lax.fori_loop(0, done[-1], put_group, leaves)
        return put

    leaves = varying_as(layer.leaves, layer, chunk)
    if layer.ragged or _width(layer, new) > unit:
        return each(leaves)
    # Elsewhere a loop takes longer than to write one group back: on CPU 30 us.
    written: Packed = lax.platform_dependent(
        leaves, tpu=each, default=lambda leaves: put_group(jnp.int32(0), leaves)
    )
    return written


# --- with what a chunk's own queries may see ---------------------------------------------------------


def put_and_slot_runs(layer: TokenLayer, chunk: Chunk) -> tuple[TokenLayer, list[SlotRun]]:
    """`put`, and all that the chunk's queries may see, what is overwritten included.

    What is overwritten is read out first. Masks count slots of the old layer's `get`, and then the
    chunk's tokens.
    """
    lost = _overwritten(layer, chunk)
    after = put(layer, chunk)
    index = index_map(layer)
    found = [slot_runs(after)[0].replace(index=index, in_order=False), *lost]
    if chunk.raw is not None:
        end = layer.position + chunk.count
        window = _window(layer, chunk.first, chunk.raw)
        fresh = _run(layer, window, layer.packing.raw_forms, chunk.first, end)
        found.append(fresh.replace(copy=copy_of(layer.packing.codec, packed=False)))
    return after, found


def _overwritten(layer: TokenLayer, chunk: Chunk) -> list[SlotRun]:
    """What `put` will leave no trace of, though queries of the chunk may see it.

    That is older tokens of a ring, and all but the latest of a long chunk.
    """
    layout, packing = layer.layout, layer.packing
    if layout.dense:
        return []
    new, ring = _width(layer, chunk.leaves), layout.slots - layout.pinned
    stop = chunk.first + chunk.stored
    size = min(new, ring)
    position = span(jnp.maximum(chunk.first, stop - size), size)
    slot = layer.slot_of(position)
    goes = (position < stop[..., None]) & (position >= layout.pinned)
    before = slot_map(layer)
    there = before.at(slot)
    held = jnp.where(goes & before.is_live(there), there, -1)

    def read(leaf: jax.Array) -> jax.Array:
        stride = layer.stride(leaf)
        return layer.buffer.take(leaf, slot[..., ::stride] // stride)

    displaced = slot_run_of(
        layer,
        jax.tree.map(read, layer.stored),
        packing.forms,
        before.replace(held=held),
        jnp.int32(size),
        Rows(),
    )
    if new <= ring:
        return [displaced]
    passing = _run(layer, chunk.leaves, packing.forms, chunk.first, stop - ring)
    unpinned = passing.slots.replace(low=jnp.maximum(layer.start, layout.pinned))
    return [displaced, passing.replace(slots=unpinned, copy=copy_of(packing.codec, packed=True))]


def _run(layer: TokenLayer, leaves: Packed, forms: Any, first: jax.Array, stop: Any) -> SlotRun:
    """Tokens of consecutive positions from `first` on as a run; live are those before `stop`."""
    width = _width(layer, leaves)
    held = SlotMap(layer.start, stop, first, first, layout=Contiguous(width, width))
    return slot_run_of(layer, leaves, forms, held, jnp.max(stop - first), Rows())
