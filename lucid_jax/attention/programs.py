"""The pure functions behind `attend` and `extend`.

They take a layer and arrays, all checked. Shapes: query (B, N, T, D), positions [T] or [B, T].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lucid_jax.attention.backends import OWN, first_that_takes
from lucid_jax.attention.mask import Mask, with_padding
from lucid_jax.attention.options import Options
from lucid_jax.attention.softmax import Query, queries_by_leaf
from lucid_jax.cache.append import append, put_and_slot_runs, take_in
from lucid_jax.cache.mesh_programs import Parts
from lucid_jax.cache.packing import Tokens
from lucid_jax.cache.reading import SlotRun, sights, slot_runs
from lucid_jax.cache.sharding import MeshAxes
from lucid_jax.cache.slots import span
from lucid_jax.cache.token_arguments import absolute_positions
from lucid_jax.cache.tokens import TokenLayer
from lucid_jax.cache.verb import verb
from lucid_jax.cache.write import write

Result = tuple[jax.Array, jax.Array]  # out (B, N, T, Dv) and log-sum-exp (B, N, T)


def _parts_of_attend(axes: MeshAxes, layer: Any, *args: Any) -> Parts | None:
    query, places, counts, options = args
    if not OWN.issuperset(options.backends):  # which may not expect to be in `shard_map`
        return None
    result = axes.of_heads(_any_of(query))
    rows = axes.of_rows(places, 2), axes.of_rows(counts, 1)
    return (axes.of_heads(query), *rows, options.parts(axes)), (result, result)


def _parts_of_extend(axes: MeshAxes, layer: Any, *args: Any) -> Parts | None:
    query, new, *others, first = args
    found = _parts_of_attend(axes, layer, query, *others)
    if found is None:
        return None
    (specs, *rest), result = found
    return (specs, axes.of_heads(new), *rest, first), (result, layer)


@verb(parts=_parts_of_attend)
def attend(layer: TokenLayer, query: Query, places: Any, counts: Any, options: Options) -> Result:
    """Attention of the newest queries over what a layer stores."""
    tokens = _shape(query)[2]
    if not options.causal:  # all see what the latest token sees: what is stored
        # Of an empty cache nothing, but queries of position -1 would be padding, without even a sink.
        newest = jnp.maximum(layer.position - 1, 0)
        position = jnp.broadcast_to(newest[..., None], (*layer.position.shape, tokens))
    elif places is None:
        newest = jnp.full_like(layer.position, tokens) if counts is None else jnp.asarray(counts)
        position = span(layer.position - newest, tokens)
    else:
        position = absolute_positions(layer, places)
    return _over(slot_runs(layer), layer, query, position, counts, options)


@verb("first", parts=_parts_of_extend)
def extend(
    layer: TokenLayer,
    query: Query,
    new: Tokens,
    places: Any,
    counts: Any,
    options: Options,
    first: bool,
) -> tuple[Result, TokenLayer]:
    """Attention over what a layer stores and new tokens, and the layer with them.

    `first`: the layer is read before it is written to, as queries may see what is overwritten.
    """
    counts = None if counts is None else jnp.asarray(counts)
    if first:
        position = span(layer.position, _shape(query)[2])
        layer, found = put_and_slot_runs(layer, take_in(layer, new, counts))
        return _over(found, layer, query, position, counts, options), layer
    if places is None:
        layer = append(layer, new, counts)
        return attend.traced(layer, query, None, counts, options), layer
    # Where the places are, before tokens past the end move a window on.
    position = absolute_positions(layer, places)
    layer = write(layer, new, jnp.asarray(places), counts)
    return _over(slot_runs(layer), layer, query, position, counts, options), layer


def _over(
    found: Sequence[SlotRun],
    layer: TokenLayer,
    query: Query,
    position: jax.Array,
    counts: Any,
    options: Options,
) -> Result:
    """Attention of queries at absolute positions [T] or [B, T] over runs of a layer's slots."""
    if options.window is not None:  # what lies before it is not even read
        first = layer.first_slot(jnp.min(position, axis=-1) - (options.window - 1))
        found = [found[0].replace(start=first), *found[1:]]
    mask = Mask(
        position=with_padding(position, None if counts is None else jnp.asarray(counts)),
        sights=tuple(sights(layer, position, options.scores.rope is not None)),
        visible=_by_slot(options.visible, found[0]),
        bias=_by_slot(options.bias, found[0]),
        num_kv_heads=layer.num_kv_heads,
        causal=options.causal,
        window=options.window,
    )
    out, lse = first_that_takes(options.backends, query, found, mask, options.scores)
    return out.astype(_any_of(query).dtype), lse


def _by_slot(x: jax.Array | None, slot_run: SlotRun) -> jax.Array | None:
    """A mask or bias by index, with entries for slots past the capacity where indices are slots."""
    if x is None or x.shape[-1] == 1 or not slot_run.in_order:
        return x
    return jnp.pad(x, [(0, 0)] * 3 + [(0, slot_run.size - x.shape[-1])])


def check_answers(layer: TokenLayer, queries: Any, window: int | None, traced: bool) -> None:
    """Raises if tokens rolled back have overwritten what the first queries may see; see `attend`."""
    if traced and not layer.checked:
        return
    if traced:
        what = "attend of more queries than the tokens rolled back have left"
        layer.flag(layer.answers(jnp.asarray(queries, jnp.int32), window), what)
        return

    def possible(n: Any) -> bool:
        with jax.ensure_compile_time_eval():  # also while something else is traced
            return bool(np.asarray(layer.answers(jnp.asarray(n, jnp.int32), window)).all())

    if possible(queries):
        return
    most = int(np.max(queries))
    left = next(n for n in range(most, 0, -1) if possible(n))
    raise ValueError(
        f"{most} queries came, but tokens since rolled back have overwritten what the first of them "
        f"may see: at most {left} are left to ask; send the latest {left}, give {layer.spec} more "
        "slack= (KIVI: residual=), or attend before rolling back"
    )


def nothing_asked(layer: TokenLayer, queries: Query) -> Result:
    """The result for no queries."""
    query = _any_of(queries)
    out = jnp.zeros((*query.shape[:3], layer.packing.value_head_dim), query.dtype)
    return out, jnp.zeros(query.shape[:3], jnp.float32)


def _any_of(query: Query) -> jax.Array:
    """One of the queries: all but their widths are the same for each."""
    return next(iter(queries_by_leaf(query).values()))


def _shape(query: Query) -> tuple[int, ...]:
    return _any_of(query).shape
