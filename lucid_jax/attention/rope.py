"""Rotary position embedding (Su et al., 2021, "RoFormer"), in the rotate-half form of Llama.

Shapes: x (B, H, T, D); positions [T], or [B, T] where rows stand at different positions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def rope(x: jax.Array, positions: jax.Array, theta: float = 10000.0) -> jax.Array:
    """Rotates each pair (x[i], x[i + D/2]) by `position * theta ** (-2i / D)`.

    The pairing is Hugging Face's for Llama checkpoints, not the interleaved one of the paper.
    Angles and rotation are computed in float32: bfloat16 cannot tell position 4096 from 4104.

    Args:
      x: queries or keys, (B, H, T, D), D even.
      positions: integer absolute positions, [T] or [B, T].
      theta: base of the geometric series of wavelengths.

    Returns:
      The rotated array, in x's shape and dtype.

    Raises:
      ValueError: if x is not 4-D, D is odd, or positions are neither [T] nor [B, T].
      TypeError: if positions are not integers.
    """
    if x.ndim != 4:
        raise ValueError(f"rope takes x as (batch, heads, seq, head_dim), got shape {x.shape}")
    batch, _, length, head_dim = x.shape
    if head_dim % 2:
        raise ValueError(f"rope rotates pairs, so head_dim must be even, got {head_dim}")
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(f"rope takes integer positions, got {positions.dtype}")
    if positions.shape not in ((length,), (batch, length), (1, length)):
        raise ValueError(
            f"rope takes positions of shape ({length},) or ({batch}, {length}) for x of shape "
            f"{x.shape}, got {positions.shape}"
        )
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)  # [D/2]
    # The same for all heads: [1 or B, 1, T, D/2].
    angles = positions.astype(jnp.float32).reshape(-1, 1, length, 1) * frequencies[None, None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    # Behind a barrier, or XLA on CPU computes them again for every head: 26 ms for a window of 2048
    # and 8 heads of 128, against 7 ms.
    cos, sin = lax.optimization_barrier(
        (jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1))
    )
    wide = x.astype(jnp.float32)
    swapped = jnp.concatenate(jnp.split(wide, 2, axis=-1)[::-1], axis=-1)
    return (wide * cos + swapped * sin).astype(x.dtype)
