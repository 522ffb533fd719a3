"""What may be given as a codec, and which tokens a codec takes."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lucid_jax.cache.codecs.base import Codec
from lucid_jax.cache.codecs.bits import keeps_bits


def check_codec(codec: Any) -> Codec:
    """Checks what was given as `codec=`.

    Raises:
        TypeError: if it is no codec.
    """
    if not isinstance(codec, Codec):
        raise TypeError(
            f"codec must be a codec such as lucid_jax.codecs.Int8(), got {codec!r}; "
            "(lucid_jax.Int8 is the dtype)"
        )
    return codec


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def refuse_tangents(codec: Codec, tokens: jax.Array) -> jax.Array:
    """The tokens, on their way into a codec whose leaves carry no tangents.

    Raises:
        TypeError: where they are differentiated, which would give zeros or worse.
    """
    return tokens


@refuse_tangents.defjvp
def _(codec: Codec, *_: Any) -> Any:
    fix = (
        "store them by codecs.Identity()"
        if keeps_bits(codec)
        else f"train with its rounding by codecs.Simulated({codec})"
    )
    raise TypeError(
        f"tokens that carry a gradient cannot be stored by {codec}, whose leaves carry none; {fix}, "
        "or say that none is wanted with jax.lax.stop_gradient on the keys and values"
    )


_FLOATS = ("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64")


def check_dtype(dtype: DTypeLike, codec: Codec) -> None:
    """Checks the dtype of tokens against what caches hold, and what a codec takes.

    Raises:
        TypeError: for complex numbers, floats that XLA cannot move slot by slot, or integers in a codec
            that quantizes.
    """
    known = jnp.dtype(dtype)
    if known.name in _FLOATS:
        return
    if not (jnp.issubdtype(known, jnp.integer) or known == jnp.bool_):
        hint = (
            "; store real and imaginary parts as two halves of head_dim"
            if known.kind == "c"
            else ""
        )
        raise TypeError(
            f"tokens must be one of {', '.join(_FLOATS)}, integers or booleans, got {known}{hint}"
            + ("; or store four bits a number by codecs.Int4()" if "float4" in known.name else "")
        )
    if not keeps_bits(codec):
        raise TypeError(
            f"{codec} quantizes floating-point tokens, got dtype {known}; use a floating dtype, or no "
            "codec"
        )
