"""Layouts, a file each, and the registry that files, the command line, pictures and tests read."""

from __future__ import annotations

from lucid_jax.cache.layouts.base import LayerSpec
from lucid_jax.cache.layouts.chunked import Chunked
from lucid_jax.cache.layouts.contiguous import Dynamic, Static
from lucid_jax.cache.layouts.ring import Sliding

__all__ = ["LAYOUTS", "Chunked", "Dynamic", "LayerSpec", "Sliding", "Static"]

LAYOUTS: dict[str, type[LayerSpec]] = {
    one.__name__: one for one in (Static, Dynamic, Sliding, Chunked)
}
