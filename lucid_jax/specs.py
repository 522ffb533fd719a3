"""Cache specs as text, for the command line: `static:2048`, `sliding:256+4`, `int4`, `kivi:64+32`."""

from __future__ import annotations

import dataclasses
import re

from lucid_jax.cache.codec import KIVI, Codec, Float8, Identity, Int4, Int8
from lucid_jax.cache.contiguous import Dynamic, Static
from lucid_jax.cache.layer import LayerSpec
from lucid_jax.cache.ring import Sliding

LAYOUTS = "static, static:CAPACITY, dynamic, sliding:WINDOW or sliding:WINDOW+SINKS"
CODECS = "none, int8, fp8, int4, int4:GROUP, kivi or kivi:GROUP+RESIDUAL; -rotated turns keys first"


def parse_spec(layout: str, codec: str = "none", *, capacity: int) -> LayerSpec:
    """The spec that two words name.

    Args:
        layout: one of `LAYOUTS`.
        codec: one of `CODECS`.
        capacity: slots of a `static` without a number.

    Raises:
        ValueError: for words that name nothing.

    Example:
        >>> parse_spec("sliding:256+4", "int4", capacity=0)
        Sliding(window=256, sinks=4, slack=0, codec=Int4(group=64, rotate=False))
    """
    match = re.fullmatch(r"(static|dynamic|sliding)(?::(\d+)(?:\+(\d+))?)?", layout)
    name, *numbers = match.groups() if match else (None,)
    first, second = (None if n is None else int(n) for n in (*numbers, None, None)[:2])
    bound = parse_codec(codec)
    if name == "static" and second is None:
        return Static(capacity if first is None else first, codec=bound)
    if name == "dynamic" and first is None:
        return Dynamic(codec=bound)
    if name == "sliding" and first is not None:
        return Sliding(first, sinks=second or 0, codec=bound)
    raise ValueError(f"a cache is one of {LAYOUTS}; got {layout!r}")


def parse_codec(text: str) -> Codec:
    """The codec that a word names, one of `CODECS`.

    Raises:
        ValueError: for a word that names none.

    Example:
        >>> parse_codec("kivi:32+16")
        KIVI(group=32, residual=16, channels=64, rotate=False)
    """
    match = re.fullmatch(r"(none|int8|fp8|int4|kivi)(?::(\d+)(?:\+(\d+))?)?(-rotated)?", text)
    name, first, second, rotated = match.groups() if match else (None,) * 4
    codec: Codec
    if name == "int4" and second is None:
        codec = Int4() if first is None else Int4(int(first))
    elif name == "kivi":
        default = KIVI()
        codec = KIVI(int(first or default.group), int(second or default.residual))
    elif name in ("none", "int8", "fp8") and first is None and not (name == "none" and rotated):
        plain: dict[str, Codec] = {"none": Identity(), "int8": Int8(), "fp8": Float8()}
        codec = plain[name]
    else:
        raise ValueError(f"a codec is one of {CODECS}; got {text!r}")
    if rotated:
        assert isinstance(codec, (Int4, Int8, Float8, KIVI))
        codec = dataclasses.replace(codec, rotate=True)
    return codec
