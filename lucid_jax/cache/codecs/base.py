"""What every codec is, and what every form: how a codec's keys, or its values, are stored.

A codec is a small hashable description given to a layout, `Static(2048, codec=Int8())`. It names a
form for the keys and one for the values.

A form turns tokens (B, H, T, D) into a small pytree of leaves (B, H, T, ...), or (B, H, T / g, ...) for
what g tokens share. Layouts move such leaves along T and never ask what they mean. Attention multiplies
with the stored codes and applies scales to scores and weights, so nothing decoded is ever materialised.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

Stored = Any  # a leaf, or a dict of leaves; the first has one entry per token

_FEW = 64  # queries of a KV head up to which XLA on CPU wants the keys as the product's left side


def products(rows: jax.Array, keys: jax.Array, precision: lax.Precision | None = None) -> jax.Array:
    """Products of rows (B, H, R, D) and keys (B, H, S, D), (B, H, R, S).

    With few rows the keys come first: for B=1, H=8, D=128, S=256 on CPU 22 us against 37-45 with 2,
    55 against 74 with 16; with 512 it would be 2.3 ms against 1.8.
    """
    if rows.shape[2] > _FEW:
        return jnp.einsum("bhrd,bhsd->bhrs", rows, keys, precision=precision)
    return jnp.swapaxes(jnp.einsum("bhsd,bhrd->bhsr", keys, rows, precision=precision), 2, 3)


@dataclasses.dataclass(frozen=True)
class Form(abc.ABC):
    """How tokens of one dtype and width are stored.

    Attributes:
        dtype: name of the tokens' dtype, such as "bfloat16".
        dim: D, their width.
    """

    dtype: str
    dim: int
    differentiable: ClassVar[bool] = False  # whether what is stored carries the tokens' tangents

    @abc.abstractmethod
    def encode(self, tokens: jax.Array) -> Stored:
        """Tokens (B, H, T, D) to their storage form, each token by itself."""

    @abc.abstractmethod
    def decode(self, stored: Stored) -> jax.Array:
        """The tokens a piece of storage stands for. Slice first: decode only what is read."""

    def cast(self, stored: Stored, other: Form) -> Stored:
        """Storage of the same tokens in the dtype of another form, which differs in that only.

        Codes stay: what they stand for is rounded to the tokens' dtype when it is read.
        """
        return stored

    def scores(self, rows: jax.Array, stored: Stored) -> jax.Array:
        """Products of rows (B, H, R, D) and stored keys of S tokens: (B, H, R, S) in rows' dtype."""
        return products(rows, self.decode(stored).astype(rows.dtype), self.precision)

    def mix(self, weights: jax.Array, stored: Stored) -> jax.Array:
        """Weights (B, H, R, S) times stored values of S tokens: (B, H, R, D) in weights' dtype."""
        tokens = self.decode(stored).astype(weights.dtype)
        return jnp.einsum("bhrs,bhsd->bhrd", weights, tokens, precision=self.precision)

    @property
    def precision(self) -> lax.Precision | None:
        """A TPU rounds what it multiplies to bfloat16 unless told not to: no loss to narrow tokens."""
        return lax.Precision.HIGHEST if jnp.dtype(self.dtype).itemsize > 2 else None

    def is_finite(self, stored: Stored) -> jax.Array:
        """Which of S tokens stand for finite numbers, bool (B, H, S)."""
        return jnp.all(jnp.isfinite(self.decode(stored)), axis=-1)

    def made_finite(self, stored: Stored) -> Stored:
        """What is stored, with zeros for tokens that are not finite."""
        good = self.is_finite(stored)
        return jax.tree.map(
            lambda leaf: jnp.where(
                good.reshape(*good.shape, *(1,) * (leaf.ndim - 3)), leaf, jnp.zeros((), leaf.dtype)
            ),
            stored,
        )

    def empty(self, batch_size: int, heads: int, slots: int) -> Stored:
        """Storage of `slots` zero tokens; each leaf has a buffer of its own."""
        tokens = jax.ShapeDtypeStruct((batch_size, heads, slots, self.dim), jnp.dtype(self.dtype))
        return jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(self.encode, tokens)
        )


class Codec(abc.ABC):
    """What a layout asks of a codec; a small hashable description.

    Attributes:
        unit: tokens that are quantized together; 1 if each is on its own.
        tail: latest tokens kept in full precision until their unit is quantized; 0 for none.
        usage: how the command line writes it, as `LayerSpec.usage`; not at all by default. A codec with
            a field `rotate` may be followed by "-rotated".
    """

    usage: ClassVar[tuple[str, ...]] = ()
    unit: int = 1
    tail: int = 0

    @abc.abstractmethod
    def forms(self, dtype: str, head_dim: int, value_head_dim: int) -> tuple[Form, Form]:
        """The forms of keys (B, H, T, head_dim) and values (B, H, T, value_head_dim)."""
