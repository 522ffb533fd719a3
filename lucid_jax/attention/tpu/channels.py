"""Keys of four bits whose scales are by channel and group of tokens (KIVI), in the kernel.

The scale of a channel goes to the query's channel, so that each group has queries of its own; those of
the groups that share a register are multiplied at once, and of each product its group's tokens count.
Shapes: rows (R, D), or their sides (2 R, W) one below the other, see nibbles.py; scales (groups, D).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from lucid_jax.attention.tpu.nibbles import as_float, sides_of, sides_of_bytes
from lucid_jax.attention.tpu.products import How, Piece, dot
from lucid_jax.cache.codecs import ChannelNibbles
from lucid_jax.cache.tiles import LANES, ROWS


def takes(form: ChannelNibbles) -> bool:
    """Whether registers hold whole groups, or groups whole registers."""
    return LANES % form.tokens == 0 or form.tokens % LANES == 0


def least_slots(form: ChannelNibbles) -> int:
    """Slots of the smallest block, with eight groups, as scales are read by eights."""
    return math.lcm(LANES, ROWS * form.tokens)


def queries_of(form: ChannelNibbles, rows: jax.Array) -> Piece:
    """Rows (B, H, R, D), and their sides one below the other."""
    return {"rows": rows, "sides": jnp.concatenate(sides_of(form.dim, rows), axis=2)}


def scores(form: ChannelNibbles, queries: Piece, stored: Piece, how: How) -> jax.Array:
    """Products of rows and keys, float32 (R, S)."""
    sides, scales = sides_of_bytes(stored["numbers"]), as_float(stored["scale"])
    count = len(queries["rows"])
    asked = queries["sides"][:count], queries["sides"][count:]
    width = asked[0].shape[1]
    by_side = scales[:, :width], _wide(scales[:, width:], width)
    shift = dot(
        queries["rows"], as_float(stored["offset"]), how._replace(on_lanes=False), by_width=True
    )
    tokens = math.lcm(LANES, form.tokens)  # of a step: whole registers, whole groups
    groups = tokens // form.tokens
    found = []
    for step in range(sides[0].shape[int(how.on_lanes)] // tokens):
        at, first = slice(step * tokens, (step + 1) * tokens), step * groups
        raw = [shift[:, first + i : first + i + 1] for i in range(groups)]
        for rows, scale, side in zip(asked, by_side, sides, strict=True):
            each = [rows * scale[first + i : first + i + 1] for i in range(groups)]
            numbers = side[:, at] if how.on_lanes else side[at]
            both = dot(jnp.concatenate(each), numbers, how, by_width=True)
            raw = [x + both[i * count : (i + 1) * count] for i, x in enumerate(raw)]
        group = lax.broadcasted_iota(jnp.int32, (count, tokens), 1) // form.tokens
        total = raw[0]
        for i in range(1, groups):
            total = jnp.where(group == i, raw[i], total)
        found.append(total)
    return jnp.concatenate(found, axis=1)


def _wide(x: jax.Array, width: int) -> jax.Array:
    """Rows as wide as the other side: of an odd width the last channel is nobody's."""
    rest = width - x.shape[1]
    return jnp.concatenate([x, jnp.zeros((len(x), rest), x.dtype)], axis=1) if rest else x
