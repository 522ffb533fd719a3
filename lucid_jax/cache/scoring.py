"""Eviction scorers: how much each stored token is worth keeping, and which tokens that leaves.

A scorer takes `get`'s keys (B, H, T, D), values (B, H, T, Dv) and `valid` ([T] or [B, T]), and returns
float32 scores (B, H, T): higher is kept longer, -inf marks a slot that holds no token. Of a state of
`axes="BTHD"`, pass `axes=state.axes`: tokens, queries too, come in that order. Scores never do, nor do
the masks that `keep_best` makes of them for `compact`: (B, H, T).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from lucid_jax.cache.argument_checks import as_array, as_integers, check_count
from lucid_jax.cache.axes import STORED, check_axes, swapped
from lucid_jax.cache.mesh_programs import in_auto_axes


def sinks_and_recent(
    keys: ArrayLike, values: ArrayLike, valid: ArrayLike, *, sinks: int, axes: str = STORED
) -> jax.Array:
    """StreamingLLM (Xiao et al. 2023): the oldest few tokens first, then the newest.

    Args:
        keys: (B, H, T, D), oldest first; only the shape matters.
        values: (B, H, T, Dv); only the shape matters.
        valid: bool [T] or [B, T], which slots hold a token.
        sinks: how many of the oldest live tokens score above all others, the very oldest highest.
        axes: the order of `keys` and `values`, see `init_cache`.

    Returns:
        float32 (B, H, T), whole numbers, exact while 2 * T <= 2**24.

    Raises:
        ValueError: for shapes that do not fit, or a negative `sinks`.
        TypeError: if `valid` is not boolean, or `sinks` not an integer.

    Example:
        >>> kv, valid = jnp.ones((1, 1, 5, 2)), jnp.array([True, True, True, True, False])
        >>> sinks_and_recent(kv, kv, valid, sinks=1)[0, 0].tolist()
        [10.0, 1.0, 2.0, 3.0, -inf]
    """
    sinks = check_count(sinks, "sinks")
    keys, live = _live_keys(keys, values, valid, axes)
    age = jnp.cumsum(live, axis=-1, dtype=jnp.int32) - 1  # 0 is the oldest live token
    length = live.shape[-1]
    scores = jnp.where(age < min(sinks, length), 2 * length - age, age)
    return _scores(jnp.broadcast_to(scores.astype(jnp.float32), keys.shape[:3]), live)


def key_norm(
    keys: ArrayLike, values: ArrayLike, valid: ArrayLike, *, axes: str = STORED
) -> jax.Array:
    """Minus the L2 norm of the key (Devoto et al. 2024): keys of low norm draw much attention.

    Args:
        keys: (B, H, T, D), oldest first.
        values: (B, H, T, Dv); only the shape matters.
        valid: bool [T] or [B, T], which slots hold a token.
        axes: the order of `keys` and `values`, see `init_cache`.

    Returns:
        float32 (B, H, T).

    Raises:
        ValueError: for shapes that do not fit.
        TypeError: if `valid` is not boolean.

    Example:
        >>> keys = jnp.array([[[[3.0, 4.0], [1.0, 0.0]]]])
        >>> key_norm(keys, keys, jnp.array([True, True]))[0, 0].tolist()
        [-5.0, -1.0]
    """
    keys, live = _live_keys(keys, values, valid, axes)
    return _scores(-jnp.linalg.norm(keys, axis=-1), live)


def key_diff(
    keys: ArrayLike, values: ArrayLike, valid: ArrayLike, *, axes: str = STORED
) -> jax.Array:
    """Minus the cosine similarity to the mean of the unit keys (KeyDiff, Park et al. 2025).

    Keys unlike the others are kept. The mean is taken per row and head, over live keys.

    Args:
        keys: (B, H, T, D), oldest first.
        values: (B, H, T, Dv); only the shape matters.
        valid: bool [T] or [B, T], which slots hold a token.
        axes: the order of `keys` and `values`, see `init_cache`.

    Returns:
        float32 (B, H, T), in [-1, 1] up to rounding; 0 for a key of norm 0.

    Raises:
        ValueError: for shapes that do not fit.
        TypeError: if `valid` is not boolean.

    Example:
        >>> keys = jnp.array([[[[2.0, 0.0], [3.0, 0.0], [-1.0, 0.0]]]])
        >>> key_diff(keys, keys, jnp.ones(3, bool))[0, 0].tolist()
        [-1.0, -1.0, 1.0]
    """
    keys, live = _live_keys(keys, values, valid, axes)
    unit = _unit(keys)
    # The sum points where the mean does, and a dead key, being zero, adds nothing to it.
    anchor = _unit(jnp.sum(unit, axis=2, keepdims=True))
    return _scores(-jnp.sum(unit * anchor, axis=-1), live)


def random(
    keys: ArrayLike,
    values: ArrayLike,
    valid: ArrayLike,
    *,
    rng: jax.Array,
    axes: str = STORED,
) -> jax.Array:
    """Uniform scores in [0, 1): the baseline any other scorer has to beat.

    Args:
        keys: (B, H, T, D); only the shape matters.
        values: (B, H, T, Dv); only the shape matters.
        valid: bool [T] or [B, T], which slots hold a token.
        rng: a PRNG key; a new one for each call, or the same slots are chosen again.
        axes: the order of `keys` and `values`, see `init_cache`.

    Returns:
        float32 (B, H, T), drawn independently per row, head and slot.

    Raises:
        ValueError: for shapes that do not fit.
        TypeError: if `valid` is not boolean.

    Example:
        >>> kv, valid = jnp.ones((2, 3, 4, 2)), jnp.ones(4, bool)
        >>> random(kv, kv, valid, rng=jax.random.key(0)).shape
        (2, 3, 4)
    """
    keys, live = _live_keys(keys, values, valid, axes)
    return _scores(jax.random.uniform(rng, keys.shape[:3], jnp.float32), live)


def attention_mass(
    keys: ArrayLike,
    values: ArrayLike,
    valid: ArrayLike,
    *,
    queries: ArrayLike,
    query_positions: ArrayLike | None = None,
    key_positions: ArrayLike | None = None,
    scale: ArrayLike | None = None,
    pool: int = 1,
    axes: str = STORED,
) -> jax.Array:
    """Softmax attention that observed queries give each live key, summed over a KV head's queries.

    Which queries are observed makes the method: the newest one is TOVA (Oren et al. 2024; it also
    averages over the heads of a layer: take `scores.mean(1, keepdims=True)`), all of them H2O (Zhang
    et al. 2023), a window of the newest with `pool` > 1 SnapKV (Li et al. 2024).

    Needs B * N * Q * T floats. Scores of several chunks of queries add up to those of all of them.

    Args:
        keys: (B, H, T, D), oldest first.
        values: (B, H, T, Dv); only the shape matters.
        valid: bool [T] or [B, T], which slots hold a token.
        queries: (B, N, Q, D); N = H * G, heads of one group side by side (GQA, MQA).
        query_positions: int [Q] or [B, Q]. A query sees keys at its own position and before; one that
            sees none, such as padding at -1, counts for nothing. None: every query sees every key.
        key_positions: int [T], [B, T] or [B, H, T]; given if, and only if, `query_positions` is.
        scale: multiplies the scores; 1 / sqrt(D) by default.
        pool: each score becomes the mean over the live among the `pool` slots around it; odd.
        axes: the order of `keys`, `values` and `queries`, see `init_cache`.

    Returns:
        float32 (B, H, T), at least 0 where live; with `pool=1` they sum to Q * G per row and head if
        every query sees a key.

    Raises:
        ValueError: for shapes that do not fit, positions of one kind only, or a `pool` that is even
            or less than 1.
        TypeError: if `valid` is not boolean, positions not integers or `pool` not an integer.

    Example:
        >>> keys = jnp.array([[[[1.0], [1.0], [9.0]]]])
        >>> seen = {"query_positions": jnp.array([1]), "key_positions": jnp.arange(3)}
        >>> attention_mass(keys, keys, jnp.ones(3, bool), queries=jnp.ones((1, 2, 1, 1)), **seen)
        Array([[[1., 1., 0.]]], dtype=float32)
    """
    pool = check_count(pool, "pool", 1)
    if pool % 2 == 0:
        raise ValueError(
            f"pool must be odd, to reach as far to either side of a token, got {pool}; "
            f"use {pool - 1} or {pool + 1}"
        )
    keys, live = _live_keys(keys, values, valid, axes)
    batch, heads, length, dim = keys.shape
    queries = as_array(queries).astype(jnp.float32)
    queries = swapped(queries, axes) if queries.ndim == 4 else queries
    if (
        queries.ndim != 4
        or (queries.shape[0], queries.shape[3]) != (batch, dim)
        or queries.shape[1] % heads
        or not queries.shape[1]
    ):
        raise ValueError(
            f"queries must be (batch={batch}, a multiple of {heads} heads, queries, "
            f"head_dim={dim}) for these keys, got {queries.shape}; check the axis order"
        )
    count = queries.shape[2]
    seen = live[:, :, None, None, :]
    if (query_positions is None) != (key_positions is None):
        given, missing = ("query", "key") if key_positions is None else ("key", "query")
        raise ValueError(
            f"query_positions and key_positions must come together, got only {given}_positions; "
            f"pass {missing}_positions= too, or neither to let every query see every key"
        )
    if query_positions is not None and key_positions is not None:
        asked = _positions(query_positions, "query_positions", (count,), (batch, count))
        stored = _positions(
            key_positions, "key_positions", (length,), (batch, length), (batch, heads, length)
        )
        seen = seen & (stored[:, :, None, None, :] <= asked[:, :, None, :, None])

    factor = jnp.asarray(1 / math.sqrt(dim) if scale is None else scale, jnp.float32)
    grouped = (queries * factor).reshape(batch, heads, queries.shape[1] // heads, count, dim)
    logits = jnp.einsum("bhgqd,bhtd->bhgqt", grouped, keys)
    # A finite floor instead of -inf: a query that sees nothing then has no NaN.
    weights = jax.nn.softmax(jnp.where(seen, logits, jnp.finfo(jnp.float32).min), axis=-1)
    mass = jnp.sum(jnp.where(seen, weights, 0), axis=(2, 3))
    if pool > 1:
        mass = _window_sum(mass, pool) / jnp.maximum(_window_sum(live.astype(jnp.float32), pool), 1)
    return _scores(mass, live)


def keep_best(scores: ArrayLike, n: int, *, protect: ArrayLike | None = None) -> jax.Array:
    """Which tokens to keep: the `n` best of every row and head.

    Ties go to the later token. A NaN counts as the worst score of a live token.

    Args:
        scores: floating point (B, H, T), -inf where no token is.
        n: how many to keep, a Python int.
        protect: bool, broadcastable to (B, H, T): tokens taken before all others, whatever their
            score. They count towards n; if there are more than n, the n best of them are kept. A mask
            per row is (B, 1, T).

    Returns:
        bool (B, H, T) with exactly `min(n, live tokens)` True per row and head.

    Raises:
        ValueError: for shapes that do not fit, or a negative `n`.
        TypeError: if `n` is not an integer, `protect` not boolean or `scores` not floating point.

    Example:
        >>> scores = jnp.array([[[1.0, 2.0, 2.0, 3.0, -jnp.inf]]])
        >>> keep_best(scores, 2)[0, 0].tolist()
        [False, False, True, True, False]
        >>> keep_best(scores, 2, protect=jnp.arange(5) == 0)[0, 0].tolist()
        [True, False, False, True, False]
    """
    n = check_count(n, "n")
    scores = as_array(scores)
    if scores.ndim != 3:
        raise ValueError(
            f"scores must be (batch, heads, tokens), got shape {scores.shape}; "
            "pass what a scorer returned"
        )
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise TypeError(f"scores must be floating point, got {scores.dtype}; cast them")
    return _best(scores, n, None if protect is None else _protected(protect, scores.shape))


@in_auto_axes
def _best(scores: jax.Array, n: int, protect: jax.Array | None) -> jax.Array:
    live = ~jnp.isneginf(scores)
    first = jnp.zeros_like(live) if protect is None else jnp.broadcast_to(protect, scores.shape)
    tier = jnp.where(live, jnp.where(first, 0, 1), 2)
    # The sort is stable, so backwards in time the later of two equal tokens comes first; and it puts
    # NaN, whatever its sign, after all numbers.
    order = jnp.lexsort((jnp.flip(-scores, axis=-1), jnp.flip(tier, axis=-1)), axis=-1)
    rank = jnp.flip(jnp.argsort(order, axis=-1), axis=-1)
    return live & (rank < n)


# --- shared pieces ---------------------------------------------------------------------------------


def _live_keys(
    keys: ArrayLike, values: ArrayLike, valid: ArrayLike, axes: str
) -> tuple[jax.Array, jax.Array]:
    """Checked float32 keys (B, H, T, D), zero where no token is, and which are live: (1|B, 1, T)."""
    keys, values, valid = as_array(keys), as_array(values), as_array(valid)
    if check_axes(axes) != STORED and keys.ndim == values.ndim == 4:
        keys, values = swapped(keys, axes), swapped(values, axes)
    if keys.ndim != 4:
        raise ValueError(
            f"keys must be (batch, heads, tokens, head_dim), got shape {keys.shape}; "
            "pass what get() returned"
        )
    batch, heads, length, _ = keys.shape
    if values.ndim != 4 or values.shape[:3] != keys.shape[:3]:
        raise ValueError(
            f"values must be (batch={batch}, heads={heads}, tokens={length}, value_head_dim) for "
            f"these keys, got {values.shape}; pass the keys and values of one get()"
        )
    if valid.shape not in ((length,), (batch, length)):
        raise ValueError(
            f"valid must be ({length},) or ({batch}, {length}) for these keys, got {valid.shape}; "
            "pass the keys and valid of one get(), and axes=state.axes if that is not (B, H, C, D)"
        )
    if valid.dtype != jnp.bool_:
        raise TypeError(f"valid must be boolean (True = holds a token), got {valid.dtype}")
    live = (valid if valid.ndim == 2 else valid[None])[:, None]
    # where, not a product: a dead slot may hold NaN, and 0 * NaN is NaN.
    return jnp.where(live[..., None], keys.astype(jnp.float32), 0), live


def _scores(scores: jax.Array, live: jax.Array) -> jax.Array:
    """The scores where live and -inf elsewhere."""
    # A norm may overflow float32; only a dead slot may score -inf.
    return jnp.where(live, jnp.maximum(scores, jnp.finfo(jnp.float32).min), -jnp.inf)


def _unit(x: jax.Array) -> jax.Array:
    """Vectors along the last axis at length 1, zero vectors as they are."""
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(norm > 0, norm, 1)


def _window_sum(x: jax.Array, size: int) -> jax.Array:
    """Sum over the `size` (odd) slots around each, along the last of three axes."""
    total: jax.Array = lax.reduce_window(x, np.float32(0), lax.add, (1, 1, size), (1, 1, 1), "SAME")
    return total


def _positions(x: ArrayLike, name: str, *shapes: tuple[int, ...]) -> jax.Array:
    """Checks integer positions against the shapes they may have; int32 (1|B, 1|H, ·)."""
    positions = jnp.asarray(as_integers(x, name))
    if positions.shape not in shapes:
        raise ValueError(
            f"{name} must be {' or '.join(map(str, shapes))} here, got {positions.shape}; "
            "give each one its absolute position"
        )
    batch, heads = (*positions.shape[:-1], 1, 1)[:2]
    return positions.reshape(batch, heads, positions.shape[-1])


def _protected(protect: ArrayLike, full: tuple[int, ...]) -> jax.Array:
    """Checks a mask that broadcasts to `full` and gives it as many axes."""
    mask = as_array(protect)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"protect must be boolean (True = keep), got {mask.dtype}")
    shape = (*(1,) * (3 - mask.ndim), *mask.shape)
    if len(shape) != 3 or any(m not in (1, k) for m, k in zip(shape, full, strict=True)):
        raise ValueError(
            f"protect must broadcast to (batch, heads, tokens) = {full}, got {mask.shape}; "
            "a mask per row is (batch, 1, tokens)"
        )
    return mask.reshape(shape)
