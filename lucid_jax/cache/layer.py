"""What a layer state is: the fields every layout has, and the length/position arithmetic, written once.

A layer state holds keys (B, H, C, D) and values (B, H, C, Dv) for capacity C, and three counters that
are `[]` while all rows advance together and `[B]` when ragged. A layout (contiguous, ring, ...)
decides where in C a token lives; nothing outside its module knows.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.experimental import checkify

from lucid_jax.cache import slots
from lucid_jax.cache.checks import is_traced
from lucid_jax.cache.codec import Identity


@struct.dataclass(repr=False)
class Layer(abc.ABC):
    """State of one layer's cache: a frozen pytree.

    `position - length` is the absolute position of the oldest stored token; crop raises it,
    rollback and append leave it alone. That one difference is why both counters exist.
    """

    key: jax.Array  # (B, H, C, D), as the codec stores it
    value: jax.Array  # (B, H, C, Dv), as the codec stores it
    length: jax.Array  # int32 [] or [B]: tokens stored now
    position: jax.Array  # int32 [] or [B]: tokens ever seen, the next absolute position
    overflowed: (
        jax.Array
    )  # bool [] or [B]: sticky, a traced operation asked for what cannot be done
    codec: Identity = struct.field(pytree_node=False)

    if TYPE_CHECKING:

        def replace(self, **updates: Any) -> Self:
            """A copy with some fields changed; flax adds it."""

    def __repr__(self) -> str:
        """Sizes rather than megabytes of numbers."""
        shape = ", ".join(f"{name}={n}" for name, n in zip("BHCD", self.key.shape, strict=True))
        length = "traced"
        if not is_traced(self.length):
            length = "donated" if self.length.is_deleted() else np.asarray(self.length).tolist()
        return f"{type(self).__name__}({shape}, {self.dtype}, length={length})"

    # --- facts ---------------------------------------------------------------------------------

    @property
    def ragged(self) -> bool:
        """Whether each row has its own length."""
        return self.length.ndim == 1

    @property
    def batch_size(self) -> int:
        """B, the number of rows."""
        return self.key.shape[0]

    @property
    def capacity(self) -> int:
        """C, the token slots a row has."""
        return self.key.shape[2]

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the tokens that go in and come out."""
        return jnp.dtype(self.codec.dtype)

    @property
    def offset(self) -> jax.Array:
        """Absolute position of the oldest stored token, int32 [] or [B]."""
        return self.position - self.length

    # --- what a layout decides -----------------------------------------------------------------

    @abc.abstractmethod
    def append(self, key: jax.Array, value: jax.Array, counts: jax.Array | None) -> Self:
        """Appends T tokens, or the first `counts` int32 [B] of each row's T; all or nothing."""

    @abc.abstractmethod
    def write(
        self, key: jax.Array, value: jax.Array, index: jax.Array, counts: jax.Array | None
    ) -> Self:
        """Writes T tokens at stored index [T] or [B, T] (0 is the oldest stored token)."""

    @abc.abstractmethod
    def keep_latest(self, max_length: jax.Array) -> Self:
        """Keeps the latest `max_length` tokens (int32 [], >= 0); positions stay as they are."""

    @abc.abstractmethod
    def gather_rows(self, rows: jax.Array) -> Self:
        """Gathers batch rows, int32 [B'], each in [0, B)."""

    @abc.abstractmethod
    def in_order(self) -> tuple[jax.Array, jax.Array]:
        """Stored keys and values, oldest token in slot 0; what is not live may hold anything."""

    @abc.abstractmethod
    def scan_slots(self, oldest: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """The slots [start, stop) a reader must look at, int32 []: they follow length, not capacity.

        With `oldest` (int32 [] or [B]), only tokens at that absolute position or later are wanted.
        """

    @abc.abstractmethod
    def slot_positions(self, begin: jax.Array, size: int) -> jax.Array:
        """Absolute positions of slots [begin, begin + size), int32 [size] or [B, size]; -1 if dead."""

    @property
    def can_grow(self) -> bool:
        """Whether `with_room` can make room."""
        return False

    def with_room(self, need: int) -> Self | None:
        """A copy with at least `need` slots, made on the host; None where the layout cannot grow."""
        return None

    def block(self, begin: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        """Keys and values of slots [begin, begin + size): (B, H, size, D) and (B, H, size, Dv)."""
        key, value = (
            self.codec.decode(lax.dynamic_slice_in_dim(leaf, begin, size, axis=2))
            for leaf in (self.key, self.value)
        )
        return key, value

    # --- arithmetic every layout shares --------------------------------------------------------

    def valid(self) -> jax.Array:
        """Which slots of `in_order` hold a live token: bool [C] or [B, C]."""
        index = slots.span(jnp.zeros_like(self.length), self.capacity)
        return index < self.length[..., None]

    def flag(self, ok: jax.Array, what: str) -> jax.Array:
        """The sticky flag after an operation that was possible where `ok` (bool [] or [B])."""
        checkify.debug_check(jnp.all(ok), what)
        return self.overflowed | ~ok

    def grown(self, by: jax.Array, ok: jax.Array, what: str) -> Self:
        """Counters after `by` more tokens came to be stored where `ok`; storage untouched."""
        by = jnp.where(ok, by, 0)
        return self.replace(
            length=self.length + by,
            position=self.position + by,
            overflowed=self.flag(ok, what),
        )

    def crop(self, max_length: jax.Array) -> Self:
        """Keeps the latest `max_length` tokens (int32 []); a negative number crops nothing."""
        ok = jnp.broadcast_to(max_length >= 0, self.overflowed.shape)
        everything = jnp.int32(jnp.iinfo(jnp.int32).max)
        cropped = self.keep_latest(jnp.where(max_length >= 0, max_length, everything))
        flag = self.flag(ok, "crop to a negative length; nothing was dropped")
        return cropped.replace(overflowed=flag)

    def select(self, rows: jax.Array) -> Self:
        """Gathers batch rows, int32 [B']; a row out of range is clamped and flagged."""
        ok = (rows >= 0) & (rows < self.batch_size)
        chosen = self.gather_rows(jnp.clip(rows, 0, self.batch_size - 1))
        ok = ok if self.ragged else jnp.all(ok)
        return chosen.replace(
            overflowed=chosen.flag(ok, "selection of a row that is not in the batch")
        )

    def rollback(self, n: jax.Array) -> Self:
        """Drops the latest `n` tokens (int32 [] or [B]) where there are that many."""
        ok = (n >= 0) & (n <= self.length)
        return self.grown(-n, ok, "rollback of more tokens than are stored; nothing was dropped")

    def reset(self) -> Self:
        """Empties the layer; buffers are kept and what they hold is never seen again."""
        return self.replace(
            length=jnp.zeros_like(self.length),
            position=jnp.zeros_like(self.position),
            overflowed=jnp.zeros_like(self.overflowed),
        )


class LayerSpec(Protocol):
    """What `init_cache` takes: a small, hashable description that builds empty layer states."""

    def init(
        self,
        *,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        value_head_dim: int,
        dtype: Any,
        ragged: bool,
    ) -> Layer:
        """An empty layer of this kind."""
        ...
