"""Lets `jax.export` serialize functions that take or return cache states.

What is written of a state is its static configuration, as JSON by field name: specs, codecs, counts.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from jax import export

from lucid_jax.cache.buffers import Rows
from lucid_jax.cache.codecs import CODECS
from lucid_jax.cache.encoder_decoder import EncoderDecoderState
from lucid_jax.cache.layouts import LAYOUTS
from lucid_jax.cache.packing import Packing
from lucid_jax.cache.state import CacheState
from lucid_jax.cache.tokens import TokenLayer


def _descriptions() -> dict[str, Any]:
    """The classes of static fields by name: what is registered by now."""
    arithmetic = {spec.arithmetic.__name__: spec.arithmetic for spec in LAYOUTS.values()}
    return {"Packing": Packing, **LAYOUTS, **arithmetic, **CODECS}


def _described(value: Any) -> Any:
    """A static field as JSON has it: descriptions by the name of their class."""
    if isinstance(value, tuple):
        return [_described(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    name = type(value).__name__
    known = _descriptions()
    if known.get(name) is not type(value):
        raise TypeError(
            f"cannot export a state with {value}: expected one of {', '.join(known)}; for a class of "
            "your own, export a function of the state's leaves and unflatten them inside; a codec may "
            "be registered (lucid_jax.codecs.register)"
        )
    fields = {f.name: _described(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return {"class": name, **fields}


def _made(value: Any) -> Any:
    """What `_described` was given."""
    if isinstance(value, list):
        return tuple(_made(item) for item in value)
    if not isinstance(value, dict):
        return value
    fields = {name: _made(item) for name, item in value.items()}
    return _descriptions()[fields.pop("class")](**fields)


def _register(node: type) -> None:
    # flax hands the static fields to JAX as one tuple, in the order of the class.
    names = [f.name for f in dataclasses.fields(node) if not f.metadata.get("pytree_node", True)]

    def write(static: tuple[Any, ...]) -> bytes:
        described = {n: _described(value) for n, value in zip(names, static, strict=True)}
        return json.dumps(described).encode()

    def read(data: bytes | bytearray) -> tuple[Any, ...]:
        described = json.loads(data)
        return tuple(_made(described[name]) for name in names)

    export.register_pytree_node_serialization(
        node,
        serialized_name=f"lucid_jax.{node.__name__}",
        serialize_auxdata=write,
        deserialize_auxdata=read,
    )


def register_states() -> None:
    """Tells JAX how to write the static part of a state; the package does it once, when imported."""
    for node in (CacheState, TokenLayer, Rows, EncoderDecoderState):
        _register(node)
