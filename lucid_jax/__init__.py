"""KV caches for JAX: immutable pytrees, pure jit-compiled verbs, and a thin stateful wrapper.

The functional API is here (`init_cache`, `update`, `attend`, ...), stateful caches and flax modules in
`lucid_jax.nn`, the reference model and checkpoints in `lucid_jax.models`.
"""

from lucid_jax.attention.attend import attend
from lucid_jax.cache.contiguous import Dynamic, Static
from lucid_jax.cache.layer import Layer, LayerSpec
from lucid_jax.cache.state import (
    CacheState,
    capacity,
    check_overflow,
    crop,
    ensure_capacity,
    get,
    grow,
    init_cache,
    nbytes,
    overflowed,
    positions,
    reorder,
    repeat_interleave,
    reset,
    rollback,
    select,
    seq_length,
    update,
    valid,
)

__version__ = "0.1.0"

__all__ = [
    "CacheState",
    "Dynamic",
    "Layer",
    "LayerSpec",
    "Static",
    "attend",
    "capacity",
    "check_overflow",
    "crop",
    "ensure_capacity",
    "get",
    "grow",
    "init_cache",
    "nbytes",
    "overflowed",
    "positions",
    "reorder",
    "repeat_interleave",
    "reset",
    "rollback",
    "select",
    "seq_length",
    "update",
    "valid",
]
