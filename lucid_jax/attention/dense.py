"""`dot_product`: attention over plain arrays, no cache: training, and the reference to check against.

Differentiable, and O(T * S) in memory. Shapes: query (B, N, T, D), key (B, H, S, D), value
(B, H, S, Dv), N = H * G; out (B, N, T, Dv).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def dot_product(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    query_positions: jax.Array | None = None,
    key_positions: jax.Array | None = None,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention, causal by position, accumulated in float32 at least.

    Args:
        query: (B, N, T, D).
        key: (B, H, S, D), H a divisor of N.
        value: (B, H, S, Dv).
        query_positions: int32 [T] or [B, T]; the last T of S by default.
        key_positions: int32 [S] or [B, S]; 0 ... S - 1 by default.
        causal: whether a query sees only its own position and those before.
        scale: multiplies the scores; 1 / sqrt(D) by default.
        softcap: if given, scores become `softcap * tanh(scores / softcap)`.
        window: if given, a causal query sees itself and the `window - 1` positions before it.
        mask: bool, broadcastable to (B, N, T, S); False hides a key from a query.
        bias: float, broadcastable to (B, N, T, S), added to the scores.

    Returns:
        (B, N, T, Dv) in the query's dtype; zeros for a query that sees nothing.

    Example:
        >>> q = jnp.ones((1, 4, 3, 8))
        >>> kv = jnp.ones((1, 2, 3, 8))
        >>> dot_product(q, kv, kv).shape
        (1, 4, 3, 8)
    """
    batch, heads, tokens, dim = query.shape
    kv_heads, length = key.shape[1:3]
    wide = query.dtype if query.dtype.itemsize > 4 else jnp.dtype(jnp.float32)
    scale = 1 / math.sqrt(dim) if scale is None else scale
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, tokens, dim)
    scores = jnp.einsum("bhgtd,bhsd->bhgts", grouped, key, preferred_element_type=wide) * scale
    scores = scores.reshape(batch, heads, tokens, length)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.reshape((1,) * (4 - bias.ndim) + bias.shape).astype(wide)
    seen = jnp.ones((1, 1, 1, length), bool)
    if causal:
        if query_positions is None:
            query_positions = jnp.arange(length - tokens, length, dtype=jnp.int32)
        if key_positions is None:
            key_positions = jnp.arange(length, dtype=jnp.int32)
        query_position = jnp.atleast_2d(query_positions)[:, None, :, None]
        before = query_position - jnp.atleast_2d(key_positions)[:, None, None]
        seen = before >= 0
        if window is not None:
            seen = seen & (before < window)
    if mask is not None:
        seen = seen & mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    # A finite floor instead of -inf: a row that sees nothing then has no NaN, nor has its gradient.
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(wide).min), axis=-1)
    weights = jnp.where(seen, weights, 0).astype(value.dtype)
    weights = weights.reshape(batch, kv_heads, heads // kv_heads, tokens, length)
    out = jnp.einsum("bhgts,bhsd->bhgtd", weights, value, preferred_element_type=wide)
    return out.reshape(batch, heads, tokens, value.shape[-1]).astype(query.dtype)
