"""Products with one head's stored tokens inside the kernel, by how the tokens are stored.

Shapes: rows (R, D), weights (R, S), a block of S tokens; `alive`, bool (1, S) or (R, S), are those that
may be mixed. Numbers of tokens come (S, D) or, of widths that would leave lanes empty, (D, S).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from lucid_jax.cache.codecs import AsBits, Form, Raw, Rotated, Rounded, Scaled
from lucid_jax.cache.codecs.base import Stored
from lucid_jax.cache.codecs.numerics import doubled
from lucid_jax.cache.codecs.rotation import hadamard

Piece = dict[
    str, jax.Array
]  # of one head: numbers (S, D) or (D, S), and (1, S) what a token has one of


def takes(form: Form) -> bool:
    """Whether the kernel reads a form; a class of the user's own it does not know."""
    if type(form) is Rotated:
        return takes(form.inner)
    if type(form) in (Raw, Rounded):
        return form.dtype in ("bfloat16", "float32")
    return type(form) is Scaled or (type(form) is AsBits and form.dtype == "bfloat16")


def turned(form: Form, rows: jax.Array) -> jax.Array:
    """Queries (B, H, R, D), turned as the keys that they are scored with."""
    if not isinstance(form, Rotated):
        return rows
    turn = jnp.asarray(hadamard(rows.shape[-1]), rows.dtype)
    return jnp.einsum("bhrd,de->bhre", rows, turn, precision="highest")


def arrays_of(form: Form, stored: Stored) -> Piece:
    """What is stored, by name: `numbers` (..., S, D) and the rest (..., S)."""
    if isinstance(form, Rotated):
        return arrays_of(form.inner, stored)
    if isinstance(form, Scaled):
        return {"numbers": stored["codes"], "scale": stored["scale"]}
    return {"numbers": stored}


def scores(form: Form, rows: jax.Array, piece: Piece, on_lanes: bool) -> jax.Array:
    """Products of rows and keys, float32 (R, S); of dead tokens anything."""
    if isinstance(form, Rotated):
        return scores(form.inner, rows, piece, on_lanes)
    raw = _dot(rows, _numbers(form, piece), by_width=True, on_lanes=on_lanes)
    return raw * piece["scale"] if isinstance(form, Scaled) else raw


def mix(
    form: Form, weights: jax.Array, piece: Piece, alive: jax.Array, on_lanes: bool
) -> jax.Array:
    """Weights times the values that are alive, float32 (R, D)."""
    numbers = _numbers(form, piece)
    if isinstance(form, Scaled):  # its codes are finite, whatever a slot holds
        halves = weights * jnp.where(alive, piece["scale"] / 2, 0)
        return doubled(_dot(halves, numbers, by_width=False, on_lanes=on_lanes), jnp.float32)
    numbers = jnp.where(_beside(alive, numbers, on_lanes), numbers, jnp.zeros((), numbers.dtype))
    return _dot(weights, numbers, by_width=False, on_lanes=on_lanes)


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


def _beside(alive: jax.Array, numbers: jax.Array, on_lanes: bool) -> jax.Array:
    """Which of the numbers are of tokens that are alive."""
    if on_lanes:
        return jnp.broadcast_to(alive, numbers.shape)
    flags = jnp.where(alive, jnp.float32(1), jnp.float32(0))
    return jnp.broadcast_to(flags, numbers.shape[::-1]).T > 0


def _dot(x: jax.Array, numbers: jax.Array, *, by_width: bool, on_lanes: bool) -> jax.Array:
    """Rows times numbers, over their width or their tokens, in float32.

    Rows are few, and the matrix unit waits for the numbers: so rows go through in three parts of
    bfloat16 each, and what is lost is that of float32.
    """
    dims = (((1,), (by_width ^ on_lanes,)), ((), ()))
    dot = partial(lax.dot_general, dimension_numbers=dims, preferred_element_type=jnp.float32)
    if numbers.dtype != jnp.bfloat16:
        return dot(x, numbers, precision=lax.Precision.HIGHEST)
    high, rest = _split(x)
    mid, low = _split(rest)
    parts = dot(jnp.concatenate([high, mid, low]).astype(jnp.bfloat16), numbers)
    count = len(x)
    return parts[:count] + (parts[count : 2 * count] + parts[2 * count :])


def _split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Float32 numbers as what bfloat16 holds of them, and the rest."""
    bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536)
    high = lax.bitcast_convert_type(bits, jnp.float32)
    return high, x - high
