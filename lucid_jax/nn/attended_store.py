"""`AttendedStore`: what stateful caches do beyond the documented page, for code that is compiled.

Attention over a layer where it is, so that nothing need be cut to a length, which traced is not known.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lucid_jax.attention.attend import attend
from lucid_jax.attention.extend import extend
from lucid_jax.cache import introspection, verbs
from lucid_jax.cache.argument_checks import as_array, as_integers, check_alive, is_traced
from lucid_jax.cache.state import of_layers
from lucid_jax.cache.tokens import TokenLayer
from lucid_jax.cache.update import update_layer
from lucid_jax.nn.layer_store import LayerStore, as_4d


class AttendedStore(LayerStore):
    """Layers that queries attend to."""

    def store(
        self,
        key: ArrayLike,
        value: ArrayLike,
        layer_idx: int,
        cache_position: ArrayLike | None = None,
    ) -> None:
        """`update` without reading back, for callers that `attend`: O(T), not O(length)."""
        index, key, value, inner, indices = self._checked(key, value, layer_idx, cache_position)
        layer, alone = self._for_update(index, key, inner)
        if layer is None:
            return
        stored = self._stored(index)
        new = update_layer(
            layer,
            {"key": as_4d(key), "value": as_4d(value)},
            indices,
            donate=alone,
            stored=stored,
        )
        if stored is not None:
            appended = indices is None and not is_traced(key, value)
            stored = stored + key.shape[-2] if appended else None
        self._keep(index, new, inner, stored)

    @overload
    def extend(
        self,
        query: ArrayLike,
        key: ArrayLike,
        value: ArrayLike,
        layer_idx: int,
        cache_position: ArrayLike | None = None,
        *,
        return_lse: Literal[False] = False,
        **options: Any,
    ) -> jax.Array: ...

    @overload
    def extend(
        self,
        query: ArrayLike,
        key: ArrayLike,
        value: ArrayLike,
        layer_idx: int,
        cache_position: ArrayLike | None = None,
        *,
        return_lse: Literal[True],
        **options: Any,
    ) -> tuple[jax.Array, jax.Array]: ...

    def extend(
        self,
        query: ArrayLike,
        key: ArrayLike,
        value: ArrayLike,
        layer_idx: int,
        cache_position: ArrayLike | None = None,
        **options: Any,
    ) -> Any:
        """`store` and `attend` in one: the new tokens' queries (B, N, T, D) see what they should.

        A cache that drops tokens no longer has, once a long chunk is stored, what the chunk's first
        queries should see; this reads before it overwrites. Options are those of `lucid_jax.extend`.
        """
        index, key, value, inner, indices = self._checked(key, value, layer_idx, cache_position)
        query = _as_query(query)
        layer, alone = self._for_update(index, key, inner)
        if layer is None:
            nothing = query[..., :0, :]
            if options.get("return_lse", False):
                return nothing, jnp.full(nothing.shape[:-1], -jnp.inf, jnp.float32)
            return nothing
        out, state = extend(
            of_layers(layer),
            as_4d(query),
            as_4d(key),
            as_4d(value),
            0,
            cache_position=indices,
            donate=alone,
            **options,
        )
        self._keep(index, state.layers[0], inner)
        return _as_asked(out, query)

    def cross_attend(
        self,
        query: ArrayLike,
        new: tuple[ArrayLike, ArrayLike] | None,
        layer_idx: int,
        cache_position: ArrayLike | None = None,
        *,
        replace: bool = False,
        **options: Any,
    ) -> jax.Array:
        """Attention over an encoder's keys and values, stored now if they are `new`.

        Args:
            query: (B, N, T, D).
            new: keys and values (B, H, S, D) to store first; None if they are there.
            layer_idx: which layer.
            cache_position: where they go, see `update`.
            replace: whether they take the place of what the layer holds, rather than follow it.
            **options: see `attend`.

        Raises:
            ValueError: if the layer is a sliding one; and as `update` and `attend` do. The cache is
                then as it was: nothing is stored unless both can be done.
        """
        if new is None:
            check_holds_everything(self._existing(layer_idx))
            return self.attend(query, layer_idx, **options)
        index, key, value, inner, indices = self._checked(*new, layer_idx, cache_position)
        query = _as_query(query)
        layer = self._emptied(index, key) if replace else self._for_update(index, key, inner)[0]
        if layer is None:
            raise ValueError("cross-attention needs at least one token of the encoder, got none")
        check_holds_everything(layer)
        layer = update_layer(layer, {"key": as_4d(key), "value": as_4d(value)}, indices)
        out = attend(of_layers(layer), as_4d(query), 0, **options)
        self._keep(index, layer, inner)
        return _as_asked(out, query)

    @overload
    def attend(
        self,
        query: ArrayLike,
        layer_idx: int,
        *,
        return_lse: Literal[False] = False,
        **options: Any,
    ) -> jax.Array: ...

    @overload
    def attend(
        self, query: ArrayLike, layer_idx: int, *, return_lse: Literal[True], **options: Any
    ) -> tuple[jax.Array, jax.Array]: ...

    def attend(self, query: ArrayLike, layer_idx: int, **options: Any) -> Any:
        """Attention of the newest T queries (B, N, T, D) over the layer; see `lucid_jax.attend`."""
        layer = self._existing(layer_idx)
        query = _as_query(query)
        out = attend(of_layers(layer), as_4d(query), 0, **options)
        return _as_asked(out, query)

    def valid(self, layer_idx: int) -> jax.Array:
        """Which indices of what a traced `get` returns hold a token: bool (C,)."""
        return self._existing(layer_idx).valid()

    def positions(
        self, n: int, layer_idx: int = 0, cache_position: ArrayLike | None = None
    ) -> jax.Array:
        """Absolute positions of the layer's next `n` tokens, for RoPE; see `lucid_jax.positions`."""
        layer = self._layer(self._check_layer_idx(layer_idx))
        if layer is not None:
            check_alive(layer)
            return introspection.positions(of_layers(layer), n, 0, cache_position)
        if cache_position is not None:
            return jnp.atleast_1d(jnp.asarray(as_integers(cache_position, "cache_position")))
        return jnp.arange(n, dtype=jnp.int32)

    def rollback(self, n: int | jax.Array) -> None:
        """Drops the latest `n` tokens of every layer, as if they had never come.

        Raises:
            ValueError: if `n` is negative or more than a layer stores, or can bring back (a sliding
                one its `slack`).
            TypeError: if it is not an integer.
        """
        written = [variable for _, variable in self._written()]
        drop = as_integers(n, "n")
        if not written and not is_traced(drop) and np.any(drop < 0):
            raise ValueError(f"rollback needs n of at least 0, got {n}")
        if written:
            state = of_layers(*(variable.layer for variable in written))
            alone = all(variable.alone for variable in written)
            rolled = verbs.rollback(state, drop, donate=alone)
            for variable, layer in zip(written, rolled.layers, strict=True):
                variable.keep(layer)

    def ensure_capacity(self, n: int) -> None:
        """Makes room for `n` more tokens in each written layer, before compiled steps.

        Inside `nnx.jit` a cache cannot grow: its capacity is a shape.

        Raises:
            ValueError: if a layer cannot grow and has no room.
        """
        for _, variable in list(self._written()):
            state = verbs.ensure_capacity(of_layers(variable.layer), n)
            if state.layers[0] is not variable.layer:
                variable.keep(state.layers[0])

    def owns(self, layer_idx: int) -> bool:
        """Whether the layer stores tokens, rather than read another's (`lucid_jax.Shared`)."""
        self._check_layer_idx(layer_idx)
        return True


def check_holds_everything(layer: TokenLayer) -> None:
    """Raises if a layer forgets tokens, which cross-attention cannot use."""
    if not layer.bounded:
        raise ValueError(
            "cross-attention needs every token of the encoder, but this layer is "
            f"{layer.spec}; give it Static or Dynamic"
        )


def _as_asked(out: Any, query: jax.Array) -> Any:
    """Outputs (B, N, T, Dv), perhaps with their log-sum-exps (B, N, T), in the axes of the query."""
    if isinstance(out, tuple):
        return _as_asked(out[0], query), out[1].reshape(query.shape[:-1])
    return out.reshape(*query.shape[:-1], out.shape[-1])


def _as_query(query: ArrayLike) -> jax.Array:
    query = as_array(query)
    if query.ndim < 2:
        raise ValueError(f"query must be (..., seq, head_dim), got {query.shape}")
    return query
