"""The compiled loop of `generate` and `stream`: choose a token a row, feed it, until all are done."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
from flax import struct

from lucid_jax.cache.mesh_programs import in_auto_axes
from lucid_jax.decode.language_model import LanguageModel, ModelStructure
from lucid_jax.decode.prompts import power_of_two
from lucid_jax.decode.sampling import Sampling, sample

MIN_OUT = 512  # new tokens that the loop's output has room for


def out_size(max_new_tokens: int) -> int:
    """Columns of the output of so many new tokens: one size for most calls."""
    return max(MIN_OUT, power_of_two(max_new_tokens))


@dataclasses.dataclass(frozen=True)
class LoopSetup:
    """What the compiled loop is specialised to."""

    structure: ModelStructure
    sampling: Sampling
    stops: tuple[int, ...]


@struct.dataclass
class TokenLoop:
    """What the compiled loop carries from token to token."""

    cache: Any  # a CacheState; without a cache, the tokens so far, int32 (B, C)
    token: jax.Array  # int32 (B,): chosen, and not yet in the cache
    done: jax.Array  # bool (B,)
    produced: jax.Array  # int32 (B,): tokens chosen so far
    step: jax.Array  # int32 []: tokens the longest row has
    out: jax.Array  # int32 (B, P): the token of a step in column step % P; P takes those of a call
    seen: jax.Array | None  # bool (B, V), for the repetition penalty
    key: jax.Array

    if TYPE_CHECKING:

        def replace(self, **updates: Any) -> Self:
            """A copy with some fields changed; flax adds it."""


@partial(jax.jit, static_argnums=(0, 6), donate_argnums=2)
@partial(in_auto_axes, by_heads=False)
def start_loop(
    setup: LoopSetup,
    params: Any,
    cache: Any,
    last: jax.Array,
    seen: jax.Array | None,
    key: jax.Array,
    size: int,
) -> TokenLoop:
    """Chooses the first token, from the prompt's last hidden state (B, E); the output has `size`."""
    batch = last.shape[0]
    loop = TokenLoop(
        cache=cache,
        token=jnp.zeros(batch, jnp.int32),
        done=jnp.zeros(batch, bool),
        produced=jnp.zeros(batch, jnp.int32),
        step=jnp.int32(0),
        out=jnp.zeros((batch, size), jnp.int32),
        seen=seen,
        key=key,
    )
    return choose(setup, setup.structure.merge(params), loop, last)


def choose(setup: LoopSetup, model: LanguageModel, loop: TokenLoop, hidden: jax.Array) -> TokenLoop:
    """Chooses each row's next token from hidden states (B, E) and records it."""
    logits = model.logits(hidden[:, None])[:, 0]
    key = jax.random.fold_in(loop.key, loop.step)
    token = jnp.where(loop.done, 0, sample(logits, key, setup.sampling, loop.seen))
    ended = (
        jnp.isin(token, jnp.array(setup.stops, jnp.int32))
        if setup.stops
        else jnp.zeros_like(loop.done)
    )
    seen = loop.seen
    if seen is not None:
        seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
    column = loop.step % loop.out.shape[1]
    out = jax.lax.dynamic_update_slice(loop.out, token[:, None], (jnp.int32(0), column))
    return loop.replace(
        token=token,
        done=loop.done | ended,
        produced=loop.produced + (~loop.done).astype(jnp.int32),
        step=loop.step + 1,
        out=out,
        seen=seen,
    )


def loop_until(
    limit: jax.Array, feed: Callable[[TokenLoop], TokenLoop], loop: TokenLoop
) -> TokenLoop:
    """Feeds until `limit` tokens are chosen or all rows are done."""
    return jax.lax.while_loop(lambda loop: (loop.step < limit) & ~jnp.all(loop.done), feed, loop)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
@partial(in_auto_axes, by_heads=False)
def decode_tokens(setup: LoopSetup, params: Any, loop: TokenLoop, limit: jax.Array) -> TokenLoop:
    """Decodes until `limit` tokens are chosen or all rows are done; the loop is donated."""
    model = setup.structure.merge(params)

    def feed(loop: TokenLoop) -> TokenLoop:
        live = (~loop.done).astype(jnp.int32)
        hidden, cache = model.hidden(loop.token[:, None], loop.cache, lengths=live)
        return choose(setup, model, loop.replace(cache=cache), hidden[:, 0])

    return loop_until(limit, feed, loop)
