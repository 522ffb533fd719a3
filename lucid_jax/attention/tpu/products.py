"""Matrix products inside the kernel: few rows of float32 with many stored numbers.

Shapes: rows (R, D), weights (R, S), numbers of S tokens (S, D), or (D, S) if they lie along the lanes.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

# By name the arrays of a leaf: `numbers`, and what comes once a token or for some channels together.
Piece = dict[str, jax.Array]


def dot(x: jax.Array, numbers: jax.Array, *, by_width: bool, on_lanes: bool) -> jax.Array:
    """Rows times numbers, over their width or their tokens, in float32.

    Rows are few, and the matrix unit waits for the numbers: so rows go through in three parts of
    bfloat16 each, and what is lost is that of float32.
    """
    dims = (((1,), (int(by_width ^ on_lanes),)), ((), ()))
    product = partial(lax.dot_general, dimension_numbers=dims, preferred_element_type=jnp.float32)
    if numbers.dtype != jnp.bfloat16:
        return product(x, numbers, precision=lax.Precision.HIGHEST)
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
