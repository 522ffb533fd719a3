"""Four bits a number, two a byte, with a scale and an offset: how `Int4` and `KIVI` store."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from lucid_jax.cache.codecs.base import Form, products
from lucid_jax.cache.codecs.numerics import FLOOR, as_bits, as_float, doubled, single


@dataclasses.dataclass(frozen=True)
class Nibbles(Form):
    """Four bits a number; each token has a scale and an offset for every `group` channels.

    Affine: codes 0 ... 15 span the group's least to its largest number. Scale and offset are bfloat16.

    Attributes:
        group: channels that share a scale; divides `dim`.
    """

    group: int

    def encode(self, tokens: jax.Array) -> dict[str, jax.Array]:
        wide = single(tokens).reshape(*tokens.shape[:3], -1, self.group)
        codes, offset, scale = quantize_affine(wide, wide.min(axis=-1), wide.max(axis=-1))
        return {"codes": pack(codes.reshape(tokens.shape)), "offset": offset, "scale": scale}

    def decode(self, stored: dict[str, jax.Array]) -> jax.Array:
        codes = self._groups(stored, jnp.dtype(jnp.float32))
        offset, scale = (as_float(stored[name])[..., None] / 2 for name in ("offset", "scale"))
        half = (codes * scale + offset).reshape(*codes.shape[:3], self.dim)
        return doubled(half, self.dtype)

    def scores(self, rows: jax.Array, stored: dict[str, jax.Array]) -> jax.Array:
        sums = rows.reshape(*rows.shape[:3], -1, self.group).sum(axis=-1)
        offset, scale = (as_float(stored[name]).astype(rows.dtype) for name in ("offset", "scale"))
        total = jnp.einsum("bhrg,bhsg->bhrs", sums, offset)
        for group, begin, codes in self._pieces(stored, rows.dtype):
            part = rows[..., begin : begin + codes.shape[3]]
            raw = products(part, codes)
            total = total + raw * scale[:, :, None, :, group]
        return total

    def mix(self, weights: jax.Array, stored: dict[str, jax.Array]) -> jax.Array:
        offset, scale = (
            as_float(stored[name]).astype(weights.dtype) / 2 for name in ("offset", "scale")
        )
        shift = jnp.einsum("bhrs,bhsg->bhrg", weights, offset)
        parts = {}
        for group, begin, codes in self._pieces(stored, weights.dtype):
            scaled = weights * scale[:, :, None, :, group]
            mixed = jnp.einsum("bhrs,bhsd->bhrd", scaled, codes)
            parts[begin] = mixed + shift[..., group : group + 1]
        half = jnp.concatenate([parts[begin] for begin in sorted(parts)], axis=-1)
        return doubled(half, weights.dtype)

    def is_finite(self, stored: dict[str, jax.Array]) -> jax.Array:
        # Scales and offsets tell.
        shift, scale = (jnp.isfinite(as_float(stored[name])) for name in ("offset", "scale"))
        return jnp.all(shift & scale, axis=-1)

    def _pieces(
        self, stored: dict[str, jax.Array], dtype: jnp.dtype
    ) -> Iterator[tuple[int, int, jax.Array]]:
        """Codes (B, H, S, w) of runs of channels, each in one group and one half of the bytes.

        So no array of all the channels is put together first, which costs more than the products.
        Yields (group, first channel, codes).
        """
        half = stored["codes"].shape[3]
        width = math.gcd(self.group, half)
        nibbles = stored["codes"] & jnp.uint8(15), stored["codes"] >> jnp.uint8(4)
        for begin in range(0, self.dim, width):
            side, at = divmod(begin, half)
            yield begin // self.group, begin, nibbles[side][..., at : at + width].astype(dtype)

    def _groups(self, stored: dict[str, jax.Array], dtype: jnp.dtype) -> jax.Array:
        codes = unpack(stored["codes"], self.dim)
        return codes.astype(dtype).reshape(*codes.shape[:3], -1, self.group)


def channels(most: int, dim: int) -> int:
    """The largest divisor of a width up to a number of channels."""
    return max(n for n in range(1, min(most, dim) + 1) if dim % n == 0)


def quantize_affine(
    x: jax.Array, low: jax.Array, high: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes 0 ... 15 of x (..., n) between low and high (...), and offset and scale as stored."""
    # Codes are chosen for the offset and scale as they will be read back, rounded to bfloat16. All in
    # halves: from the least to the largest float32 it is twice the largest.
    top = float(jnp.finfo(jnp.bfloat16).max)
    offset = jnp.where(jnp.isinf(low), low, jnp.clip(low, -top, top)).astype(jnp.bfloat16)
    least = offset.astype(jnp.float32) / 2
    scale = jnp.maximum((high / 2 - least) / 7.5, FLOOR).astype(jnp.bfloat16)
    codes = (x / 2 - least[..., None]) / (scale.astype(jnp.float32) / 2)[..., None]
    return jnp.clip(jnp.round(codes), 0, 15).astype(jnp.uint8), as_bits(offset), as_bits(scale)


def pack(codes: jax.Array) -> jax.Array:
    """Codes 0 ... 15, uint8 (..., D), two a byte: channel i in the low half, i + D/2 in the high."""
    if codes.shape[-1] % 2:
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
    low, high = jnp.split(codes, 2, axis=-1)
    packed: jax.Array = low | (high << jnp.uint8(4))
    return packed


def unpack(packed: jax.Array, dim: int) -> jax.Array:
    """What `pack` packed, uint8 (..., dim)."""
    both = jnp.concatenate([packed & jnp.uint8(15), packed >> jnp.uint8(4)], axis=-1)
    return both[..., :dim]
