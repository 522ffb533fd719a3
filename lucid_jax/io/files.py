"""Cache states on disk: `save` writes one safetensors file, `load` gives the same state back.

The file holds every leaf under its path ("layers.0.key.codes") and, as JSON in its metadata, what an
empty state of that structure is made of. A file is data only: nothing in it is ever run or imported.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lucid_jax.cache.argument_checks import check_alive, is_traced
from lucid_jax.cache.codecs import bits_dtype
from lucid_jax.cache.growth import in_whole_tiles
from lucid_jax.cache.introspection import nbytes
from lucid_jax.cache.stacking import apart, together
from lucid_jax.cache.state import CacheState
from lucid_jax.cache.verbs import checked
from lucid_jax.io import checked_file
from lucid_jax.io.checked_file import Mismatch
from lucid_jax.io.description import (
    check_counters,
    check_structure,
    describe,
    empty_state,
    leaves_by_path,
    parsed,
)

_KIND = checked_file.Kind(
    "lucid_jax.cache", "2", "lucid_jax cache file", written_by="lucid_jax.save", older=("1",)
)


class CacheFileError(ValueError):
    """A file holds no cache state that can be trusted, or a state is of no kind that files hold."""


def save(path: str | os.PathLike[str], state: CacheState) -> None:
    """Writes a cache state to one file, in one step: a failure leaves what was there before.

    Sharded arrays are gathered on this host. The file is as large as `nbytes(state)`, whatever the
    length, and any safetensors reader can look into it.

    Args:
        path: the file, replaced if it exists; its folder must exist.
        state: any state; it stays valid.

    Raises:
        TypeError: if `state` is no `CacheState`, or is traced.
        RuntimeError: if its buffers were donated.
        CacheFileError: if a spec or codec is not one of this package's, a token dtype is not
            supported, or the leaves are not what `init_cache` makes of them (as under `vmap`).
        OSError: if the file cannot be written.

    Example:
        >>> import tempfile, lucid_jax as lj
        >>> state = lj.init_cache(
        ...     lj.Static(4), num_layers=1, batch_size=1, num_kv_heads=2, head_dim=8
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lj.save(f"{folder}/prompt.safetensors", state)
        ...     lj.load(f"{folder}/prompt.safetensors").layers[0]
        Contiguous(Static(capacity=4, ...), B=1, H=2, C=4, D=8, float32, length=0)
    """
    if not isinstance(state, CacheState):
        raise TypeError(f"save takes a CacheState, got {type(state).__name__}")
    if is_traced(state):
        raise TypeError(
            "save needs a concrete state: a traced one has no contents yet; "
            "return the state and call save outside jit"
        )
    check_alive(state)
    state = checked(state, False)
    target = Path(path)
    try:
        config = json.dumps(describe(state), default=lambda number: number.item())  # NumPy's
        # A file that could not be read is never written.
        empty = empty_state(parsed(config), nbytes(state))
        if not state.stacked:
            check_structure(empty, state)
        # On CPU a view into the state's buffers: it must be gone before the caller donates them.
        host = jax.tree.map(lambda leaf: np.asarray(leaf, order="C"), state)
        if state.stacked:
            host = apart(host)
            check_structure(empty, host)
        check_counters(host)
    except Mismatch as error:
        fix = error.fix or "save states as init_cache and the verbs make them; split one under vmap"
        raise CacheFileError(f"cannot save to {target}: {error}; {fix}") from None
    tensors = {name: leaf.view(_on_disk(leaf.dtype)) for name, leaf in leaves_by_path(host).items()}
    checked_file.write(target, _KIND, config, tensors)


def load(path: str | os.PathLike[str]) -> CacheState:
    """Reads what `save` wrote: the same structure, bits and dtypes, on the default device.

    Everything is checked before a state is made: what the file says of itself, the names, shapes and
    dtypes of its tensors, a checksum, and the counters. The checksum finds accidents; it is no
    signature, so a file from a stranger may hold any tokens, but never code.

    Args:
        path: a file that `save` wrote.

    Raises:
        CacheFileError: if it is no such file, is damaged, or comes from a newer version.
        FileNotFoundError: if there is none. (Other errors of the system stay `OSError` too.)

    Example:
        >>> import lucid_jax as lj
        >>> lj.load("no/such/file")
        Traceback (most recent call last):
        FileNotFoundError: ...
    """
    source = Path(path)
    try:
        host = _read(source)
    except Mismatch as error:
        fix = error.fix or "the file is damaged or was edited: save it again"
        raise CacheFileError(f"cannot load {source}: {error}; {fix}") from None
    # A copy: JAX may alias a NumPy array, and could not write to it when it is donated.
    state: CacheState = jax.tree.map(jnp.array, host)
    return state.with_layers(map(in_whole_tiles, state.layers))


def _read(source: Path) -> CacheState:
    """The state a file holds, of NumPy arrays."""
    empty: Any = None
    stacked = False

    def expected(config: str, size: int, version: str) -> dict[str, Any]:
        nonlocal empty, stacked
        description = parsed(config)
        empty = empty_state(description, size)
        stacked = "stacked" in description
        return {
            name: jax.ShapeDtypeStruct(leaf.shape, _on_disk(leaf.dtype, version))
            for name, leaf in leaves_by_path(empty).items()
        }

    tensors = checked_file.read(source, _KIND, expected)
    leaves, structure = jax.tree.flatten(empty)
    host = jax.tree.unflatten(
        structure, [x.view(leaf.dtype) for x, leaf in zip(tensors.values(), leaves, strict=True)]
    )
    check_counters(host)
    return together(host) if stacked else host


def _on_disk(dtype: np.dtype, version: str = _KIND.version) -> np.dtype:
    """The dtype a file stores a leaf as: integers of its width for what it has no name for."""
    return dtype if version != "1" and dtype.name in checked_file.STORED else bits_dtype(dtype)
