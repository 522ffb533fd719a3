"""`attend`: attention of the newest queries over one layer of a cache, block by block.

One loop serves prefill and decode: it walks the stored slots in blocks, keeps a running softmax
(Milakov & Gimelshein 2018; FlashAttention, Dao et al. 2022), and stops at the longest length, so cost
follows the length and not the capacity. A block fits in a core's cache, which is also why widening
bfloat16 to float32 costs nothing here. Shapes: query (B, N, T, D), N = H * G heads; out (B, N, T, Dv).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from lucid_jax.cache.checks import as_array, as_layer_index, check_alive, check_count, is_traced
from lucid_jax.cache.inputs import absolute_positions, as_counts, as_places
from lucid_jax.cache.layer import Layer
from lucid_jax.cache.slots import span
from lucid_jax.cache.state import CacheState

_Carry = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

BLOCK = 256  # slots per loop turn: measured best of 128, 256, 512 on CPU for 1 and 4 heads a group


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
) -> jax.Array:
    """Attention of the newest T tokens' queries over what the layer stores; call it after `update`.

    Causal by position: a query sees stored tokens at its own position and before. Slots that hold no
    live token are never seen, whatever is in them. Cost is O(T * length).

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

    Returns:
        (B, N, T, Dv) in the query's dtype, accumulated in float32 (or wider). A query that sees
        nothing returns zeros.

    Raises:
        ValueError: for a wrong shape, head count or option.
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
    layer = state.layers[as_layer_index(layer_idx, state.num_layers)]
    check_alive(layer)
    query = as_array(query)
    _check_query(layer, query)
    tokens = query.shape[2]
    counts = as_counts(lengths, layer, tokens)
    places = as_places(cache_position, layer.batch_size, tokens, counts)
    full = (layer.batch_size, query.shape[1], tokens, layer.capacity)
    mask = _as_scores_shape(mask, "mask", full)
    bias = _as_scores_shape(bias, "bias", full)
    if window is not None:
        window = min(check_count(window, "window", 1), 1 << 30)  # int32 arithmetic must not wrap
        if not causal:
            raise ValueError("window= counts back from a causal query; drop it or causal=False")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}; None turns it off")
    if tokens == 0:
        return jnp.zeros((*query.shape[:3], layer.value.shape[3]), query.dtype)
    run = _attend if is_traced(layer, query, places, counts, mask, bias) else _attend_jit
    return run(
        layer,
        query,
        places,
        counts,
        mask,
        bias,
        scale=1 / math.sqrt(query.shape[-1]) if scale is None else float(scale),
        softcap=None if softcap is None else float(softcap),
        window=window,
        causal=causal,
    )


def _attend(
    layer: Layer,
    query: jax.Array,
    places: Any,
    counts: Any,
    mask: jax.Array | None,
    bias: jax.Array | None,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    causal: bool,
) -> jax.Array:
    batch, heads, tokens, dim = query.shape
    kv_heads, value_dim = layer.value.shape[1], layer.value.shape[3]
    groups = heads // kv_heads
    wide = query.dtype if query.dtype.itemsize > 4 else jnp.dtype(jnp.float32)
    size = min(BLOCK, layer.capacity)

    position, real = _query_positions(layer, tokens, places, counts)
    oldest = None if window is None else jnp.min(position, axis=-1) - (window - 1)
    start, stop = layer.scan_slots(oldest)
    # Heads of a group and tokens share one axis, so that scores are one matrix product per KV head.
    rows = (query.astype(wide) * scale).reshape(batch, kv_heads, groups * tokens, dim)

    def body(carry: _Carry) -> _Carry:
        turn, top, total, acc = carry
        low = start + turn * size
        begin = jnp.minimum(low, layer.capacity - size)  # the last block may overlap the one before
        key, value = layer.block(begin, size)
        stored = layer.slot_positions(begin, size)
        stored = jnp.expand_dims(
            stored, range(position.ndim - stored.ndim)
        )  # [S] for [B, T] queries
        unread = span(jnp.broadcast_to(begin, stored.shape[:-1]), size) >= low
        live = (stored >= 0) & unread
        seen = live[..., None, :]  # [1, S] or [B, 1, S], to become [T, S] or [B, T, S]
        if causal:
            before = position[..., None] - stored[..., None, :]
            seen = seen & (before >= 0)
            if window is not None:
                seen = seen & (before < window)
        seen = seen.reshape(-1, 1, 1, *seen.shape[-2:])

        scores = jnp.einsum("bhrd,bhsd->bhrs", rows, key.astype(wide))
        scores = scores.reshape(batch, kv_heads, groups, tokens, size)
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        if bias is not None:
            scores = scores + _score_block(bias, begin, size, kv_heads).astype(wide)
        if mask is not None:
            seen = seen & _score_block(mask, begin, size, kv_heads)
        scores = jnp.where(seen, scores, -jnp.inf).reshape(batch, kv_heads, -1, size)

        # While nothing was seen the maximum is -inf; subtracting 0 instead keeps NaN out.
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        shift = jnp.where(jnp.isneginf(new_top), 0, new_top)
        weights = jnp.exp(scores - shift[..., None])
        decay = jnp.exp(top - shift)
        # A dead slot may hold NaN, and a weight of 0 would not silence it.
        value = jnp.where(live.reshape(-1, 1, size, 1), value, jnp.zeros((), value.dtype))
        update = jnp.einsum("bhrs,bhsd->bhrd", weights, value.astype(wide))
        total = total * decay + jnp.sum(weights, axis=-1)
        return turn + 1, new_top, total, acc * decay[..., None] + update

    # Counted in ones: XLA gets the trip count of a constant loop wrong if the step does not divide
    # its range, and then drops turns (openxla/xla#48454).
    turns = -(-(stop - start) // size)
    shape = (batch, kv_heads, groups * tokens)
    _, _, total, acc = lax.while_loop(
        lambda carry: carry[0] < turns,
        body,
        (
            jnp.int32(0),
            jnp.full(shape, -jnp.inf, wide),
            jnp.zeros(shape, wide),
            jnp.zeros((*shape, value_dim), wide),
        ),
    )
    out = acc / jnp.where(total > 0, total, 1)[..., None]
    out = out.reshape(batch, heads, tokens, value_dim)
    if real is not None:
        out = jnp.where(real[:, None, :, None], out, 0)
    return out.astype(query.dtype)


_attend_jit = partial(jax.jit, static_argnames=("scale", "softcap", "window", "causal"))(_attend)


def _query_positions(
    layer: Layer, tokens: int, places: Any, counts: Any
) -> tuple[jax.Array, jax.Array | None]:
    """Absolute positions [T] or [B, T] of the queries, and which are real, bool [B, T] or None."""
    real = None
    if counts is not None:
        counts = jnp.asarray(counts)
        real = span(jnp.zeros_like(counts), tokens) < counts[:, None]
    if places is None:
        newest = jnp.full_like(layer.position, tokens) if counts is None else counts
        return span(layer.position - newest, tokens), real
    return absolute_positions(layer, places), real


def _check_query(layer: Layer, query: jax.Array) -> None:
    batch, kv_heads, _, dim = layer.key.shape
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


def _score_block(x: jax.Array, begin: jax.Array, size: int, kv_heads: int) -> jax.Array:
    """The part of a (1|B, 1|N, 1|T, 1|C) mask or bias over one block, as (·, H|1, G|1, ·, S|1)."""
    if x.shape[-1] > 1:
        x = lax.dynamic_slice_in_dim(x, begin, size, axis=3)
    batch, heads, tokens, slots = x.shape
    split = (1, 1) if heads == 1 else (kv_heads, heads // kv_heads)
    return x.reshape(batch, *split, tokens, slots)
