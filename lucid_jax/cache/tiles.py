"""How XLA lays arrays out in a TPU's memory: by tiles, of which the last two axes are the sides."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType

from lucid_jax.cache.slots import whole

LANES = 128  # numbers side by side in a register of a TPU
ROWS = 8  # registers are so many rows of them


def in_tiles(slots: int, group: int = 1) -> int:
    """So many slots, rounded up to whole rows of tiles, and to whole groups of a codec.

    XLA for TPUs lays any other number of them out with another axis in their place, and copies the
    array whole when it is to be read by slots. Groups that go into no tiles, nor tiles into them, are
    left at that: both are whole too seldom.

    Example:
        >>> in_tiles(13), in_tiles(13, group=4), in_tiles(13, group=12)
        (16, 16, 24)
    """
    both = math.lcm(ROWS, group)
    unit = both if both == max(ROWS, group) else group
    return whole(slots, unit)


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


def as_it_lies(leaf: jax.Array, slot_axis: int) -> jax.Array:
    """A leaf (..., S, width) that XLA for TPUs is told to leave as it lies, where that is by slots.

    In a loop inside of another it takes the usual order, and copies the leaf around both.
    """
    return unmoved(lambda leaf: leaf, leaf, slot_axis=slot_axis)


def unmoved(
    change: Callable[..., jax.Array], leaf: jax.Array, *args: jax.Array, slot_axis: int
) -> jax.Array:
    """`change(leaf, *args)`, a leaf again, which is told to be `as_it_lies` before and after."""
    if slot_axis != leaf.ndim - 2 or not lies_on_lanes(leaf.shape[-1], leaf.shape[-2]):
        return change(leaf, *args)
    return _told(change, leaf, *args)


def held(leaf: jax.Array) -> jax.Array:
    """A leaf (..., S, width) that XLA for TPUs is told to keep in the order that it gives arguments."""
    return _told(lambda leaf: leaf, leaf)


def _told(change: Callable[..., jax.Array], leaf: jax.Array, *args: jax.Array) -> jax.Array:
    """`change(leaf, *args)`, where XLA for TPUs is told the order of the leaf before and after.

    Where the compiler divides the work it gathers what it is told so of, and is not told.
    """
    if divided_by_compiler(leaf):
        return change(leaf, *args)
    order = Layout(_order(leaf.shape))

    def on_tpu(leaf: jax.Array, *args: jax.Array) -> jax.Array:
        leaf = change(with_layout_constraint(leaf, order), *args)
        told: jax.Array = with_layout_constraint(leaf, order)
        return told

    changed: jax.Array = lax.platform_dependent(leaf, *args, tpu=on_tpu, default=change)
    return changed


def _order(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of a leaf (..., S, width) as XLA for TPUs lays an argument out, the outermost first."""
    *rest, slots, width = range(len(shape))
    if shape[width] == 1:
        return (width, *rest, slots)
    on_lanes = lies_on_lanes(shape[width], shape[slots])
    return (*rest, width, slots) if on_lanes else (*rest, slots, width)


def divided_by_compiler(leaf: jax.Array) -> bool:
    """Whether an array lies on a mesh of several devices whose work the compiler divides."""
    for mesh in (jax.typeof(leaf).sharding.mesh, jax.sharding.get_abstract_mesh()):
        sizes = zip(mesh.axis_types, mesh.axis_sizes, strict=True)
        if any(kind != AxisType.Manual and size > 1 for kind, size in sizes):
            return True
    return False
