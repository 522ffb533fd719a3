"""How stored tokens reach the tensor cores: as 16-bit numbers, in pieces of some channels each.

Numbers of 16 bits are multiplied as they lie. Codes are widened inside the kernel, exactly; what a
token's scale and offset do is done to scores and weights. Numbers of 32 bits are taken apart there into
three of bfloat16 that add up to them. A piece is channels that share a scale.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lucid_jax.cache.codecs import Form, Nibbles, Raw, Rotated, Rounded, Scaled

Piece = dict[str, jax.Array]

MOST_CHANNELS = 128  # of a piece: 64 rows of it are 64 registers of each thread
FEWEST_CHANNELS = 16  # what a tensor core multiplies at once
PARTS = 3  # numbers of 16 bits that stand for one of float32
LAID_OUT = 8  # slots that TMA lays out together for the tensor cores
NARROW = ("bfloat16", "float16")


def takes(form: Form) -> bool:
    """Whether the kernel reads a form; a class of the user's own it does not know."""
    if type(form) is Rotated:
        return takes(form.inner)
    if type(form) in (Raw, Rounded):
        return form.dtype in (*NARROW, "float32")
    return type(form) in (Scaled, Nibbles)


def plain(form: Form) -> Form:
    """The form without what only turns queries."""
    return form.inner if isinstance(form, Rotated) else form


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the channels of a leaf are divided, and what stands for them.

    Attributes:
        form: how the leaf is stored.
        width: channels of a piece.
        staged: whether numbers are brought as they lie, and laid out for the tensor cores inside the
            kernel: codes, which are widened, float32, which is taken apart, and what is not a multiple
            of 8 slots, of which TMA lays out none.
    """

    form: Form
    width: int
    staged: bool

    @property
    def count(self) -> int:
        """How many pieces."""
        return self.form.dim // self.width

    @property
    def dtype(self) -> jnp.dtype:
        """What is multiplied."""
        narrow = not self.coded and self.form.dtype in NARROW
        dtype: jnp.dtype = jnp.dtype(self.form.dtype if narrow else jnp.bfloat16)
        return dtype

    @property
    def parts(self) -> int:
        """How many numbers that are multiplied stand for one that is stored."""
        return PARTS if self.form.dtype == "float32" and not self.coded else 1

    @property
    def coded(self) -> bool:
        """Whether numbers are widened inside the kernel."""
        return isinstance(self.form, (Scaled, Nibbles))

    @property
    def stored_width(self) -> int:
        """Codes or numbers of a token."""
        return self.form.dim // (2 if isinstance(self.form, Nibbles) else 1)

    @property
    def stored_dtype(self) -> jnp.dtype:
        """What codes or numbers are stored as."""
        if not self.coded:
            return jnp.dtype(self.form.dtype)
        signed = isinstance(self.form, Scaled) and self.form.code == "int8"
        dtype: jnp.dtype = jnp.dtype(jnp.int8 if signed else jnp.uint8)
        return dtype

    @property
    def groups(self) -> int:
        """Scales of a token."""
        return self.form.dim // self.form.group if isinstance(self.form, Nibbles) else 1

    def group_of(self, piece: int) -> int:
        """Which scale of a token a piece has."""
        return piece * self.width * self.groups // self.form.dim


def cut_of(form: Form, slots: int) -> Cut | None:
    """How the kernel divides a leaf's channels, of so many slots; None if it cannot."""
    form = plain(form)
    if isinstance(form, Nibbles):
        if form.dim % 2:
            return None
        whole = math.gcd(form.group, form.dim // 2)
    else:
        whole = form.dim
    if whole % FEWEST_CHANNELS:
        return None
    cut = Cut(form, FEWEST_CHANNELS, staged=True)
    most = MOST_CHANNELS // (2 if cut.parts > 1 else 1)  # while it is taken apart it is held twice
    widths = range(FEWEST_CHANNELS, min(whole, most) + 1, FEWEST_CHANNELS)
    return dataclasses.replace(
        cut,
        width=max(n for n in widths if whole % n == 0),
        staged=cut.coded or cut.parts > 1 or slots % LAID_OUT != 0,
    )


def arrays_of(cut: Cut, stored: Any) -> Piece:
    """What is stored, by name: numbers (..., S, width), scales and offsets (..., S[, groups])."""
    if not cut.coded:
        return {"numbers": stored}
    beside = {name: x for name, x in stored.items() if name != "codes"}
    if isinstance(cut.form, Nibbles) and cut.groups == 1:
        beside = {name: x[..., 0] for name, x in beside.items()}
    return {"numbers": stored["codes"], **beside}


# --- inside the kernel -------------------------------------------------------------------------------


def widened(cut: Cut, codes: jax.Array, side: Any) -> jax.Array:
    """Codes, a byte each or two a byte, as numbers that are exact in bfloat16; numbers as they are."""
    if not cut.coded:
        return codes
    if isinstance(cut.form, Nibbles):
        four_bits: jax.Array = (codes.astype(jnp.int32) >> (4 * side)) & 15
        return four_bits.astype(jnp.float32).astype(jnp.bfloat16)
    assert isinstance(cut.form, Scaled)
    if cut.form.code == "int8":
        return codes.astype(jnp.float32).astype(jnp.bfloat16)
    # Float8 (e4m3) has four bits of exponent, less 7: a float32's less 127.
    wide = codes.astype(jnp.int32)
    bits = ((wide & 127) << 20) | ((wide & 128) << 24)
    return (lax.bitcast_convert_type(bits, jnp.float32) * 2.0**120).astype(jnp.bfloat16)


def taken_apart(cut: Cut, x: jax.Array) -> Iterator[jax.Array]:
    """Numbers of 16 bits that add up to those of a piece, the largest first, one at a time."""
    for _ in range(cut.parts - 1):
        # Its first 16 bits, so that none becomes infinite; what is infinite has no rest.
        bits = lax.bitcast_convert_type(x, jnp.int32)
        part = lax.bitcast_convert_type(bits & -65536, jnp.float32)
        yield part.astype(cut.dtype)
        x = jnp.where((bits & 0x7F800000) == 0x7F800000, jnp.zeros_like(x), x - part)
    yield x.astype(cut.dtype)


def pairs(a: int, b: int) -> list[tuple[int, int]]:
    """Which parts of two numbers are multiplied: the others are below a float32's precision."""
    return [(i, j) for i in range(a) for j in range(b) if i + j < PARTS]


def as_float(x: jax.Array) -> jax.Array:
    """Scales and offsets, of which some are bits of bfloat16, as float32."""
    if x.dtype != jnp.uint16:
        return x
    return lax.bitcast_convert_type(x.astype(jnp.int32) << 16, jnp.float32)
