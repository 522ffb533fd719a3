"""Codecs, a file each, and the registry that files, exports, the command line and tests read.

How a layer's keys and values are stored, orthogonal to where (the layout).
"""

from __future__ import annotations

from typing import TypeVar

from lucid_jax.cache.codecs.argument_checks import check_codec, check_dtype, refuse_tangents
from lucid_jax.cache.codecs.base import Codec, Form
from lucid_jax.cache.codecs.bits import AsBits, Bits, default_codec, keeps_bits, of_no_backend
from lucid_jax.cache.codecs.float8 import Float8
from lucid_jax.cache.codecs.identity import PLAIN, Identity, Raw
from lucid_jax.cache.codecs.int4 import Int4
from lucid_jax.cache.codecs.int8 import Int8
from lucid_jax.cache.codecs.kivi import KIVI, ChannelNibbles
from lucid_jax.cache.codecs.nibbles import Nibbles
from lucid_jax.cache.codecs.numerics import bits_dtype
from lucid_jax.cache.codecs.rotation import Rotated
from lucid_jax.cache.codecs.scaled import Scaled
from lucid_jax.cache.codecs.simulated import Rounded, Simulated

__all__ = [
    "CODECS",
    "KIVI",
    "PLAIN",
    "AsBits",
    "Bits",
    "ChannelNibbles",
    "Codec",
    "Float8",
    "Form",
    "Identity",
    "Int4",
    "Int8",
    "Nibbles",
    "Raw",
    "Rotated",
    "Rounded",
    "Scaled",
    "Simulated",
    "bits_dtype",
    "check_codec",
    "check_dtype",
    "default_codec",
    "keeps_bits",
    "of_no_backend",
    "refuse_tangents",
    "register",
]

CODECS: dict[str, type[Codec]] = {  # by class name: what files and exported functions may hold
    one.__name__: one for one in (Identity, Bits, Simulated, Int8, Float8, Int4, KIVI)
}

_C = TypeVar("_C", bound=Codec)


def register(codec: type[_C]) -> type[_C]:
    """Lets files, exported functions and the command line name a codec; a class decorator.

    Everything else takes any codec. To read such a file, import the codec's module first.

    Args:
        codec: a frozen dataclass whose fields are annotated `int`, `bool` or `Codec`.

    Returns:
        The class.

    Raises:
        ValueError: if there is another codec of its name.

    Example:
        >>> import dataclasses
        >>> @register
        ... @dataclasses.dataclass(frozen=True)
        ... class Copied(Codec):
        ...     def forms(self, dtype, head_dim, value_head_dim):
        ...         return Raw(dtype, head_dim), Raw(dtype, value_head_dim)
        >>> CODECS.pop("Copied").__name__
        'Copied'
    """
    known = CODECS.get(codec.__name__, codec)
    # A notebook's cell that runs again replaces what it made.
    if (known.__module__, known.__qualname__) != (codec.__module__, codec.__qualname__):
        raise ValueError(f"there is a codec {codec.__name__!r} already; choose another name")
    CODECS[codec.__name__] = codec
    return codec
