"""Tokens as they are."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from lucid_jax.cache.codecs.base import Codec, Form, Stored


@dataclasses.dataclass(frozen=True)
class Raw(Form):
    """Tokens as they are, in their own dtype."""

    differentiable = True

    def cast(self, stored: jax.Array, other: Form) -> Stored:
        return other.encode(stored.astype(other.dtype))

    def encode(self, tokens: jax.Array) -> jax.Array:
        return tokens

    def decode(self, stored: jax.Array) -> jax.Array:
        return stored


@dataclasses.dataclass(frozen=True)
class Identity(Codec):
    """Stores tokens as they are, in the cache's dtype; gradients pass.

    On CPU XLA rewrites a whole bfloat16 or float16 buffer to write one token, and alters the payload
    of some bfloat16 NaNs: see `Bits`.
    """

    usage: ClassVar[tuple[str, ...]] = ("none",)

    def forms(self, dtype: str, head_dim: int, value_head_dim: int) -> tuple[Form, Form]:
        return Raw(dtype, head_dim), Raw(dtype, value_head_dim)


PLAIN = Identity()  # the codec of a layout that names none
