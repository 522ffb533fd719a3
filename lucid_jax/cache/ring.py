"""The sliding layout: the first tokens pinned, the latest in a ring. Spec `Sliding`.

Token p < S lives in slot p, where S is `sinks` rounded up to whole groups of the codec; token p >= S
in slot S + (p - S) % R. Appending overwrites the slot of the token R before; nothing is ever shifted.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from lucid_jax.cache import residual, slots
from lucid_jax.cache.checks import check_count
from lucid_jax.cache.codec import PLAIN, Codec, check_codec
from lucid_jax.cache.layer import Chunk, Layer, blank
from lucid_jax.cache.part import Part, Region


@dataclasses.dataclass(frozen=True)
class Sliding:
    """The first `sinks` tokens and the latest `window`: constant memory, however long the text.

    A query sees itself, the `window - 1` tokens before it, and the sinks (StreamingLLM, Xiao et al.
    2023). Nothing is ever refused for want of room.

    Attributes:
        window: latest tokens kept, at least 1.
        sinks: first tokens kept for ever.
        slack: further slots, so that up to `slack` tokens can be rolled back, and chunks of up to
            `slack + 1` tokens attended to after `update`, once the ring has wrapped. (`extend` takes
            chunks of any length.)
        codec: how tokens are stored.
    """

    window: int
    sinks: int = 0
    slack: int = 0
    codec: Codec = PLAIN
    growable = False

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("sinks", 0), ("slack", 0)):
            value = check_count(getattr(self, name), f"{name} of Sliding", least)
            object.__setattr__(self, name, value)
        codec = check_codec(self.codec)
        if codec.unit > 1 and self.window < codec.residual + codec.unit:
            raise ValueError(
                f"a window of {self.window} is too small for {codec}: a group of {codec.unit} "
                f"tokens is quantized when {codec.residual} more have come, and must then all be "
                f"inside; use a window of at least {codec.residual + codec.unit}, or smaller groups"
            )

    def init(self, **shape: Any) -> Ring:
        """See `LayerSpec.init`."""
        return _empty(self, **shape)


@struct.dataclass(repr=False)
class Ring(Layer):
    """`sinks` pinned tokens and a ring of the latest."""

    @property
    def bounded(self) -> bool:
        """See `Layer.bounded`: what is full drops its oldest token instead."""
        return False

    @property
    def capacity(self) -> int:
        """See `Layer.capacity`: sinks and window."""
        return self.spec.sinks + self.spec.window

    @property
    def pinned(self) -> int:
        """S, the slots before the ring."""
        return _whole(self.spec.sinks, self.packing.codec.unit)

    @property
    def ring(self) -> int:
        """R, the slots of the ring."""
        return self.num_slots - self.pinned

    @property
    def length(self) -> jax.Array:
        """See `Layer.length`: sinks that are left, and what is in the window."""
        sinks = jnp.minimum(self.position, self.spec.sinks) - self.start
        return jnp.maximum(sinks, 0) + jnp.maximum(self.position - self._window_start(), 0)

    def _window_start(self) -> jax.Array:
        """Absolute position of the oldest token that is in the window and not a sink."""
        spec = self.spec
        return jnp.maximum(jnp.maximum(self.start, spec.sinks), self.position - spec.window)

    @property
    def lookback(self) -> int | None:
        """See `Layer.lookback`."""
        slack, kept = self.spec.slack, self.packing.codec.residual
        return min(slack, kept) if kept else slack

    def fits(self, count: jax.Array) -> jax.Array:
        """See `Layer.fits`: always."""
        return jnp.ones_like(self.overflowed)

    def put(self, chunk: Chunk) -> Self:
        """See `Layer.put`. Of a chunk longer than the ring only the latest tokens are stored."""
        new = jax.tree.leaves(chunk.value)[0].shape[2]
        position = slots.span(chunk.first, new)
        stop = (chunk.first + chunk.stored)[..., None]
        lasting = (position < self.pinned) | (position >= stop - self.ring)
        slot = self.slot_of(position)
        real = (position < stop) & lasting

        def write(leaf: jax.Array, tokens: jax.Array) -> jax.Array:
            stride = self.num_slots // leaf.shape[2]
            if new == self.packing.codec.unit:  # one token, or one group: no wrap inside
                begin = slot[..., 0] // stride
                return slots.write_window(leaf, tokens, begin, real[..., ::stride])
            target = jnp.where(real, slot, self.num_slots)[..., ::stride] // stride
            return slots.write_at(leaf, tokens, target)

        return self.replace(
            key=jax.tree.map(write, self.key, chunk.key),
            value=jax.tree.map(write, self.value, chunk.value),
        ).counted(chunk)

    def overwritten_by(self, chunk: Chunk) -> list[Part]:
        """See `Layer.overwritten_by`: older tokens of the ring, and all but the latest of a chunk."""
        new = jax.tree.leaves(chunk.value)[0].shape[2]
        stop = chunk.first + chunk.stored
        size = min(new, self.ring)
        position = slots.span(jnp.maximum(chunk.first, stop - size), size)
        slot = self.slot_of(position)
        goes = (position < stop[..., None]) & (position >= self.pinned)
        old = jnp.where(goes, self.position_in(slot), -1)
        if self.recent is not None:
            old = jnp.where(old < self.packing.flushed(self.position)[..., None], old, -1)

        def read(leaf: jax.Array) -> jax.Array:
            stride = self.num_slots // leaf.shape[2]
            return slots.take(leaf, slot[..., ::stride] // stride)

        def cut(begin: jax.Array, size: int) -> jax.Array:
            return lax.dynamic_slice_in_dim(old, begin, size, axis=-1)

        displaced = Part(
            jax.tree.map(read, self.key),
            jax.tree.map(read, self.value),
            *self.packing.forms,
            size=size,
            start=jnp.int32(0),
            stop=jnp.int32(size),
            positions=cut,
            index=lambda begin, size: self.index_of(cut(begin, size)),
        )
        if new <= self.ring:
            return [displaced]
        tokens = (chunk.key, chunk.value)
        passing = self.run(tokens, self.packing.forms, chunk.first, stop - self.ring)

        def unpinned(begin: jax.Array, size: int) -> jax.Array:
            position = passing.positions(begin, size)
            return jnp.where(position >= self.pinned, position, -1)

        visible = None if self.recent is None else self._seen_packed
        return [displaced, dataclasses.replace(passing, positions=unpinned, visible=visible)]

    def write(
        self, key: jax.Array, value: jax.Array, index: jax.Array, counts: jax.Array | None
    ) -> Self:
        """See `Layer.write`. Places past the end move the window on; what falls out is dropped."""
        index, real, ok = self.named(index, counts)
        row = -1 if self.ragged else None  # what shares one length: a row, or the whole batch
        most = jnp.iinfo(jnp.int32).max - self.position
        inside = (index >= 0) & (index < (most[..., None] if self.ragged else most))
        ok = ok & jnp.all(~real | inside, axis=row)
        index = jnp.where(inside, index, 0)
        end = jnp.max(jnp.where(real, index + 1, 0), axis=row)
        added = jnp.where(ok, jnp.maximum(end - self.length, 0), 0)
        stop = self.position + added
        position = self.position_of(index)
        real = real & (ok[..., None] if self.ragged else ok)
        first_kept = jnp.maximum(stop - self.ring, self.pinned)
        aligned = first_kept[..., None] if self.ragged else first_kept
        real = real & ((position < self.pinned) | (position >= aligned))
        target = jnp.where(real, self.slot_of(position), self.num_slots)
        target = slots.last_wins(target, dropped=self.num_slots)
        # Zeros for what was skipped: among the pinned, then in the ring, which may wrap.
        low = jnp.maximum(self.position, first_kept)
        begin = self.slot_of(low[..., None])[..., 0]
        past = begin + jnp.maximum(stop - low, 0)

        def put(leaf: jax.Array, new: jax.Array) -> jax.Array:
            leaf = slots.clear(leaf, self.position, jnp.minimum(stop, self.pinned))
            leaf = slots.clear(leaf, begin, jnp.minimum(past, self.num_slots))
            leaf = slots.clear(leaf, jnp.full_like(begin, self.pinned), past - self.ring)
            return slots.write_at(leaf, new, target)

        key_form, value_form = self.packing.forms
        return self.replace(
            key=jax.tree.map(put, self.key, key_form.encode(key)),
            value=jax.tree.map(put, self.value, value_form.encode(value)),
        ).advanced(added, ok, "write outside of what int32 can count; nothing was written")

    def keep_latest(self, max_length: jax.Array) -> Self:
        """See `Layer.keep_latest`. Nothing moves."""
        latest = jnp.maximum(self.position - self._window_start(), 0)
        kept = jnp.minimum(self.length, max_length)
        sinks = jnp.minimum(self.position, self.spec.sinks)
        start = jnp.where(kept <= latest, self.position - kept, sinks - (kept - latest))
        return self.replace(start=jnp.where(kept < self.length, start, self.start))

    def slot_of(self, position: jax.Array) -> jax.Array:
        """See `Layer.slot_of`."""
        around = self.pinned + (position - self.pinned) % self.ring
        return jnp.where(position < self.pinned, position, around)

    def index_of(self, position: jax.Array) -> jax.Array:
        """See `Layer.index_of`."""
        shape = (*self.start.shape, *(1,) * (position.ndim - self.start.ndim))
        sinks = jnp.maximum(self.spec.sinks - self.start, 0)
        index = position + (sinks - self._window_start()).reshape(shape)
        return jnp.where(position < self.spec.sinks, position - self.start.reshape(shape), index)

    def position_of(self, index: jax.Array) -> jax.Array:
        """See `Layer.position_of`."""
        shape = (*self.start.shape, *(1,) * (index.ndim - self.start.ndim))
        sinks = jnp.maximum(self.spec.sinks - self.start, 0).reshape(shape)
        later = index - sinks + self._window_start().reshape(shape)
        return jnp.where(index < sinks, index + self.start.reshape(shape), later)

    def slot_positions(self, begin: jax.Array, size: int) -> jax.Array:
        """See `Layer.slot_positions`."""
        return self.position_in(slots.span(jnp.broadcast_to(begin, self.position.shape), size))

    def position_in(self, slot: jax.Array) -> jax.Array:
        """`slot_positions` of any slots, int32 [S] or [B, S]."""
        # In a ring slot is the latest token that came to it, even if it has been rolled back since.
        around = residual.newest(slot, self.packing.flushed(self.reach), self.ring)
        position = jnp.where(slot < self.pinned, slot, around)
        live = (position >= self.start[..., None]) & (position < self.position[..., None])
        live = live & ((slot < self.pinned) | (position >= self.pinned))
        return jnp.where(live, position, -1)

    def slots_in_use(self) -> jax.Array:
        """See `Layer.slots_in_use`."""
        return jnp.minimum(jnp.max(self.reach), self.num_slots)

    def regions(self, query: jax.Array, by_place: bool) -> list[Region]:
        """See `Layer.regions`. By place, sinks come right before the window, however far they are."""
        sinks, window = self.spec.sinks, self.spec.window
        if not by_place:
            see = lambda q, k: (k > q - window) | (k < sinks)  # noqa: E731
            return [Region(see, lambda q: q, lambda position, index: position)]
        # Angles are of distances: counted from the oldest query's window they stay small.
        base = jnp.min(query, axis=-1, keepdims=True) if self.ragged else jnp.min(query)
        base = base - window
        regions = [
            Region(
                lambda q, k: (k > q - window) & (k >= sinks),
                lambda q: q - base,
                lambda position, index: position - base,
            )
        ]
        if sinks:
            start = self.start[..., None] if self.ragged else self.start
            left = jnp.maximum(sinks - start, 0)

            def place(q: jax.Array) -> jax.Array:
                inside = jnp.minimum(q + 1 - jnp.maximum(start, sinks), window)
                return jnp.where(q < sinks, q - start, left + inside - 1)

            regions.append(
                Region(
                    lambda q, k: k < sinks,
                    place,
                    lambda position, index: position - start,
                    slots=self.pinned,
                )
            )
        return regions

    def retained(self, position: jax.Array) -> jax.Array:
        """See `Layer.retained`. The ring holds the latest R tokens that ever came."""
        oldest = jnp.maximum(jnp.maximum(self.start, self.pinned), position - self.spec.window)
        overwritten = self.packing.flushed(self.reach) - self.ring
        return (oldest >= overwritten) | self.empty_at(position)

    def empty_at(self, position: jax.Array) -> jax.Array:
        """See `Layer.empty_at`. Pinned tokens are in no ring, but their residual is."""
        nothing = super().empty_at(position)
        return nothing if self.recent is not None else nothing | (position <= self.pinned)


def _whole(count: int, group: int) -> int:
    """`count` slots rounded up to whole groups."""
    return -(-count // group) * group


@partial(
    jax.jit,
    static_argnums=0,
    static_argnames=(
        "batch_size", "num_kv_heads", "head_dim", "value_head_dim", "dtype", "ragged",
    ),
)  # fmt: skip
def _empty(spec: Sliding, **shape: Any) -> Ring:
    group = spec.codec.unit
    # The window may begin inside a group, whose slots then wait for its last token to leave.
    ring = _whole(spec.window + spec.slack, group)
    return Ring(**blank(spec, _whole(spec.sinks, group) + ring, **shape))
