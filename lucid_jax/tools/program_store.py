"""Where the command line keeps XLA's programs for its next run: a folder in the user's cache folder."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

_SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,  # small programs are many
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


def folder() -> Path:
    """`lucid-jax/programs` in $XDG_CACHE_HOME, or in this system's folder for caches.

    Raises:
        RuntimeError: if there is no home folder.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    if given and Path(given).is_absolute():
        base = Path(given)
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return base / "lucid-jax" / "programs"


@contextlib.contextmanager
def opened() -> Iterator[None]:
    """JAX's persistent compilation cache, on within the block.

    One that is set up already, as by JAX_COMPILATION_CACHE_DIR, is left as it is. A folder that cannot
    be written is done without.
    """
    name = "jax_compilation_cache_dir"
    if getattr(jax.config, name) is not None:
        yield
        return
    try:
        store = folder()
        store.mkdir(parents=True, exist_ok=True)
        usable = os.access(store, os.R_OK | os.W_OK | os.X_OK)
    except (OSError, RuntimeError):
        usable = False
    if not usable:
        yield
        return
    settings = {name: str(store), **_SETTINGS}
    before = {name: getattr(jax.config, name) for name in settings}
    configure(settings)
    try:
        with warnings.catch_warnings():
            # A full disk or a damaged file costs time, and is nothing that a user of ours need know.
            warnings.filterwarnings(
                "ignore", "Error (reading|writing) persistent compilation cache"
            )
            yield
    finally:
        configure(before)


def configure(settings: dict[str, object]) -> None:
    """Sets options of JAX's that say whether and how programs are kept."""
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # it asks once, at the first program
