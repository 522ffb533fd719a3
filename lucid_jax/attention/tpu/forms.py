"""Products with one head's stored tokens inside the kernel, by how the tokens are stored.

Shapes: rows (R, D), weights (R, S), a block of S tokens; `alive`, bool (1, S), are those that may be
mixed. Numbers of tokens come (S, D) or, of widths that would leave lanes empty, (D, S).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from lucid_jax.attention.kernel_inputs import turned_for
from lucid_jax.attention.tpu import channels, nibbles
from lucid_jax.attention.tpu.products import How, Piece, beside, dot
from lucid_jax.cache.codecs import (
    AsBits,
    ChannelNibbles,
    Form,
    Nibbles,
    Raw,
    Rotated,
    Rounded,
    Scaled,
)
from lucid_jax.cache.codecs.base import Stored
from lucid_jax.cache.codecs.numerics import doubled
from lucid_jax.cache.tiles import LANES


def takes(form: Form) -> bool:
    """Whether the kernel reads a form; a class of the user's own it does not know."""
    if type(form) is Rotated:
        return takes(form.inner)
    if type(form) in (Raw, Rounded):
        return form.dtype in ("bfloat16", "float32")
    if type(form) is ChannelNibbles:
        return channels.takes(form)
    known = type(form) in (Scaled, Nibbles)
    return known or (type(form) is AsBits and form.dtype == "bfloat16")


def least_slots(form: Form) -> int:
    """Slots of the smallest block: whole registers, also of what a group of tokens shares."""
    if isinstance(form, Rotated):
        return least_slots(form.inner)
    return channels.least_slots(form) if isinstance(form, ChannelNibbles) else LANES


# --- outside of the kernel -------------------------------------------------------------------------


def narrowed(form: Form, rows: jax.Array) -> jax.Array:
    """Queries that are going to be rounded, rounded at once where nothing else is done to them."""
    plain = type(form) in (Raw, Rounded, AsBits) and form.dtype == "bfloat16"
    return rows.astype(jnp.bfloat16) if plain or type(form) is Scaled else rows


def queries_of(form: Form, rows: jax.Array) -> Piece:
    """Queries (B, H, R, D) as the kernel multiplies keys with them, arrays (B, H, ...)."""
    if isinstance(form, Rotated):
        return queries_of(form.inner, turned_for(form, rows))
    if isinstance(form, ChannelNibbles):
        return channels.queries_of(form, rows)
    return nibbles.queries_of(form, rows) if isinstance(form, Nibbles) else {"rows": rows}


def arrays_of(form: Form, stored: Stored) -> Piece:
    """What is stored, by name: (..., S, width) or (..., S)."""
    if isinstance(form, Rotated):
        return arrays_of(form.inner, stored)
    if not isinstance(form, (Scaled, Nibbles, ChannelNibbles)):
        return {"numbers": stored}
    beside_codes = {name: x for name, x in stored.items() if name != "codes"}
    if isinstance(form, Nibbles) and form.group == form.dim:  # an axis of 1 XLA lays elsewhere
        beside_codes = {name: x[..., 0] for name, x in beside_codes.items()}
    return {"numbers": stored["codes"], **beside_codes}


def mixed_shape(form: Form, count: int) -> tuple[int, int]:
    """The shape of what `mix` gives of `count` rows."""
    return (2 * count, -(-form.dim // 2)) if isinstance(form, Nibbles) else (count, form.dim)


def value_of(form: Form, mixed: jax.Array) -> jax.Array:
    """Values (B, H, R, D) of what was mixed."""
    return nibbles.value_of(form, mixed) if isinstance(form, Nibbles) else mixed


# --- inside ----------------------------------------------------------------------------------------


def scores(form: Form, queries: Piece, piece: Piece, how: How) -> jax.Array:
    """Products of rows and keys, float32 (R, S); of dead tokens anything."""
    if isinstance(form, Rotated):
        return scores(form.inner, queries, piece, how)
    if isinstance(form, ChannelNibbles):
        return channels.scores(form, queries, piece, how)
    if isinstance(form, Nibbles):
        return nibbles.scores(form, queries, piece, how)
    raw = dot(queries["rows"], _numbers(form, piece), how, by_width=True)
    return raw * piece["scale"] if isinstance(form, Scaled) else raw


def mix(form: Form, weights: jax.Array, piece: Piece, alive: jax.Array, how: How) -> jax.Array:
    """Weights times the values that are alive, float32, shaped as `mixed_shape` says."""
    if isinstance(form, Nibbles):
        return nibbles.mix(form, weights, piece, alive, how)
    numbers = _numbers(form, piece)
    if isinstance(form, Scaled):  # its codes are finite, whatever a slot holds
        halves = weights * jnp.where(alive, piece["scale"] / 2, 0)
        return doubled(dot(halves, numbers, how, by_width=False), jnp.float32)
    numbers = jnp.where(beside(alive, numbers, how.on_lanes), numbers, jnp.zeros((), numbers.dtype))
    return dot(weights, numbers, how, by_width=False)


def _numbers(form: Form, piece: Piece) -> jax.Array:
    """Numbers as the matrix unit takes them: codes of a byte are exact in bfloat16."""
    numbers = piece["numbers"]
    if isinstance(form, AsBits):
        return lax.bitcast_convert_type(numbers, jnp.dtype(form.dtype))
    if not isinstance(form, Scaled):
        return numbers
    if form.code == "int8":
        return numbers.astype(jnp.float32).astype(jnp.bfloat16)
    wide = lax.bitcast_convert_type(numbers, jnp.dtype(form.code)).astype(jnp.float32)
    return jnp.where(jnp.isnan(wide), 0, wide).astype(jnp.bfloat16)
