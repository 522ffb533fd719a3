"""Whether the buffers that a cache asks for can exist, asked before XLA is, which would abort.

Sizes are Python integers, bytes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

INT32_MAX = int(np.iinfo(np.int32).max)
_ADDRESSABLE = 1 << 62  # bytes; XLA's own sums of them are int64
_FIX = "use fewer tokens, rows or layers, a narrower dtype or a codec"


def check_dims(spec: Any, slots: int, dims: Mapping[str, int] | None = None, **sizes: int) -> None:
    """Checks the sizes of one layer's leaves, of widths `dims`, as slots and rows are int32.

    Raises:
        ValueError: if one does not fit, or all together cannot be addressed.
    """
    if slots > INT32_MAX:
        raise ValueError(
            f"{spec} needs {slots} token slots in each row, but they are counted in int32, up to "
            f"{INT32_MAX}; use fewer"
        )
    usual = {"key": "head_dim", "value": "value_head_dim"}
    widths = {usual.get(name, name): width for name, width in (dims or {}).items()}
    for name, size in (sizes | widths).items():
        if size > INT32_MAX:
            raise ValueError(f"{name} must fit int32, at most {INT32_MAX}, got {size}")
    # A leaf has one width; a number takes at most 16 bytes.
    widest = max(widths.values(), default=1)
    if 16 * slots * math.prod(sizes.values()) * widest >= _ADDRESSABLE:
        raise ValueError(
            f"{spec} with {_listed(sizes)} and heads {widest} wide is more than any "
            "machine can address; use fewer tokens, rows or layers"
        )


def check_memory(nbytes: int, device: jax.Device, what: str) -> None:
    """Checks what is about to be put on a device.

    Raises:
        ValueError: if its whole memory is too small.
    """
    there = _memory(device)
    if there is not None and nbytes > there:
        raise ValueError(f"{what} needs {nbytes} bytes, but the device has {there}; {_FIX}")


@contextmanager
def refusing(what: str, nbytes: int) -> Iterator[None]:
    """Turns XLA's error about memory into a ValueError that says what `nbytes` were for."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(
            f"{what} needs {nbytes} bytes, more than the device has left; {_FIX}"
        ) from error


def _memory(device: jax.Device) -> int | None:
    """Bytes of a device's memory, where that can be told."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    if device.platform != "cpu":
        return None
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on this system
        return None


def _listed(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())
