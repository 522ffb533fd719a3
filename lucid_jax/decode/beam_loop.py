"""The compiled loop of `beam_search`, from prefilled prompts to the last step.

Shapes: B prompts, W beams, N new tokens, P >= N columns for them (`out_size`), K candidates a step, V
ids.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

import jax
import jax.numpy as jnp
from flax import struct

from lucid_jax.cache import verbs
from lucid_jax.cache.mesh_programs import in_auto_axes
from lucid_jax.cache.state import CacheState
from lucid_jax.decode.language_model import LanguageModel, ModelStructure
from lucid_jax.decode.sampling import penalized

History = Literal["tree", "reorder", "gather"]


@dataclasses.dataclass(frozen=True)
class SearchSetup:
    """What the compiled loop is specialised to."""

    structure: ModelStructure
    width: int  # W
    history: History


@struct.dataclass
class PrefilledPrompts:
    """What the search knows of the prompts in its cache."""

    hidden: jax.Array  # (B, E): of each prompt's last token
    lengths: Any  # int32 (B,)
    seen: jax.Array | None  # bool (B, V), for the repetition penalty


@struct.dataclass
class Rules:
    """What decides between hypotheses; traced, so that another value compiles nothing."""

    new: Any  # int32 []: N, the most new tokens
    stops: Any  # int32 [S]
    divisor: Any  # float32 [P + 1]: what the sum of a hypothesis of n tokens is divided by
    bound: Any  # float32 [P + 1]: the same for the best that live beams may still become
    early: Any  # bool []: W finished hypotheses are enough
    penalty: Any  # float32 []: of repetition


@struct.dataclass
class Finished:
    """The best finished hypotheses, as the live beam each went on from and its last token."""

    score: jax.Array  # float32 (B, W), descending; -inf where there is none
    length: jax.Array  # int32 (B, W)
    beam: jax.Array  # int32 (B, W)
    token: jax.Array  # int32 (B, W)


@struct.dataclass
class Search:
    """What the compiled loop carries from step to step."""

    cache: Any  # what the model returns; every chosen token but the newest is in it
    sum: jax.Array  # float32 (B, W): log-probability of each live beam; -inf for none
    tokens: jax.Array  # int32 (P, B, W)
    parents: jax.Array  # int32 (P, B, W)
    sums: jax.Array  # float32 (P, B, W)
    finished: Finished
    open: jax.Array  # bool (B,): whether live beams may still improve what has finished
    step: jax.Array  # int32 []: tokens chosen so far
    seen: jax.Array | None  # bool (B, W, V), for the repetition penalty
    path: jax.Array | None  # tree: bool (B, W, C), the slots of each beam's own past
    # reorder: int32 (B, W, W), how many new tokens two rows of the cache have in common

    if TYPE_CHECKING:

        def replace(self, **updates: Any) -> Self:
            """A copy with some fields changed; flax adds it."""


@partial(jax.jit, static_argnums=0, donate_argnums=2)
@partial(in_auto_axes, by_heads=False)
def search_from(
    setup: SearchSetup, params: Any, cache: CacheState, prompts: PrefilledPrompts, rules: Rules
) -> Search:
    """The whole search, from the hidden state of each prompt's last token."""
    model = setup.structure.merge(params)
    search = _opened(setup, cache, prompts, len(rules.divisor) - 1)
    feed = _feed_tree if setup.history == "tree" else _feed_rows

    def step(search: Search) -> Search:
        hidden, search = feed(model, search, prompts.lengths)
        return _choose(model.logits(hidden), search, rules)

    logits = model.logits(prompts.hidden[:, None])
    batch, width = search.sum.shape
    search = _choose(jnp.broadcast_to(logits, (batch, width, logits.shape[-1])), search, rules)
    if setup.history == "tree" and search.cache.layers[0].capacity < width:
        return search  # of one token: there is no room for a step, even one not taken
    return jax.lax.while_loop(
        lambda search: (search.step < rules.new) & jnp.any(search.open), step, search
    )


def _opened(
    setup: SearchSetup, cache: CacheState, prompts: PrefilledPrompts, columns: int
) -> Search:
    """A search of which nothing is chosen yet, with room for so many tokens."""
    batch, width = len(prompts.lengths), setup.width
    shape = (batch, width)
    path: jax.Array | None = None
    if setup.history == "tree":
        slot = jnp.arange(cache.layers[0].capacity, dtype=jnp.int32)[None, None]
        path = jnp.broadcast_to(slot < prompts.lengths[:, None, None], (*shape, slot.size))
    elif setup.history == "reorder":
        path = jnp.zeros((*shape, width), jnp.int32)
    seen = prompts.seen
    return Search(
        cache=cache,
        # All go on from one beam at first, or they would be W times the same.
        sum=jnp.full(shape, -jnp.inf, jnp.float32).at[:, 0].set(0),
        tokens=jnp.zeros((columns, *shape), jnp.int32),
        parents=jnp.zeros((columns, *shape), jnp.int32),
        sums=jnp.zeros((columns, *shape), jnp.float32),
        finished=Finished(
            score=jnp.full(shape, -jnp.inf, jnp.float32),
            length=jnp.zeros(shape, jnp.int32),
            beam=jnp.zeros(shape, jnp.int32),
            token=jnp.zeros(shape, jnp.int32),
        ),
        open=jnp.ones(batch, bool),
        step=jnp.int32(0),
        seen=None if seen is None else jnp.repeat(seen[:, None], width, axis=1),
        path=path,
    )


def _feed_tree(model: LanguageModel, search: Search, prompt: jax.Array) -> tuple[jax.Array, Search]:
    """Appends each row's W newest tokens; a beam sees the prompt and its own branch."""
    token, parent = search.tokens[search.step - 1], search.parents[search.step - 1]
    batch, width = token.shape
    assert search.path is not None
    first = prompt + width * (search.step - 1)
    own = first[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
    slot = jnp.arange(search.path.shape[-1], dtype=jnp.int32)
    path = jnp.take_along_axis(search.path, parent[..., None], axis=1)
    path = path | (own[..., None] == slot[None, None])
    positions = jnp.broadcast_to((prompt + search.step - 1)[:, None], (batch, width))
    hidden, cache = model.hidden(token, search.cache, positions=positions, mask=path[:, None])
    return hidden, search.replace(cache=cache, path=path)


def _feed_rows(model: LanguageModel, search: Search, prompt: jax.Array) -> tuple[jax.Array, Search]:
    """Brings the past of each beam to its row, then appends its newest token."""
    token, parent = search.tokens[search.step - 1], search.parents[search.step - 1]
    batch, width = token.shape
    first = width * jnp.arange(batch, dtype=jnp.int32)[:, None]
    rows, path = (first + parent).reshape(-1), search.path
    if path is None:
        cache = verbs.reorder(search.cache, rows)
    else:
        across = jnp.broadcast_to(parent[:, None], (batch, width, width))
        from_parent = jnp.take_along_axis(path, parent[..., None], axis=2)[..., 0]
        since = prompt[:, None] + from_parent
        cache = verbs.reorder(search.cache, rows, since=since.reshape(-1))
        path = jnp.take_along_axis(path, parent[..., None], axis=1)
        path = jnp.take_along_axis(path, across, axis=2)
        itself = jnp.eye(width, dtype=bool)[None]
        path = jnp.where(itself, search.step, path)
    hidden, cache = model.hidden(token.reshape(-1, 1), cache)
    hidden = hidden.reshape(batch, width, -1)
    return hidden, search.replace(cache=cache, path=path)


def _choose(logits: jax.Array, search: Search, rules: Rules) -> Search:
    """Goes on from logits (B, W, V): the beams that live on, and hypotheses that finish."""
    batch, width, vocab = logits.shape
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    if search.seen is not None:
        log_probs = penalized(log_probs, search.seen, rules.penalty)
    total = (search.sum[..., None] + log_probs).reshape(batch, width * vocab)
    # So many that W do not stop, even if each beam could stop in every way there is.
    count = (1 + len(rules.stops)) * width
    total, index = jax.lax.top_k(total, count)
    beam, token = index // vocab, index % vocab
    length = search.step + 1
    stops = jnp.any(token[..., None] == rules.stops[None, None], axis=-1) | (length == rules.new)

    # Only what is among the W best may finish; the others are there to live on.
    best = jnp.arange(count)[None] < width
    ends = stops & best & search.open[:, None]
    old = search.finished
    merged = Finished(
        score=jnp.where(ends, total / rules.divisor[length], -jnp.inf),
        length=jnp.full_like(beam, length),
        beam=beam,
        token=token,
    )
    merged = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), old, merged)
    score, kept = jax.lax.top_k(merged.score, width)
    finished = _picked(merged, kept)
    finished = finished.replace(length=jnp.where(score > -jnp.inf, finished.length, 0))

    order = jax.lax.top_k(jnp.where(stops, -jnp.inf, total), width)[1]
    order = _settled(beam, order)
    total, beam, token = _picked((total, beam, token), order)
    # Judged by what the best live beam may still become.
    full = jnp.all(score > -jnp.inf, axis=1)
    hope = jnp.max(total, axis=1) / rules.bound[length] > jnp.min(score, axis=1)
    seen = search.seen
    if seen is not None:
        seen = jnp.take_along_axis(seen, beam[..., None], axis=1)
        seen = seen | (token[..., None] == jnp.arange(vocab, dtype=jnp.int32)[None, None])
    return search.replace(
        sum=total,
        tokens=search.tokens.at[search.step].set(token),
        parents=search.parents.at[search.step].set(beam),
        sums=search.sums.at[search.step].set(total),
        finished=finished,
        open=search.open & hope & ~(full & rules.early),
        step=length,
        seen=seen,
    )


def _picked(tree: Any, index: jax.Array) -> Any:
    """Entries `index` int32 (B, W) of arrays (B, K)."""
    return jax.tree.map(lambda x: jnp.take_along_axis(x, index, axis=1), tree)


def _settled(beam: jax.Array, order: jax.Array) -> jax.Array:
    """The same W candidates in an order in which a beam's best continuation keeps its number.

    So rows of a cache move only where a beam dies and another branches into its place.
    """
    parent = jnp.take_along_axis(beam, order, axis=1)  # (B, W)
    width = parent.shape[1]
    number = jnp.arange(width, dtype=parent.dtype)
    is_from = parent[:, :, None] == number[None, None]  # (B, candidate, beam)
    heir = jnp.argmax(is_from, axis=1).astype(
        jnp.int32
    )  # the first candidate of each beam, if it has any
    extinct = ~jnp.any(is_from, axis=1)
    later = jnp.take_along_axis(heir, parent, axis=1) != number[None]
    # Candidates that are not a first, in order, then take the places of extinct beams.
    queue = jnp.argsort(~later, axis=1, stable=True).astype(jnp.int32)
    turn = jnp.cumsum(extinct, axis=1, dtype=jnp.int32) - 1
    placed = jnp.where(extinct, jnp.take_along_axis(queue, jnp.maximum(turn, 0), axis=1), heir)
    return jnp.take_along_axis(order, placed, axis=1)
