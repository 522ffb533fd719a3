"""Input checks shared by the verbs: what was expected, what came, and the fix.

Everything here runs on static facts (shapes, dtypes) or on concrete host values; traced values pass
through untouched, since what a tracer holds is not known yet.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from lucid_jax.cache.tokens import TokenLayer


def is_traced(*trees: Any) -> bool:
    """Whether any leaf of `trees` is a JAX tracer (we are inside `jit`, `vmap`, `scan`, ...)."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def as_array(x: Any, name: str = "this") -> jax.Array:
    """Turns anything with `__array__` or `__dlpack__` into a `jax.Array`, keeping its dtype.

    64-bit inputs become 32-bit where JAX runs without `jax_enable_x64`, silently: the caller cannot
    store more than JAX offers.

    Raises:
        TypeError: for what holds no numbers, by the argument's name.

    Example:
        >>> as_array([1, 2]).dtype
        dtype('int32')
    """
    if isinstance(x, (jax.Array, jax.core.Tracer)):
        return x
    host = _on_host(x)
    if not (jnp.issubdtype(host.dtype, jnp.number) or host.dtype == np.bool_):
        raise TypeError(
            f"{name} must be an array of numbers, got {type(x).__name__}, as an array {host.dtype}"
        )
    dtype = jax.dtypes.canonicalize_dtype(host.dtype)
    # A copy: JAX may alias a NumPy array, and the caller may write to it before the device has read.
    # By NumPy and device_put, as jnp.array would compile a program for every new shape.
    array: jax.Array = jax.device_put(np.array(host, dtype=dtype, copy=True))
    return array


def _on_host(x: Any) -> np.ndarray:
    if isinstance(x, (np.ndarray, np.generic, jax.Array)) or not hasattr(x, "__dlpack__"):
        return np.asarray(x)
    try:
        return np.from_dlpack(x)
    except (BufferError, RuntimeError):  # a dtype NumPy has not, or memory it cannot see
        return np.asarray(jnp.from_dlpack(x))


def as_integers(x: Any, name: str) -> jax.Array | np.ndarray:
    """Checks that `x` holds integers and returns it as int32, on the host if it was concrete.

    Raises:
        TypeError: if `x` is boolean, floating point or not numeric at all.
        ValueError: if a concrete value does not fit int32.
    """
    array: jax.Array | np.ndarray = jnp.asarray(x) if is_traced(x) else _on_host(x)
    if array.dtype == object or not np.issubdtype(array.dtype, np.integer):
        empty_list = array.size == 0 and isinstance(x, (list, tuple))
        if not empty_list:  # np.asarray([]) is float64, but holds nothing that is not an integer
            raise TypeError(
                f"{name} must hold integers, got dtype {array.dtype}; "
                f"convert it, for example with {name}.astype(jnp.int32)"
            )
    if isinstance(array, np.ndarray) and array.size:
        bounds = np.iinfo(np.int32)
        if array.max() > bounds.max or array.min() < bounds.min:
            raise ValueError(f"{name} must fit int32, got values in [{array.min()}, {array.max()}]")
    if is_traced(array) and array.dtype.itemsize >= 4 and array.dtype != np.int32:
        # Too large a number must stay out of range, not be cut to another one that is in it.
        bounds = np.iinfo(np.int32)
        low = max(bounds.min, np.iinfo(array.dtype).min)
        array = jnp.clip(array, np.array(low, array.dtype), np.array(bounds.max, array.dtype))
    return array.astype(np.int32)


def as_layer_index(layer_idx: Any, num_layers: int) -> int:
    """Checks a static layer index; negative indices raise instead of counting from the end."""
    try:
        index = operator.index(layer_idx)
    except TypeError:
        raise TypeError(
            f"layer_idx must be a Python int (it selects a layer at trace time), got {layer_idx!r}"
        ) from None
    if isinstance(layer_idx, (bool, np.bool_)):
        raise TypeError(f"layer_idx must be a Python int, got the boolean {layer_idx!r}")
    if not 0 <= index < num_layers:
        raise ValueError(
            f"layer_idx must be in [0, {num_layers}), got {index}; "
            f"this cache was made with num_layers={num_layers}"
        )
    return index


def check_count(n: Any, name: str, minimum: int = 0) -> int:
    """Checks a static count such as `repeats` and returns it as an int."""
    if isinstance(n, (bool, np.bool_)):
        raise TypeError(f"{name} must be an integer, got the boolean {n!r}")
    try:
        count = operator.index(n)
    except TypeError:
        raise TypeError(f"{name} must be an integer known at trace time, got {n!r}") from None
    if count < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {count}")
    return count


def check_indices(indices: Any, batch_size: int) -> jax.Array | np.ndarray:
    """Checks batch indices: a non-empty 1-D list of integers in `[0, batch_size)`.

    Raises:
        TypeError: if they are not integers.
        ValueError: if they are not 1-D, or empty.
        IndexError: if a concrete index is out of range (JAX alone would clamp or wrap it).
    """
    rows = as_integers(indices, "indices")
    if rows.ndim != 1:
        raise ValueError(
            f"indices must be 1-D (one row number per new row), got shape {rows.shape}"
        )
    if rows.shape[0] == 0:
        raise ValueError(
            "indices must name at least one row, got none; use reset() to empty a cache"
        )
    if isinstance(rows, np.ndarray):
        bad = rows[(rows < 0) | (rows >= batch_size)]
        if bad.size:
            raise IndexError(
                f"indices must be in [0, {batch_size}) for a batch of {batch_size}, got {bad[0]}"
            )
    return rows


def check_alive(tree: Any) -> None:
    """Raises a readable error when a buffer of `tree` was donated to an earlier call."""
    for leaf in jax.tree.leaves(tree):
        held = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
        if held and leaf.is_deleted():
            raise RuntimeError(
                "this cache state was donated to an earlier call, which reused its memory (or a state "
                "that shares its buffers was, as what rollback, reset, free and crop return does); go "
                "on with the state that call returned, or make that call with donate=False to keep both"
            )


def check_layer_axes(layer: TokenLayer) -> None:
    """Raises if a layer's leaves have more axes than they are made with."""
    leaf = jax.tree.leaves(layer.leaves[layer.packing.mixed])[0]
    expected = layer.packing.leaf_ndim + layer.buffer.lead
    if leaf.ndim != expected:
        raise ValueError(
            f"a layer's tokens must have {expected} axes, got {leaf.ndim}, shape {leaf.shape}: "
            "states stacked by hand, as by jax.tree.map(jnp.stack), are for vmap or scan to take "
            "apart; for layers stacked in one state use init_cache(..., stacked=True) or "
            "lucid_jax.stack(state)"
        )


def check_layer_dtypes(layer: TokenLayer) -> None:
    """Raises if a layer's leaves are not what the codec makes of tokens of its dtype."""
    leaves = jax.tree.leaves((layer.position, layer.stored, layer.tail))
    found = tuple(leaf.dtype for leaf in leaves)
    if found != layer.packing.leaf_dtypes:
        expected, came = (
            ", ".join(dict.fromkeys(map(str, dtypes)))
            for dtypes in (layer.packing.leaf_dtypes, found)
        )
        raise TypeError(
            f"a layer of {layer.dtype} tokens must have leaves of {expected}, got {came}: they were "
            "converted, as by jax.tree.map; lucid_jax.astype(state, dtype) converts the tokens and "
            "leaves counters and codes alone"
        )
