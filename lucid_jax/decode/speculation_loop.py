"""The compiled loop of `speculate`: rounds that draft, verify and keep what holds, in place."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lucid_jax.cache import introspection, verbs
from lucid_jax.cache.mesh_programs import in_auto_axes
from lucid_jax.cache.state import CacheState
from lucid_jax.cache.tree import keep_path, tree_mask
from lucid_jax.decode.acceptance import accept_greedy, accept_sampled, accept_tree
from lucid_jax.decode.drafts import Drafter, Text, filtered_along
from lucid_jax.decode.language_model import ModelStructure
from lucid_jax.decode.sampling import Sampling, sample
from lucid_jax.decode.topology import Topology

Caches = tuple[CacheState, CacheState | None]  # the target's and the draft model's


@dataclasses.dataclass(frozen=True)
class SpeculationSetup:
    """What the compiled loop is specialised to."""

    structure: ModelStructure  # of the target
    drafter: Drafter
    sampling: Sampling
    stops: tuple[int, ...]


@struct.dataclass
class SpeculationLoop:
    """What the compiled loop carries from round to round."""

    cache: CacheState
    draft_cache: CacheState | None
    history: jax.Array  # int32 (B, S): prompts and new tokens
    filled: jax.Array  # int32 (B,): tokens of each row; the last one is not in the cache
    limit: jax.Array  # int32 (B,): most tokens of each row
    done: jax.Array  # bool (B,)
    seen: jax.Array | None  # bool (B, V), for the repetition penalty
    rounds: jax.Array  # int32 (B,)
    proposed: jax.Array  # int32 (B,)
    accepted: jax.Array  # int32 (B,)
    key: jax.Array

    if TYPE_CHECKING:

        def replace(self, **updates: Any) -> Self:
            """A copy with some fields changed; flax adds it."""


@partial(jax.jit, static_argnums=0, donate_argnums=2)
@partial(in_auto_axes, by_heads=False)
def start_rounds(
    setup: SpeculationSetup,
    params: Any,
    caches: Caches,
    text: Text,
    last: jax.Array,
    key: jax.Array,
) -> SpeculationLoop:
    """Chooses the token after the prompt, as `generate` does, from its last hidden state (B, E)."""
    none = jnp.zeros_like(text.filled)
    loop = SpeculationLoop(
        cache=caches[0],
        draft_cache=caches[1],
        history=text.history,
        filled=text.filled,
        limit=text.filled + text.left,
        done=none > 0,
        seen=text.seen,
        rounds=none,
        proposed=none,
        accepted=none,
        key=key,
    )
    logits = setup.structure.merge(params).logits(last[:, None])[:, 0]
    token = sample(logits, jax.random.fold_in(loop.key, 0), setup.sampling, loop.seen)
    return _add(setup, loop, token[:, None], jnp.ones_like(loop.filled))[0]


def _add(
    setup: SpeculationSetup, loop: SpeculationLoop, tokens: jax.Array, counts: jax.Array
) -> tuple[SpeculationLoop, jax.Array]:
    """Adds the first `counts` (B,) of tokens (B, P) to each row, up to a stop token; and how many."""
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    added = index < counts[:, None]
    ended = jnp.zeros_like(loop.done)
    if setup.stops:
        stop = added & jnp.isin(tokens, jnp.array(setup.stops, jnp.int32))
        ended = jnp.any(stop, axis=1)
        first = jnp.argmax(stop, axis=1).astype(jnp.int32)
        counts = jnp.where(ended, first + 1, counts)
        added = index < counts[:, None]
    size = loop.history.shape[1]
    target = jnp.where(added, loop.filled[:, None] + index, size)
    put = jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop"))
    seen = loop.seen
    if seen is not None:
        mark = jax.vmap(lambda row, new: row.at[new].set(True, mode="drop"))
        seen = mark(seen, jnp.where(added, tokens, seen.shape[1]))
    filled = loop.filled + counts
    loop = loop.replace(
        history=put(loop.history, target, tokens),
        filled=filled,
        done=loop.done | ended | (filled >= loop.limit),
        seen=seen,
    )
    return loop, counts


@partial(jax.jit, static_argnums=0, donate_argnums=2)
@partial(in_auto_axes, by_heads=False)
def decode_rounds(
    setup: SpeculationSetup, params: Any, loop: SpeculationLoop, stop_at: jax.Array
) -> SpeculationLoop:
    """Decodes until all rows are done, or one has more than `stop_at` tokens before a round."""

    def going(loop: SpeculationLoop) -> jax.Array:
        longest = jnp.max(jnp.where(loop.done, 0, loop.filled))
        return ~jnp.all(loop.done) & (longest <= stop_at)

    return jax.lax.while_loop(going, partial(_round, setup, params), loop)


def _round(setup: SpeculationSetup, params: Any, loop: SpeculationLoop) -> SpeculationLoop:
    """Drafts, verifies, keeps what holds."""
    drafter, sampling = setup.drafter, setup.sampling
    target = setup.structure.merge(params[0])
    live = ~loop.done
    left = jnp.where(live, loop.limit - loop.filled, 0)
    text = Text(loop.history, loop.filled, left, loop.seen)
    draft_keys, keys = _round_keys(loop)
    proposal, draft_cache = drafter.propose(params[1], loop.draft_cache, text, draft_keys, sampling)

    token = text.at(loop.filled[:, None] - 1)
    chunk = jnp.concatenate([token, proposal.tokens], axis=1)
    fed = jnp.where(live, proposal.counts + 1, 0)
    options: dict[str, Any] = {}
    tree = drafter.tree
    if tree is not None:
        options["positions"] = loop.filled[:, None] - 1 + jnp.asarray(tree.depths[None])
        options["mask"] = tree_mask(tree.sees, loop.filled - 1, introspection.capacity(loop.cache))
    hidden, cache = target.hidden(chunk, loop.cache, lengths=fed, **options)
    logits = filtered_along(target.logits(hidden), sampling, _seen_along(loop.seen, chunk, tree))

    path = None
    if tree is not None:
        tokens, accepted, path = accept_tree(logits, proposal.tokens, proposal.counts, tree)
    elif proposal.probs is None:
        tokens, accepted = accept_greedy(logits, proposal.tokens, proposal.counts)
    else:
        tokens, accepted = accept_sampled(
            logits, proposal.probs, proposal.tokens, proposal.counts, keys
        )
    after, kept = _add(setup, loop, tokens, jnp.where(live, accepted + 1, 0))
    # The latest token stays out of the cache, but the one before the drafts is in it now.
    cache = verbs.rollback(cache, fed - kept) if path is None else keep_path(cache, fed, path, kept)
    return after.replace(
        cache=cache,
        draft_cache=drafter.settle(draft_cache, text, after.filled, path),
        rounds=loop.rounds + live.astype(jnp.int32),
        proposed=loop.proposed + jnp.where(live, proposal.counts, 0),
        accepted=loop.accepted + jnp.minimum(accepted, kept),
    )


def _round_keys(loop: SpeculationLoop) -> tuple[jax.Array, jax.Array]:
    """Keys of this round for the draft and for the acceptance, (B,) each, one stream a row."""
    rows = jnp.arange(loop.filled.shape[0], dtype=jnp.uint32)

    def of_row(row: jax.Array, rounds: jax.Array) -> jax.Array:
        return jax.random.split(jax.random.fold_in(jax.random.fold_in(loop.key, rounds + 1), row))

    draft, accept = jnp.swapaxes(jax.vmap(of_row)(rows, loop.rounds), 0, 1)
    return draft, accept


def _seen_along(
    seen: jax.Array | None, chunk: jax.Array, tree: Topology | None
) -> jax.Array | None:
    """What was seen at each token of a chunk (B, T), itself included: bool (B, T, V)."""
    if seen is None:
        return None
    count = chunk.shape[1]
    sees = np.tri(count, dtype=bool) if tree is None else tree.sees
    new = jax.nn.one_hot(chunk, seen.shape[1], dtype=jnp.float32)
    return seen[:, None] | (jnp.einsum("tm,bmv->btv", sees.astype(np.float32), new) > 0)
