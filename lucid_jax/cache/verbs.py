"""The verbs over all layers: pure functions from state to state.

Every verb works three ways. Inside `jit` it traces into the caller's program. Called eagerly it is
compiled already and the old state stays valid. Called eagerly with `donate=True` it updates in place
and the old state's buffers are gone. Buffers that a call leaves as they are (other layers of an
`update`, all in `rollback`, `reset`, `free` and a ring's `crop`) belong to the old state and the new
one: donate either, and the other says that it is gone. Eager calls check everything and raise; a traced
call that asks for what cannot be done changes nothing and sets the state's sticky `overflowed` flag.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from lucid_jax.cache.argument_checks import (
    as_integers,
    check_alive,
    check_count,
    check_indices,
    check_layer_axes,
    check_layer_dtypes,
    is_traced,
)
from lucid_jax.cache.convert import astype as layer_astype
from lucid_jax.cache.growth import with_room as layer_with_room
from lucid_jax.cache.stacked import (
    ask,
    counter,
    each,
)
from lucid_jax.cache.state import CacheState
from lucid_jax.cache.token_arguments import (
    no_room,
)
from lucid_jax.cache.tokens import TokenLayer
from lucid_jax.cache.verb import Verb, verb


def checked(state: CacheState, on: bool = True) -> CacheState:
    """The state, whose traced operations also tell `jax.experimental.checkify` what did not fit.

    Errors then name the call, where the sticky `overflowed` flag tells only that there was one. Not the
    default, as jit takes the slow way through Python for programs that hold such checks: 0.3 ms more a
    call. Like a codec it is static: a loop or a branch must carry one kind. `save` does not keep it.

    Args:
        state: a cache; of an encoder and decoder, `state.decoder`.
        on: False takes the checks out again.

    Raises:
        TypeError: if `state` is not a `CacheState`.

    Example:
        >>> import jax.numpy as jnp, lucid_jax as lj
        >>> from jax.experimental import checkify
        >>> state = lj.init_cache(
        ...     lj.Static(2), num_layers=1, batch_size=1, num_kv_heads=1, head_dim=4
        ... )
        >>> tokens = jnp.ones((1, 1, 2, 4))
        >>> step = checkify.checkify(jax.jit(lambda s: lj.update(s, tokens, tokens, 0)))
        >>> _, state = step(lj.checked(state))
        >>> error, _ = step(state)
        >>> print(error.get().split("; ")[0])
        append past the capacity of 2
    """
    if not isinstance(state, CacheState):
        raise TypeError(
            f"checked takes a CacheState, got {type(state).__name__}; of an EncoderDecoderState give "
            "it the decoder"
        )
    return state.replace(layers=tuple(layer.replace(checked=on) for layer in state.layers))


def astype(state: CacheState, dtype: DTypeLike) -> CacheState:
    """The same tokens in another dtype, which `update` then expects.

    Plain tokens are converted, in new buffers; what a codec has quantized stays as it is, and is read
    in the new dtype. `jax.tree.map` with `astype` would convert counters and codes too.

    Args:
        state: a cache, which stays valid; of an encoder and decoder, one part.
        dtype: as for `init_cache`.

    Raises:
        TypeError: if `state` is no `CacheState`, or for a dtype that its codecs do not take.
        RuntimeError: if its buffers were donated.

    Example:
        >>> import jax.numpy as jnp, lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Static(4), num_layers=1, batch_size=1, num_kv_heads=2, head_dim=8
        ... )
        >>> lj.astype(state, jnp.bfloat16).layers[0].key.dtype
        dtype(bfloat16)
    """
    if not isinstance(state, CacheState):
        raise TypeError(f"astype takes a CacheState, got {type(state).__name__}")
    check_alive(state)
    for layer in state.layers:
        check_layer_dtypes(layer)
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    return _astype(state, dtype=dtype)


@verb("dtype")
def _astype(state: CacheState, dtype: jnp.dtype) -> CacheState:
    return state.with_layers(layer_astype(layer, dtype) for layer in state.layers)


def _per_layer(name: str) -> Verb[CacheState]:
    """The verb that calls one method on each layer."""

    @verb(shares=True)
    def run(state: CacheState, *args: Any) -> CacheState:
        args = tuple(jnp.asarray(arg) for arg in args)

        def change(layer: TokenLayer) -> TokenLayer:
            check_layer_axes(layer)
            changed: TokenLayer = getattr(layer, name)(*args)
            return changed

        return state.with_layers(each(layer, change) for layer in state.layers)

    return run


_select, _crop, _rollback, _reset = (
    _per_layer(name) for name in ("select", "crop", "rollback", "reset")
)


def select(state: CacheState, indices: ArrayLike, *, donate: bool = False) -> CacheState:
    """Gathers batch rows: row i of the result is row `indices[i]`. Rows may repeat or be left out.

    Only stored tokens move, not the whole capacity. With as many rows as before, `donate=True` (or a
    loop carry) reorders in place.

    Args:
        state: the cache.
        indices: int32 [B'], each in [0, B).
        donate: eager calls only: the old state must not be used again. Another number of rows takes
            new buffers all the same.

    Raises:
        IndexError: for a concrete index out of range, negative ones included. A traced one is
            clamped and sets `overflowed`.
        ValueError: if indices are not 1-D.
        TypeError: if they are not integers.

    Example:
        >>> import lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Static(4), num_layers=1, batch_size=2, num_kv_heads=2, head_dim=8
        ... )
        >>> lj.select(state, [1, 1, 0]).batch_size
        3
    """
    check_alive(state)
    rows = check_indices(indices, state.batch_size)
    # Another number of rows needs other buffers: there would be nothing to reuse.
    return _select(state, rows, donate=donate and len(rows) == state.batch_size)


def reorder(
    state: CacheState,
    beam_idx: ArrayLike,
    *,
    since: ArrayLike | None = None,
    donate: bool = False,
) -> CacheState:
    """`select` under its beam-search name: row i goes on from row `beam_idx[i]`.

    Args:
        state: the cache.
        beam_idx: int32 [B'], each in [0, B).
        since: an absolute position, an integer or int32 [B]: before it, row i already holds the tokens
            of row `beam_idx[i]` (the prompt, and what came before those two beams parted), so
            contiguous layers move only what follows. Rings, which wrap, move whole.
        donate: eager calls only: the old state must not be used again.

    Raises:
        IndexError: as `select`.
        ValueError: as `select`; and, with `since`, if it is negative, past a row's position, of
            another shape, or if the number of rows changes. (Traced values are clamped.)
        TypeError: as `select`.

    Example:
        >>> import jax.numpy as jnp, lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Static(8), num_layers=1, batch_size=1, num_kv_heads=2, head_dim=8
        ... )
        >>> prompt = jnp.ones((1, 2, 5, 8))
        >>> state = lj.repeat_interleave(lj.update(state, prompt, prompt, 0), 3)
        >>> tokens = jnp.arange(3.0)[:, None, None, None] * jnp.ones((1, 2, 1, 8))
        >>> state = lj.reorder(lj.update(state, tokens, tokens, 0), [2, 0, 0], since=5)
        >>> lj.get(state, 0)[0][:, 0, 4:6, 0].tolist()
        [[1.0, 2.0], [1.0, 0.0], [1.0, 0.0]]
    """
    if since is None:
        return select(state, beam_idx, donate=donate)
    check_alive(state)
    rows = check_indices(beam_idx, state.batch_size)
    return _select(state, rows, _as_since(state, rows, since), donate=donate)


def _as_since(state: CacheState, rows: Any, since: ArrayLike) -> Any:
    """Checks what `reorder` is told about shared tokens."""
    position = as_integers(since, "since")
    if len(rows) != state.batch_size:
        raise ValueError(
            f"since= leaves shared tokens where they are, so the number of rows must stay "
            f"{state.batch_size}, got {len(rows)} indices; leave since= out"
        )
    if position.ndim > 1 or (position.ndim == 1 and len(position) != state.batch_size):
        raise ValueError(
            f"since must be an integer or shape ({state.batch_size},), got {position.shape}"
        )
    if not is_traced(state, position):
        with jax.ensure_compile_time_eval():  # also where a concrete state is used inside jit
            each_position = [np.asarray(counter(layer, "position")) for layer in state.layers]
            newest = np.min(np.concatenate(each_position), axis=0)
        if np.any(position < 0) or np.any(position > newest):
            raise ValueError(
                f"since must be an absolute position in [0, {np.min(newest)}], got "
                f"{np.asarray(position).tolist()}; rows share nothing beyond what they hold"
            )
    return position


def repeat_interleave(state: CacheState, n: int) -> CacheState:
    """Beam expansion: rows 0, 0, ..., 1, 1, ..., each `n` times.

    Raises:
        ValueError: if `n` is less than 1.
        TypeError: if `n` is not an integer known at trace time.

    Example:
        >>> import lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Static(4), num_layers=1, batch_size=2, num_kv_heads=2, head_dim=8
        ... )
        >>> lj.repeat_interleave(state, 4).batch_size
        8
    """
    repeats = check_count(n, "n", 1)
    return select(state, np.repeat(np.arange(state.batch_size, dtype=np.int32), repeats))


def crop(state: CacheState, max_length: ArrayLike, *, donate: bool = False) -> CacheState:
    """Keeps the latest `max_length` tokens of every layer and row; absolute positions go on.

    Called eagerly, rings are shared with the old state until one of the two is donated: nothing moves.

    Args:
        state: the cache.
        max_length: an integer >= 0, or a traced int32 [].
        donate: eager calls only: the old state must not be used again.

    Raises:
        ValueError: if negative. (Traced: nothing is dropped and `overflowed` is set.)
        TypeError: if not an integer.
    """
    check_alive(state)
    limit = as_integers(max_length, "max_length")
    if limit.ndim:
        raise ValueError(f"max_length must be one integer, got shape {limit.shape}")
    if isinstance(limit, (np.ndarray, np.integer)) and limit < 0:
        raise ValueError(f"max_length must be at least 0, got {limit}")
    return _crop(state, limit, donate=donate)


def rollback(state: CacheState, n: ArrayLike, *, donate: bool = False) -> CacheState:
    """Drops the latest `n` tokens, as if they had never come: position goes back with length.

    For speculative decoding: append the drafts, then roll the rejected ones back. Costs O(1): called
    eagerly, the new state shares the old one's buffers until one of the two is donated.

    Args:
        state: the cache.
        n: an integer, or int32 [B] for a ragged cache: tokens to drop from each row.
        donate: eager calls only: the old state must not be used again.

    Raises:
        ValueError: if `n` is negative, more than is stored, or more than a layer can bring back
            exactly: a ring that has wrapped its `slack`, KIVI its `residual`, and an evicted layer
            what came since. (Traced: nothing is dropped and `overflowed` is set, per row.)
        TypeError: if not integers.

    Example:
        >>> import jax.numpy as jnp, lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Static(8), num_layers=1, batch_size=2, num_kv_heads=2, head_dim=8, ragged=True
        ... )
        >>> tokens = jnp.ones((2, 2, 5, 8))
        >>> state = lj.rollback(lj.update(state, tokens, tokens, 0), jnp.array([0, 3]))
        >>> lj.seq_length(state).tolist()
        [5, 2]
    """
    check_alive(state)
    drop = as_integers(n, "n")
    if drop.ndim == 1 and not state.ragged:
        raise ValueError(
            "rolling rows back by different amounts needs a ragged cache; "
            "make it with init_cache(..., ragged=True), or pass one integer"
        )
    if drop.ndim > 1 or (drop.ndim == 1 and drop.shape != (state.batch_size,)):
        raise ValueError(f"n must be an integer or shape ({state.batch_size},), got {drop.shape}")
    if not is_traced(state, drop):
        with jax.ensure_compile_time_eval():  # also where a concrete state is used inside jit
            possible = np.asarray(_can_rollback(state, drop))
        if not possible.all():
            raise ValueError(_no_way_back(state, np.asarray(drop), possible))
    return _rollback(state, drop, donate=donate)


@jax.jit
def _can_rollback(state: CacheState, n: jax.Array) -> jax.Array:
    """Which layers (and rows) can drop `n` tokens: bool [layers] or [layers, B]."""
    return jnp.concatenate([ask(layer, lambda one: one.can_rollback(n)) for layer in state.layers])


def _no_way_back(state: CacheState, drop: np.ndarray, possible: np.ndarray) -> str:
    first = int(np.flatnonzero(~possible.reshape(len(possible), -1).all(axis=1))[0])
    owner = state.in_stacks[first]
    layer = state.layer(owner)
    stored = np.asarray(layer.position) - np.asarray(layer.start)
    asked = f"rollback({drop.tolist()}) of layer {owner}"
    if np.any(drop < 0) or np.any(drop > stored):
        return (
            f"{asked} needs 0 <= n <= tokens stored, or slid out of a window since they were, which "
            f"are {stored.tolist()}"
        )
    if layer.tracked:
        return f"{asked} would reach tokens that were there at the latest compact; drop fewer"
    return (
        f"{asked} is more than {layer.spec} can bring back: it promises {layer.lookback} tokens, "
        "counted from the longest it has been. Give the layer more slack=, or KIVI more residual="
    )


def reset(state: CacheState, *, donate: bool = False) -> CacheState:
    """Empties every layer and clears `overflowed`; buffers are kept, and what they held is unseen.

    Called eagerly, the new state shares them with the old one, until one of the two is donated.
    """
    check_alive(state)
    return _reset(state, donate=donate)


def grow(state: CacheState, capacity: int) -> CacheState:
    """Gives every dynamic layer at least `capacity` slots (rounded up to a power of two).

    Runs on the host, between compiled calls, as the new capacity is a new shape. Stored tokens are
    copied; layers that are large enough already are shared with the old state.

    Raises:
        ValueError: if a layer is too small and its layout cannot grow.
    """
    need = check_count(capacity, "capacity", 1)
    return with_room(state, [need] * len(state.layers))


def with_room(state: CacheState, needs: Sequence[int]) -> CacheState:
    """`grow` with a number of its own for each of `state.layers`."""
    check_alive(state)
    layers = []
    for stored, layer, need in zip(state.each_stack, state.layers, needs, strict=True):
        index = state.owners[stored[0]]
        enough = need <= layer.capacity or not layer.bounded
        roomy = layer if enough else layer_with_room(layer, need)
        if roomy is None:
            raise ValueError(no_room(f"layer {index} cannot grow: {need} tokens", need, layer))
        layers.append(roomy)
    return state.with_layers(layers)


def ensure_capacity(state: CacheState, n: int) -> CacheState:
    """Makes room for `n` more tokens in every row before a compiled chunk of steps; see `grow`.

    Layers that drop tokens need none.

    Example:
        >>> import lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Dynamic(), num_layers=1, batch_size=1, num_kv_heads=2, head_dim=8
        ... )
        >>> lj.capacity(lj.ensure_capacity(state, 100))
        128
    """
    if is_traced(state):
        raise TypeError(
            "ensure_capacity needs a concrete state: a traced length cannot choose a shape; "
            "call it outside jit, before the compiled steps"
        )
    check_alive(state)
    more = check_count(n, "n")
    return with_room(state, [int(np.max(x.length_on_host())) + more for x in state.layers])
