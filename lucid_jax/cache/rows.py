"""Batch rows as slots of a running batch (continuous batching), and eviction of chosen tokens.

Verbs that move whole rows between states, `insert`, `extract`, `concat`, `free`, and `compact`, which
keeps the tokens that a scorer (scoring.py) chose.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lucid_jax.cache import evict
from lucid_jax.cache.argument_checks import (
    as_array,
    check_alive,
    check_count,
    check_indices,
    check_layer_axes,
    is_traced,
)
from lucid_jax.cache.codecs import of_no_backend
from lucid_jax.cache.convert import stored_by
from lucid_jax.cache.growth import in_whole_tiles
from lucid_jax.cache.layouts.base import LayerSpec
from lucid_jax.cache.mesh_programs import in_auto_axes
from lucid_jax.cache.stacked import LayerIndex, each
from lucid_jax.cache.stacking import stacked_like
from lucid_jax.cache.state import CacheState
from lucid_jax.cache.tokens import TokenLayer
from lucid_jax.cache.verb import verb
from lucid_jax.cache.verbs import checked, select, with_room


def insert(
    state: CacheState, rows: ArrayLike, other: CacheState, *, donate: bool = False
) -> CacheState:
    """Puts the sequences of another state into rows of this one, which forget what they held.

    So a prompt prefilled alone joins a running batch. Only stored tokens move.

    Args:
        state: a ragged cache of B rows.
        rows: int32 [B'], distinct, each in [0, B).
        other: a cache of B' rows with the same layers and codecs (`Identity` and `Bits` count as the
            same); aligned or ragged. Its contiguous layers may have another capacity, if what they
            hold fits.
        donate: eager calls only: `state` must not be used again. (`other` stays valid.)

    Returns:
        The new state.

    Raises:
        ValueError: if the states do not match, rows repeat, or (eager) tokens do not fit. (Traced:
            that row stays as it was and `overflowed` is set.)
        IndexError: for a concrete row out of range.
        TypeError: if rows are not integers.

    Example:
        >>> import jax.numpy as jnp, lucid_jax as lj
        >>> sizes = dict(num_layers=1, num_kv_heads=2, head_dim=8)
        >>> state = lj.init_cache(lj.Static(16), batch_size=4, ragged=True, **sizes)
        >>> one = lj.init_cache(lj.Static(8), batch_size=1, **sizes)
        >>> tokens = jnp.ones((1, 2, 5, 8))
        >>> state = lj.insert(state, [2], lj.update(one, tokens, tokens, 0))
        >>> lj.seq_length(state).tolist()
        [0, 0, 5, 0]
    """
    check_alive((state, other))
    _need_ragged(state, "insert")
    other = stacked_like(other, state)
    into = check_indices(rows, state.batch_size)
    _check_alike(state, other)
    if into.shape != (other.batch_size,):
        raise ValueError(
            f"insert needs one row number per row of the other state: expected "
            f"({other.batch_size},), got {into.shape}"
        )
    if isinstance(into, np.ndarray) and len(np.unique(into)) != len(into):
        raise ValueError(f"rows must be distinct, got {into.tolist()}")
    if is_traced(state, other, into):
        return _insert.traced(state, into, other)
    if donate and {id(x) for x in jax.tree.leaves(state)} & {id(x) for x in jax.tree.leaves(other)}:
        raise ValueError(
            "a state cannot be donated while the other one shares its buffers; pass donate=False, "
            "or insert rows that extract() or select() has copied"
        )
    longest = [int(np.max(layer.length_on_host())) for layer in other.layers]
    state = with_room(state, longest)
    return _insert.compiled(donate)(state, into, other)


@verb()
def _insert(state: CacheState, rows: Any, other: CacheState) -> CacheState:
    rows = jnp.asarray(rows)
    other = _stored_alike(state, other)
    return state.with_layers(
        each(
            layer,
            lambda one, theirs: one.put_rows(rows, theirs),
            evict.tracked(new) if layer.tracked else new,
        )
        for layer, new in zip(state.layers, other.layers, strict=True)
    )


def extract(state: CacheState, row: ArrayLike) -> CacheState:
    """One sequence as a state of its own, of batch size 1; `insert` puts it back.

    Args:
        state: the cache, which stays valid.
        row: which row, an integer in [0, B), or a traced int32 [].

    Raises:
        IndexError: for a concrete row out of range. A traced one is clamped and sets `overflowed`.
        TypeError: if it is not an integer.

    Example:
        >>> import lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Static(8), num_layers=1, batch_size=3, num_kv_heads=2, head_dim=8
        ... )
        >>> lj.extract(state, 1).batch_size
        1
    """
    if is_traced(row):
        return select(state, jnp.reshape(row, (1,)))
    return select(state, np.array([check_count(row, "row", -(2**31))]))


def concat(states: Sequence[CacheState]) -> CacheState:
    """The rows of several states in one, in order.

    Args:
        states: caches with the same layers, codecs and capacities; all ragged, as rows of different
            caches have different lengths.

    Returns:
        A new state of as many rows as all have together, `checked` if the first is; the old ones stay
        valid.

    Raises:
        ValueError: if there are none, or they do not match.

    Example:
        >>> import lucid_jax as lj
        >>> sizes = dict(num_layers=1, num_kv_heads=2, head_dim=8, ragged=True)
        >>> a, b = (lj.init_cache(lj.Static(8), batch_size=n, **sizes) for n in (1, 3))
        >>> lj.concat([a, b]).batch_size
        4
    """
    states = list(states)
    if not states:
        raise ValueError("concat needs at least one state, got none")
    check_alive(states)
    first = states[0]
    states = [stacked_like(state, first) for state in states]
    for other in states:
        _need_ragged(other, "concat")
        _check_alike(first, other)
    # Those of an older version, as out of a checkpoint, may have fewer slots for the same capacity.
    first, *_ = states = [state.with_layers(map(in_whole_tiles, state.layers)) for state in states]
    for other in states:
        for a, b in zip(first.layers, other.layers, strict=True):
            alike = _spec(a) == _spec(b) and a.tracked == b.tracked
            if not alike or a.num_slots != b.num_slots:
                raise ValueError(
                    f"concat needs equal layers, got {a} and {b}; grow() the smaller one, or "
                    "insert() its rows"
                )
    together: CacheState = _concat(
        tuple(checked(state, first.layers[0].checked) for state in states)
    )
    return together


@jax.jit
@in_auto_axes
def _concat(states: tuple[CacheState, ...]) -> CacheState:
    states = tuple(_stored_alike(states[0], state) for state in states)
    axis = 1 if states[0].stacked else 0
    together: CacheState = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=axis), *states)
    return together


def free(state: CacheState, rows: ArrayLike, *, donate: bool = False) -> CacheState:
    """Empties rows for the next sequences; what they held is never seen again.

    Called eagerly, the new state shares the old one's buffers, until one of the two is donated.

    Args:
        state: a ragged cache of B rows.
        rows: int32 [n], each in [0, B); or bool [B], True for rows to empty.
        donate: eager calls only: the old state must not be used again.

    Raises:
        ValueError: if the cache is not ragged, or a mask is not [B].
        IndexError: for a concrete row out of range. (A traced one sets `overflowed`.)
        TypeError: if rows are neither integers nor booleans.

    Example:
        >>> import jax.numpy as jnp, lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Static(8), num_layers=1, batch_size=3, num_kv_heads=2, head_dim=8, ragged=True
        ... )
        >>> tokens = jnp.ones((3, 2, 5, 8))
        >>> lj.seq_length(lj.free(lj.update(state, tokens, tokens, 0), [0, 2])).tolist()
        [0, 5, 0]
    """
    check_alive(state)
    _need_ragged(state, "free")
    array = as_array(rows, "rows")
    if array.shape == (0,):
        return state
    ok: Any = np.True_
    if array.dtype == jnp.bool_:
        if array.shape != (state.batch_size,):
            raise ValueError(
                f"a mask of rows must be ({state.batch_size},), got {array.shape}; "
                "or pass row numbers"
            )
        gone: Any = array
    else:
        numbers = check_indices(rows, state.batch_size)
        host: Any = np if isinstance(numbers, np.ndarray) else jnp
        each = np.arange(state.batch_size, dtype=np.int32)
        gone = host.any(each[:, None] == numbers[None], axis=1)
        ok = host.all((numbers >= 0) & (numbers < state.batch_size))
    return _free(state, gone, ok, donate=donate)


@verb(shares=True)
def _free(state: CacheState, gone: jax.Array, ok: Any) -> CacheState:
    freed = [layer.free(jnp.asarray(gone)) for layer in state.layers]
    what = "freeing of a row that is not in the batch"
    return state.with_layers(
        layer.replace(overflowed=layer.flag(jnp.asarray(ok), what)) for layer in freed
    )


def compact(
    state: CacheState, keep: ArrayLike, layer_idx: LayerIndex, *, donate: bool = False
) -> CacheState:
    """Keeps chosen tokens of a layer and drops the others; order and absolute positions stay.

    What eviction policies (H2O, SnapKV, KeyDiff, ...) and accepted paths of draft trees need. Heads
    may keep different tokens, but equally many. New tokens go on from the same position, and causality
    and `window=` go by the positions that the kept tokens had. Rolling back stops at tokens that were
    there before.

    Args:
        state: the cache.
        keep: bool, broadcastable to (B, H, C) whatever the state's `axes`: which slots of `get` to
            keep; those that hold nothing count for nothing. `keep_best` makes one from scores.
        layer_idx: which layer: `Static` or `Dynamic`, with a codec that stores each token by itself.
        donate: eager calls only: the old state must not be used again.

    Returns:
        The new state, whose layer has a position beside each token (`Static(..., track=True)` has it
        from the start, as the carry of a loop must).

    Raises:
        ValueError: if the layer cannot evict, shapes do not match, or (eager) heads, or rows of an
            aligned cache, keep different numbers of tokens. (Traced: those rows stay as they were and
            `overflowed` is set.)
        TypeError: if `keep` is not boolean.

    Example:
        >>> import jax.numpy as jnp, lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Static(6), num_layers=1, batch_size=1, num_kv_heads=2, head_dim=8
        ... )
        >>> tokens = jnp.ones((1, 2, 5, 8))
        >>> state = lj.update(state, tokens, tokens, 0)
        >>> state = lj.compact(state, jnp.array([True, False, False, True, True, False]), 0)
        >>> int(lj.seq_length(state)), lj.positions(state, 1).tolist()
        (3, [5])
    """
    layer = state.own_layer(layer_idx)
    if state.stacked and not layer.tracked and evict.can_evict(layer):
        # A stack has the positions of all its layers, or of none.
        state = state.with_layers(
            evict.tracked(one) if one.spec == layer.spec else one for one in state.layers
        )
        layer = state.own_layer(layer_idx)
    if not evict.can_evict(layer):
        raise ValueError(
            f"compact needs Static or Dynamic with a codec that stores each token by itself, got "
            f"{layer.spec}; windows and chunks evict by themselves, and groups of tokens are quantized "
            "together"
        )
    chosen = as_array(keep, "keep")
    if chosen.dtype != jnp.bool_:
        raise TypeError(
            f"keep must be boolean, got {chosen.dtype}; keep_best(scores, n) makes it from scores"
        )
    full = (layer.batch_size, layer.num_kv_heads, layer.capacity)
    shape = (*(1,) * (3 - chosen.ndim), *chosen.shape)
    if len(shape) != 3 or any(n not in (1, m) for n, m in zip(shape, full, strict=True)):
        raise ValueError(
            f"keep must broadcast to (batch, kv heads, capacity) = {full}, got {chosen.shape}"
        )
    chosen = chosen.reshape(shape)
    if is_traced(layer, chosen):
        return state.with_layer(layer_idx, _compact.traced(layer, chosen))
    if not np.asarray(_countable(layer, chosen)).all():
        raise ValueError(
            "compact needs every head to keep equally many tokens, and every row too unless the "
            "cache is ragged; keep_best(scores, n) keeps n of each"
        )
    return state.with_layer(layer_idx, _compact.compiled(donate)(layer, chosen))


def _kept(layer: TokenLayer, chosen: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The tokens to keep, bool (B, H, C), and how many of each head, int32 (B, H)."""
    valid = layer.valid().reshape(-1, 1, layer.capacity)
    full = (layer.batch_size, layer.num_kv_heads, layer.capacity)
    kept = jnp.broadcast_to(chosen & valid, full)
    return kept, jnp.sum(kept, axis=-1, dtype=jnp.int32)


@jax.jit
def _countable(layer: TokenLayer, chosen: jax.Array) -> jax.Array:
    """Whether what is kept is equally many tokens, bool [] or [B]."""
    _, counts = _kept(layer, chosen)
    if layer.ragged:
        return jnp.all(counts == counts[:, :1], axis=1)
    return jnp.all(counts == counts[0, 0])


@verb()
def _compact(layer: TokenLayer, chosen: jax.Array) -> TokenLayer:
    ok = _countable(layer, chosen)
    everything = jnp.ones((1, 1, layer.capacity), bool)
    chosen = jnp.where(ok.reshape(-1, 1, 1), chosen, everything)
    kept, counts = _kept(layer, chosen)
    # The i-th kept index of a head, by writing each kept index at its rank.
    rank = jnp.where(kept, jnp.cumsum(kept, axis=-1, dtype=jnp.int32) - 1, layer.capacity)
    index = jnp.arange(layer.capacity, dtype=jnp.int32)

    def kept_first(rank: jax.Array) -> jax.Array:
        return jnp.zeros_like(index).at[rank].set(index, mode="drop")

    keep = jax.vmap(jax.vmap(kept_first))(rank)
    count = counts[:, 0] if layer.ragged else counts[0, 0]
    smaller = evict.compact(layer, keep, count, ok)
    return smaller.replace(
        overflowed=smaller.flag(ok, "compact of unequal numbers of tokens; nothing was dropped")
    )


def _need_ragged(state: CacheState, verb: str) -> None:
    for layer in state.layers:
        check_layer_axes(layer)
    if not state.ragged:
        raise ValueError(
            f"{verb} needs a ragged cache, where each row has its own length; "
            "make it with init_cache(..., ragged=True)"
        )


def _check_alike(state: CacheState, other: CacheState) -> None:
    """Raises unless rows of one can live in the other."""
    for layer in (*state.layers, *other.layers):
        check_layer_axes(layer)

    def kind(layer: TokenLayer) -> tuple[object, ...]:
        # Rows of dense layers move down to the first slots of any number.
        layout = type(layer.layout) if layer.layout.dense else _spec(layer)
        packing = dataclasses.replace(layer.packing, codec=_spec(layer).codec)
        return (layout, packing, layer.num_kv_heads)

    if state.axes != other.axes:
        raise ValueError(
            f"states must take tokens in the same order, got axes={state.axes!r} and {other.axes!r}; "
            f"they are stored alike, so other.replace(axes={state.axes!r}) is enough"
        )
    if state.reads != other.reads:
        raise ValueError(
            f"states must have the same layers, got {state.num_layers} and {other.num_layers}, "
            f"reading {state.reads} and {other.reads}"
        )
    for stored, a, b in zip(state.each_stack, state.layers, other.layers, strict=True):
        index = state.owners[stored[0]]
        if b.tracked and not a.tracked:
            raise ValueError(
                f"layer {index} of the other state has evicted tokens and remembers their positions; "
                "make this state with track=True, so that it can too"
            )
        if kind(a) != kind(b):
            raise ValueError(
                f"layer {index} of the states must have the same layout, codec, heads and widths, "
                f"got {a} and {b}"
            )


def _spec(layer: TokenLayer) -> LayerSpec:
    """A layer's spec, the same for all codecs that keep a token's bits."""
    return layer.spec.but(codec=of_no_backend(layer.spec.codec))


def _stored_alike(state: CacheState, other: CacheState) -> CacheState:
    """The other state, which is alike, stored by the codecs of the first."""
    return other.with_layers(
        stored_by(b, a.packing.codec) for a, b in zip(state.layers, other.layers, strict=True)
    )
