"""The contiguous layout: token i of a row lives in slot i. Specs `Static` and `Dynamic`.

Both are the same state; a dynamic one may also be given more slots by the host, between calls, in
powers of two, so that decoding T tokens compiles O(log T) shapes.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import struct

from lucid_jax.cache import slots
from lucid_jax.cache.checks import check_count
from lucid_jax.cache.codec import Identity
from lucid_jax.cache.layer import Layer

MIN_DYNAMIC_CAPACITY = 64


@dataclasses.dataclass(frozen=True)
class Static:
    """A fixed number of slots: `Static(2048)` holds 2048 tokens and refuses the next.

    Attributes:
        capacity: slots per row, at least 1.
    """

    capacity: int

    def __post_init__(self) -> None:
        capacity = check_count(self.capacity, "the capacity of Static(capacity)", 1)
        object.__setattr__(self, "capacity", capacity)

    def init(self, **shape: Any) -> Contiguous:
        """See `LayerSpec.init`."""
        return _empty(capacity=self.capacity, growable=False, **shape)


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """Slots are added on the host as tokens come, doubling each time. Starts at 64.

    Inside `jit` the capacity is what the state came with: call `ensure_capacity` before a
    compiled chunk of steps.
    """

    def init(self, **shape: Any) -> Contiguous:
        """See `LayerSpec.init`."""
        return _empty(capacity=MIN_DYNAMIC_CAPACITY, growable=True, **shape)


@struct.dataclass(repr=False)
class Contiguous(Layer):
    """Token i in slot i: slots `[0, length)` are live."""

    growable: bool = struct.field(pytree_node=False)

    def append(self, key: jax.Array, value: jax.Array, counts: jax.Array | None) -> Self:
        """See `Layer.append`. One `dynamic_update_slice` per leaf."""
        tokens = key.shape[2]
        count = jnp.full_like(self.length, tokens) if counts is None else counts
        ok = (count >= 0) & (count <= tokens) & (self.length + count <= self.capacity)
        size = min(tokens, self.capacity)
        begin = jnp.clip(self.length, 0, self.capacity - size)
        source = slots.span(begin, size) - self.length[..., None]  # the token for each window slot
        fresh = ok[..., None] & (source >= 0) & (source < count[..., None])

        def put(leaf: jax.Array, new: jax.Array) -> jax.Array:
            # A padded chunk may reach past the end though its real tokens fit; then the window
            # starts early and its tokens move right. A full chunk that fits never does.
            aligned = new if counts is None else slots.take(new, source)
            return slots.write_window(leaf, aligned, begin, fresh)

        return self.grown(
            count, ok, f"append past the capacity of {self.capacity}; nothing was written"
        ).replace(
            key=put(self.key, self.codec.encode(key)),
            value=put(self.value, self.codec.encode(value)),
        )

    def write(
        self, key: jax.Array, value: jax.Array, index: jax.Array, counts: jax.Array | None
    ) -> Self:
        """See `Layer.write`. Slots skipped between the old length and the new one become zeros."""
        tokens = key.shape[2]
        if self.ragged and index.ndim == 1:
            index = jnp.broadcast_to(index, (self.batch_size, tokens))
        real = jnp.ones(index.shape, bool)
        count_ok = jnp.ones_like(self.overflowed)
        if counts is not None:
            real = slots.span(jnp.zeros_like(counts), tokens) < counts[:, None]
            count_ok = (counts >= 0) & (counts <= tokens)
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

        return self.grown(
            added, ok, f"write outside the capacity of {self.capacity}; nothing was written"
        ).replace(
            key=put(self.key, self.codec.encode(key)),
            value=put(self.value, self.codec.encode(value)),
        )

    def keep_latest(self, max_length: jax.Array) -> Self:
        """See `Layer.keep_latest`. The kept tokens move to the front."""
        kept = jnp.minimum(self.length, max_length)
        shift = self.length - kept
        return self.replace(
            key=slots.shift_left(self.key, shift, kept),
            value=slots.shift_left(self.value, shift, kept),
            length=kept,
        )

    def gather_rows(self, rows: jax.Array) -> Self:
        """See `Layer.gather_rows`. Only slots below the longest length move."""
        stop = jnp.max(self.length)
        counters = {
            "length": self.length,
            "position": self.position,
            "overflowed": self.overflowed,
        }
        if self.ragged:
            counters = {name: jnp.take(c, rows, mode="clip") for name, c in counters.items()}
        return self.replace(
            key=slots.select_rows(self.key, rows, stop),
            value=slots.select_rows(self.value, rows, stop),
            **counters,
        )

    def in_order(self) -> tuple[jax.Array, jax.Array]:
        """See `Layer.in_order`. Storage order is already chronological."""
        return self.key, self.value

    def scan_slots(self, oldest: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """See `Layer.scan_slots`. Up to the longest length in the batch."""
        stop = jnp.max(self.length)
        if oldest is None:
            return jnp.int32(0), stop
        return jnp.clip(jnp.min(oldest - self.offset), 0, stop), stop

    def slot_positions(self, begin: jax.Array, size: int) -> jax.Array:
        """See `Layer.slot_positions`."""
        slot = slots.span(jnp.broadcast_to(begin, self.length.shape), size)
        return jnp.where(slot < self.length[..., None], slot + self.offset[..., None], -1)

    @property
    def can_grow(self) -> bool:
        """See `Layer.can_grow`."""
        return self.growable

    def with_room(self, need: int) -> Self | None:
        """See `Layer.with_room`. Capacities are powers of two."""
        if not self.growable:
            return None
        return _widened(self, grown_capacity(need) - self.capacity)


def grown_capacity(need: int) -> int:
    """The capacity a dynamic layer takes to hold `need` tokens: a power of two, at least 64.

    Example:
        >>> grown_capacity(3), grown_capacity(65), grown_capacity(128)
        (64, 128, 128)
    """
    return max(MIN_DYNAMIC_CAPACITY, 1 << (need - 1).bit_length())


@partial(jax.jit, static_argnums=1)
def _widened(layer: Contiguous, added: int) -> Contiguous:
    """`added` more slots. Counters are copied: the result may be donated while `layer` lives on."""
    widen = ((0, 0, 0), (0, 0, 0), (0, added, 0), (0, 0, 0))
    pad = lambda leaf: jax.lax.pad(leaf, jnp.zeros((), leaf.dtype), widen)  # noqa: E731
    counters = {
        name: jnp.copy(getattr(layer, name)) for name in ("length", "position", "overflowed")
    }
    return layer.replace(key=pad(layer.key), value=pad(layer.value), **counters)


@partial(
    jax.jit,
    static_argnames=(
        "capacity", "growable", "batch_size", "num_kv_heads", "head_dim", "value_head_dim",
        "dtype", "ragged",
    ),
)  # fmt: skip
def _empty(
    *,
    capacity: int,
    growable: bool,
    batch_size: int,
    num_kv_heads: int,
    head_dim: int,
    value_head_dim: int,
    dtype: Any,
    ragged: bool,
) -> Contiguous:
    slots_shape = (batch_size, num_kv_heads, capacity)
    counter_shape = (batch_size,) if ragged else ()
    codec = Identity(jnp.dtype(dtype).name)
    # Each leaf gets its own zeros: a buffer shared by two leaves could not be donated.
    return Contiguous(
        key=jnp.zeros((*slots_shape, head_dim), codec.storage_dtype),
        value=jnp.zeros((*slots_shape, value_head_dim), codec.storage_dtype),
        length=jnp.zeros(counter_shape, jnp.int32),
        position=jnp.zeros(counter_shape, jnp.int32),
        overflowed=jnp.zeros(counter_shape, bool),
        codec=codec,
        growable=growable,
    )
