"""One call of `MultiHeadAttention`: what it is asked for, and attention over either kind of cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lucid_jax.attention.attend import attend
from lucid_jax.attention.extend import extend
from lucid_jax.cache import introspection
from lucid_jax.cache.state import CacheState
from lucid_jax.cache.update import update
from lucid_jax.nn.attended_store import check_holds_everything
from lucid_jax.nn.base import Cache
from lucid_jax.nn.cache import KVCache
from lucid_jax.nn.encoder_decoder import EncoderDecoderCache

KeysValues = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """What a call says of its tokens and their cache."""

    cache: Cache | CacheState | None
    layer_idx: Any  # an int; of a stacked pure state also traced
    encoder_hidden: jax.Array | None
    is_cross_attention: bool
    positions: jax.Array | None
    cache_position: ArrayLike | None
    lengths: ArrayLike | None

    def check(self, hidden: jax.Array) -> None:
        """Raises for arguments that do not go together."""
        for name, x in (("hidden", hidden), ("encoder_hidden", self.encoder_hidden)):
            if x is not None and x.ndim != 3:
                raise ValueError(
                    f"{name} must be (batch, seq, width), got shape {x.shape}; of one sequence give "
                    f"{name}[None]"
                )
        pure = isinstance(self.cache, CacheState)
        if self.lengths is not None and not pure:
            raise ValueError("lengths= needs a ragged CacheState; drop it, or pass one as cache=")
        if self.cache_position is not None and self.cache is None:
            raise ValueError("cache_position= needs a cache; drop it, or pass positions= for RoPE")
        if self.encoder_hidden is not None and not self.is_cross_attention:
            raise ValueError("encoder_hidden= is for is_cross_attention=True; set it, or drop it")
        if self.is_cross_attention and isinstance(self.cache, CacheState):
            check_holds_everything(self.cache.layer(self.layer_idx))


def attend_with_state(
    cache: CacheState,
    query: jax.Array,
    new: KeysValues | None,
    call: AttentionCall,
    options: dict[str, Any],
) -> tuple[jax.Array, CacheState]:
    """Attention over a pure state, and the state with what is new in it."""
    state = cache.replace(axes="BHTD")  # whatever its owner's order
    if new is not None and not call.is_cross_attention:
        del options["causal"]
        out, state = extend(state, query, *new, call.layer_idx, **options)
    else:
        if new is not None:
            state = update(state, *new, call.layer_idx, call.cache_position, call.lengths)
        out = attend(state, query, call.layer_idx, **options)
    return out, state.replace(axes=cache.axes)


def attend_with_object(
    cache: Cache,
    query: jax.Array,
    new: KeysValues | None,
    call: AttentionCall,
    options: dict[str, Any],
) -> jax.Array:
    """Attention over a stateful cache, which takes in what is new."""
    part, layer_idx = _part(cache, call.is_cross_attention), call.layer_idx
    if call.is_cross_attention:
        pair = cache if isinstance(cache, EncoderDecoderCache) else None
        options |= {"cache_position": call.cache_position, "replace": pair is not None}
        out = part.cross_attend(query, new, layer_idx, **options)
        if pair is not None and new is not None:
            pair.is_updated[layer_idx] = True
        return out
    if new is None:
        return part.attend(query, layer_idx, **options)
    del options["causal"]
    return part.extend(query, *new, layer_idx, **options)


def _part(cache: Cache, is_cross_attention: bool) -> KVCache:
    if isinstance(cache, EncoderDecoderCache):
        return cache.cross_attention_cache if is_cross_attention else cache.self_attention_cache
    if isinstance(cache, KVCache):
        return cache
    raise TypeError(
        f"cache must be a CacheState, a KVCache or an EncoderDecoderCache, got {type(cache).__name__}"
    )


def has_encoder_keys(cache: Cache | CacheState | None, layer_idx: Any) -> bool:
    """Whether a pair of caches has the layer's encoder keys, and they need not be computed again."""
    return isinstance(cache, EncoderDecoderCache) and cache.is_updated.get(layer_idx, False)


def reads_another(cache: Cache | CacheState | None, layer_idx: Any) -> bool:
    """Whether this layer shares the tokens of an earlier one, which has stored them already."""
    if cache is None:
        return False
    return not (cache if isinstance(cache, CacheState) else _part(cache, False)).owns(layer_idx)


def next_positions(
    cache: Cache | CacheState | None,
    tokens: int,
    layer_idx: Any = 0,
    cache_position: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
) -> jax.Array:
    """Absolute positions of the tokens about to be stored, int32 [T] or [B, T]."""
    if cache is None:
        return jnp.arange(tokens, dtype=jnp.int32)
    if isinstance(cache, CacheState):
        positions = introspection.positions(cache, tokens, layer_idx, cache_position)
    else:
        positions = _part(cache, False).positions(tokens, layer_idx, cache_position)
    if cache_position is not None or not reads_another(cache, layer_idx):
        return positions
    # The layer it reads has stored these tokens already.
    return positions - (tokens if lengths is None else jnp.asarray(lengths)[:, None])
