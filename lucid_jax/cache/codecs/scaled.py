"""One byte a number and one scale a token: how `Int8` and `Float8` store."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from lucid_jax.cache.codecs.base import Form, products
from lucid_jax.cache.codecs.numerics import FLOOR, as_bits, doubled, single


@dataclasses.dataclass(frozen=True)
class Scaled(Form):
    """One byte a number and one float32 scale a token: int8, or float8 (e4m3).

    Symmetric: the largest magnitude of the token takes the largest code.

    Attributes:
        code: "int8" or "float8_e4m3fn".
    """

    code: str

    def encode(self, tokens: jax.Array) -> dict[str, jax.Array]:
        wide = single(tokens)
        top = 127.0 if self.code == "int8" else float(jnp.finfo(self.code).max)
        scale = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1) / top, FLOOR)
        scaled = jnp.clip(wide / scale[..., None], -top, top)
        if self.code == "int8":
            return {"codes": jnp.round(scaled).astype(jnp.int8), "scale": scale}
        return {"codes": as_bits(scaled.astype(self.code)), "scale": scale}

    def decode(self, stored: dict[str, jax.Array]) -> jax.Array:
        half = self._numbers(stored, jnp.dtype(jnp.float32)) * (stored["scale"] / 2)[..., None]
        return doubled(half, self.dtype)

    def scores(self, rows: jax.Array, stored: dict[str, jax.Array]) -> jax.Array:
        raw = products(rows, self._numbers(stored, rows.dtype))
        return raw * stored["scale"].astype(rows.dtype)[:, :, None]

    def mix(self, weights: jax.Array, stored: dict[str, jax.Array]) -> jax.Array:
        halves = weights * (stored["scale"] / 2).astype(weights.dtype)[:, :, None]
        mixed = jnp.einsum("bhrs,bhsd->bhrd", halves, self._numbers(stored, weights.dtype))
        return doubled(mixed, weights.dtype)

    def is_finite(self, stored: dict[str, jax.Array]) -> jax.Array:
        # A token's scale tells.
        return jnp.isfinite(stored["scale"])

    def _numbers(self, stored: dict[str, jax.Array], dtype: jnp.dtype) -> jax.Array:
        codes = stored["codes"]
        if self.code != "int8":
            codes = lax.bitcast_convert_type(codes, jnp.dtype(self.code))
        return codes.astype(dtype)
