"""How decoders store what they cache: as `init_cache` would, but in place on every backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax

from lucid_jax.cache.codecs import PLAIN, default_codec
from lucid_jax.cache.sharding import MeshAxes, as_axes, shardings, with_shardings
from lucid_jax.cache.state import CacheState
from lucid_jax.decode.language_model import LanguageModel, ModelStructure, split


def empty_cache(
    model: LanguageModel, spec: Any, batch_size: int, *, ragged: bool = True, sharding: Any = None
) -> CacheState:
    """`model.init_cache`, whose narrow floats are stored as bits on CPU where no codec was asked for.

    Args:
        model: whose cache it is.
        spec: a spec, or one per layer.
        batch_size: rows.
        ragged: whether each row has its own length.
        sharding: as for `init_cache`.

    Example:
        >>> import jax.numpy as jnp, lucid_jax as lj
        >>> from flax import nnx
        >>> from lucid_jax.models import ModelConfig, Transformer
        >>> config = ModelConfig(vocab_size=64, hidden_size=32, num_attention_heads=2)
        >>> model = Transformer(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        >>> one, other = lj.Static(8), lj.Static(8, lj.codecs.Int4())
        >>> for spec in (one, other):  # on CPU
        ...     empty_cache(model, spec, 1).layers[0].spec.codec
        Bits()
        Int4(group=64, rotate=True)
    """
    # A model of somebody's own may know aligned caches alone.
    rows = {"ragged": True} if ragged else {}
    listed = isinstance(spec, Sequence)
    specs = list(spec) if listed else [spec]
    if any(_names_none(one) for one in specs):
        layers = jax.eval_shape(lambda: model.init_cache(spec, 1, **rows)).layers
        # `Bits` of what is not narrow is `Identity` by another name.
        codec = default_codec(min((layer.dtype for layer in layers), key=lambda d: d.itemsize))
        specs = [one.but(codec=codec) if _names_none(one) else one for one in specs]
    chosen = tuple(specs) if listed else specs[0]
    if sharding is None:
        return model.init_cache(chosen, batch_size, **rows)
    axes = as_axes(sharding)
    with axes.in_force():
        return _on_mesh(*split(model), chosen, batch_size, ragged, axes)


@partial(jax.jit, static_argnums=(0, 2, 3, 4, 5))
def _on_mesh(
    structure: ModelStructure, params: Any, spec: Any, batch_size: int, ragged: bool, axes: MeshAxes
) -> CacheState:
    state = structure.merge(params).init_cache(spec, batch_size, ragged=ragged)
    return with_shardings(state, shardings(state, axes.mesh, batch=axes.batch, heads=axes.heads))


def _names_none(spec: Any) -> bool:
    """Whether a spec, of those that are dataclasses, leaves the codec open."""
    return dataclasses.is_dataclass(spec) and getattr(spec, "codec", None) == PLAIN
