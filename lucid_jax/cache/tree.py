"""Trees of tokens in one row of a cache: which of them see each other, and keeping one path.

A tree is appended as a chunk, every parent before its children. Node i of a tree whose first node
lies in slot s is in slot s + i, while its position in the text is that of s plus its depth. So the
model gets both as `positions=` and `mask=`, and `keep_path` makes the two agree again.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lucid_jax.cache import evict
from lucid_jax.cache.argument_checks import as_array, as_integers, check_alive, is_traced
from lucid_jax.cache.slots import span
from lucid_jax.cache.stacked import ask, each
from lucid_jax.cache.state import CacheState
from lucid_jax.cache.tokens import TokenLayer
from lucid_jax.cache.verb import verb


def tree_mask(sees: ArrayLike, first: jax.Array, capacity: int) -> jax.Array:
    """Which stored tokens the nodes of a tree see: all before the tree, and their own ancestors.

    Args:
        sees: bool (T, M): whether query i sees node j of the tree.
        first: int32 [B], the slot of each row's node 0.
        capacity: C, the slots of a layer.

    Returns:
        bool (B, 1, T, C), for `mask=` of `attend`, `extend` and models.

    Example:
        >>> sees = jnp.array([[True, False], [False, True]])  # two roots
        >>> tree_mask(sees, jnp.array([1]), 4)[0, 0].astype(int).tolist()
        [[1, 1, 0, 0], [1, 0, 1, 0]]
    """
    table = as_array(sees, "sees")
    nodes = table.shape[1]
    node = span(-first, capacity)  # [B, C]
    inside = jnp.take(table, jnp.clip(node, 0, nodes - 1), axis=1)  # (T, B, C)
    mask = jnp.where((node < 0)[None], True, inside & (node < nodes)[None])
    return jnp.swapaxes(mask, 0, 1)[:, None]


def keep_path(
    state: CacheState, n: ArrayLike, path: ArrayLike, counts: ArrayLike, *, donate: bool = False
) -> CacheState:
    """Of each row's latest `n` tokens, a tree, keeps one path, as if the others had never come.

    What `rollback` is to a chain of drafts (SpecInfer, Miao et al. 2024). The kept tokens take the
    slots and positions that follow what was there before the tree: those that they had in their
    text. (`compact` drops tokens too, but lets the others keep their positions.) Costs O(P), whatever
    is stored.

    Args:
        state: a ragged cache of B rows.
        n: int32 [B], tokens of the tree.
        path: int32 (B, P), the nodes to keep, ascending, each in [0, n).
        counts: int32 [B], how many of the P; the rest may be anything.
        donate: eager calls only: the old state must not be used again.

    Returns:
        The new state.

    Raises:
        ValueError: if a layer is not `Static` or `Dynamic` with a codec that stores each token by
            itself, shapes do not match, or (eager) the nodes are not a path among what is stored.
            (Traced: that row stays as it was and `overflowed` is set.)
        TypeError: if not integers.

    Example:
        >>> import lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Static(8), num_layers=1, batch_size=1, num_kv_heads=2, head_dim=8, ragged=True
        ... )
        >>> tokens = jnp.ones((1, 2, 6, 8))
        >>> state = lj.update(state, tokens, tokens, 0)
        >>> state = lj.keep_path(state, [4], [[0, 2]], [2])  # 2 before the tree, nodes 0 and 2
        >>> lj.seq_length(state).tolist(), lj.positions(state, 1).tolist()
        ([4], [[4]])
    """
    check_alive(state)
    check_tree_layers(state)
    if not state.ragged:
        raise ValueError(
            "keep_path needs a ragged cache, where each row keeps a path of its own; "
            "make it with init_cache(..., ragged=True)"
        )
    args = tuple(as_integers(x, name) for x, name in ((n, "n"), (path, "path"), (counts, "counts")))
    rows = (state.batch_size,)
    if args[0].shape != rows or args[2].shape != rows or args[1].shape[:-1] != rows:
        raise ValueError(
            f"keep_path takes n {rows}, path ({rows[0]}, P) and counts {rows}, got "
            f"{args[0].shape}, {args[1].shape} and {args[2].shape}"
        )
    if is_traced(state, args):
        return _keep_path.traced(state, *args)
    if not np.asarray(_possible(state, *args)).all():
        raise ValueError(
            "keep_path needs 0 <= counts <= n <= tokens stored (since the latest compact), and "
            f"ascending nodes in [0, n), got n={np.asarray(n).tolist()}, "
            f"path={np.asarray(path).tolist()}, counts={np.asarray(counts).tolist()}"
        )
    return _keep_path.compiled(donate)(state, *args)


def check_tree_layers(state: CacheState) -> None:
    """Raises ValueError unless every layer can hold a tree and keep one path of it."""
    for stored, layer in zip(state.each_stack, state.layers, strict=True):
        index = state.owners[stored[0]]
        if not evict.can_evict(layer):
            raise ValueError(
                "trees of tokens need Static or Dynamic layers with a codec that stores each token "
                f"by itself, got {layer.spec} for layer {index}; use a chain of drafts"
            )


def _allowed(layer: TokenLayer, n: jax.Array, path: jax.Array, counts: jax.Array) -> jax.Array:
    """Whether a row's path can be kept, bool [B]."""
    width = path.shape[1]
    kept = span(jnp.zeros_like(counts), width) < counts[:, None]
    before = jnp.concatenate([jnp.full_like(path[:, :1], -1), path[:, :-1]], axis=1)
    good = ~kept | ((path > before) & (path < n[:, None]))
    return layer.can_rollback(n) & (counts >= 0) & (counts <= width) & jnp.all(good, axis=1)


@jax.jit
def _possible(state: CacheState, n: jax.Array, path: jax.Array, counts: jax.Array) -> jax.Array:
    return jnp.concatenate(
        [ask(layer, lambda one: _allowed(one, n, path, counts)) for layer in state.layers]
    )


@verb()
def _keep_path(state: CacheState, n: Any, path: Any, counts: Any) -> CacheState:
    n, path, counts = jnp.asarray(n), jnp.asarray(path), jnp.asarray(counts)

    def keep(layer: TokenLayer) -> TokenLayer:
        ok = _allowed(layer, n, path, counts)
        return evict.keep_path(layer, n, path, jnp.where(ok, counts, 0), ok)

    return state.with_layers(each(layer, keep) for layer in state.layers)
