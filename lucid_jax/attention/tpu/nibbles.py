"""Four bits a number in the kernel: each half of the bytes in one product, of rows by group.

A byte holds channel i in its low half and channel i + D/2 in its high one: two sides, W = D/2 wide.
Shapes: rows (B, H, R, D); inside the kernel (k R, W), an (R, W) for each piece, a group of a side.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from lucid_jax.attention.tpu.products import How, Piece, dot
from lucid_jax.cache.codecs import Nibbles
from lucid_jax.cache.codecs.numerics import doubled


def pieces(form: Nibbles) -> list[list[tuple[int, int, int]]]:
    """Of each side its groups: number, and first and last channel within the side, exclusive."""
    half = -(-form.dim // 2)
    sides = []
    for first, stop in ((0, half), (half, form.dim)):
        groups = range(first // form.group, -(-stop // form.group))
        sides.append(
            [
                (g, max(g * form.group, first) - first, min((g + 1) * form.group, stop) - first)
                for g in groups
            ]
        )
    return sides


def sides_of(dim: int, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows (B, H, R, D) of the channels of each side, (B, H, R, W)."""
    half = -(-dim // 2)
    return rows[..., :half], jnp.pad(rows[..., half:], [(0, 0)] * 3 + [(0, dim % 2)])


def queries_of(form: Nibbles, rows: jax.Array) -> Piece:
    """Rows of each piece, zero in other channels, one after the other; and sums over groups."""
    sides = sides_of(form.dim, rows)
    half = sides[0].shape[-1]
    channel = jnp.arange(half).reshape(1, 1, 1, half)
    parts = [
        jnp.where((channel >= first) & (channel < stop), side, 0)
        for side, groups in zip(sides, pieces(form), strict=True)
        for _, first, stop in groups
    ]
    sums = rows.reshape(*rows.shape[:3], -1, form.group).sum(axis=-1)
    return {"rows": jnp.concatenate(parts, axis=2), "sums": sums}


def scores(form: Nibbles, queries: Piece, stored: Piece, how: How) -> jax.Array:
    """Products of rows and keys, float32 (R, S)."""
    scale, offset = as_float(stored["scale"]), as_float(stored["offset"])
    sums, count, at = queries["sums"], len(queries["sums"]), 0
    total = sums[:, :1] * offset[:1]
    for group in range(1, len(offset)):
        total = total + sums[:, group : group + 1] * offset[group : group + 1]
    for side, groups in zip(sides_of_bytes(stored["numbers"]), pieces(form), strict=True):
        size = len(groups) * count
        raw = dot(queries["rows"][at : at + size], side, how, by_width=True)
        for i, (group, _, _) in enumerate(groups):
            total = total + raw[i * count : (i + 1) * count] * scale[group : group + 1]
        at += size
    return total


def mix(form: Nibbles, weights: jax.Array, stored: Piece, alive: jax.Array, how: How) -> jax.Array:
    """Weights times the values that are alive, one side below the other: float32 (2 R, W)."""
    scale, offset = (
        jnp.where(alive, as_float(stored[name]) / 2, 0) for name in ("scale", "offset")
    )
    count, mixed = len(weights), []
    for side, groups in zip(sides_of_bytes(stored["numbers"]), pieces(form), strict=True):
        scaled = jnp.concatenate([weights * scale[group : group + 1] for group, _, _ in groups])
        raw = dot(scaled, side, how, by_width=False)
        channel = lax.broadcasted_iota(jnp.int32, (count, raw.shape[1]), 1)
        total = jnp.zeros(channel.shape, jnp.float32)
        for i, (group, first, stop) in enumerate(groups):
            shift = jnp.sum(weights * offset[group : group + 1], axis=1, keepdims=True)
            one = raw[i * count : (i + 1) * count] + shift
            total = jnp.where((channel >= first) & (channel < stop), one, total)
        mixed.append(total)
    return doubled(jnp.concatenate(mixed), jnp.float32)


def value_of(form: Nibbles, mixed: jax.Array) -> jax.Array:
    """What was mixed, (B, H, 2 R, W), as values (B, H, R, D)."""
    sides = jnp.split(mixed, 2, axis=2)
    return jnp.concatenate(sides, axis=-1)[..., : form.dim]


def sides_of_bytes(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both halves of bytes, exact in bfloat16."""
    wide = packed.astype(jnp.int32)

    def exact(x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32).astype(jnp.bfloat16)

    return exact(wide & 15), exact(wide >> 4)


def as_float(bits: jax.Array) -> jax.Array:
    """Bits of bfloat16 as float32."""
    return lax.bitcast_convert_type(bits.astype(jnp.int32) << 16, jnp.float32)
