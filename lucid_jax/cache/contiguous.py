"""The contiguous layout: a row's tokens lie in a row of slots. Specs `Static` and `Dynamic`.

Both are the same state; a dynamic one may also be given more slots by the host, between calls, in
powers of two, so that decoding T tokens compiles O(log T) shapes.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from lucid_jax.cache import slots
from lucid_jax.cache.checks import check_count
from lucid_jax.cache.codec import PLAIN, Codec, check_codec
from lucid_jax.cache.layer import Chunk, Layer, blank
from lucid_jax.cache.part import Region

MIN_DYNAMIC_CAPACITY = 64


@dataclasses.dataclass(frozen=True)
class Static:
    """A fixed number of slots: `Static(2048)` holds 2048 tokens and refuses the next.

    Attributes:
        capacity: tokens a row can hold, at least 1.
        codec: how they are stored.
        track: keep each token's position beside it, from the start. `compact` needs that and adds it;
            a loop that compacts in its body must carry it from the beginning.
    """

    capacity: int
    codec: Codec = PLAIN
    track: bool = False
    growable = False

    def __post_init__(self) -> None:
        capacity = check_count(self.capacity, "the capacity of Static(capacity)", 1)
        object.__setattr__(self, "capacity", capacity)
        check_codec(self.codec)

    def init(self, **shape: Any) -> Contiguous:
        """See `LayerSpec.init`."""
        return _empty(self, self.capacity, **shape)


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """Slots are added on the host as tokens come, doubling each time. Starts at 64.

    Inside `jit` the capacity is what the state came with: call `ensure_capacity` before a
    compiled chunk of steps.

    Attributes:
        codec: how tokens are stored.
        track: as for `Static`.
    """

    codec: Codec = PLAIN
    track: bool = False
    growable = True

    def __post_init__(self) -> None:
        check_codec(self.codec)

    def init(self, **shape: Any) -> Contiguous:
        """See `LayerSpec.init`."""
        return _empty(self, MIN_DYNAMIC_CAPACITY, **shape)


@struct.dataclass
class Places:
    """Where the tokens of a layer come from, when eviction has left gaps between them."""

    position: jax.Array  # int32 (B, H, C): absolute position of the token in each slot
    floor: jax.Array  # int32 [] or [B]: position at the latest eviction; no rollback goes below

    if TYPE_CHECKING:

        def replace(self, **updates: Any) -> Places:
            """A copy with some fields changed; flax adds it."""


@struct.dataclass(repr=False)
class Contiguous(Layer):
    """The oldest token in slot 0, or in the first group's slots; the others follow it.

    A codec that quantizes groups of tokens wants them to start at multiples of their size. So the
    oldest token, of absolute position `start`, then lives in slot `start % group`.
    """

    places: Places | None

    @property
    def capacity(self) -> int:
        """See `Layer.capacity`."""
        spare = _spare(self.packing.codec.unit)
        return self.num_slots - spare if self.spec.growable else self.spec.capacity

    @property
    def length(self) -> jax.Array:
        """See `Layer.length`."""
        return self.position - self.start

    @property
    def lookback(self) -> int | None:
        """See `Layer.lookback`: only a codec with a residual sets a bound."""
        return self.packing.codec.residual or None

    @property
    def in_order(self) -> bool:
        """Slot i is index i, unless groups shift it."""
        return self.packing.codec.unit == 1

    @property
    def has_places(self) -> bool:
        """See `Layer.has_places`: not once heads may have evicted different tokens."""
        return self.places is None

    def fits(self, count: jax.Array) -> jax.Array:
        """See `Layer.fits`."""
        return self.length + count <= self.capacity

    def put(self, chunk: Chunk) -> Self:
        """See `Layer.put`. One `dynamic_update_slice` per leaf."""
        new = jax.tree.leaves(chunk.value)[0].shape[2]
        first = self.slot_of(chunk.first[..., None])[..., 0]
        size = min(new, self.num_slots)
        begin = jnp.clip(first, 0, self.num_slots - size)
        source = slots.span(begin, size) - first[..., None]  # the token for each slot of the window
        fresh = (source >= 0) & (source < chunk.stored[..., None])

        def write(leaf: jax.Array, tokens: jax.Array) -> jax.Array:
            stride = self.num_slots // leaf.shape[2]
            # A padded chunk may reach past the end though its real tokens fit; then the window
            # starts early and its tokens move right. A full chunk that fits never does.
            if not chunk.exact:
                tokens = slots.take(tokens, source[..., ::stride] // stride)
            return slots.write_window(leaf, tokens, begin // stride, fresh[..., ::stride])

        return self._mapped(write, chunk.key, chunk.value, chunk.first).counted(chunk)

    def _mapped(self, change: Any, key: Any, value: Any, first: jax.Array) -> Self:
        """Applies `change(leaf, new)` to each leaf that has slots; new positions from `first` on."""
        places = self.places
        if places is not None:
            new = jax.tree.leaves(value)[0].shape[2]
            position = slots.span(first, new).reshape(-1, 1, new)
            shape = (*places.position.shape[:2], new)
            places = places.replace(
                position=change(places.position, jnp.broadcast_to(position, shape))
            )
        return self.replace(
            key=jax.tree.map(change, self.key, key),
            value=jax.tree.map(change, self.value, value),
            places=places,
        )

    def write(
        self, key: jax.Array, value: jax.Array, index: jax.Array, counts: jax.Array | None
    ) -> Self:
        """See `Layer.write`. Slots skipped between the old length and the new one become zeros."""
        index, real, count_ok = self.named(index, counts)
        row = -1 if self.ragged else None  # what shares one length: a row, or the whole batch
        in_range = jnp.all(~real | ((index >= 0) & (index < self.capacity)), axis=row)
        ok = in_range & count_ok
        end = jnp.max(jnp.where(real, index + 1, 0), axis=row)
        added = jnp.maximum(end - self.length, 0)
        stop = jnp.where(ok, self.length + added, self.length)

        target = jnp.where(real & (ok[..., None] if self.ragged else ok), index, self.capacity)
        target = slots.last_wins(target, dropped=self.capacity)

        def put(leaf: jax.Array, new: jax.Array) -> jax.Array:
            return slots.write_at(slots.clear(leaf, self.length, stop), new, target)

        key_form, value_form = self.packing.forms
        return self.replace(
            key=jax.tree.map(put, self.key, key_form.encode(key)),
            value=jax.tree.map(put, self.value, value_form.encode(value)),
        ).advanced(added, ok, f"write outside the capacity of {self.capacity}; nothing was written")

    def keep_latest(self, max_length: jax.Array) -> Self:
        """See `Layer.keep_latest`. The kept tokens move to the front, by whole groups."""
        group = self.packing.codec.unit
        start = self.position - jnp.minimum(self.length, max_length)
        shift = start // group * group - self.start // group * group
        kept = jnp.where(start < self.position, self.position - start // group * group, 0)

        def pull(leaf: jax.Array) -> jax.Array:
            stride = self.num_slots // leaf.shape[2]
            return slots.shift_left(leaf, shift // stride, -(-kept // stride))

        moved = self.replace(
            key=jax.tree.map(pull, self.key), value=jax.tree.map(pull, self.value), start=start
        )
        if self.places is None:
            return moved
        return moved.replace(places=self.places.replace(position=pull(self.places.position)))

    def slot_of(self, position: jax.Array) -> jax.Array:
        """See `Layer.slot_of`."""
        group = self.packing.codec.unit
        return position - _along(self.start // group * group, position)

    def index_of(self, position: jax.Array) -> jax.Array:
        """See `Layer.index_of`."""
        return position - _along(self.start, position)

    def position_of(self, index: jax.Array) -> jax.Array:
        """See `Layer.position_of`. With gaps, what the index would be without them."""
        return index + _along(self.start, index)

    def slot_positions(self, begin: jax.Array, size: int) -> jax.Array:
        """See `Layer.slot_positions`."""
        index = self.slot_index(begin, size)
        live = (index >= 0) & (index < self.length[..., None])
        if self.places is None:
            return jnp.where(live, self.position_of(index), -1)
        position = lax.dynamic_slice_in_dim(self.places.position, begin, size, axis=2)
        return jnp.where(live.reshape(-1, 1, size), position, -1)

    def slot_index(self, begin: jax.Array, size: int) -> jax.Array:
        """See `Layer.slot_index`."""
        slot = slots.span(jnp.broadcast_to(begin, self.position.shape), size)
        return slot - (self.start % self.packing.codec.unit)[..., None]

    def slots_in_use(self) -> jax.Array:
        """See `Layer.slots_in_use`. Up to the longest length in the batch."""
        return jnp.max(self.length + self.start % self.packing.codec.unit)

    def first_slot(self, oldest: jax.Array) -> jax.Array:
        """See `Layer.first_slot`. Where some were evicted, the others only moved further down."""
        return jnp.clip(jnp.min(self.slot_of(oldest)), 0, self.slots_in_use())

    def regions(self, query: jax.Array, by_place: bool) -> list[Region]:
        """See `Layer.regions`. All that is stored, and a token's place is its index."""
        return [Region(None, self.index_of, lambda position, index: index)]

    def retained(self, position: jax.Array) -> jax.Array:
        """See `Layer.retained`. Appending overwrites nothing."""
        if self.places is None:
            return jnp.ones_like(self.overflowed)
        return position >= self.places.floor

    def put_rows(self, rows: jax.Array, other: Layer) -> Self:
        """See `Layer.put_rows`."""
        moved = super().put_rows(rows, other)
        if self.places is None:
            return moved
        assert isinstance(other, Contiguous)
        new = other.tracked().places
        assert new is not None
        target = self.row_targets(rows, other)
        used = jnp.minimum(other.slots_in_use(), self.num_slots)
        floor = jnp.broadcast_to(new.floor, rows.shape)
        return moved.replace(
            places=Places(
                position=slots.put_rows(self.places.position, new.position, target, used),
                floor=self.places.floor.at[target].set(floor, mode="drop"),
            )
        )

    def free(self, gone: jax.Array) -> Self:
        """See `Layer.free`."""
        freed = super().free(gone)
        if self.places is None:
            return freed
        floor = jnp.where(gone, 0, self.places.floor)
        return freed.replace(places=self.places.replace(floor=floor))

    def reset(self) -> Self:
        """See `Layer.reset`."""
        fresh = super().reset()
        if self.places is None:
            return fresh
        floor = jnp.zeros_like(self.places.floor)
        return fresh.replace(places=self.places.replace(floor=floor))

    def with_room(self, need: int) -> Self | None:
        """See `Layer.with_room`. Capacities are powers of two."""
        if not self.spec.growable:
            return None
        slots_needed = _physical(grown_capacity(need), self.packing.codec.unit)
        return _widened(self, slots_needed - self.num_slots)

    def tracked(self) -> Self:
        """This layer with the position of every token beside it."""
        if self.places is not None:
            return self
        shape = (self.batch_size, self.num_kv_heads, self.num_slots)
        position = self.slot_positions(jnp.int32(0), self.num_slots).reshape(-1, 1, shape[2])
        return self.replace(
            places=Places(
                position=jnp.broadcast_to(position, shape) + jnp.int32(0),
                floor=jnp.zeros_like(self.position),
            )
        )

    def stored_positions(self) -> jax.Array:
        """See `Layer.stored_positions`. Heads may differ once some were evicted."""
        if self.places is None:
            return super().stored_positions()
        live = self.valid().reshape(-1, 1, self.capacity)
        return jnp.where(live, self.places.position[:, :, : self.capacity], -1)

    def compact(self, keep: jax.Array, count: jax.Array, ok: jax.Array) -> Self:
        """Keeps the tokens at indices `keep`, int32 (B, H, C) ascending, the first `count` of them.

        `count` is int32 [] or [B], at most the length; where not `ok`, that is everything. Positions
        are remembered.
        """
        layer = self.tracked()
        assert layer.places is not None
        most = jnp.max(count)
        pull = lambda leaf: slots.pull(leaf, keep, most)  # noqa: E731
        floor = jnp.where(ok, self.position, layer.places.floor)
        return layer.replace(
            key=jax.tree.map(pull, layer.key),
            value=jax.tree.map(pull, layer.value),
            places=Places(position=pull(layer.places.position), floor=floor),
            start=self.position - count,
        )

    def keep_path(self, n: jax.Array, path: jax.Array, count: jax.Array, ok: jax.Array) -> Self:
        """Of the latest `n` tokens keeps those at offsets `path`, the first `count` of them.

        n, count and ok are [B], path is [B, P]; where not `ok`, count is 0 and nothing changes.
        """
        first = self.slot_of((self.position - n)[..., None])
        source = first + path
        kept = slots.span(jnp.zeros_like(count), path.shape[1])
        # Read before anything is written: a later node's slot may be an earlier one's target.
        target = jnp.where(kept < count[:, None], first + kept, self.num_slots)

        def move(leaf: jax.Array) -> jax.Array:
            return slots.write_at(leaf, slots.take(leaf, source), target)

        places = self.places
        if places is not None:
            position = (self.position - n)[:, None] + kept
            shape = (*places.position.shape[:2], path.shape[1])
            new = jnp.broadcast_to(position[:, None], shape)
            places = places.replace(position=slots.write_at(places.position, new, target))
        return self.replace(
            key=jax.tree.map(move, self.key), value=jax.tree.map(move, self.value), places=places
        ).advanced(count - n, ok, "keep_path of what is no path; nothing was dropped")


def _along(counter: jax.Array, like: jax.Array) -> jax.Array:
    """A counter [] or [B], to combine with [...] or [B, ...]."""
    return counter.reshape(*counter.shape, *(1,) * (like.ndim - counter.ndim))


def grown_capacity(need: int) -> int:
    """The capacity a dynamic layer takes to hold `need` tokens: a power of two, at least 64.

    Example:
        >>> grown_capacity(3), grown_capacity(65), grown_capacity(128)
        (64, 128, 128)
    """
    return max(MIN_DYNAMIC_CAPACITY, 1 << (need - 1).bit_length())


def _spare(group: int) -> int:
    """Slots beyond the capacity, as the oldest token may stand late in its group."""
    return group if group > 1 else 0


def _physical(capacity: int, group: int) -> int:
    """Slots for `capacity` tokens: whole groups."""
    return -(-capacity // group) * group + _spare(group)


@partial(jax.jit, static_argnums=1)
def _widened(layer: Contiguous, added: int) -> Contiguous:
    """`added` more slots. The rest is copied: the result may be donated while `layer` lives on."""

    def pad(leaf: jax.Array) -> jax.Array:
        stride = layer.num_slots // leaf.shape[2]
        widen = [(0, 0, 0), (0, 0, 0), (0, added // stride, 0), *[(0, 0, 0)] * (leaf.ndim - 3)]
        return lax.pad(leaf, jnp.zeros((), leaf.dtype), widen)

    wider = jax.tree.map(jnp.copy, layer).replace(
        key=jax.tree.map(pad, layer.key), value=jax.tree.map(pad, layer.value)
    )
    if layer.places is None:
        return wider
    return wider.replace(places=wider.places.replace(position=pad(layer.places.position)))


@partial(
    jax.jit,
    static_argnums=(0, 1),
    static_argnames=(
        "batch_size", "num_kv_heads", "head_dim", "value_head_dim", "dtype", "ragged",
    ),
)  # fmt: skip
def _empty(spec: Any, capacity: int, **shape: Any) -> Contiguous:
    if spec.track and spec.codec.unit > 1:
        raise ValueError(
            f"track=True, and so compact, needs a codec that stores each token by itself; "
            f"{spec.codec} quantizes groups of tokens. Use Int4() or Int8()"
        )
    layer = Contiguous(**blank(spec, _physical(capacity, spec.codec.unit), **shape), places=None)
    return layer.tracked() if spec.track else layer
