"""KV caches for JAX: immutable pytrees, pure jit-compiled verbs, and a thin stateful wrapper.

The functional API is here (`init_cache`, `update`, `attend`, ...), stateful caches and flax modules in
`lucid_jax.nn`, the reference model and checkpoints in `lucid_jax.models`.
"""

from lucid_jax import attention, nn
from lucid_jax.attention.attend import attend
from lucid_jax.attention.extend import extend, extend_leaves
from lucid_jax.attention.merge import merge
from lucid_jax.cache import codecs, scoring
from lucid_jax.cache.creation import init_cache
from lucid_jax.cache.encoder_decoder import EncoderDecoderState
from lucid_jax.cache.introspection import (
    capacity,
    check_overflow,
    get,
    get_leaves,
    nbytes,
    overflowed,
    positions,
    seq_length,
    stored_positions,
    valid,
)
from lucid_jax.cache.layouts import Chunked, Dynamic, LayerSpec, Sliding, Static
from lucid_jax.cache.rows import compact, concat, extract, free, insert
from lucid_jax.cache.sharding import shardings
from lucid_jax.cache.stacked import LayerLike
from lucid_jax.cache.stacking import stack, unstack
from lucid_jax.cache.state import CacheState, Shared
from lucid_jax.cache.tokens import TokenLayer as Layer
from lucid_jax.cache.tree import keep_path, tree_mask
from lucid_jax.cache.update import update, update_leaves
from lucid_jax.cache.verbs import (
    astype,
    checked,
    crop,
    ensure_capacity,
    grow,
    reorder,
    repeat_interleave,
    reset,
    rollback,
    select,
)
from lucid_jax.decode import (
    BeamResult,
    Conversation,
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
from lucid_jax.io import exports
from lucid_jax.io.files import CacheFileError, load, save
from lucid_jax.lucid import (
    BFloat16,
    Bool,
    Float16,
    Float32,
    Float64,
    Int16,
    Int32,
    Int64,
    Tensor,
    manual_seed,
    randn,
)
from lucid_jax.lucid import Int8 as Int8  # the documented dtype; not in __all__, see codecs.Int8
from lucid_jax.tools.planning import Plan, plan
from lucid_jax.tools.plots import plot_beam_tree, plot_occupancy
from lucid_jax.tools.report import MemoryReport, memory_report

exports.register_states()

__version__ = "0.2.0"

__all__ = [
    "BFloat16",
    "BeamResult",
    "Bool",
    "CacheFileError",
    "CacheState",
    "Chunked",
    "Conversation",
    "Dynamic",
    "EncoderDecoderState",
    "Float16",
    "Float32",
    "Float64",
    "Generation",
    "Int16",
    "Int32",
    "Int64",
    "Layer",
    "LayerLike",
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
    "astype",
    "attend",
    "attention",
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
    "extend_leaves",
    "extract",
    "free",
    "generate",
    "get",
    "get_leaves",
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
    "shardings",
    "speculate",
    "stack",
    "stored_positions",
    "stream",
    "tree_mask",
    "unstack",
    "update",
    "update_leaves",
    "valid",
]
