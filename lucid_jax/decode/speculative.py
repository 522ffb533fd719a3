"""`speculate`: decoding with drafts, several tokens per pass of the target, the same text.

A round, all of it in one compiled loop on donated caches: a draft proposes K tokens a row, the target
verifies them in one chunk of K + 1, each row accepts as many as hold, and both caches take back the
rest, `rollback` for a chain and `keep_path` for a tree. Rows go at their own pace. (Leviathan et al.
2023; Chen et al. 2023.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike

from lucid_jax.cache import state as core
from lucid_jax.cache.checks import check_count
from lucid_jax.cache.layer import LayerSpec
from lucid_jax.cache.tree import check_tree_layers, keep_path, tree_mask
from lucid_jax.decode.acceptance import accept_greedy, accept_sampled, accept_tree
from lucid_jax.decode.drafts import (
    Drafter,
    ModelDrafter,
    NGram,
    NGramDrafter,
    Text,
    Tree,
    TreeDrafter,
    filter_places,
)
from lucid_jax.decode.generation import (
    Generation,
    as_stops,
    open_cache,
    pad_prompts,
    power_of_two,
    prefill,
    seen_tokens,
)
from lucid_jax.decode.graph import Graph, split
from lucid_jax.decode.sampling import Sampling, sample
from lucid_jax.decode.topology import Topology


@dataclasses.dataclass(frozen=True)
class Speculation(Generation):
    """What `speculate` returns: a `Generation`, and how its drafts fared.

    Attributes:
        rounds: int32 (B,), passes of the target over each row, prefill aside.
        proposed: int32 (B,), drafts that the target verified.
        accepted: int32 (B,), drafts that became tokens of the row.
    """

    rounds: np.ndarray
    proposed: np.ndarray
    accepted: np.ndarray

    @property
    def acceptance(self) -> float:
        """The part of all drafts that was accepted; 0 if there were none."""
        return float(self.accepted.sum() / max(int(self.proposed.sum()), 1))


@dataclasses.dataclass(frozen=True)
class _Setup:
    """What the compiled loop is specialised to."""

    graph: Graph  # of the target
    drafter: Drafter
    sampling: Sampling
    stops: tuple[int, ...]


@struct.dataclass
class _Loop:
    """What the compiled loop carries from round to round."""

    cache: core.CacheState
    draft_cache: core.CacheState | None
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


def speculate(
    model: Any,
    prompts: ArrayLike | Sequence[Sequence[int]],
    *,
    draft: Any,
    max_new_tokens: int,
    draft_tokens: int = 4,
    cache: LayerSpec | Sequence[LayerSpec] | None = None,
    draft_cache: LayerSpec | Sequence[LayerSpec] | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop_tokens: Sequence[int] = (),
    prefill_chunk: int = 512,
) -> Speculation:
    """Continues each prompt as `generate` does, in fewer passes of the model.

    Greedy tokens are those of `generate`. Sampled ones have the same distribution, though another
    seed's luck: drafts and model draw from the same filtered logits.

    Args:
        model: the target, an nnx module such as `lucid_jax.models.Transformer`.
        prompts: token ids, one list per row, of any lengths; or an int array (B, T).
        draft: a smaller model with the same vocabulary; `NGram()`, to copy from the row's own text;
            or `Tree(model, branching)`, greedy only.
        max_new_tokens: the most tokens to add to a row.
        draft_tokens: K, drafts a round; a tree has as many as it has nodes.
        cache: the target's cache, as for `generate`. Layers that cannot take back K tokens are
            refused: a window needs `slack=K` (by default a model's own have it), KIVI `residual=K`.
            A tree needs Static or Dynamic, and as many slots more as it has nodes beside its longest
            path.
        draft_cache: likewise for the draft model.
        sampling: how to choose tokens; greedy by default.
        seed: of the random choices. A row's draws depend on (seed, row, round) alone.
        stop_tokens: ids that end a row.
        prefill_chunk: as for `generate`.

    Returns:
        The new tokens, how many each row has, the target's cache, and how many drafts were accepted.

    Raises:
        ValueError: as `generate` does; for a draft of another vocabulary, a cache that cannot take
            back drafts, or a tree with sampling or a windowed model.

    Example:
        >>> from flax import nnx
        >>> from lucid_jax.models import ModelConfig, Transformer
        >>> sizes = dict(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> model = Transformer(ModelConfig(**sizes), rngs=nnx.Rngs(0))
        >>> result = speculate(model, [[1, 2]], draft=model, max_new_tokens=11)
        >>> result.lengths.tolist(), result.rounds.tolist(), result.acceptance
        ([11], [2], 1.0)
    """
    check_count(max_new_tokens, "max_new_tokens", 1)
    check_count(prefill_chunk, "prefill_chunk", 1)
    sampling = Sampling() if sampling is None else sampling
    stops = as_stops(stop_tokens)
    drafter, draft_model, draft_params = _drafter(model, draft, draft_tokens, sampling)
    if draft_model is None and draft_cache is not None:
        raise ValueError("NGram() has no model, so no draft_cache; leave it out")
    tokens, lengths = pad_prompts(prompts, model.config.vocab_size)
    batch, longest = tokens.shape
    spare = 0 if drafter.tree is None else drafter.tree.nodes - drafter.tree.depth

    def prefilled(
        one: Any, graph: Graph, params: Any, spec: Any, name: str
    ) -> tuple[jax.Array, core.CacheState]:
        state = open_cache(
            one, spec, batch, longest, max_new_tokens, spare=spare, slack=drafter.width
        )
        _check_can_take_back(state, drafter, name)
        return prefill(graph, params, state, tokens, lengths, prefill_chunk)

    graph, params = split(model)
    last, state = prefilled(model, graph, params, cache, "cache")
    draft_state = None
    if isinstance(drafter, ModelDrafter | TreeDrafter):
        _, draft_state = prefilled(
            draft_model, drafter.graph, draft_params, draft_cache, "draft_cache"
        )
    setup = _Setup(graph, drafter, sampling, stops)
    loop = _start(
        setup, params, state, draft_state, last, _history(tokens, max_new_tokens), lengths,
        np.int32(max_new_tokens), seen_tokens(tokens, lengths, model, sampling),
        jax.random.key(seed),
    )  # fmt: skip

    need = tokens.shape[1] + max_new_tokens - 1 + spare
    while not bool(np.all(loop.done)):
        loop, stop_at = _with_room(loop, need, drafter.width)
        loop = _decode(setup, (params, draft_params), loop, stop_at)
        for one in (loop.cache, loop.draft_cache):
            if one is not None:
                core.check_overflow(one)
    return _result(loop, lengths, max_new_tokens)


# --- the host's part -------------------------------------------------------------------------------


def _drafter(
    model: Any, draft: Any, draft_tokens: int, sampling: Sampling
) -> tuple[Drafter, Any | None, Any]:
    """What drafts in the compiled loop, the model that it needs a cache for, and its parameters."""
    width = check_count(draft_tokens, "draft_tokens", 1)
    if isinstance(draft, NGram):
        return NGramDrafter(draft, width, model.config.vocab_size), None, None
    draft_model: Any = draft.model if isinstance(draft, Tree) else draft
    if not callable(getattr(draft_model, "hidden", None)):
        raise TypeError(
            f"draft must be a model, NGram() or Tree(model, branching), got {draft_model!r}"
        )
    if draft_model.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the draft must have the model's vocabulary of {model.config.vocab_size} tokens, got "
            f"{draft_model.config.vocab_size}; use a draft made with the same tokenizer"
        )
    graph, params = split(draft_model)
    if not isinstance(draft, Tree):
        return ModelDrafter(graph, width), draft_model, params
    if sampling.temperature > 0:
        raise ValueError(
            "a tree of drafts decodes greedily; use temperature=0, or a chain: draft=model"
        )
    for one in (model, draft_model):
        if any(window is not None for window in one.windows):
            raise ValueError(
                "a tree of drafts needs a model that sees all earlier tokens in every layer, got "
                f"windows {one.windows}; use a chain: draft=model"
            )
        if one.rope_by_place:
            raise ValueError(
                "a tree of drafts needs models whose rotary positions go along a branch, got one with "
                "rope_by_place=True, which counts places in the cache; use a chain: draft=model"
            )
    tree = Topology(tuple(draft.branching))
    if max(tree.branching) > model.config.vocab_size:
        raise ValueError(
            f"the children of a node are different tokens, of {model.config.vocab_size}, got "
            f"branching={tree.branching}; use fewer"
        )
    return TreeDrafter(graph, tree), draft_model, params


def _check_can_take_back(state: core.CacheState, drafter: Drafter, name: str) -> None:
    if drafter.tree is not None:
        check_tree_layers(state)
        sizes = {layer.capacity for layer in state.layers}
        if len(sizes) > 1:
            raise ValueError(
                f"a tree of drafts needs layers of one capacity, got {sorted(sizes)} in {name}="
            )
        return
    for index, layer in zip(state.owners, state.layers, strict=True):
        if layer.lookback is not None and layer.lookback < drafter.width:
            raise ValueError(
                f"layer {index} of {name}= is {layer.spec}, which can take back {layer.lookback} "
                f"tokens, but up to {drafter.width} drafts may be rejected; give Sliding "
                f"slack={drafter.width} (KIVI residual={drafter.width}), or lower draft_tokens"
            )


def _history(tokens: np.ndarray, max_new_tokens: int) -> np.ndarray:
    """Prompts with room for new tokens: a power of two, so that few shapes are compiled."""
    rows, longest = tokens.shape
    history = np.zeros((rows, power_of_two(longest + max_new_tokens)), np.int32)
    history[:, :longest] = tokens
    return history


def _with_room(loop: _Loop, need: int, width: int) -> tuple[_Loop, np.int32]:
    """The loop with room for a round at least, and up to how many tokens a row may start one."""

    def bound(loop: _Loop) -> int:
        states = [state for state in (loop.cache, loop.draft_cache) if state is not None]
        room = [layer.capacity for s in states for layer in s.layers if layer.bounded]
        smallest = min(room, default=need)
        return np.iinfo(np.int32).max if smallest >= need else smallest - width

    longest = int(np.max(np.where(loop.done, 0, loop.filled)))
    if longest > bound(loop):
        # No more than rows can come to need: layers of fixed size beside them have just that.
        slots = min(longest + width, need)
        grown = [
            None if state is None else core.grow(state, slots)
            for state in (loop.cache, loop.draft_cache)
        ]
        loop = loop.replace(cache=grown[0], draft_cache=grown[1])
    return loop, np.int32(bound(loop))


def _result(loop: _Loop, lengths: np.ndarray, max_new_tokens: int) -> Speculation:
    produced = np.array(loop.filled) - lengths
    tokens = np.zeros((len(lengths), max_new_tokens), np.int32)
    for row, text, start, count in zip(
        tokens, np.asarray(loop.history), lengths, produced, strict=True
    ):
        row[:count] = text[start : start + count]
    return Speculation(
        tokens=tokens,
        lengths=produced,
        cache=loop.cache,
        rounds=np.array(loop.rounds),
        proposed=np.array(loop.proposed),
        accepted=np.array(loop.accepted),
    )


# --- the device's part -----------------------------------------------------------------------------


@partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def _start(
    setup: _Setup,
    params: Any,
    cache: core.CacheState,
    draft_cache: core.CacheState | None,
    last: jax.Array,
    history: jax.Array,
    lengths: jax.Array,
    max_new_tokens: jax.Array,
    seen: jax.Array | None,
    key: jax.Array,
) -> _Loop:
    """Chooses the token after the prompt, as `generate` does, from its last hidden state (B, E)."""
    none = jnp.zeros_like(lengths)
    loop = _Loop(
        cache=cache,
        draft_cache=draft_cache,
        history=history,
        filled=lengths,
        limit=lengths + max_new_tokens,
        done=none > 0,
        seen=seen,
        rounds=none,
        proposed=none,
        accepted=none,
        key=key,
    )
    logits = setup.graph.merge(params).logits(last[:, None])[:, 0]
    token = sample(logits, jax.random.fold_in(loop.key, 0), setup.sampling, loop.seen)
    return _add(setup, loop, token[:, None], jnp.ones_like(loop.filled))[0]


def _add(
    setup: _Setup, loop: _Loop, tokens: jax.Array, counts: jax.Array
) -> tuple[_Loop, jax.Array]:
    """Adds the first `counts` (B,) of tokens (B, P) to each row, up to a stop token; and how many."""
    place = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    added = place < counts[:, None]
    ended = jnp.zeros_like(loop.done)
    if setup.stops:
        stop = added & jnp.isin(tokens, jnp.array(setup.stops, jnp.int32))
        ended = jnp.any(stop, axis=1)
        first = jnp.argmax(stop, axis=1).astype(jnp.int32)
        counts = jnp.where(ended, first + 1, counts)
        added = place < counts[:, None]
    size = loop.history.shape[1]
    target = jnp.where(added, loop.filled[:, None] + place, size)
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
def _decode(setup: _Setup, params: Any, loop: _Loop, stop_at: jax.Array) -> _Loop:
    """Decodes until all rows are done, or one has more than `stop_at` tokens before a round."""

    def going(loop: _Loop) -> jax.Array:
        longest = jnp.max(jnp.where(loop.done, 0, loop.filled))
        return ~jnp.all(loop.done) & (longest <= stop_at)

    return jax.lax.while_loop(going, partial(_round, setup, params), loop)


def _round(setup: _Setup, params: Any, loop: _Loop) -> _Loop:
    """Drafts, verifies, keeps what holds."""
    drafter, sampling = setup.drafter, setup.sampling
    target = setup.graph.merge(params[0])
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
        options["mask"] = tree_mask(tree.sees, loop.filled - 1, core.capacity(loop.cache))
    hidden, cache = target.hidden(chunk, loop.cache, lengths=fed, **options)
    logits = filter_places(target.logits(hidden), sampling, _seen_along(loop.seen, chunk, tree))

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
    cache = core.rollback(cache, fed - kept) if path is None else keep_path(cache, fed, path, kept)
    return after.replace(
        cache=cache,
        draft_cache=drafter.settle(draft_cache, text, after.filled, path),
        rounds=loop.rounds + live.astype(jnp.int32),
        proposed=loop.proposed + jnp.where(live, proposal.counts, 0),
        accepted=loop.accepted + jnp.minimum(accepted, kept),
    )


def _round_keys(loop: _Loop) -> tuple[jax.Array, jax.Array]:
    """Keys of this round for the draft and for the acceptance, (B,) each, one stream a row."""
    rows = jnp.arange(loop.filled.shape[0], dtype=jnp.uint32)

    def of_row(row: jax.Array, rounds: jax.Array) -> jax.Array:
        return jax.random.split(jax.random.fold_in(jax.random.fold_in(loop.key, rounds + 1), row))

    draft, accept = jnp.swapaxes(jax.vmap(of_row)(rows, loop.rounds), 0, 1)
    return draft, accept


def _seen_along(
    seen: jax.Array | None, chunk: jax.Array, tree: Topology | None
) -> jax.Array | None:
    """What was seen at each place of a chunk (B, T), itself included: bool (B, T, V)."""
    if seen is None:
        return None
    places = chunk.shape[1]
    sees = np.tri(places, dtype=bool) if tree is None else tree.sees
    new = jax.nn.one_hot(chunk, seen.shape[1])
    return seen[:, None] | (jnp.einsum("tm,bmv->btv", sees.astype(np.float32), new) > 0)
