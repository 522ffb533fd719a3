"""What another codec would give back, with gradients."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax

from lucid_jax.cache.codecs.argument_checks import check_codec
from lucid_jax.cache.codecs.base import Codec, Form


@dataclasses.dataclass(frozen=True)
class Rounded(Form):
    """Tokens as another form gives them back, in their own dtype; gradients pass straight through.

    Attributes:
        inner: the form whose rounding they take.
    """

    inner: Form
    differentiable = True

    def cast(self, stored: jax.Array, other: Form) -> jax.Array:
        # What has been rounded is not rounded again.
        return stored.astype(other.dtype)

    def encode(self, tokens: jax.Array) -> jax.Array:
        return _round_through(self.inner, tokens)

    def decode(self, stored: jax.Array) -> jax.Array:
        return stored


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _round_through(form: Form, tokens: jax.Array) -> jax.Array:
    """What a form gives back, whose derivative is taken to be 1 (Bengio et al. 2013)."""
    return form.decode(form.encode(tokens))


@_round_through.defjvp
def _(
    form: Form, tokens: tuple[jax.Array], tangent: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return _round_through(form, *tokens), *tangent


@dataclasses.dataclass(frozen=True)
class Simulated(Codec):
    """Stores what another codec would give back, in the cache's dtype, for training with its rounding.

    Gradients pass straight through, as if nothing had been rounded (the straight-through estimator,
    Bengio et al. 2013): so a model, or a shared prefix, learns to live with the codec it will be served
    with. Saves no memory. `KIVI`'s latest tokens are in full precision here too. In dtypes narrower
    than float32 attention differs from the codec's own by the rounding of what it gives back.

    Attributes:
        inner: the codec simulated.
    """

    inner: Codec

    def __post_init__(self) -> None:
        if isinstance(check_codec(self.inner), Simulated):
            raise TypeError(f"Simulated takes the codec itself, got {self.inner}; leave one out")

    @property
    def unit(self) -> int:  # type: ignore[override]
        return self.inner.unit

    @property
    def tail(self) -> int:  # type: ignore[override]
        return self.inner.tail

    def forms(self, dtype: str, head_dim: int, value_head_dim: int) -> tuple[Form, Form]:
        key, value = self.inner.forms(dtype, head_dim, value_head_dim)
        return Rounded(dtype, head_dim, key), Rounded(dtype, value_head_dim, value)
