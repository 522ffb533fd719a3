"""`attend`: attention of queries over one layer of a cache.

A layer of several runs (quantized and full-precision tokens, what is stored and a new chunk) is one
softmax over all. Shapes: query (B, N, T, D), N = H * G heads; out (B, N, T, Dv).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Unpack, overload

import jax
from jax.typing import ArrayLike

from lucid_jax.attention import programs
from lucid_jax.attention.options import (
    AttendKeywords,
    Pair,
    as_given,
    as_options,
    as_queries,
    as_result,
)
from lucid_jax.attention.rope import Rope
from lucid_jax.cache.argument_checks import is_traced
from lucid_jax.cache.stacked import LayerIndex
from lucid_jax.cache.state import CacheState
from lucid_jax.cache.token_arguments import (
    as_counts,
    as_places,
    check_places_possible,
)


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

    Causal by position: a query sees stored tokens at its own position and before, and of a layer that
    drops tokens what its layout says: of `Sliding` its window and the sinks, of `Chunked` its block.
    Slots that hold no live token are never seen, whatever is in them. Cost is O(T * length), and so is
    that of its gradient, whose memory is linear in T and the capacity: reverse mode is right with
    respect to query, bias, sinks and stored tokens. The cotangents of tokens are summed in float32 over
    the queries of a call, then have the tokens' dtype, in which JAX adds those of several calls: train
    in chunks, not token by token, which costs O(T * capacity).

    A layer that drops tokens, and KIVI, lose to tokens that were rolled back since what their oldest
    queries may see. Asked for more queries than are left, an eager call raises; a traced one leaves out
    what is gone, and tells it if the state is `checked`.

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
            static run of slots, in few kernels but O(T * capacity), all scores in memory; "pallas_tpu",
            and for a few queries "mosaic_gpu" (Hopper, JAX 0.12), kernels that read the blocks of slots
            which hold what queries see; or one of your own, see `lucid_jax.attention.register`. By
            default the platform's first that takes the call: its kernel on TPUs and GPUs, there "dense"
            where scores are few and layers not stacked, or else, as on CPU, "walk". Kernels run in
            `jax.shard_map`, and on each device of a mesh whose axes are `Explicit`, as `jax.make_mesh`
            makes them, and divide rows and heads of state and queries alike; the compiler, which
            divides the work elsewhere, cannot divide them.
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
            f"{layer.spec} cannot tell after the update where cache_position= was; call "
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
            f"slots of get() of {layer.spec} stand for other tokens before and after a chunk of "
            f"{tokens}; pass mask= and bias= to extend(state, query, key, value, layer_idx)"
        )
    full = (layer.batch_size, heads, tokens, layer.capacity)
    options = options.with_masks(mask, bias, full)
    if tokens == 0:
        return as_result(programs.nothing_asked(layer, queries), state.axes, return_lse)
    # An eager gradient traces the query, and then too our own program is what JAX compiles once.
    traced = is_traced(layer.counters(), places, counts)
    if causal and layer.lookback is not None and tokens > 1:
        asked = tokens if counts is None else counts
        programs.check_answers(layer, asked, options.window, traced)
    run = programs.attend.traced if traced else programs.attend.kept
    result = run(layer, as_given(query, queries), places, counts, options)
    return as_result(result, state.axes, return_lse)
