"""What a layout says: where in a row a position lives, and which positions are still seen.

Index arithmetic alone, over int32: a layout knows nothing of tokens, codecs, batches or arrays.
Counters are [] or [B], positions and slots [...] or [B, ...]. All else follows from it, in derive.py.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, Protocol, Self

import jax
from jax.typing import DTypeLike

from lucid_jax.cache.codecs import Codec
from lucid_jax.cache.empty_layer import empty_layer
from lucid_jax.cache.tokens import TokenLayer

Runs = tuple[tuple[jax.Array, jax.Array], ...]  # consecutive positions [first, stop), oldest first


class Layout(Protocol):
    """Three functions and a few facts; hashable, for it is static under `jit`."""

    @property
    def slots(self) -> int:
        """Slots of a row that positions live in. Leaves may have a few more, see `tiles.in_tiles`."""
        ...

    @property
    def capacity(self) -> int:
        """The most tokens that a row keeps, at most `slots`."""
        ...

    @property
    def slack(self) -> int | None:
        """Tokens that can be taken back whatever came before.

        None: all of them, as nothing is ever overwritten; then everything stored is seen, and what
        does not fit is refused.
        """
        ...

    @property
    def dense(self) -> bool:
        """Whether consecutive positions lie in consecutive slots, the oldest in the first ones."""
        ...

    @property
    def pinned(self) -> int:
        """Positions, from 0 on, that stay in the slots of their number; the other slots are a ring.

        All runs but the last consist of such positions.
        """
        ...

    def kept(self, start: jax.Array, position: jax.Array) -> Runs:
        """The positions seen by the newest of `position` tokens, those before `start` left out.

        An empty run may end before it begins.
        """
        ...

    def slot(self, position: jax.Array, start: jax.Array) -> jax.Array:
        """The slot of a position."""
        ...

    def latest(self, slot: jax.Array, start: jax.Array, reach: jax.Array) -> jax.Array:
        """Of the first `reach` positions, the last that was written to a slot.

        Of a slot that none came to, any position that lives elsewhere or is outside [start, reach).
        """
        ...


class LayerSpec(abc.ABC):
    """What `init_cache` takes: a small, hashable description that builds empty layer states.

    A layout of one's own is a frozen dataclass of this kind and the `Layout` that it names.

    Attributes:
        codec: how tokens are stored.
        usage: how the command line writes it: fields in capitals, such as "sliding:WINDOW+SINKS".
        arithmetic: the class of its layouts.
        growable: whether the host may add slots.
        track: whether each token's position is kept beside it from the start.
    """

    usage: ClassVar[tuple[str, ...]]
    arithmetic: ClassVar[type]
    growable: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def codec(self) -> Codec:
        """How tokens are stored."""

    @property
    def track(self) -> bool:
        """Whether each token's position is kept beside it from the start."""
        return False

    @abc.abstractmethod
    def layout(self) -> Layout:
        """Where tokens of an empty layer go."""

    def with_room(self, need: int) -> Layout | None:
        """A layout for at least `need` tokens, where the host may add slots; else None."""
        return None

    def sized(self, capacity: int) -> LayerSpec:
        """This spec for so many tokens, where it names their number; else the spec itself."""
        return self

    def but(self, **changes: Any) -> Self:
        """This spec with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    @property
    def bounded(self) -> bool:
        """Whether what does not fit is refused, rather than older tokens dropped."""
        return self.layout().slack is None

    def init(
        self,
        *,
        batch_size: int,
        num_kv_heads: int,
        dims: tuple[tuple[str, int], ...],
        dtype: DTypeLike,
        ragged: bool,
    ) -> TokenLayer:
        """An empty layer of this kind, of leaves whose names and widths are `dims`."""
        return empty_layer(
            self, batch_size=batch_size, num_kv_heads=num_kv_heads, dims=dims, dtype=dtype,
            ragged=ragged,
        )  # fmt: skip
