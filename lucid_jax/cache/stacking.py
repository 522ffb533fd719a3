"""`stack` and `unstack`: layers of one kind as one layer state, for models that scan over layers."""

from __future__ import annotations

import jax

from lucid_jax.cache import stacked as stacks
from lucid_jax.cache.argument_checks import check_alive, check_layer_axes, is_traced
from lucid_jax.cache.state import CacheState
from lucid_jax.cache.tokens import TokenLayer


def stack(state: CacheState) -> CacheState:
    """The same cache with all layers of one spec and shape in one layer state, as `stacked=True` makes.

    For models that scan over their layers: leaves are (L, B, H, S, ...), verbs take a traced
    `layer_idx`, and a `scan` that carries the state writes in place. Copies all; a stacked state comes
    back as it is.

    Args:
        state: a cache, which stays valid; of an encoder and decoder, one part.

    Raises:
        TypeError: if `state` is no `CacheState`.
        RuntimeError: if its buffers were donated.

    Example:
        >>> import jax, jax.numpy as jnp, lucid_jax as lj
        >>> state = lj.stack(
        ...     lj.init_cache(lj.Static(8), num_layers=4, batch_size=1, num_kv_heads=2, head_dim=4)
        ... )
        >>> def layer(carry, layer_idx):
        ...     hidden, state = carry  # hidden stands for a layer's queries, keys and values
        ...     out, state = lj.extend(state, hidden, hidden, hidden, layer_idx)
        ...     return (hidden + out, state), None
        >>> carry = (jnp.ones((1, 2, 3, 4)), state)
        >>> (hidden, state), _ = jax.lax.scan(layer, carry, jnp.arange(4))
        >>> lj.seq_length(state, 3).item(), state.layers[0].key.shape
        (3, (4, 1, 2, 8, 4))
    """
    _check(state, "stack")
    if state.stacked:
        return state
    return (together if is_traced(state) else _stack_jit)(state)


def unstack(state: CacheState) -> CacheState:
    """The same cache with a layer state for each layer: what `stack` undoes. Copies all.

    Args:
        state: a cache, which stays valid.

    Raises:
        TypeError: if `state` is no `CacheState`.
        RuntimeError: if its buffers were donated.

    Example:
        >>> import lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Static(8), num_layers=4, batch_size=1, num_kv_heads=2, head_dim=4, stacked=True
        ... )
        >>> len(state.layers), len(lj.unstack(state).layers)
        (1, 4)
    """
    _check(state, "unstack")
    if not state.stacked:
        return state
    return (apart if is_traced(state) else _unstack_jit)(state)


def stacked_like(other: CacheState, state: CacheState) -> CacheState:
    """The other state, stacked if the first is, and only then."""
    if other.stacked == state.stacked:
        return other
    return stack(other) if state.stacked else unstack(other)


def _kind(layer: TokenLayer) -> tuple[object, ...]:
    """What layers of one stack have in common: all that is static, and shapes."""
    leaves, structure = jax.tree.flatten(layer)
    return (structure, *((leaf.shape, leaf.dtype) for leaf in leaves))


def _check(state: CacheState, verb: str) -> None:
    if not isinstance(state, CacheState):
        raise TypeError(f"{verb} takes a CacheState, got {type(state).__name__}")
    check_alive(state)
    for layer in state.layers:
        check_layer_axes(layer)


def together(state: CacheState) -> CacheState:
    """`stack` of arrays that are traced, or NumPy's, whose layers are not stacked."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for number, layer in enumerate(state.layers):
        alike.setdefault(_kind(layer), []).append(number)
    numbers = tuple(map(tuple, alike.values()))
    layers = tuple(stacks.stacked([state.layers[i] for i in each]) for each in numbers)
    return state.replace(layers=layers, stacks=numbers)


def apart(state: CacheState) -> CacheState:
    """`unstack` of arrays that are traced, or NumPy's, which are not copied."""
    each = {
        number: layer
        for numbers, stack in zip(state.each_stack, state.layers, strict=True)
        for number, layer in zip(numbers, stacks.taken_apart(stack), strict=True)
    }
    return state.replace(layers=tuple(each[i] for i in range(len(each))), stacks=None)


_stack_jit, _unstack_jit = jax.jit(together), jax.jit(apart)
