"""Forms: how one tensor of tokens (B, H, T, D) is stored, and how attention works on what is stored.

A form turns tokens into a small pytree of leaves (B, H, T, ...), or (B, H, T / g, ...) for what g
tokens share. Layouts move such leaves along T and never ask what they mean. Attention multiplies with
the stored codes and applies scales to scores and weights, so nothing decoded is ever materialised.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Stored = Any  # a leaf, or a dict of leaves; the first has one entry per token

_FEW = 64  # queries of a KV head up to which XLA on CPU wants the keys as the product's left side
_FLOOR = float(np.finfo(np.float32).tiny)  # the least scale: dividing by it is safe, and 0 stays 0


def products(rows: jax.Array, keys: jax.Array) -> jax.Array:
    """Products of rows (B, H, R, D) and keys (B, H, S, D), (B, H, R, S).

    With few rows the keys come first: for B=1, H=8, D=128, S=256 on CPU 22 us against 37-45 with 2,
    55 against 74 with 16; with 512 it would be 2.3 ms against 1.8.
    """
    if rows.shape[2] > _FEW:
        return jnp.einsum("bhrd,bhsd->bhrs", rows, keys)
    return jnp.swapaxes(jnp.einsum("bhsd,bhrd->bhsr", keys, rows), 2, 3)


@dataclasses.dataclass(frozen=True)
class Form(abc.ABC):
    """How tokens of one dtype and width are stored.

    Attributes:
        dtype: name of the tokens' dtype, such as "bfloat16".
        dim: D, their width.
    """

    dtype: str
    dim: int

    @abc.abstractmethod
    def encode(self, tokens: jax.Array) -> Stored:
        """Tokens (B, H, T, D) to their storage form, each token by itself."""

    @abc.abstractmethod
    def decode(self, stored: Stored) -> jax.Array:
        """The tokens a piece of storage stands for. Slice first: decode only what is read."""

    def scores(self, rows: jax.Array, stored: Stored) -> jax.Array:
        """Products of rows (B, H, R, D) and stored keys of S tokens: (B, H, R, S) in rows' dtype."""
        return products(rows, self.decode(stored).astype(rows.dtype))

    def mix(self, weights: jax.Array, stored: Stored) -> jax.Array:
        """Weights (B, H, R, S) times stored values of S tokens: (B, H, R, D) in weights' dtype."""
        return jnp.einsum("bhrs,bhsd->bhrd", weights, self.decode(stored).astype(weights.dtype))

    def empty(self, batch_size: int, heads: int, slots: int) -> Stored:
        """Storage of `slots` zero tokens; each leaf has a buffer of its own."""
        tokens = jax.ShapeDtypeStruct((batch_size, heads, slots, self.dim), jnp.dtype(self.dtype))
        return jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(self.encode, tokens)
        )


@dataclasses.dataclass(frozen=True)
class Raw(Form):
    """Tokens as they are, bit for bit.

    Floats narrower than 32 bits are kept as unsigned integers of their width. XLA on CPU has no
    narrow float arithmetic and would widen a whole bfloat16 buffer to float32 and back to write one
    token (measured: 2 ms against 0.2 ms at 16 MB); integers it moves as they are.
    """

    def encode(self, tokens: jax.Array) -> jax.Array:
        """See `Form.encode`."""
        return _as_bits(tokens)

    def decode(self, stored: jax.Array) -> jax.Array:
        """See `Form.decode`."""
        return lax.bitcast_convert_type(stored, jnp.dtype(self.dtype))


@dataclasses.dataclass(frozen=True)
class Scaled(Form):
    """One byte a number and one float32 scale a token: int8, or float8 (e4m3).

    Symmetric: the largest magnitude of the token takes the largest code.

    Attributes:
        code: "int8" or "float8_e4m3fn".
    """

    code: str

    def encode(self, tokens: jax.Array) -> dict[str, jax.Array]:
        """See `Form.encode`."""
        wide = tokens.astype(jnp.float32)
        top = 127.0 if self.code == "int8" else float(jnp.finfo(self.code).max)
        scale = jnp.maximum(jnp.max(jnp.abs(wide), axis=-1) / top, _FLOOR)
        scaled = jnp.clip(wide / scale[..., None], -top, top)
        if self.code == "int8":
            return {"codes": jnp.round(scaled).astype(jnp.int8), "scale": scale}
        return {"codes": _as_bits(scaled.astype(self.code)), "scale": scale}

    def decode(self, stored: dict[str, jax.Array]) -> jax.Array:
        """See `Form.decode`."""
        wide = self._numbers(stored, jnp.dtype(jnp.float32)) * stored["scale"][..., None]
        return wide.astype(self.dtype)

    def scores(self, rows: jax.Array, stored: dict[str, jax.Array]) -> jax.Array:
        """See `Form.scores`."""
        raw = products(rows, self._numbers(stored, rows.dtype))
        return raw * stored["scale"].astype(rows.dtype)[:, :, None]

    def mix(self, weights: jax.Array, stored: dict[str, jax.Array]) -> jax.Array:
        """See `Form.mix`."""
        weights = weights * stored["scale"].astype(weights.dtype)[:, :, None]
        return jnp.einsum("bhrs,bhsd->bhrd", weights, self._numbers(stored, weights.dtype))

    def _numbers(self, stored: dict[str, jax.Array], dtype: jnp.dtype) -> jax.Array:
        codes = stored["codes"]
        if self.code != "int8":
            codes = lax.bitcast_convert_type(codes, jnp.dtype(self.code))
        return codes.astype(dtype)


@dataclasses.dataclass(frozen=True)
class Nibbles(Form):
    """Four bits a number; each token has a scale and an offset for every `group` channels.

    Affine: codes 0 ... 15 span the group's least to its largest number. Scale and offset are bfloat16.

    Attributes:
        group: channels that share a scale; divides `dim`.
    """

    group: int

    def encode(self, tokens: jax.Array) -> dict[str, jax.Array]:
        """See `Form.encode`."""
        wide = tokens.astype(jnp.float32).reshape(*tokens.shape[:3], -1, self.group)
        codes, offset, scale = _quantize_affine(wide, wide.min(axis=-1), wide.max(axis=-1))
        return {"codes": _pack(codes.reshape(tokens.shape)), "offset": offset, "scale": scale}

    def decode(self, stored: dict[str, jax.Array]) -> jax.Array:
        """See `Form.decode`."""
        codes = self._groups(stored, jnp.dtype(jnp.float32))
        offset, scale = (_as_float(stored[name])[..., None] for name in ("offset", "scale"))
        wide = (codes * scale + offset).reshape(*codes.shape[:3], self.dim)
        return _narrowed(wide, self.dtype)

    def scores(self, rows: jax.Array, stored: dict[str, jax.Array]) -> jax.Array:
        """See `Form.scores`."""
        sums = rows.reshape(*rows.shape[:3], -1, self.group).sum(axis=-1)
        offset, scale = (_as_float(stored[name]).astype(rows.dtype) for name in ("offset", "scale"))
        total = jnp.einsum("bhrg,bhsg->bhrs", sums, offset)
        for group, begin, codes in self._pieces(stored, rows.dtype):
            part = rows[..., begin : begin + codes.shape[3]]
            raw = products(part, codes)
            total = total + raw * scale[:, :, None, :, group]
        return total

    def mix(self, weights: jax.Array, stored: dict[str, jax.Array]) -> jax.Array:
        """See `Form.mix`."""
        offset, scale = (
            _as_float(stored[name]).astype(weights.dtype) for name in ("offset", "scale")
        )
        shift = jnp.einsum("bhrs,bhsg->bhrg", weights, offset)
        parts = {}
        for group, begin, codes in self._pieces(stored, weights.dtype):
            scaled = weights * scale[:, :, None, :, group]
            mixed = jnp.einsum("bhrs,bhsd->bhrd", scaled, codes)
            parts[begin] = mixed + shift[..., group : group + 1]
        return jnp.concatenate([parts[begin] for begin in sorted(parts)], axis=-1)

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
        codes = _unpack(stored["codes"], self.dim)
        return codes.astype(dtype).reshape(*codes.shape[:3], -1, self.group)


@dataclasses.dataclass(frozen=True)
class ChannelNibbles(Form):
    """Four bits a number; each channel has a scale and an offset for every `tokens` tokens (KIVI).

    Keys have a few channels of large magnitude (Liu et al. 2024), which then spoil no other channel.
    Affine; scale and offset are bfloat16 leaves (B, H, T / tokens, D).

    Attributes:
        tokens: tokens that share a scale.
    """

    tokens: int

    def encode(self, tokens: jax.Array) -> dict[str, jax.Array]:
        """See `Form.encode`; but it takes whole groups, and quantizes each group by itself."""
        batch, heads, _, _ = tokens.shape
        wide = tokens.astype(jnp.float32).reshape(batch, heads, -1, self.tokens, self.dim)
        low, high = wide.min(axis=3), wide.max(axis=3)
        codes, offset, scale = _quantize_affine(wide.swapaxes(3, 4), low, high)
        codes = codes.swapaxes(3, 4).reshape(tokens.shape)
        return {"codes": _pack(codes), "offset": offset, "scale": scale}

    def decode(self, stored: dict[str, jax.Array]) -> jax.Array:
        """See `Form.decode`."""
        codes = self._groups(stored, jnp.dtype(jnp.float32))
        offset, scale = (_as_float(stored[name])[:, :, :, None] for name in ("offset", "scale"))
        tokens = (codes * scale + offset).reshape(*codes.shape[:2], -1, self.dim)
        return _narrowed(tokens, self.dtype)

    def scores(self, rows: jax.Array, stored: dict[str, jax.Array]) -> jax.Array:
        """See `Form.scores`: the scale of a channel goes to the query's channel."""
        offset, scale = (_as_float(stored[name]).astype(rows.dtype) for name in ("offset", "scale"))
        scaled = rows[:, :, None] * scale[:, :, :, None]  # (B, H, n, R, D)
        raw = jnp.einsum("bhnrd,bhntd->bhrnt", scaled, self._groups(stored, rows.dtype))
        raw = raw + jnp.einsum("bhrd,bhnd->bhrn", rows, offset)[..., None]
        return raw.reshape(*rows.shape[:3], -1)

    def _groups(self, stored: dict[str, jax.Array], dtype: jnp.dtype) -> jax.Array:
        codes = _unpack(stored["codes"], self.dim).astype(dtype)
        return codes.reshape(*codes.shape[:2], -1, self.tokens, self.dim)


@dataclasses.dataclass(frozen=True)
class Rotated(Form):
    """Tokens rotated by a Hadamard matrix before another form stores them.

    The rotation spreads an outlier channel over all of them (QuaRot, Ashkboos et al. 2024). It is
    orthogonal, so turning the queries alike leaves every score as it was.

    Attributes:
        inner: the form that stores the rotated tokens, which are float32.
    """

    inner: Form

    def encode(self, tokens: jax.Array) -> Stored:
        """See `Form.encode`."""
        return self.inner.encode(_turn(tokens.astype(jnp.float32)))

    def decode(self, stored: Stored) -> jax.Array:
        """See `Form.decode`."""
        return _turn(self.inner.decode(stored)).astype(self.dtype)

    def scores(self, rows: jax.Array, stored: Stored) -> jax.Array:
        """See `Form.scores`."""
        return self.inner.scores(_turn(rows), stored)


def hadamard(dim: int) -> np.ndarray:
    """A symmetric orthogonal (dim, dim) matrix of equal magnitudes within blocks.

    Sylvester's construction gives powers of two; other widths take it in blocks of the largest power
    of two that divides them.
    """
    block = np.ones((1, 1), np.float32)
    while dim % (2 * len(block)) == 0:
        block = np.block([[block, block], [block, -block]])
    return np.kron(np.eye(dim // len(block), dtype=np.float32), block / np.sqrt(len(block)))


def _turn(rows: jax.Array) -> jax.Array:
    """Rotates (B, H, R, D); its own inverse."""
    return jnp.einsum("bhrd,de->bhre", rows, jnp.asarray(hadamard(rows.shape[-1]), rows.dtype))


def _as_bits(x: jax.Array) -> jax.Array:
    """Floats under 32 bits as unsigned integers of their width; anything else as it is."""
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")) if narrow else x


def _as_float(bits: jax.Array) -> jax.Array:
    """Stored bfloat16 bits as float32."""
    return lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32)


def _narrowed(x: jax.Array, dtype: str) -> jax.Array:
    """float32 to the tokens' dtype: a rounded offset must not pass its largest number (float16)."""
    top = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -top, top).astype(dtype) if dtype == "float16" else x.astype(dtype)


def _quantize_affine(
    x: jax.Array, low: jax.Array, high: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes 0 ... 15 of x (..., n) between low and high (...), and offset and scale as stored."""
    # Codes are chosen for the offset and scale as they will be read back, rounded to bfloat16.
    offset = low.astype(jnp.bfloat16)
    span = high - offset.astype(jnp.float32)
    scale = jnp.maximum(span / 15, _FLOOR).astype(jnp.bfloat16)
    codes = (x - offset.astype(jnp.float32)[..., None]) / scale.astype(jnp.float32)[..., None]
    return jnp.clip(jnp.round(codes), 0, 15).astype(jnp.uint8), _as_bits(offset), _as_bits(scale)


def _pack(codes: jax.Array) -> jax.Array:
    """Codes 0 ... 15, uint8 (..., D), two a byte: channel i in the low half, i + D/2 in the high."""
    if codes.shape[-1] % 2:
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
    low, high = jnp.split(codes, 2, axis=-1)
    return low | (high << jnp.uint8(4))


def _unpack(packed: jax.Array, dim: int) -> jax.Array:
    """What `_pack` packed, uint8 (..., dim)."""
    both = jnp.concatenate([packed & jnp.uint8(15), packed >> jnp.uint8(4)], axis=-1)
    return both[..., :dim]
