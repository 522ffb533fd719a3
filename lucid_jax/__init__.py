"""KV caches for JAX: immutable pytrees, pure jit-compiled verbs, and a thin stateful wrapper.

The functional API is here (`init_cache`, `update`, `attend`, ...), stateful caches and flax modules in
`lucid_jax.nn`, the reference model and checkpoints in `lucid_jax.models`.
"""

from lucid_jax import nn
from lucid_jax.attention.attend import attend, extend, merge
from lucid_jax.cache import codec as codecs
from lucid_jax.cache import scoring
from lucid_jax.cache.contiguous import Dynamic, Static
from lucid_jax.cache.encoder_decoder import EncoderDecoderState
from lucid_jax.cache.layer import Layer, LayerSpec
from lucid_jax.cache.ring import Sliding
from lucid_jax.cache.rows import compact, concat, extract, free, insert
from lucid_jax.cache.state import (
    CacheState,
    Shared,
    capacity,
    check_overflow,
    checked,
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
    stored_positions,
    update,
    valid,
)
from lucid_jax.cache.tree import keep_path, tree_mask
from lucid_jax.decode import (
    BeamResult,
    Generation,
    NGram,
    PromptCache,
    Sampling,
    Speculation,
    Tree,
    beam_search,
    generate,
    speculate,
    stream,
)
from lucid_jax.files import CacheFileError, load, save
from lucid_jax.planning import Plan, plan
from lucid_jax.plots import plot_beam_tree, plot_occupancy
from lucid_jax.report import MemoryReport, memory_report, state_html
from lucid_jax.tensor import (
    BFloat16,
    Bool,
    Float16,
    Float32,
    Float64,
    Int8,
    Int16,
    Int32,
    Int64,
    Tensor,
    manual_seed,
    randn,
)

CacheState._repr_html_ = state_html  # type: ignore[attr-defined]

__version__ = "0.1.0"

__all__ = [
    "BFloat16",
    "BeamResult",
    "Bool",
    "CacheFileError",
    "CacheState",
    "Dynamic",
    "EncoderDecoderState",
    "Float16",
    "Float32",
    "Float64",
    "Generation",
    "Int8",
    "Int16",
    "Int32",
    "Int64",
    "Layer",
    "LayerSpec",
    "MemoryReport",
    "NGram",
    "Plan",
    "PromptCache",
    "Sampling",
    "Shared",
    "Sliding",
    "Speculation",
    "Static",
    "Tensor",
    "Tree",
    "attend",
    "beam_search",
    "capacity",
    "check_overflow",
    "checked",
    "codecs",
    "compact",
    "concat",
    "crop",
    "ensure_capacity",
    "extend",
    "extract",
    "free",
    "generate",
    "get",
    "grow",
    "init_cache",
    "insert",
    "keep_path",
    "load",
    "manual_seed",
    "memory_report",
    "merge",
    "nbytes",
    "nn",
    "overflowed",
    "plan",
    "plot_beam_tree",
    "plot_occupancy",
    "positions",
    "randn",
    "reorder",
    "repeat_interleave",
    "reset",
    "rollback",
    "save",
    "scoring",
    "select",
    "seq_length",
    "speculate",
    "stored_positions",
    "stream",
    "tree_mask",
    "update",
    "valid",
]
