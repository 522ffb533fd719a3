"""Numbers as codecs store them: narrow floats as the integers of their bits, and what saturates."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

FLOOR = 2 * float(np.finfo(np.float32).tiny)  # the least scale: half of it divides, and 0 stays 0


def bits_dtype(dtype: Any) -> jnp.dtype:
    """The unsigned integers of a narrow float's width; any other dtype as it is.

    Example:
        >>> bits_dtype("bfloat16"), bits_dtype("float32")
        (dtype('uint16'), dtype('float32'))
    """
    dtype = jnp.dtype(dtype)
    narrow = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    return jnp.dtype(f"uint{8 * dtype.itemsize}") if narrow else dtype


def as_bits(x: jax.Array) -> jax.Array:
    """Narrow floats as the unsigned integers of their bits; any other numbers as they are."""
    dtype = bits_dtype(x.dtype)
    return x if dtype == x.dtype else lax.bitcast_convert_type(x, dtype)


def as_float(bits: jax.Array) -> jax.Array:
    """Stored bfloat16 bits as float32."""
    return lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32)


def single(tokens: jax.Array) -> jax.Array:
    """Tokens in float32; finite ones of float64 that it cannot hold become its largest number."""
    if tokens.dtype.itemsize > 4:
        top = float(np.finfo(np.float32).max)
        tokens = jnp.where(jnp.isfinite(tokens), jnp.clip(tokens, -top, top), tokens)
    return tokens.astype(jnp.float32)


def doubled(half: jax.Array, dtype: Any) -> jax.Array:
    """Twice some float32 or wider numbers in another dtype; finite ones stop at its largest.

    Codes and scales are rounded, so that their product may pass it, if the token did not.
    """
    top = min(float(jnp.finfo(x).max) for x in (dtype, half.dtype)) / 2
    return (2 * jnp.where(jnp.isinf(half), half, jnp.clip(half, -top, top))).astype(dtype)
