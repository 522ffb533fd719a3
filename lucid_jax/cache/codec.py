"""Codecs: how a layer's keys and values are stored, orthogonal to where (the layout).

A codec is a small hashable description given to a layout, `Static(2048, codec=Int8())`. It names a
form (forms.py) for the keys and one for the values.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

from lucid_jax.cache.checks import check_count
from lucid_jax.cache.forms import ChannelNibbles, Form, Nibbles, Raw, Rotated, Scaled


class Codec(abc.ABC):
    """What a layout asks of a codec; a small hashable description.

    Attributes:
        unit: tokens that are quantized together; 1 if each is on its own.
        residual: latest tokens kept in full precision until their unit is quantized; 0 for none.
    """

    unit: int = 1
    residual: int = 0

    @abc.abstractmethod
    def forms(self, dtype: str, head_dim: int, value_head_dim: int) -> tuple[Form, Form]:
        """The forms of keys (B, H, T, head_dim) and values (B, H, T, value_head_dim)."""


def check_codec(codec: Any) -> Codec:
    """Checks what was given as `codec=`.

    Raises:
        TypeError: if it is no codec.
    """
    if not isinstance(codec, Codec):
        raise TypeError(
            f"codec must be a codec such as lucid_jax.codecs.Int8(), got {codec!r}; "
            "(lucid_jax.Int8 is the dtype)"
        )
    return codec


@dataclasses.dataclass(frozen=True)
class Identity(Codec):
    """Stores tokens as they are, in the cache's dtype."""

    def forms(self, dtype: str, head_dim: int, value_head_dim: int) -> tuple[Form, Form]:
        """See `Codec.forms`."""
        return Raw(dtype, head_dim), Raw(dtype, value_head_dim)


PLAIN = Identity()  # the codec of a layout that names none


@dataclasses.dataclass(frozen=True)
class Int8(Codec):
    """Eight bits a number, one float32 scale a token and head: 1.94 times smaller than bfloat16.

    Symmetric. Sizes are for head_dim 128.

    Attributes:
        rotate: turn keys by a Hadamard matrix first, which tames outlier channels.
    """

    rotate: bool = False

    def forms(self, dtype: str, head_dim: int, value_head_dim: int) -> tuple[Form, Form]:
        """See `Codec.forms`."""
        key = _rotated(Scaled(dtype, head_dim, "int8"), self.rotate)
        return key, Scaled(dtype, value_head_dim, "int8")


@dataclasses.dataclass(frozen=True)
class Float8(Codec):
    """Eight bits a number as float8 (e4m3), one float32 scale a token and head.

    As small as `Int8`; coarser for the largest numbers of a token, finer for its small ones.

    Attributes:
        rotate: turn keys by a Hadamard matrix first, which tames outlier channels.
    """

    rotate: bool = False

    def forms(self, dtype: str, head_dim: int, value_head_dim: int) -> tuple[Form, Form]:
        """See `Codec.forms`."""
        key = _rotated(Scaled(dtype, head_dim, "float8_e4m3fn"), self.rotate)
        return key, Scaled(dtype, value_head_dim, "float8_e4m3fn")


@dataclasses.dataclass(frozen=True)
class Int4(Codec):
    """Four bits a number, a bfloat16 scale and offset for every `group` channels of a token.

    Affine. With groups of 64, 3.56 times smaller than bfloat16 at head_dim 128.

    Attributes:
        group: the most channels that share a scale; the largest divisor of head_dim up to it do.
        rotate: turn keys by a Hadamard matrix first, which tames outlier channels.
    """

    group: int = 64
    rotate: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "group", check_count(self.group, "group of Int4(group)", 1))

    def forms(self, dtype: str, head_dim: int, value_head_dim: int) -> tuple[Form, Form]:
        """See `Codec.forms`."""
        key = Nibbles(dtype, head_dim, _channels(self.group, head_dim))
        value = Nibbles(dtype, value_head_dim, _channels(self.group, value_head_dim))
        return _rotated(key, self.rotate), value


@dataclasses.dataclass(frozen=True)
class KIVI(Codec):
    """Four bits: keys quantized per channel in groups of tokens, values per token (KIVI, Liu et al.).

    The latest `residual` tokens are always read in full precision; behind them, whole groups are
    quantized, once. What was full precision is kept long enough that rolling back up to `residual`
    tokens, across such a flush too, is exact. Tokens are only appended: `cache_position` is refused.
    A step quantizes the group it may complete, so that an append costs O(group), not O(1).

    Attributes:
        group: tokens of a group.
        residual: latest tokens in full precision, and the most that `rollback` undoes.
        channels: channels of a value that share a scale, as `Int4`'s `group`.
        rotate: turn keys by a Hadamard matrix first.
    """

    group: int = 64
    residual: int = 32
    channels: int = 64
    rotate: bool = False

    def __post_init__(self) -> None:
        for name, least in (("group", 2), ("residual", 1), ("channels", 1)):
            count = check_count(getattr(self, name), f"{name} of KIVI", least)
            object.__setattr__(self, name, count)

    @property
    def unit(self) -> int:  # type: ignore[override]
        """See `Codec`: a group of keys."""
        return self.group

    def forms(self, dtype: str, head_dim: int, value_head_dim: int) -> tuple[Form, Form]:
        """See `Codec.forms`."""
        key = ChannelNibbles(dtype, head_dim, self.group)
        value = Nibbles(dtype, value_head_dim, _channels(self.channels, value_head_dim))
        return _rotated(key, self.rotate), value


def _rotated(form: Form, rotate: bool) -> Form:
    if not rotate:
        return form
    return Rotated(form.dtype, form.dim, dataclasses.replace(form, dtype="float32"))


def _channels(most: int, dim: int) -> int:
    """The largest divisor of a width up to a number of channels."""
    return max(n for n in range(1, min(most, dim) + 1) if dim % n == 0)
