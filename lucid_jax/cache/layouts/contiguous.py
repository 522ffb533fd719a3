"""The contiguous layout: a row's tokens lie in a row of slots. Specs `Static` and `Dynamic`.

A dynamic layer may be given more slots by the host, between calls, in powers of two, so that decoding
T tokens compiles O(log T) shapes.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from lucid_jax.cache.argument_checks import check_count
from lucid_jax.cache.codecs import PLAIN, Codec, check_codec
from lucid_jax.cache.layouts.base import LayerSpec, Runs
from lucid_jax.cache.slots import whole

MIN_DYNAMIC_CAPACITY = 64


@dataclasses.dataclass(frozen=True)
class Contiguous:
    """The oldest token in slot 0, or in the first group's slots; the others follow it.

    A codec that quantizes groups of tokens wants them to start at multiples of their size. So the
    oldest token, of position `start`, then lives in slot `start % group`.
    """

    slots: int
    capacity: int
    group: int = 1
    slack: ClassVar[int | None] = None
    dense: ClassVar[bool] = True
    pinned: ClassVar[int] = 0

    @classmethod
    def of(cls, capacity: int, group: int) -> Contiguous:
        """For so many tokens: a group more, as the oldest token may stand late in its own."""
        return cls(whole(capacity, group) + (group if group > 1 else 0), capacity, group)

    def kept(self, start: jax.Array, position: jax.Array) -> Runs:
        return ((start, position),)

    def slot(self, position: jax.Array, start: jax.Array) -> jax.Array:
        return position - start // self.group * self.group

    def latest(self, slot: jax.Array, start: jax.Array, reach: jax.Array) -> jax.Array:
        return slot + start // self.group * self.group


@dataclasses.dataclass(frozen=True)
class Static(LayerSpec):
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
    usage: ClassVar[tuple[str, ...]] = ("static", "static:CAPACITY")
    arithmetic: ClassVar[type] = Contiguous

    def __post_init__(self) -> None:
        capacity = check_count(self.capacity, "the capacity of Static(capacity)", 1)
        object.__setattr__(self, "capacity", capacity)
        check_codec(self.codec)

    def layout(self) -> Contiguous:
        return Contiguous.of(self.capacity, self.codec.unit)

    def sized(self, capacity: int) -> Static:
        return dataclasses.replace(self, capacity=capacity)


@dataclasses.dataclass(frozen=True)
class Dynamic(LayerSpec):
    """Slots are added on the host as tokens come, doubling each time. Starts at 64.

    Inside `jit` the capacity is what the state came with: call `ensure_capacity` before a
    compiled chunk of steps.

    Attributes:
        codec: how tokens are stored.
        track: as for `Static`.
    """

    codec: Codec = PLAIN
    track: bool = False
    usage: ClassVar[tuple[str, ...]] = ("dynamic",)
    arithmetic: ClassVar[type] = Contiguous
    growable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_codec(self.codec)

    def layout(self) -> Contiguous:
        return Contiguous.of(MIN_DYNAMIC_CAPACITY, self.codec.unit)

    def with_room(self, need: int) -> Contiguous:
        return Contiguous.of(grown_capacity(need), self.codec.unit)


def grown_capacity(need: int) -> int:
    """The capacity a dynamic layer takes to hold `need` tokens: a power of two, at least 64.

    Example:
        >>> grown_capacity(3), grown_capacity(65), grown_capacity(128)
        (64, 128, 128)
    """
    return max(MIN_DYNAMIC_CAPACITY, 1 << (need - 1).bit_length())
