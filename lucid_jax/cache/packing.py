"""`Packing`: a codec bound to the tokens of one layer, their leaves and how each is stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property

import jax
import jax.numpy as jnp

from lucid_jax.cache.codecs import PLAIN, Bits, Codec, refuse_tangents
from lucid_jax.cache.codecs.base import Form, Stored

Tokens = dict[str, jax.Array]  # (B, H, T, D) by name, each leaf with its own D
Packed = dict[str, Stored]  # the same as stored: leaves (B, H, S, ...)


@dataclasses.dataclass(frozen=True)
class Packing:
    """A codec bound to the tokens of one layer.

    Attributes:
        codec: what the user chose.
        dtype: name of the tokens' dtype.
        dims: the name and the width of each leaf, such as (("key", 128), ("value", 128)).
    """

    codec: Codec
    dtype: str
    dims: tuple[tuple[str, int], ...]

    @cached_property
    def widths(self) -> dict[str, int]:
        """The width of each leaf."""
        return dict(self.dims)

    @property
    def names(self) -> tuple[str, ...]:
        """The leaves, in the order that they were named in."""
        return tuple(self.widths)

    @property
    def mixed(self) -> str:
        """The leaf that attention mixes: `value`, or else the first (MLA's `latent`)."""
        return "value" if "value" in self.widths else self.names[0]

    @property
    def head_dim(self) -> int:
        """D, of keys, or of the first leaf."""
        return self.widths.get("key", self.dims[0][1])

    @property
    def value_head_dim(self) -> int:
        """Dv, of what attention gives."""
        return self.widths[self.mixed]

    @cached_property
    def forms(self) -> dict[str, Form]:
        """How each leaf is stored."""
        return self._forms_of(self.codec)

    @cached_property
    def raw_forms(self) -> dict[str, Form]:
        """How a tail stores them, in full precision."""
        return self._forms_of(PLAIN if self.differentiable else Bits())

    def _forms_of(self, codec: Codec) -> dict[str, Form]:
        # What is mixed is stored as values are, all that is only scored as keys are.
        return {
            name: codec.forms(self.dtype, dim, dim)[name == self.mixed] for name, dim in self.dims
        }

    @cached_property
    def differentiable(self) -> bool:
        """Whether what is stored carries the tokens' tangents."""
        return all(form.differentiable for form in self.forms.values())

    @cached_property
    def leaf_ndim(self) -> int:
        """Axes of the first leaf that holds what is mixed."""
        form = self.forms[self.mixed]
        stored = jax.eval_shape(lambda: form.empty(1, 1, self.codec.unit))
        ndim: int = jax.tree.leaves(stored)[0].ndim
        return ndim

    @cached_property
    def leaf_dtypes(self) -> tuple[jnp.dtype, ...]:
        """The dtypes of the position, all leaves and the tail's, in the order of the tree."""
        forms = [self.forms, *([self.raw_forms] if self.codec.tail else [])]
        stored = jax.eval_shape(
            lambda: [{n: f.empty(1, 1, self.codec.unit) for n, f in each.items()} for each in forms]
        )
        return (jnp.dtype(jnp.int32), *(leaf.dtype for leaf in jax.tree.leaves(stored)))

    def admit(self, tokens: Tokens) -> Tokens:
        """Tokens that are about to be encoded; those that carry a tangent raise if it would be lost."""
        if self.differentiable:
            return tokens
        return {name: refuse_tangents(self.codec, x) for name, x in tokens.items()}

    def flushed(self, position: jax.Array) -> jax.Array:
        """Of the tokens before `position`, how many are in slots, and not only in the tail."""
        return flushed(position, self.codec.tail, self.codec.unit)


def encoded(forms: Mapping[str, Form], tokens: Tokens) -> Packed:
    """Each leaf of some tokens as its form stores it."""
    return {name: forms[name].encode(x) for name, x in tokens.items()}


def decoded(forms: Mapping[str, Form], stored: Packed) -> Tokens:
    """What `encoded` was given, as far as the codec keeps it."""
    return {name: form.decode(stored[name]) for name, form in forms.items()}


def flushed(position: jax.Array, tail: int, group: int) -> jax.Array:
    """Of the tokens before `position`, how many have left a tail of so many, by whole groups."""
    if not tail:
        return position
    return jnp.maximum((position - tail) // jnp.int32(group) * group, 0)
