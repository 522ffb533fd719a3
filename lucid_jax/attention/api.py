"""`attend`, `extend` and `merge`: attention of queries over one layer of a cache.

A layer of several runs (quantized and full-precision tokens, what is stored and a new chunk) is one
softmax over all. Shapes: query (B, N, T, D), N = H * G heads; out (B, N, T, Dv).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Unpack, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lucid_jax.attention import programs
from lucid_jax.attention.options import AttendKeywords, ExtendKeywords, as_options, as_queries
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

Pair = tuple[jax.Array, jax.Array]  # out and log-sum-exp


@overload
def attend(
    state: CacheState,
    query: ArrayLike | Mapping[str, ArrayLike],
    layer_idx: LayerIndex,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[AttendKeywords],
) -> jax.Array: ...
@overload
def attend(
    state: CacheState,
    query: ArrayLike | Mapping[str, ArrayLike],
    layer_idx: LayerIndex,
    *,
    return_lse: Literal[True],
    **options: Unpack[AttendKeywords],
) -> Pair: ...
@overload
def attend(
    state: CacheState,
    query: ArrayLike | Mapping[str, ArrayLike],
    layer_idx: LayerIndex,
    *,
    return_lse: bool,
    **options: Unpack[AttendKeywords],
) -> jax.Array | Pair: ...
def attend(
    state: CacheState,
    query: ArrayLike | Mapping[str, ArrayLike],
    layer_idx: LayerIndex,
    *,
    lengths: ArrayLike | None = None,
    cache_position: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    causal: bool = True,
    rope_theta: float | Rope | None = None,
    sink_logits: ArrayLike | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
) -> jax.Array | Pair:
    """Attention of the newest T tokens' queries over what the layer stores; call it after `update`.

    Causal by position: a query sees stored tokens at its own position and before, and of a sliding
    layer its window and the sinks. Slots that hold no live token are never seen, whatever is in them.
    Cost is O(T * length), and so is that of its gradient, whose memory is linear in T and the capacity:
    reverse mode is right with respect to query, bias, sinks and stored tokens. The cotangents of tokens
    are summed in float32 over the queries of a call, then have the tokens' dtype, in which JAX adds
    those of several calls: train in chunks, not token by token, which costs O(T * capacity).

    A window or KIVI's residual loses, to tokens that were rolled back since, what its oldest queries
    may see. Asked for more queries than are left, an eager call raises; a traced one leaves out what is
    gone, and tells it if the state is `checked`.

    Args:
        state: the cache, with the T tokens already in it.
        query: (B, N, T, D); N is a multiple of the layer's H key/value heads (GQA, MQA). For a state
            of `axes="BTHD"` (B, T, N, D), and so is the result. Or queries by the names of a layer's
            leaves, each as wide as its leaf, whose scores add up: multi-head latent attention in its
            absorbed form (DeepSeek-V2). Values are then read from `value`, or else from the first leaf
            that `init_cache` was told of, `latent`, without a second copy.
        layer_idx: which layer, a Python int; of a stacked state also a traced int32 [].
        lengths: as given to `update` (ragged caches): how many of each row's queries are real. The
            others return zeros.
        cache_position: as given to `update`, if the tokens were written by place.
        scale: multiplies the scores; 1 / sqrt(D) by default. Queries by name need one: they are wider
            than the heads they stand for.
        softcap: if given, scores become `softcap * tanh(scores / softcap)` (Gemma 2).
        window: if given, a query sees itself and the `window - 1` positions before it.
        mask: bool, broadcastable to (B, N, T, C): False hides a slot of `get` from a query.
        bias: float, broadcastable to (B, N, T, C), added to the scores.
        causal: False lets every query see every stored token (cross-attention).
        rope_theta: if given, keys and queries come unrotated and are rotated here by their place in
            the cache rather than their absolute position: places never exceed what the cache holds,
            so decoding stays sound past the length a model was trained for (StreamingLLM, Xiao et
            al. 2023). The base of the rotary positions, or a `Rope`; see `rope`.
        sink_logits: float [N], learned sinks: the softmax of each query head has this logit more, of a
            token that adds nothing to the output (gpt-oss). Not scaled, capped or hidden by a mask. Of
            results for `merge`, only one may have them.
        implementation: which backend computes it: "walk", block by block; "dense", one product over a
            static run of slots, in few kernels but O(T * capacity), all scores in memory; or one of
            your own, see `lucid_jax.attention.register`. By default the platform's first that takes
            the call: on GPUs and TPUs "dense" where scores are few and layers not stacked, or else, as
            on CPU, "walk".
        return_lse: return also the log-sum-exp of each query's scores, for `merge`.

    Returns:
        (B, N, T, Dv) in the query's dtype, accumulated in float32 (or wider). A query that sees
        nothing returns zeros. With `return_lse`, that and float32 (B, N, T), -inf where nothing was
        seen, not even a sink.

    Raises:
        ValueError: for a wrong shape, head count or option, a backend that does not take the call, or
            a chunk so long that the layer no longer has what its first queries may see: use `extend`.
        TypeError: for a query that is not floating point, or a mask that is not boolean.

    Example:
        >>> import jax.numpy as jnp, lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Static(8), num_layers=1, batch_size=1, num_kv_heads=2, head_dim=4
        ... )
        >>> tokens = jnp.ones((1, 2, 3, 4))
        >>> state = lj.update(state, tokens, tokens, 0)
        >>> lj.attend(state, jnp.ones((1, 6, 3, 4)), 0).shape
        (1, 6, 3, 4)
    """
    layer = state.layer(layer_idx)
    queries = as_queries(layer, query, scale, state.axes)
    _, heads, tokens, _ = next(iter(queries.values())).shape
    counts = as_counts(lengths, layer, tokens)
    places = as_places(cache_position, layer.batch_size, tokens, counts)
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
        causal,
    )
    if places is not None and not layer.bounded:
        raise ValueError(
            "a sliding layer cannot tell after the update where cache_position= was; call "
            "extend(state, query, key, value, layer_idx, cache_position=...) instead of both"
        )
    if causal and layer.lookback is not None and tokens > layer.lookback + 1:
        raise ValueError(
            f"{layer.spec} keeps what chunks of at most {layer.lookback + 1} tokens may see, and "
            f"{tokens} queries came; call extend(state, query, key, value, layer_idx) instead of "
            "update and attend, or, as a layer that reads another's tokens must, send fewer tokens at "
            "a time or give it more slack= (KIVI: residual=)"
        )
    if (mask is not None or bias is not None) and not layer.bounded and tokens > 1:
        raise ValueError(
            "slots of a sliding layer's get() stand for other tokens before and after a chunk of "
            f"{tokens}; pass mask= and bias= to extend(state, query, key, value, layer_idx)"
        )
    full = (layer.batch_size, heads, tokens, layer.capacity)
    options = options.with_masks(mask, bias, full)
    if tokens == 0:
        return _result(programs.nothing_asked(layer, queries), state.axes, return_lse)
    # An eager gradient traces the query, and then too our own program is what JAX compiles once.
    traced = is_traced(layer.counters(), places, counts)
    if causal and layer.lookback is not None and tokens > 1:
        asked = tokens if counts is None else counts
        programs.check_answers(layer, asked, options.window, traced)
    run = programs.attend.traced if traced else programs.attend.kept
    result = run(layer, _plain(query, queries), places, counts, options)
    return _result(result, state.axes, return_lse)


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
        cache_position: see `update`; not for chunks that need reading first. A `mask` of a sliding
            layer then goes by what `get` gives after the call.
        scale: see `attend`.
        softcap: see `attend`.
        window: see `attend`.
        mask: bool, broadcastable to (B, N, T, C); of a sliding layer to (B, N, T, C + T), whose last
            axis counts the tokens `get` gives before the call, the new ones right after them. Where the
            call makes a dynamic layer grow, C may be the capacity before it: what the mask says
            nothing of, new tokens past that, is visible (and has no bias).
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
        return _result(programs.nothing_asked(layer, queries), state.axes, return_lse), state
    if is_traced(layer, queries, new, places, counts, mask, bias, options):
        roomy = with_known_room(layer, count, places, counts)
        known = not is_traced(layer.counters(), places, counts)
        run = programs.extend.kept if known else programs.extend.traced
    else:
        layer = divided_like_tokens(layer, new[layer.packing.mixed])
        roomy = make_room(layer, count, places, counts)
        run = programs.extend.compiled(donate or roomy is not layer)
    layer, given = roomy, layer.capacity if layer.bounded else None
    # A mask of a sliding layer names tokens that will be gone, so it too wants reading first.
    masked = mask is not None or bias is not None
    first = places is None and (not lasting or (masked and not layer.bounded))
    width = layer.capacity + (count if first and not layer.bounded else 0)
    full = (layer.batch_size, heads, count, width)
    options = options.with_masks(mask, bias, full, given)
    result, layer = run(layer, _plain(query, queries), new, places, counts, options, first)
    return _result(result, state.axes, return_lse), state.with_layer(layer_idx, layer)


def merge(outs: Sequence[jax.Array], lses: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Combines attention of the same queries over disjoint sets of tokens, exactly.

    Each result is weighed by its share of the softmax's denominator (Juravsky et al. 2024, "Hydragen";
    FlashDecoding): a shared prefix and each row's suffix, or runs kept on different devices.

    Args:
        outs: attention outputs (B, N, T, Dv).
        lses: their log-sum-exps (B, N, T), as `attend(return_lse=True)` gives them; -inf if a query
            saw nothing there.

    Returns:
        The attention over all tokens, (B, N, T, Dv) in the outputs' dtype, and its log-sum-exp.

    Raises:
        ValueError: if there is nothing to merge, or shapes do not match.

    Example:
        >>> import jax.numpy as jnp
        >>> outs = [jnp.ones((1, 1, 1, 2)), jnp.zeros((1, 1, 1, 2))]
        >>> out, lse = merge(outs, [jnp.zeros((1, 1, 1))] * 2)
        >>> out[0, 0, 0].tolist(), round(float(lse[0, 0, 0]), 4)
        ([0.5, 0.5], 0.6931)
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"merge needs as many log-sum-exps as outputs, at least one, got {len(outs)} and "
            f"{len(lses)}"
        )
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != outs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                "merge takes outputs (B, N, T, Dv) of one shape and log-sum-exps (B, N, T), got "
                f"{[x.shape for x in outs]} and {[x.shape for x in lses]}"
            )
    stacked = jnp.stack([jnp.asarray(lse) for lse in lses])
    top = jnp.max(stacked, axis=0)
    shift = jnp.where(jnp.isneginf(top), 0, top)
    weights = jnp.exp(stacked - shift[None])
    total = jnp.sum(weights, axis=0)
    share = weights / jnp.where(total > 0, total, 1)[None]
    # A run without a share may hold anything.
    mixed = [
        jnp.where(s[..., None] > 0, out.astype(s.dtype) * s[..., None], 0)
        for out, s in zip(outs, share, strict=True)
    ]
    out = sum(mixed[1:], mixed[0])
    return out.astype(outs[0].dtype), jnp.log(total) + shift


def _result(result: Pair, axes: str, return_lse: bool) -> jax.Array | Pair:
    """What the caller gets, in the state's order of axes."""
    out, lse = result
    out = swapped(out, axes)
    return (out, swapped(lse, axes)) if return_lse else out


def _plain(
    given: ArrayLike | Mapping[str, ArrayLike], queries: dict[str, jax.Array]
) -> jax.Array | dict[str, jax.Array]:
    """Queries as backends take them: of keys alone an array, as they were given."""
    return queries if isinstance(given, Mapping) else queries["key"]
