"""The sliding layout: the first tokens pinned, the latest in a ring. Spec `Sliding`.

Position p < S lives in slot p, where S is `sinks` rounded up to whole groups of the codec; p >= S in
slot S + (p - S) % R. Appending overwrites the slot of the token R before; nothing is ever shifted.
"""

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
class Ring:
    """`sinks` tokens pinned in the first slots, and a ring of the latest."""

    slots: int
    window: int
    sinks: int
    pinned: int  # S
    slack: int
    dense: ClassVar[bool] = False

    @property
    def capacity(self) -> int:
        return self.sinks + self.window

    def kept(self, start: jax.Array, position: jax.Array) -> Runs:
        latest = jnp.maximum(jnp.maximum(start, self.sinks), position - self.window)
        recent = (latest, position)
        return ((start, jnp.minimum(position, self.sinks)), recent) if self.sinks else (recent,)

    def slot(self, position: jax.Array, start: jax.Array) -> jax.Array:
        around = self.pinned + (position - self.pinned) % (self.slots - self.pinned)
        return jnp.where(position < self.pinned, position, around) if self.pinned else around

    def latest(self, slot: jax.Array, start: jax.Array, reach: jax.Array) -> jax.Array:
        last = reach - 1
        around = last - (last - slot) % (self.slots - self.pinned)
        return jnp.where(slot < self.pinned, slot, around) if self.pinned else around


@dataclasses.dataclass(frozen=True)
class Sliding(LayerSpec):
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
    usage: ClassVar[tuple[str, ...]] = ("sliding:WINDOW", "sliding:WINDOW+SINKS")
    arithmetic: ClassVar[type] = Ring

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("sinks", 0), ("slack", 0)):
            value = check_count(getattr(self, name), f"{name} of Sliding", least)
            object.__setattr__(self, name, value)
        codec = check_codec(self.codec)
        if codec.unit > 1 and self.window < codec.tail + codec.unit:
            raise ValueError(
                f"a window of {self.window} is too small for {codec}: a group of {codec.unit} "
                f"tokens is quantized when {codec.tail} more have come, and must then all be "
                f"inside; use a window of at least {codec.tail + codec.unit}, or smaller groups"
            )

    def layout(self) -> Ring:
        group = self.codec.unit
        pinned = whole(self.sinks, group)
        # The window may begin inside a group, whose slots then wait for its last token to leave.
        slots = pinned + whole(self.window + self.slack, group)
        return Ring(slots, self.window, self.sinks, pinned, self.slack)
