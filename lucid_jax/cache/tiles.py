"""How XLA lays arrays out in a TPU's memory: by tiles, of which the last two axes are the sides."""

from __future__ import annotations

import math

import jax
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType

LANES = 128  # numbers side by side in a register of a TPU
ROWS = 8  # registers are so many rows of them


def lies_on_lanes(width: int, slots: int) -> bool:
    """Whether tokens, rather than their numbers, lie along a TPU's lanes: where that pads less.

    An array that is wanted the other way round is copied whole first.

    Example:
        >>> lies_on_lanes(64, 8192), lies_on_lanes(128, 8192)
        (True, False)
    """

    def size(rows: int, lanes: int) -> int:
        return math.ceil(rows / ROWS) * math.ceil(lanes / LANES)

    return size(width, slots) < size(slots, width)


def as_it_lies(leaf: jax.Array) -> jax.Array:
    """A leaf (..., S, width) that XLA for TPUs is told to leave as it lies, where that is by slots.

    In a loop inside of another it takes the usual order, and copies the leaf around both.
    """
    return held(leaf) if lies_on_lanes(leaf.shape[-1], leaf.shape[-2]) else leaf


def held(leaf: jax.Array) -> jax.Array:
    """A leaf (..., S, width) that XLA for TPUs is told to keep in the order that it gives arguments.

    Where the compiler divides the work it gathers what it is told so of, and is not told.
    """
    if divided_by_compiler(leaf):
        return leaf
    *rest, slots, width = leaf.shape
    last = (leaf.ndim - 2, leaf.ndim - 1)
    order = Layout((*range(len(rest)), *(last[::-1] if lies_on_lanes(width, slots) else last)))
    told: jax.Array = lax.platform_dependent(
        leaf, tpu=lambda x: with_layout_constraint(x, order), default=lambda x: x
    )
    return told


def divided_by_compiler(leaf: jax.Array) -> bool:
    """Whether an array lies on a mesh of several devices whose work the compiler divides."""
    for mesh in (jax.typeof(leaf).sharding.mesh, jax.sharding.get_abstract_mesh()):
        sizes = zip(mesh.axis_types, mesh.axis_sizes, strict=True)
        if any(kind != AxisType.Manual and size > 1 for kind, size in sizes):
            return True
    return False
