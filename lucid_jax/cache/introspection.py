"""What a state holds: tokens (`get`), lengths, positions, capacity, bytes, and the overflow flag."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from lucid_jax.cache.argument_checks import (
    check_alive,
    check_count,
)
from lucid_jax.cache.axes import swapped
from lucid_jax.cache.codecs import bits_dtype
from lucid_jax.cache.packing import Tokens
from lucid_jax.cache.reading import tokens as read_tokens
from lucid_jax.cache.slots import span
from lucid_jax.cache.stacked import (
    LayerIndex,
    counter,
)
from lucid_jax.cache.state import CacheState
from lucid_jax.cache.token_arguments import (
    absolute_positions,
    as_places,
    check_places_possible,
)
from lucid_jax.cache.tokens import TokenLayer
from lucid_jax.cache.verb import verb


def get(state: CacheState, layer_idx: LayerIndex) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Everything one layer stores, oldest token first, padded to the full capacity.

    Reading the whole capacity costs O(capacity); `attend` does not.

    Returns:
        keys (B, H, C, D) and values (B, H, C, Dv), or (B, C, H, ...) for a state of `axes="BTHD"`,
        zero where nothing is stored, and `valid`, bool [C], or [B, C] if ragged.

    Example:
        >>> import lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Static(4), num_layers=1, batch_size=1, num_kv_heads=2, head_dim=8
        ... )
        >>> keys, values, valid = lj.get(state, 0)
        >>> keys.shape, valid.any().item()
        ((1, 2, 4, 8), False)
    """
    tokens, valid = get_leaves(state, layer_idx)
    if not {"key", "value"} <= set(tokens):
        raise ValueError(
            f"this layer stores {' and '.join(tokens)}, not keys and values; get_leaves(state, "
            "layer_idx) gives all leaves by name"
        )
    return tokens["key"], tokens["value"], valid


def get_leaves(state: CacheState, layer_idx: LayerIndex) -> tuple[dict[str, jax.Array], jax.Array]:
    """`get` of a layer with leaves of its own names: each (B, H, C, D), and `valid`.

    Example:
        >>> import lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Static(4), num_layers=1, batch_size=1, num_kv_heads=1,
        ...     head_dim={"latent": 16, "rope": 4},
        ... )
        >>> {name: leaf.shape for name, leaf in lj.get_leaves(state, 0)[0].items()}
        {'latent': (1, 1, 4, 16), 'rope': (1, 1, 4, 4)}
    """
    layer = state.layer(layer_idx)
    tokens, valid = _read(layer)
    return {name: swapped(x, state.axes) for name, x in tokens.items()}, valid


@verb()
def _read(layer: TokenLayer) -> tuple[Tokens, jax.Array]:
    valid = layer.valid()
    mask = valid.reshape(-1, 1, layer.capacity, 1)
    return {name: _where(mask, x) for name, x in read_tokens(layer).items()}, valid


@jax.custom_jvp
def _where(mask: jax.Array, tokens: jax.Array) -> jax.Array:
    """Tokens where `mask`, zeros elsewhere; no product, as what is not live may be NaN.

    As bits: to choose between narrow floats XLA may widen them, which alters some NaNs.
    """
    bits = bits_dtype(tokens.dtype)
    if bits == tokens.dtype:
        return jnp.where(mask, tokens, jnp.zeros((), bits))
    chosen = jnp.where(mask, lax.bitcast_convert_type(tokens, bits), jnp.zeros((), bits))
    return lax.bitcast_convert_type(chosen, tokens.dtype)


@_where.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    mask, tokens = primals
    dot = tangents[1]
    return _where(mask, tokens), jnp.where(mask, dot, jnp.zeros((), dot.dtype))


def valid(state: CacheState, layer_idx: LayerIndex = 0) -> jax.Array:
    """Which slots of `get` hold a live token: bool [C], or [B, C] if ragged."""
    return state.layer(layer_idx).valid()


def seq_length(state: CacheState, layer_idx: LayerIndex = 0) -> jax.Array:
    """Tokens stored now: int32 [], or [B] if ragged."""
    return state.layer(layer_idx).length


def positions(
    state: CacheState, n: int, layer_idx: LayerIndex = 0, cache_position: ArrayLike | None = None
) -> jax.Array:
    """Absolute positions of the next `n` tokens, for RoPE: int32 [n], or [B, n] if ragged.

    They continue from the tokens ever seen, not from the length: crop lowers the length only. With
    `cache_position`, as `update` takes it, they are the positions of the places named.

    Example:
        >>> import jax.numpy as jnp, lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Static(8), num_layers=1, batch_size=1, num_kv_heads=2, head_dim=8
        ... )
        >>> tokens = jnp.ones((1, 2, 5, 8))
        >>> state = lj.crop(lj.update(state, tokens, tokens, 0), 2)
        >>> int(lj.seq_length(state)), lj.positions(state, 2).tolist()
        (2, [5, 6])
    """
    layer = state.layer(layer_idx)
    count = check_count(n, "n")
    places = as_places(cache_position, layer.batch_size, count)
    if places is None:
        return span(layer.position, count)
    check_places_possible(layer, places)
    return absolute_positions(layer, places)


def stored_positions(state: CacheState, layer_idx: LayerIndex = 0) -> jax.Array:
    """Absolute positions of the tokens that `get` gives, -1 where it gives none.

    Returns:
        int32 [C], [B, C] if ragged; (B, H, C) once heads may have evicted different tokens.

    Example:
        >>> import jax.numpy as jnp, lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Sliding(2, sinks=1), num_layers=1, batch_size=1, num_kv_heads=2, head_dim=8
        ... )
        >>> tokens = jnp.ones((1, 2, 9, 8))
        >>> lj.stored_positions(lj.update(state, tokens, tokens, 0)).tolist()
        [0, 7, 8]
    """
    return state.layer(layer_idx).stored_positions()


def capacity(state: CacheState, layer_idx: LayerIndex = 0) -> int:
    """C, the most tokens that each row of a layer holds: the seq axis of `get`."""
    return state.layer(layer_idx).capacity


def nbytes(state: CacheState) -> int:
    """Bytes reserved by all buffers of the state."""
    return _nbytes(state)


def _nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def overflowed(state: CacheState) -> jax.Array:
    """Whether a traced operation asked for what could not be done: bool [], or [B] if ragged.

    The flag is sticky until `reset`. What was asked for did not happen: no token was overwritten.
    """
    check_alive(state)
    flags = jnp.concatenate([counter(layer, "overflowed") for layer in state.layers])
    return jnp.any(flags, axis=0)


def check_overflow(state: CacheState) -> None:
    """Raises if the state's `overflowed` flag is set; for host loops, after a compiled call.

    Raises:
        OverflowError: naming the rows and layers where a traced operation was refused.
    """
    check_alive(state)
    if not any(np.asarray(layer.overflowed).any() for layer in state.layers):
        return
    for index in state.in_stacks:
        layer = state.layer(index)
        flags = np.atleast_1d(np.asarray(layer.overflowed))
        if flags.any():
            rows = f", rows {np.flatnonzero(flags).tolist()}" if layer.ragged else ""
            raise OverflowError(
                f"layer {index}{rows}: a compiled step asked for more than the cache could do "
                f"(length {layer.length_on_host().tolist()}, capacity {layer.capacity}); nothing "
                "was overwritten, but those tokens are missing. Give the cache more room "
                "(Static(capacity), ensure_capacity) or check the positions, rows and layers passed in"
            )


def room(state: CacheState) -> int | None:
    """Tokens that every row can still take without growing; None if there is no bound.

    Needs a concrete state.
    """
    check_alive(state)
    return min(
        (
            layer.capacity - int(np.max(layer.length_on_host()))
            for layer in state.layers
            if layer.bounded
        ),
        default=None,
    )
