"""The same tokens in another dtype, or stored by another codec that keeps their bits."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from lucid_jax.cache.codecs import Codec, check_dtype
from lucid_jax.cache.packing import decoded, encoded
from lucid_jax.cache.tokens import TokenLayer


def astype(layer: TokenLayer, dtype: jnp.dtype) -> TokenLayer:
    """The same tokens in another dtype; codes and scales stay."""
    old = layer.packing
    check_dtype(dtype, old.codec)
    new = dataclasses.replace(old, dtype=dtype.name)
    stored, last = layer.stored, layer.tail
    if old.differentiable:
        stored = new.admit(stored)
    stored = {name: old.forms[name].cast(x, new.forms[name]) for name, x in stored.items()}
    if last is not None:
        forms = old.raw_forms
        last = {name: forms[name].cast(x, new.raw_forms[name]) for name, x in last.items()}
    return layer.replace(leaves=layer.leaves | stored, tail=last, packing=new)


def stored_by(layer: TokenLayer, codec: Codec) -> TokenLayer:
    """The same tokens stored by another codec that keeps their bits."""
    if codec == layer.packing.codec:
        return layer
    packing = dataclasses.replace(layer.packing, codec=codec)
    tokens = packing.admit(decoded(layer.packing.forms, layer.stored))
    return layer.replace(
        leaves=layer.leaves | encoded(packing.forms, tokens),
        spec=layer.spec.but(codec=codec),
        packing=packing,
    )
