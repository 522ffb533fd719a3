"""`attend`: attention of the newest queries over one layer of a cache, block by block.

One loop serves prefill and decode: it walks the stored slots in blocks, keeps a running softmax
(Milakov & Gimelshein 2018; FlashAttention, Dao et al. 2022), and stops at the longest length, so cost
follows the length and not the capacity. A layer of several parts (quantized and full-precision tokens,
what is stored and a new chunk) is walked part after part with the one running softmax, which is the
log-sum-exp merge without its rounding. Shapes: query (B, N, T, D), N = H * G heads; out (B, N, T, Dv).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from lucid_jax.attention.rope import Rope, as_rope, rope
from lucid_jax.cache.checks import as_array, check_count, is_traced
from lucid_jax.cache.forms import products
from lucid_jax.cache.inputs import (
    absolute_positions,
    as_counts,
    as_places,
    check_places_possible,
    check_reach,
    check_tokens,
    make_room,
)
from lucid_jax.cache.layer import Layer
from lucid_jax.cache.part import Part, Region
from lucid_jax.cache.slots import span
from lucid_jax.cache.state import CacheState

BLOCK = 256  # slots per loop turn: measured best of 128, 256, 512 on CPU for 1 and 4 heads a group


class _Running(NamedTuple):
    """A softmax over the tokens read so far, per query (B, H, R), R = G * T."""

    top: jax.Array  # the largest score
    total: jax.Array  # sum of exp(score - top)
    acc: jax.Array  # (B, H, R, Dv): sum of exp(score - top) * value


class _Options(NamedTuple):
    """What attention does to scores; hashable, so static under jit."""

    scale: float
    softcap: float | None
    window: int | None
    causal: bool
    rope_theta: Rope | None


def attend(
    state: CacheState,
    query: ArrayLike,
    layer_idx: int,
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
    return_lse: bool = False,
) -> Any:
    """Attention of the newest T tokens' queries over what the layer stores; call it after `update`.

    Causal by position: a query sees stored tokens at its own position and before, and of a sliding
    layer its window and the sinks. Slots that hold no live token are never seen, whatever is in them.
    Cost is O(T * length).

    Args:
        state: the cache, with the T tokens already in it.
        query: (B, N, T, D); N is a multiple of the layer's H key/value heads (GQA, MQA).
        layer_idx: which layer, a Python int.
        lengths: as given to `update` (ragged caches): how many of each row's queries are real. The
            others return zeros.
        cache_position: as given to `update`, if the tokens were written by place.
        scale: multiplies the scores; 1 / sqrt(D) by default.
        softcap: if given, scores become `softcap * tanh(scores / softcap)` (Gemma 2).
        window: if given, a query sees itself and the `window - 1` positions before it.
        mask: bool, broadcastable to (B, N, T, C): False hides a slot of `get` from a query.
        bias: float, broadcastable to (B, N, T, C), added to the scores.
        causal: False lets every query see every stored token (cross-attention).
        rope_theta: if given, keys and queries come unrotated and are rotated here by their place in
            the cache rather than their absolute position: places never exceed what the cache holds,
            so decoding stays sound past the length a model was trained for (StreamingLLM, Xiao et
            al. 2023). The base of the rotary positions, or a `Rope`; see `rope`.
        return_lse: return also the log-sum-exp of each query's scores, for `merge`.

    Returns:
        (B, N, T, Dv) in the query's dtype, accumulated in float32 (or wider). A query that sees
        nothing returns zeros. With `return_lse`, that and float32 (B, N, T), -inf where nothing was
        seen.

    Raises:
        ValueError: for a wrong shape, head count or option, or a chunk so long that the layer no
            longer has what its first queries may see: use `extend`.
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
    query = as_array(query)
    _check_query(layer, query)
    tokens = query.shape[2]
    counts = as_counts(lengths, layer, tokens)
    places = as_places(cache_position, layer.batch_size, tokens, counts)
    check_places_possible(layer, places)
    options = _as_options(query, scale, softcap, window, causal, rope_theta)
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
    full = (layer.batch_size, query.shape[1], tokens, layer.capacity)
    mask = _as_scores_shape(mask, "mask", full)
    bias = _as_scores_shape(bias, "bias", full)
    if tokens == 0:
        return _nothing(layer, query, return_lse)
    run = _attend if is_traced(layer, query, places, counts, mask, bias) else _attend_jit
    out, lse = run(layer, query, places, counts, mask, bias, options)
    return (out, lse) if return_lse else out


def extend(
    state: CacheState,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    layer_idx: int,
    *,
    lengths: ArrayLike | None = None,
    cache_position: ArrayLike | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    rope_theta: float | Rope | None = None,
    return_lse: bool = False,
    donate: bool = False,
) -> tuple[Any, CacheState]:
    """`update` and `attend` in one: appends T tokens and attends with their queries.

    A layer that keeps only the latest tokens no longer has, once a long chunk is in, what the chunk's
    first queries should see. This reads before it overwrites, so chunks of any length give what the
    same tokens give one by one. Cost is O(T * (length + T)). For such a chunk XLA on CPU copies a
    ring once, also if donated (a decode step never does).

    Args:
        state: the cache, without the T tokens.
        query: (B, N, T, D).
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
            axis counts the tokens `get` gives before the call, the new ones right after them.
        bias: float, broadcastable likewise.
        rope_theta: see `attend`.
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
    layer = state.own_layer(layer_idx)
    query, key, value = as_array(query), as_array(key), as_array(value)
    _check_query(layer, query)
    check_tokens(layer, key, value)
    tokens = key.shape[2]
    if query.shape[2] != tokens:
        raise ValueError(
            f"query must have one entry per new token: {tokens} keys and {query.shape[2]} queries "
            "came; attend() serves other queries"
        )
    counts = as_counts(lengths, layer, tokens)
    places = as_places(cache_position, layer.batch_size, tokens, counts)
    check_places_possible(layer, places)
    options = _as_options(query, scale, softcap, window, True, rope_theta)
    lasting = layer.lookback is None or tokens <= layer.lookback + 1
    if places is not None and not lasting:
        raise ValueError(
            f"{tokens} tokens came for {layer.spec}, which with cache_position= takes at most "
            "slack + 1 at a time; send fewer, or give it more slack="
        )
    if tokens == 0:
        return _nothing(layer, query, return_lse), state
    run: Any
    if is_traced(layer, query, key, value, places, counts, mask, bias):
        check_reach(layer, tokens, places, counts)
        run = _extend
    else:
        roomy = make_room(layer, tokens, places, counts)
        run = _extend_donated if donate or roomy is not layer else _extend_kept
        layer = roomy
    # A mask of a sliding layer names tokens that will be gone, so it too wants reading first.
    masked = mask is not None or bias is not None
    first = places is None and (not lasting or (masked and not layer.bounded))
    width = layer.capacity + (tokens if first and not layer.bounded else 0)
    full = (layer.batch_size, query.shape[1], tokens, width)
    mask = _as_scores_shape(mask, "mask", full)
    bias = _as_scores_shape(bias, "bias", full)
    (out, lse), layer = run(layer, query, key, value, places, counts, mask, bias, options, first)
    return ((out, lse) if return_lse else out), state.with_layer(layer_idx, layer)


def merge(outs: Sequence[jax.Array], lses: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Combines attention of the same queries over disjoint sets of tokens, exactly.

    Each result is weighed by its share of the softmax's denominator (Juravsky et al. 2024, "Hydragen";
    FlashDecoding): a shared prefix and each row's suffix, or parts kept on different devices.

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
    # A part without a share may hold anything.
    mixed = [
        jnp.where(s[..., None] > 0, out.astype(s.dtype) * s[..., None], 0)
        for out, s in zip(outs, share, strict=True)
    ]
    out = sum(mixed[1:], mixed[0])
    return out.astype(outs[0].dtype), jnp.log(total) + shift


# --- inside ------------------------------------------------------------------------------------------


def _attend(
    layer: Layer,
    query: jax.Array,
    places: Any,
    counts: Any,
    mask: jax.Array | None,
    bias: jax.Array | None,
    options: _Options,
) -> tuple[jax.Array, jax.Array]:
    tokens = query.shape[2]
    if not options.causal:  # all see what the latest token sees: what is stored
        position = jnp.broadcast_to(
            (layer.position - 1)[..., None], (*layer.position.shape, tokens)
        )
    elif places is None:
        counts_ = None if counts is None else jnp.asarray(counts)
        newest = jnp.full_like(layer.position, tokens) if counts_ is None else counts_
        position = span(layer.position - newest, tokens)
    else:
        position = absolute_positions(layer, places)
    return _over(layer.parts(), layer, query, position, counts, mask, bias, options)


_attend_jit = jax.jit(_attend, static_argnames="options")


def _extend(
    layer: Layer,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    places: Any,
    counts: Any,
    mask: jax.Array | None,
    bias: jax.Array | None,
    options: _Options,
    first: bool,
) -> tuple[tuple[jax.Array, jax.Array], Layer]:
    counts = None if counts is None else jnp.asarray(counts)
    if first:
        chunk = layer.take_in(key, value, counts)
        position = span(layer.position, query.shape[2])
        layer, parts = layer.put_and_parts(chunk)
        return _over(parts, layer, query, position, counts, mask, bias, options), layer
    if places is None:
        layer = layer.append(key, value, counts)
        return _attend(layer, query, None, counts, mask, bias, options), layer
    # Where the places are, before tokens past the end move a window on.
    position = absolute_positions(layer, places)
    layer = layer.write(key, value, jnp.asarray(places), counts)
    return _over(layer.parts(), layer, query, position, counts, mask, bias, options), layer


_STATIC = ("options", "first")
_extend_kept = jax.jit(_extend, static_argnames=_STATIC)
_extend_donated = jax.jit(_extend, static_argnames=_STATIC, donate_argnums=0)


def _over(
    parts: list[Part],
    layer: Layer,
    query: jax.Array,
    position: jax.Array,
    counts: Any,
    mask: jax.Array | None,
    bias: jax.Array | None,
    options: _Options,
) -> tuple[jax.Array, jax.Array]:
    """Attention of queries at absolute positions [T] or [B, T] over parts of a layer."""
    batch, heads, tokens, _ = query.shape
    kv_heads, value_dim = layer.num_kv_heads, layer.packing.value_head_dim
    wide = query.dtype if query.dtype.itemsize > 4 else jnp.dtype(jnp.float32)
    shape = (batch, kv_heads, heads // kv_heads * tokens)
    running = _Running(
        jnp.full(shape, -jnp.inf, wide),
        jnp.zeros(shape, wide),
        jnp.zeros((*shape, value_dim), wide),
    )
    if options.window is not None:  # what lies before it is not even read
        first = layer.first_slot(jnp.min(position, axis=-1) - (options.window - 1))
        parts = [dataclasses.replace(parts[0], start=first), *parts[1:]]
    for region in layer.regions(position, options.rope_theta is not None):
        rows = query.astype(wide)
        if options.rope_theta is not None:
            rows = rope(rows, region.query_place(position), options.rope_theta)
        # Heads of a group and tokens share one axis: scores are one matrix product per KV head.
        rows = (rows * options.scale).reshape(*shape, -1)
        for index, part in enumerate(parts):
            if index == 0 and region.slots is not None:
                part = dataclasses.replace(part, stop=jnp.minimum(part.stop, region.slots))
            running = _walk(running, part, region, rows, position, mask, bias, options)
    total = running.total
    out = running.acc / jnp.where(total > 0, total, 1)[..., None]
    out = out.reshape(batch, heads, tokens, value_dim)
    lse = (jnp.log(total) + jnp.where(total > 0, running.top, 0)).reshape(batch, heads, tokens)
    if counts is not None:
        counts = jnp.asarray(counts)
        real = (span(jnp.zeros_like(counts), tokens) < counts[:, None])[:, None]
        out, lse = jnp.where(real[..., None], out, 0), jnp.where(real, lse, -jnp.inf)
    return out.astype(query.dtype), lse


def _walk(
    running: _Running,
    part: Part,
    region: Region,
    rows: jax.Array,
    position: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None,
    options: _Options,
) -> _Running:
    """Goes on with a softmax over the tokens of one part that lie in a region."""
    batch, kv_heads, queries, _ = rows.shape
    tokens = position.shape[-1]
    wide = rows.dtype
    stride = part.stride
    size = min(max(BLOCK // stride, 1) * stride, part.size)
    asked = position.reshape(-1, 1, 1, tokens, 1)
    oldest = part.start // stride * stride

    def body(carry: tuple[jax.Array, _Running]) -> tuple[jax.Array, _Running]:
        turn, (top, total, acc) = carry
        low = oldest + turn * size
        begin = jnp.minimum(low, part.size - size)  # the last block may overlap the one before
        key, value = part.block(begin, size)
        at = part.positions(begin, size)  # [S], [B, S] or [B, H, S]
        at = at.reshape(*_lead(at.shape), 1, 1, size)
        live = (at >= 0) & (span(begin, size) >= low).reshape(1, 1, 1, 1, size)
        seen = live
        if options.causal:
            before = asked - at
            seen = seen & (before >= 0)
            if options.window is not None:
                seen = seen & (before < options.window)
        if region.sees is not None:
            seen = seen & region.sees(asked, at)
        if part.visible is not None:
            seen = seen & part.visible(asked, at)

        # What no query sees may hold NaN, as a token that a window left behind, and a weight of 0
        # would not silence it.
        alive = jnp.any(seen, axis=(2, 3))

        if options.rope_theta is None:
            scores = part.key_form.scores(rows, key)
        else:
            where = part.positions(begin, size), part.index(begin, size)
            place = region.key_place(*where)
            key = part.key_form.decode(key).astype(wide)
            key = rope(key, place, options.rope_theta)
            scores = products(rows, key)
        scores = scores.reshape(batch, kv_heads, -1, tokens, size)
        if options.softcap is not None:
            scores = options.softcap * jnp.tanh(scores / options.softcap)
        if bias is not None:
            scores = scores + _score_block(bias, part, begin, size, kv_heads).astype(wide)
        if mask is not None:
            seen = seen & _score_block(mask, part, begin, size, kv_heads)
        scores = jnp.where(seen, scores, -jnp.inf).reshape(batch, kv_heads, queries, size)

        # While nothing was seen the maximum is -inf; subtracting 0 instead keeps NaN out.
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        shift = jnp.where(jnp.isneginf(new_top), 0, new_top)
        weights = jnp.exp(scores - shift[..., None])
        decay = jnp.exp(top - shift)

        def silence(leaf: jax.Array) -> jax.Array:
            shaped = alive.reshape(*alive.shape, *(1,) * (leaf.ndim - 3))
            return jnp.where(shaped, leaf, jnp.zeros((), leaf.dtype))

        update = part.value_form.mix(weights, jax.tree.map(silence, value))
        total = total * decay + jnp.sum(weights, axis=-1)
        return turn + 1, _Running(new_top, total, acc * decay[..., None] + update)

    if size == part.size:
        # One block holds it: no loop, at whose turns XLA on CPU waits for its threads (16 us a layer of
        # the shipped model with 4 new tokens).
        return body((jnp.int32(0), running))[1]
    # Counted in ones: XLA gets the trip count of a constant loop wrong if the step does not divide
    # its range, and then drops turns (openxla/xla#48454).
    turns = -(-(part.stop - oldest) // size)
    return lax.while_loop(lambda carry: carry[0] < turns, body, (jnp.int32(0), running))[1]


def _lead(shape: tuple[int, ...]) -> tuple[int, int]:
    """The batch and head axes of positions [S], [B, S] or [B, H, S]."""
    if len(shape) == 3:
        return shape[0], shape[1]
    return (shape[0] if len(shape) == 2 else 1), 1


def _as_options(
    query: jax.Array,
    scale: float | None,
    softcap: float | None,
    window: int | None,
    causal: bool,
    rope_theta: float | Rope | None,
) -> _Options:
    if window is not None:
        window = min(check_count(window, "window", 1), 1 << 30)  # int32 arithmetic must not wrap
        if not causal:
            raise ValueError("window= counts back from a causal query; drop it or causal=False")
    if is_traced(scale, softcap, rope_theta):
        raise TypeError(
            "scale, softcap and rope_theta must be Python numbers, known at trace time, got a traced "
            "value; multiply the query instead, or close over a constant"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}; None turns it off")
    if rope_theta is not None and not causal:
        raise ValueError("rope_theta= gives causal queries a place; drop it or causal=False")
    return _Options(
        scale=1 / math.sqrt(query.shape[-1]) if scale is None else float(scale),
        softcap=None if softcap is None else float(softcap),
        window=window,
        causal=causal,
        rope_theta=None if rope_theta is None else as_rope(rope_theta),
    )


def _nothing(layer: Layer, query: jax.Array, return_lse: bool) -> Any:
    """The result for no queries."""
    out = jnp.zeros((*query.shape[:3], layer.packing.value_head_dim), query.dtype)
    return (out, jnp.zeros(query.shape[:3], jnp.float32)) if return_lse else out


def _check_query(layer: Layer, query: jax.Array) -> None:
    batch, kv_heads, dim = layer.batch_size, layer.num_kv_heads, layer.packing.head_dim
    if query.ndim != 4:
        raise ValueError(
            f"query must be (batch, heads, seq, head_dim), got shape {query.shape}; "
            "reshape it to four axes"
        )
    if (
        query.shape[0] != batch
        or query.shape[3] != dim
        or query.shape[1] % kv_heads
        or not query.shape[1]
    ):
        raise ValueError(
            f"query must be (batch={batch}, a multiple of {kv_heads} heads, seq, head_dim={dim}) "
            f"for this layer, got {query.shape}; check the axis order"
        )
    if not jnp.issubdtype(query.dtype, jnp.floating):
        raise TypeError(f"query must be floating point, got {query.dtype}")


def _as_scores_shape(x: Any, name: str, full: tuple[int, ...]) -> jax.Array | None:
    """Checks a mask or bias and gives it four axes."""
    if x is None:
        return None
    x = as_array(x)
    if name == "mask" and x.dtype != jnp.bool_:
        raise TypeError(
            f"mask must be boolean (True = may see), got {x.dtype}; or pass it as bias="
        )
    if name == "bias" and not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"bias must be floating point, got {x.dtype}; or pass it as mask=")
    shape = (*(1,) * (4 - x.ndim), *x.shape)
    if len(shape) != 4 or any(n not in (1, m) for n, m in zip(shape, full, strict=True)):
        raise ValueError(
            f"{name} must broadcast to (batch, heads, seq, capacity) = {full}, got {x.shape}; "
            "its last axis counts slots of get(), the oldest stored token first"
        )
    return x.reshape(shape)


def _score_block(x: jax.Array, part: Part, begin: jax.Array, size: int, kv_heads: int) -> jax.Array:
    """The part of a (1|B, 1|N, 1|T, 1|C) mask or bias over one block, as (·, H|1, G|1, ·, S|1)."""
    if x.shape[-1] > 1:
        if part.in_order:
            x = lax.dynamic_slice_in_dim(x, begin, size, axis=3)
        else:
            index = part.index(begin, size)
            take = lambda row, i: jnp.take(row, i, axis=-1, mode="clip")  # noqa: E731
            if index.ndim == 1:
                x = take(x, index)
            else:
                x = jax.vmap(take)(jnp.broadcast_to(x, (len(index), *x.shape[1:])), index)
    batch, heads, tokens, slots = x.shape
    split = (1, 1) if heads == 1 else (kv_heads, heads // kv_heads)
    return x.reshape(batch, *split, tokens, slots)
