"""Matrix products inside the kernel: rows of float32 with many stored numbers.

Shapes: rows (R, D), weights (R, S), numbers of S tokens (S, D), or (D, S) if they lie along the lanes.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# By name the arrays of a leaf: `numbers`, and what comes once a token or for some channels together.
Piece = dict[str, jax.Array]


class How(NamedTuple):
    """How numbers of a leaf are multiplied with.

    Attributes:
        on_lanes: whether tokens lie along the lanes.
        rounded: whether rows are rounded to bfloat16 where numbers are.
    """

    on_lanes: bool
    rounded: bool


def dot(x: jax.Array, numbers: jax.Array, how: How, *, by_width: bool) -> jax.Array:
    """Rows times numbers, over their width or their tokens, in float32.

    While rows are few the matrix unit waits for the numbers: so they go through in three parts of
    bfloat16 each, and what is lost is that of float32. Of many that would be three times the work, and
    they are rounded, as they are wherever else a TPU multiplies narrow tokens.
    """
    dims = (((1,), (int(by_width ^ how.on_lanes),)), ((), ()))
    product = partial(lax.dot_general, dimension_numbers=dims, preferred_element_type=jnp.float32)
    if numbers.dtype != jnp.bfloat16:
        return product(x, numbers, precision=lax.Precision.HIGHEST)
    if how.rounded:
        return product(x.astype(jnp.bfloat16), numbers)
    high, rest = _split(x)
    mid, low = _split(rest)
    parts = product(jnp.concatenate([high, mid, low]).astype(jnp.bfloat16), numbers)
    count = len(x)
    total: jax.Array = parts[:count] + (parts[count : 2 * count] + parts[2 * count :])
    return total


def beside(alive: jax.Array, numbers: jax.Array, on_lanes: bool) -> jax.Array:
    """Which of the numbers are of tokens that are alive, bool (1, S)."""
    if on_lanes:
        return jnp.broadcast_to(alive, numbers.shape)
    flags = jnp.where(alive, jnp.float32(1), jnp.float32(0))
    return jnp.broadcast_to(flags, numbers.shape[::-1]).T > 0


def _split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Float32 numbers as what bfloat16 holds of them, and the rest."""
    bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536)
    high = lax.bitcast_convert_type(bits, jnp.float32)
    return high, x - high
