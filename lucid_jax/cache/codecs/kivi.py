"""Four bits a number, keys by channel in groups of tokens."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from lucid_jax.cache.argument_checks import check_count
from lucid_jax.cache.codecs.base import Codec, Form
from lucid_jax.cache.codecs.nibbles import Nibbles, channels, pack, quantize_affine, unpack
from lucid_jax.cache.codecs.numerics import as_float, doubled, single
from lucid_jax.cache.codecs.rotation import rotated


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
        """As of any form, but of whole groups, each of which is quantized by itself."""
        batch, heads, _, _ = tokens.shape
        wide = single(tokens).reshape(batch, heads, -1, self.tokens, self.dim)
        low, high = wide.min(axis=3), wide.max(axis=3)
        codes, offset, scale = quantize_affine(wide.swapaxes(3, 4), low, high)
        codes = codes.swapaxes(3, 4).reshape(tokens.shape)
        return {"codes": pack(codes), "offset": offset, "scale": scale}

    def decode(self, stored: dict[str, jax.Array]) -> jax.Array:
        codes = self._groups(stored, jnp.dtype(jnp.float32))
        offset, scale = (as_float(stored[name])[:, :, :, None] / 2 for name in ("offset", "scale"))
        half = (codes * scale + offset).reshape(*codes.shape[:2], -1, self.dim)
        return doubled(half, self.dtype)

    def scores(self, rows: jax.Array, stored: dict[str, jax.Array]) -> jax.Array:
        # The scale of a channel goes to the query's channel.
        offset, scale = (as_float(stored[name]).astype(rows.dtype) for name in ("offset", "scale"))
        scaled = rows[:, :, None] * scale[:, :, :, None]  # (B, H, n, R, D)
        raw = jnp.einsum("bhnrd,bhntd->bhrnt", scaled, self._groups(stored, rows.dtype))
        raw = raw + jnp.einsum("bhrd,bhnd->bhrn", rows, offset)[..., None]
        return raw.reshape(*rows.shape[:3], -1)

    def made_finite(self, stored: dict[str, jax.Array]) -> dict[str, jax.Array]:
        # By group and channel.
        good = {
            name: jnp.where(jnp.isfinite(as_float(stored[name])), stored[name], jnp.uint16(0))
            for name in ("offset", "scale")
        }
        return {**stored, **good}

    def _groups(self, stored: dict[str, jax.Array], dtype: jnp.dtype) -> jax.Array:
        codes = unpack(stored["codes"], self.dim).astype(dtype)
        return codes.reshape(*codes.shape[:2], -1, self.tokens, self.dim)


@dataclasses.dataclass(frozen=True)
class KIVI(Codec):
    """Four bits: keys quantized per channel in groups of tokens, values per token (KIVI, Liu et al.).

    The latest `residual` tokens are always read in full precision; behind them, whole groups are
    quantized, once. What was full precision is kept long enough that rolling back up to `residual`
    tokens, across such a flush too, is exact. Tokens are only appended: `cache_position` is refused.
    An append writes the slots of a group, so that it costs O(group), not O(1); it quantizes them only
    when the group is complete.

    Attributes:
        group: tokens of a group.
        residual: latest tokens in full precision, and the most that `rollback` undoes.
        channels: channels of a value that share a scale, as `Int4`'s `group`.
        rotate: turn keys by a Hadamard matrix first.
    """

    usage: ClassVar[tuple[str, ...]] = ("kivi", "kivi:GROUP", "kivi:GROUP+RESIDUAL")
    group: int = 64
    residual: int = 32
    channels: int = 64
    rotate: bool = False

    def __post_init__(self) -> None:
        for name, least in (("group", 2), ("residual", 1), ("channels", 1)):
            count = check_count(getattr(self, name), f"{name} of KIVI", least)
            object.__setattr__(self, name, count)

    @property
    def unit(self) -> int:  # type: ignore[override]
        return self.group

    @property
    def tail(self) -> int:  # type: ignore[override]
        return self.residual

    def forms(self, dtype: str, head_dim: int, value_head_dim: int) -> tuple[Form, Form]:
        key = ChannelNibbles(dtype, head_dim, self.group)
        value = Nibbles(dtype, value_head_dim, channels(self.channels, value_head_dim))
        return rotated(key, self.rotate), value
