"""`update`: tokens into a layer, appended or by index, and by what names its leaves have."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lucid_jax.cache.append import append, append_fitting
from lucid_jax.cache.argument_checks import (
    as_array,
    is_traced,
)
from lucid_jax.cache.axes import STORED, swapped
from lucid_jax.cache.mesh_programs import Parts, on_each_device
from lucid_jax.cache.packing import Tokens
from lucid_jax.cache.sharding import (
    MeshAxes,
    divided_like_tokens,
)
from lucid_jax.cache.stacked import (
    LayerIndex,
)
from lucid_jax.cache.state import CacheState
from lucid_jax.cache.token_arguments import (
    as_counts,
    as_places,
    check_places_possible,
    check_tokens,
    make_room,
    with_known_room,
)
from lucid_jax.cache.tokens import TokenLayer
from lucid_jax.cache.verb import verb
from lucid_jax.cache.write import write


def update(
    state: CacheState,
    key: ArrayLike,
    value: ArrayLike,
    layer_idx: LayerIndex,
    cache_position: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    *,
    donate: bool = False,
) -> CacheState:
    """Appends T tokens to one layer, or writes them at given places.

    Cost is O(T), whatever the capacity. All or nothing: tokens that do not fit raise when called
    eagerly; traced, nothing is written (per row, if ragged) and `overflowed` is set. A dynamic layer
    grows when called eagerly.

    Args:
        state: the cache.
        key: (B, H, T, D), in the cache's dtype; (B, T, H, D) for a state of `axes="BTHD"`.
        value: (B, H, T, Dv), or alike.
        layer_idx: which layer, a Python int; of a stacked state also a traced int32 [].
        cache_position: where the tokens go, counted from the oldest stored token: None appends; an
            integer places one token; `[T]` places each token; `[B, T]` places them row by row. The
            length becomes `max(length, largest + 1)`, slots skipped on the way read as zeros, and of
            duplicates the last wins.
        lengths: int32 [B], ragged caches only: how many of each row's T tokens are real. The rest of
            a right-padded chunk writes nothing; a row with 0 sits this step out.
        donate: eager calls only: reuse this layer's buffers; the old state must not be used again.

    Returns:
        The new state.

    Raises:
        ValueError: for a wrong rank, batch size, head count or head_dim, a layer index or position
            out of range, or (eager) tokens that do not fit.
        TypeError: for a dtype that is not the cache's, or positions that are not integers.

    Example:
        >>> import jax.numpy as jnp, lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Static(4), num_layers=1, batch_size=1, num_kv_heads=2, head_dim=8
        ... )
        >>> tokens = jnp.ones((1, 2, 3, 8))
        >>> state = lj.update(state, tokens, tokens, 0)
        >>> int(lj.seq_length(state))
        3
        >>> lj.update(state, tokens, tokens, 0)
        Traceback (most recent call last):
        ValueError: 3 stored + 3 new tokens need 6 slots, but the capacity is 4; ...
    """
    tokens = {"key": key, "value": value}
    return update_leaves(state, tokens, layer_idx, cache_position, lengths, donate=donate)


def update_leaves(
    state: CacheState,
    tokens: Mapping[str, ArrayLike],
    layer_idx: LayerIndex,
    cache_position: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    *,
    donate: bool = False,
) -> CacheState:
    """`update` of a layer whose tokens have leaves of their own names, as `init_cache` was told.

    Multi-head latent attention (DeepSeek-V2) stores a latent and a rotated key in place of keys and
    values; an indexer a key of its own beside them.

    Args:
        state: the cache.
        tokens: for each leaf (B, H, T, D), D its width, in the state's order of axes.
        layer_idx: see `update`.
        cache_position: see `update`.
        lengths: see `update`.
        donate: see `update`.

    Returns:
        The new state.

    Raises:
        ValueError: as `update`; and if the names are not those of the layer.
        TypeError: as `update`.

    Example:
        >>> import jax.numpy as jnp, lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Static(4), num_layers=1, batch_size=1, num_kv_heads=1,
        ...     head_dim={"latent": 16, "rope": 4},
        ... )
        >>> new = {"latent": jnp.ones((1, 1, 3, 16)), "rope": jnp.ones((1, 1, 3, 4))}
        >>> state = lj.update_leaves(state, new, 0)
        >>> query = {"latent": jnp.ones((1, 8, 3, 16)), "rope": jnp.ones((1, 8, 3, 4))}
        >>> lj.attend(state, query, 0, scale=0.25).shape
        (1, 8, 3, 16)
    """
    if not isinstance(tokens, Mapping):
        raise TypeError(
            f'update_leaves takes tokens as a dict by leaf, like {{"latent": x, "rope": y}}, got '
            f"{type(tokens).__name__}"
        )
    layer = state.own_layer(layer_idx)
    if state.axes != STORED:
        given = {name: as_array(x, name) for name, x in tokens.items()}
        check_tokens(layer, given, state.axes)
        tokens = {name: swapped(x, state.axes) for name, x in given.items()}
    new = update_layer(layer, tokens, cache_position, lengths, donate=donate)
    return state if new is layer else state.with_layer(layer_idx, new)


def update_layer(
    layer: TokenLayer,
    tokens: Mapping[str, ArrayLike],
    cache_position: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    *,
    donate: bool = False,
    stored: int | None = None,
) -> TokenLayer:
    """`update_leaves` of one layer by itself, whose buffers are there; itself if no token came.

    Of an aligned layer `stored` is the length, where the host knows it without asking the device.
    """
    new = {name: as_array(x, name) for name, x in tokens.items()}
    check_tokens(layer, new)
    count = new[layer.packing.mixed].shape[2]
    counts = as_counts(lengths, layer, count)
    places = as_places(cache_position, layer.batch_size, count, counts)
    check_places_possible(layer, places)
    if count == 0:
        return layer
    if is_traced(layer, new, places, counts):
        roomy = with_known_room(layer, count, places, counts)
        # An eager gradient traces the tokens alone, and then our own program is compiled once.
        within = is_traced(layer.counters(), places, counts)
        return (_update.traced if within else _update.kept)(roomy, new, places, counts)
    # A ring's length is only known while it is new: one program is to serve it all along.
    stored = stored if layer.bounded else None
    layer = divided_like_tokens(layer, new[layer.packing.mixed])
    roomy = make_room(layer, count, places, counts, stored)
    if stored is not None and places is None and (donate or roomy is not layer):
        fitted: TokenLayer = _append_fitting(roomy, new)
        return fitted
    # A layer that just grew is ours alone, so its buffers are free to reuse.
    return _update.compiled(donate or roomy is not layer)(roomy, new, places, counts)


def _parts_of_update(axes: MeshAxes, layer: Any, *args: Any) -> Parts:
    tokens, places, counts = args
    return (axes.of_heads(tokens), axes.of_rows(places, 2), axes.of_rows(counts, 1)), layer


@verb(parts=_parts_of_update)
def _update(layer: TokenLayer, tokens: Tokens, places: Any, counts: Any) -> TokenLayer:
    counts = None if counts is None else jnp.asarray(counts)
    if places is None:
        return append(layer, tokens, counts)
    return write(layer, tokens, jnp.asarray(places), counts)


@partial(jax.jit, donate_argnums=0)
@partial(on_each_device, parts=lambda axes, layer, tokens: ((axes.of_heads(tokens),), layer))
def _append_fitting(layer: TokenLayer, tokens: Tokens) -> TokenLayer:
    return append_fitting(layer, tokens)
