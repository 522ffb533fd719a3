"""What `update` and `attend` are given, checked against a layer and brought into one form.

Places are int32 [T] or [B, T] (None: append), counts int32 [B] (None: all tokens are real). What is
known at trace time is checked then; `make_room` checks the rest, and so needs a concrete layer.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lucid_jax.cache.allocation import INT32_MAX
from lucid_jax.cache.argument_checks import as_integers, is_traced
from lucid_jax.cache.axes import STORED, check_shape
from lucid_jax.cache.growth import with_room
from lucid_jax.cache.packing import Tokens
from lucid_jax.cache.tokens import TokenLayer


def check_tokens(layer: TokenLayer, tokens: Tokens, axes: str = STORED) -> None:
    """Checks new tokens against what a layer holds: names, ranks, sizes, dtypes."""
    expected = layer.packing.widths
    if set(tokens) != set(expected):
        raise ValueError(
            f"this layer stores {' and '.join(expected)}, got {' and '.join(tokens)}; "
            "update_leaves(state, {name: tokens, ...}, layer_idx) takes any leaves, update key and "
            "value; init_cache(head_dim={name: width, ...}) names them"
        )
    for name, dim in expected.items():
        new = tokens[name]
        check_shape(name, new, axes, layer.batch_size, layer.num_kv_heads, dim)
        if new.dtype != layer.dtype:
            raise TypeError(
                f"{name} has dtype {new.dtype} but this layer stores {layer.dtype}; "
                f"cast it with {name}.astype(...), or init_cache(dtype=...)"
            )
    counts = [tokens[name].shape[axes.index("T")] for name in expected]
    if len(set(counts)) > 1:
        raise ValueError(
            f"{' and '.join(expected)} must hold the same number of tokens, got "
            f"{' and '.join(map(str, counts))}"
        )


def as_places(cache_position: Any, batch_size: int, tokens: int, counts: Any = None) -> Any:
    """Checks `cache_position` and returns it as None, int32 [T] or int32 [B, T].

    Of places that `counts` calls padding only the number matters, not the value.
    """
    if cache_position is None:
        return None
    places = as_integers(cache_position, "cache_position")
    if places.ndim == 0:
        if tokens != 1:
            raise ValueError(
                f"a 0-D cache_position places one token, but {tokens} came; give one per token"
            )
        places = places.reshape(1)
    if places.ndim == 1 and places.shape[0] != tokens:
        raise ValueError(
            f"a 1-D cache_position must have one entry per token: expected ({tokens},), "
            f"got {places.shape}"
        )
    if places.ndim == 2 and places.shape != (batch_size, tokens):
        raise ValueError(
            f"a 2-D cache_position must be (batch, seq) = ({batch_size}, {tokens}), "
            f"got {places.shape}"
        )
    if places.ndim > 2:
        raise ValueError(f"cache_position must have at most 2 axes, got shape {places.shape}")
    if isinstance(places, np.ndarray) and (counts is None or isinstance(counts, np.ndarray)):
        real = _real(places, tokens, counts)
        lowest = np.min(np.broadcast_to(places, real.shape), initial=0, where=real)
        if lowest < 0:
            raise ValueError(
                f"cache_position must not be negative, got {lowest}; "
                "positions count from 0, the oldest stored token"
            )
    return places


def _real(places: np.ndarray, tokens: int, counts: np.ndarray | None) -> np.ndarray:
    """Which places belong to real tokens: bool, of a shape that broadcasts with [B, T]."""
    return np.ones(places.shape, bool) if counts is None else np.arange(tokens) < counts[:, None]


def as_counts(lengths: Any, layer: TokenLayer, tokens: int) -> Any:
    """Checks `lengths` and returns it as None or int32 [B]."""
    if lengths is None:
        return None
    if not layer.ragged:
        raise ValueError(
            "lengths= needs a ragged cache, where each row has its own length; "
            "make it with init_cache(..., ragged=True)"
        )
    counts = as_integers(lengths, "lengths")
    if counts.shape != (layer.batch_size,):
        raise ValueError(
            f"lengths must be one integer per row: expected ({layer.batch_size},), "
            f"got {counts.shape}"
        )
    if isinstance(counts, np.ndarray) and ((counts < 0) | (counts > tokens)).any():
        raise ValueError(f"lengths must be in [0, {tokens}], as {tokens} tokens came; got {counts}")
    return counts


def with_known_room(layer: TokenLayer, tokens: int, places: Any, counts: Any) -> TokenLayer:
    """Traced: the layer with room for T tokens, as far as that is known.

    Eager gradients trace tokens alone, and then a layer grows, or refuses, as in any eager call.
    """
    if is_traced(layer.counters(), places, counts):
        check_reach(layer, tokens, places, counts)
        return layer
    return make_room(layer, tokens, places, counts)


def check_reach(layer: TokenLayer, tokens: int, places: Any, counts: Any) -> None:
    """Raises at trace time for what can never fit, whatever the traced length will be."""
    need = tokens if counts is None and places is None else 0
    if isinstance(places, np.ndarray) and counts is None:
        need = int(places.max()) + 1
    if layer.bounded and need > layer.capacity:
        raise ValueError(no_room(f"{tokens} tokens", need, layer))


def make_room(
    layer: TokenLayer, tokens: int, places: Any, counts: Any, stored: int | None = None
) -> TokenLayer:
    """Eager: the layer itself if the tokens fit, a grown copy if it may grow, else an error."""
    if stored is not None and stored + tokens <= layer.capacity and places is None:
        return layer
    if places is None:
        _check_countable(layer, np.int32(tokens) if counts is None else counts)
    if not layer.bounded:
        if places is not None:
            real = _real(places, tokens, counts)
            last = np.iinfo(np.int32).max - 1 - int(np.max(np.asarray(layer.position)))
            far = int(np.max(np.broadcast_to(places, real.shape), initial=-1, where=real))
            if far > last:
                raise ValueError(
                    f"cache_position must be at most {last}, so that int32 can count positions, got "
                    f"{far}"
                )
        return layer
    lengths = layer.length_on_host()
    if places is None:
        new = np.int32(tokens) if counts is None else counts
        need = int(np.max(lengths.astype(np.int64) + new))
        what = f"{int(lengths.max())} stored + {int(np.max(new))} new tokens"
    else:
        real = _real(places, tokens, counts)
        places = np.broadcast_to(places, real.shape)
        row = -1 if layer.ragged else None  # what shares one length
        ends = np.max(places.astype(np.int64), axis=row, initial=-1, where=real) + 1
        _check_countable(layer, np.maximum(ends - lengths, 0))
        need = int(ends.max())
        what = f"tokens up to position {need - 1}"
    if need <= layer.capacity:
        return layer
    roomy = with_room(layer, need)
    if roomy is None:
        raise ValueError(no_room(what, need, layer))
    return roomy


def _check_countable(layer: TokenLayer, new: np.ndarray | np.generic) -> None:
    """Raises unless int32 can count the positions of `new` (integers [] or [B]) more tokens."""
    left = layer.positions_left()
    if (new > left).any():
        raise ValueError(
            f"{int(np.max(new))} new tokens would pass the last position that int32 can count, as "
            f"{INT32_MAX - int(left.min())} came before; reset() the cache, or free() the row"
        )


def check_places_possible(layer: TokenLayer, places: Any) -> None:
    """Raises where a layer can only be appended to, and places were given."""
    if places is None:
        return
    if layer.packing.codec.unit > 1:
        raise ValueError(
            f"cache_position= would change tokens that {layer.packing.codec} has quantized with "
            "their group; append instead, or use a codec that stores each token by itself (Int4)"
        )
    if layer.tracked:
        raise ValueError(
            "cache_position= names no single token once heads may have evicted different ones "
            "(track=True, compact); append instead"
        )


def no_room(what: str, need: int, layer: TokenLayer) -> str:
    """The message of an error about room: what needs how much, what there is, and the fixes."""
    return (
        f"{what} need {need} slots, but the capacity is {layer.capacity}; make a larger "
        "Static(capacity), call ensure_capacity before jit (Dynamic), or crop first"
    )


def absolute_positions(layer: TokenLayer, places: Any) -> jax.Array:
    """Turns places in the stored sequence, [T] or [B, T], into absolute positions."""
    places = jnp.asarray(places)
    if layer.ragged and places.ndim == 1:
        places = jnp.broadcast_to(places, (layer.batch_size, *places.shape))
    return layer.position_of(places)
