"""Eight bits a number, as floats."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from lucid_jax.cache.codecs.base import Codec, Form
from lucid_jax.cache.codecs.rotation import rotated
from lucid_jax.cache.codecs.scaled import Scaled


@dataclasses.dataclass(frozen=True)
class Float8(Codec):
    """Eight bits a number as float8 (e4m3), one float32 scale a token and head.

    As small as `Int8`; coarser for the largest numbers of a token, finer for its small ones.

    Attributes:
        rotate: turn keys by a Hadamard matrix first, which tames outlier channels.
    """

    usage: ClassVar[tuple[str, ...]] = ("fp8",)
    rotate: bool = False

    def forms(self, dtype: str, head_dim: int, value_head_dim: int) -> tuple[Form, Form]:
        key = rotated(Scaled(dtype, head_dim, "float8_e4m3fn"), self.rotate)
        return key, Scaled(dtype, value_head_dim, "float8_e4m3fn")
