"""The chunked layout: attention within blocks of positions, a ring of slots. Spec `Chunked`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lucid_jax.cache.argument_checks import check_count
from lucid_jax.cache.codecs import PLAIN, Codec, check_codec
from lucid_jax.cache.layouts.base import LayerSpec, Runs
from lucid_jax.cache.slots import whole


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The tokens of the newest token's block, in a ring."""

    slots: int
    capacity: int
    slack: int
    dense: ClassVar[bool] = False
    pinned: ClassVar[int] = 0

    def kept(self, start: jax.Array, position: jax.Array) -> Runs:
        block = (position - 1) // self.capacity * self.capacity
        return ((jnp.maximum(start, block), position),)

    def slot(self, position: jax.Array, start: jax.Array) -> jax.Array:
        return position % self.slots

    def latest(self, slot: jax.Array, start: jax.Array, reach: jax.Array) -> jax.Array:
        return reach - 1 - (reach - 1 - slot) % self.slots


@dataclasses.dataclass(frozen=True)
class Chunked(LayerSpec):
    """Positions in blocks of `size`: a query sees its own block, up to itself (Llama 4).

    A block's tokens are dropped together when the next begins; nothing is ever refused.

    Attributes:
        size: positions of a block, at least 1.
        slack: tokens that can be rolled back, and one less than chunks for `update` and `attend` have.
        codec: how tokens are stored.
    """

    size: int
    slack: int = 0
    codec: Codec = PLAIN
    usage: ClassVar[tuple[str, ...]] = ("chunked:SIZE",)
    arithmetic: ClassVar[type] = Blocks

    def __post_init__(self) -> None:
        for name, least in (("size", 1), ("slack", 0)):
            value = check_count(getattr(self, name), f"{name} of Chunked", least)
            object.__setattr__(self, name, value)
        check_codec(self.codec)

    def layout(self) -> Blocks:
        return Blocks(whole(self.size + self.slack, self.codec.unit), self.size, self.slack)
