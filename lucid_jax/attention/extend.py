"""`extend` and `extend_leaves`: new tokens into a layer, and attention of their queries, in one.

Shapes: query (B, N, T, D), N = H * G heads, key (B, H, T, D); out (B, N, T, Dv).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Unpack, overload

import jax
from jax.typing import ArrayLike

from lucid_jax.attention import programs
from lucid_jax.attention.options import (
    ExtendKeywords,
    Pair,
    as_given,
    as_options,
    as_queries,
    as_result,
)
from lucid_jax.attention.rope import Rope
from lucid_jax.cache.argument_checks import as_array, is_traced
from lucid_jax.cache.axes import swapped
from lucid_jax.cache.sharding import divided_like_tokens
from lucid_jax.cache.stacked import LayerIndex
from lucid_jax.cache.state import CacheState
from lucid_jax.cache.token_arguments import (
    as_counts,
    as_places,
    check_places_possible,
    check_tokens,
    make_room,
    with_known_room,
)


@overload
def extend(
    state: CacheState,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    layer_idx: LayerIndex,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[ExtendKeywords],
) -> tuple[jax.Array, CacheState]: ...
@overload
def extend(
    state: CacheState,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    layer_idx: LayerIndex,
    *,
    return_lse: Literal[True],
    **options: Unpack[ExtendKeywords],
) -> tuple[Pair, CacheState]: ...
@overload
def extend(
    state: CacheState,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    layer_idx: LayerIndex,
    *,
    return_lse: bool,
    **options: Unpack[ExtendKeywords],
) -> tuple[jax.Array | Pair, CacheState]: ...
def extend(
    state: CacheState,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    layer_idx: LayerIndex,
    *,
    lengths: ArrayLike | None = None,
    cache_position: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    rope_theta: float | Rope | None = None,
    sink_logits: ArrayLike | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
    donate: bool = False,
) -> tuple[jax.Array | Pair, CacheState]:
    """`update` and `attend` in one: appends T tokens and attends with their queries.

    A layer that keeps only the latest tokens no longer has, once a long chunk is in, what the chunk's
    first queries should see. This reads before it overwrites, so chunks of any length give what the
    same tokens give one by one. Cost is O(T * (length + T)). For such a chunk XLA on CPU copies a
    ring once, also if donated (a decode step never does).

    Args:
        state: the cache, without the T tokens.
        query: (B, N, T, D), or, with keys, values and result, in the order of the state's `axes`.
        key: (B, H, T, D).
        value: (B, H, T, Dv).
        layer_idx: which layer.
        lengths: see `update`.
        cache_position: see `update`; not for chunks that need reading first. A `mask` of a
            layer that drops tokens then goes by what `get` gives after the call.
        scale: see `attend`.
        softcap: see `attend`.
        window: see `attend`.
        mask: bool, broadcastable to (B, N, T, C); of a layer that drops tokens to (B, N, T, C + T),
            whose last axis counts the tokens `get` gives before the call, the new ones right after
            them. Where the call makes a dynamic layer grow, C may be the capacity before it: what the
            mask says nothing of, new tokens past that, is visible (and has no bias).
        bias: float, broadcastable likewise.
        rope_theta: see `attend`.
        sink_logits: see `attend`.
        implementation: see `attend`.
        return_lse: see `attend`.
        donate: eager calls only: reuse this layer's buffers; the old state must not be used again.

    Returns:
        What `attend` returns, and the new state.

    Raises:
        ValueError: as `update` and `attend` do.
        TypeError: as `update` and `attend` do.

    Example:
        >>> import jax.numpy as jnp, lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Sliding(4, sinks=1), num_layers=1, batch_size=1, num_kv_heads=2, head_dim=4
        ... )
        >>> tokens = jnp.ones((1, 2, 20, 4))
        >>> out, state = lj.extend(state, jnp.ones((1, 6, 20, 4)), tokens, tokens, 0)
        >>> out.shape, int(lj.seq_length(state))
        ((1, 6, 20, 4), 5)
    """
    tokens = {"key": key, "value": value}
    return extend_leaves(
        state, query, tokens, layer_idx, lengths=lengths, cache_position=cache_position,
        scale=scale, softcap=softcap, window=window, mask=mask, bias=bias, rope_theta=rope_theta,
        sink_logits=sink_logits, implementation=implementation, return_lse=return_lse,
        donate=donate,
    )  # fmt: skip


@overload
def extend_leaves(
    state: CacheState,
    query: ArrayLike | Mapping[str, ArrayLike],
    tokens: Mapping[str, ArrayLike],
    layer_idx: LayerIndex,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[ExtendKeywords],
) -> tuple[jax.Array, CacheState]: ...
@overload
def extend_leaves(
    state: CacheState,
    query: ArrayLike | Mapping[str, ArrayLike],
    tokens: Mapping[str, ArrayLike],
    layer_idx: LayerIndex,
    *,
    return_lse: Literal[True],
    **options: Unpack[ExtendKeywords],
) -> tuple[Pair, CacheState]: ...
@overload
def extend_leaves(
    state: CacheState,
    query: ArrayLike | Mapping[str, ArrayLike],
    tokens: Mapping[str, ArrayLike],
    layer_idx: LayerIndex,
    *,
    return_lse: bool,
    **options: Unpack[ExtendKeywords],
) -> tuple[jax.Array | Pair, CacheState]: ...
def extend_leaves(
    state: CacheState,
    query: ArrayLike | Mapping[str, ArrayLike],
    tokens: Mapping[str, ArrayLike],
    layer_idx: LayerIndex,
    *,
    lengths: ArrayLike | None = None,
    cache_position: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    rope_theta: float | Rope | None = None,
    sink_logits: ArrayLike | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
    donate: bool = False,
) -> tuple[jax.Array | Pair, CacheState]:
    """`update_leaves` and `attend` in one: `extend` of a layer with leaves of its own names.

    Args:
        state: the cache, without the T tokens.
        query: as `attend` takes it.
        tokens: as `update_leaves` takes them.
        layer_idx: which layer.
        lengths: see `extend`, as of all that follows.
        cache_position: see `attend`.
        scale: see `attend`.
        softcap: see `attend`.
        window: see `attend`.
        mask: see `attend`.
        bias: see `attend`.
        rope_theta: see `attend`.
        sink_logits: see `attend`.
        implementation: see `attend`.
        return_lse: see `attend`.
        donate: see `attend`.

    Returns:
        What `attend` returns, and the new state.

    Raises:
        ValueError: as `update_leaves` and `attend` do.
        TypeError: as `update_leaves` and `attend` do.
    """
    layer = state.own_layer(layer_idx)
    queries = as_queries(layer, query, scale, state.axes)
    new = {name: as_array(x, name) for name, x in tokens.items()}
    check_tokens(layer, new, state.axes)
    new = {name: swapped(x, state.axes) for name, x in new.items()}
    count = new[layer.packing.mixed].shape[2]
    _, heads, asked, _ = next(iter(queries.values())).shape
    if asked != count:
        raise ValueError(
            f"query must have one entry per new token: {count} keys and {asked} queries "
            "came; attend() serves other queries"
        )
    counts = as_counts(lengths, layer, count)
    places = as_places(cache_position, layer.batch_size, count, counts)
    check_places_possible(layer, places)
    options = as_options(
        queries,
        {
            "scale": scale,
            "softcap": softcap,
            "window": window,
            "rope_theta": rope_theta,
            "sink_logits": sink_logits,
            "implementation": implementation,
        },
    )
    lasting = layer.lookback is None or count <= layer.lookback + 1
    if places is not None and not lasting:
        raise ValueError(
            f"{count} tokens came for {layer.spec}, which with cache_position= takes at most "
            "slack + 1 at a time; send fewer, or give it more slack="
        )
    if count == 0:
        return as_result(programs.nothing_asked(layer, queries), state.axes, return_lse), state
    if is_traced(layer, queries, new, places, counts, mask, bias, options):
        roomy = with_known_room(layer, count, places, counts)
        known = not is_traced(layer.counters(), places, counts)
        run = programs.extend.kept if known else programs.extend.traced
    else:
        layer = divided_like_tokens(layer, new[layer.packing.mixed])
        roomy = make_room(layer, count, places, counts)
        run = programs.extend.compiled(donate or roomy is not layer)
    layer, given = roomy, layer.capacity if layer.bounded else None
    # A mask of a layer that drops tokens names tokens that will be gone, so it too wants reading first.
    masked = mask is not None or bias is not None
    first = places is None and (not lasting or (masked and not layer.bounded))
    width = layer.capacity + (count if first and not layer.bounded else 0)
    full = (layer.batch_size, heads, count, width)
    options = options.with_masks(mask, bias, full, given)
    result, layer = run(layer, as_given(query, queries), new, places, counts, options, first)
    return as_result(result, state.axes, return_lse), state.with_layer(layer_idx, layer)
