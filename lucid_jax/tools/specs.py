"""Cache specs as text, for the command line: `static:2048`, `sliding:256+4`, `int4`, `kivi:64+32`."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from lucid_jax.cache.codecs import CODECS as known_codecs
from lucid_jax.cache.codecs import Codec
from lucid_jax.cache.layouts import LAYOUTS as known_layouts
from lucid_jax.cache.layouts.base import LayerSpec
from lucid_jax.io.checked_file import short

_USAGES = [usage for spec in known_layouts.values() for usage in spec.usage]
LAYOUTS = f"{', '.join(_USAGES[:-1])} or {_USAGES[-1]}"
_CODEC_USAGES = [usage for codec in known_codecs.values() for usage in codec.usage]
CODECS = f"{', '.join(_CODEC_USAGES)}; -rotated turns keys first, as int4 does anyway"


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
        Sliding(window=256, sinks=4, slack=0, codec=Int4(group=64, rotate=True))
    """
    bound = parse_codec(codec)
    for spec in known_layouts.values():
        numbers = _numbers(spec.usage, layout)
        if numbers is not None:
            return _made(spec, numbers, bound, capacity)
    raise ValueError(f"a cache is one of {LAYOUTS}; got {layout!r}")


def _numbers(usages: tuple[str, ...], word: str) -> dict[str, int] | None:
    """The numbers in a word by the names of their fields, if it is written as one of `usages`."""
    for usage in usages:
        pattern = re.sub("[A-Z]+", lambda field: rf"(?P<{field[0].lower()}>\d+)", re.escape(usage))
        match = re.fullmatch(pattern, word)
        if match:
            return {name: _count(digits) for name, digits in match.groupdict().items()}
    return None


def _made(spec: Any, numbers: dict[str, int], codec: Codec, capacity: int) -> LayerSpec:
    """A spec from the numbers in its word; one that names a capacity has one, whatever the word."""
    needs = any(field.name == "capacity" for field in dataclasses.fields(spec))
    made: LayerSpec = spec(**({"capacity": capacity} if needs else {}) | numbers, codec=codec)
    return made


def spec_word(spec: LayerSpec) -> str:
    """The shortest word for a spec: what it does not name is left out.

    Example:
        >>> spec_word(parse_spec("sliding:256+4", capacity=0))
        'sliding:256'
    """
    return re.sub("[A-Z]+", lambda field: str(getattr(spec, field[0].lower())), spec.usage[0])


def parse_codec(text: str) -> Codec:
    """The codec that a word names, one of `CODECS`.

    Raises:
        ValueError: for a word that names none.

    Example:
        >>> parse_codec("kivi:32+16")
        KIVI(group=32, residual=16, channels=64, rotate=False)
    """
    word = text.removesuffix("-rotated")
    rotated = {} if word == text else {"rotate": True}
    codec: Any
    for codec in known_codecs.values():
        numbers = _numbers(codec.usage, word)
        if numbers is not None and rotated.keys() <= {f.name for f in dataclasses.fields(codec)}:
            made: Codec = codec(**numbers, **rotated)
            return made
    raise ValueError(f"a codec is one of {CODECS}; got {text!r}")


def _count(digits: str) -> int:
    """A number in a word, which counts slots or tokens and so fits int32."""
    if len(digits) > 10 or int(digits) >= 1 << 31:
        raise ValueError(f"numbers in caches and codecs are below 2**31; got {short(digits)}")
    return int(digits)
