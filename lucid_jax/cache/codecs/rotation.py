"""Tokens turned by a Hadamard matrix before another form stores them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lucid_jax.cache.codecs.base import Form, Stored
from lucid_jax.cache.codecs.numerics import doubled, single


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
        return self.inner.encode(_turn_tokens(single(tokens)))

    def decode(self, stored: Stored) -> jax.Array:
        return doubled(_turn_tokens(self.inner.decode(stored)) / 2, self.dtype)

    def scores(self, rows: jax.Array, stored: Stored) -> jax.Array:
        return self.inner.scores(_turn(rows), stored)

    def is_finite(self, stored: Stored) -> jax.Array:
        return self.inner.is_finite(stored)

    def made_finite(self, stored: Stored) -> Stored:
        return self.inner.made_finite(stored)


def rotated(form: Form, rotate: bool) -> Form:
    """A form, or it behind a rotation, whose tokens are float32."""
    if not rotate:
        return form
    return Rotated(form.dtype, form.dim, dataclasses.replace(form, dtype="float32"))


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


def _turn_tokens(tokens: jax.Array) -> jax.Array:
    """Rotates float32 (B, H, T, D), of which a sum may pass the largest number: it saturates."""
    block = tokens.shape[-1] & -tokens.shape[-1]
    top = float(jnp.finfo(tokens.dtype).max)
    loud = jnp.max(jnp.abs(tokens), axis=-1, keepdims=True) > top / block
    factor = jnp.where(loud, jnp.float32(1 / block), jnp.float32(1))
    return jnp.clip(_turn(tokens * factor), -top * factor, top * factor) / factor
