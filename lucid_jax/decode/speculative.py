"""`speculate`: decoding with drafts, several tokens per pass of the target, the same text.

A round, all of it in one compiled loop on donated caches: a draft proposes K tokens a row, the target
verifies them in one chunk of K + 1, each row accepts as many as hold, and both caches take back the
rest, `rollback` for a chain and `keep_path` for a tree. Rows go at their own pace. (Leviathan et al.
2023; Chen et al. 2023.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from lucid_jax.cache import introspection, verbs
from lucid_jax.cache.argument_checks import check_count
from lucid_jax.cache.layouts.base import LayerSpec
from lucid_jax.cache.state import CacheState
from lucid_jax.cache.tree import check_tree_layers
from lucid_jax.decode.drafts import (
    Drafter,
    ModelDrafter,
    NGram,
    NGramDrafter,
    Text,
    Tree,
    TreeDrafter,
)
from lucid_jax.decode.generation import Generation
from lucid_jax.decode.language_model import LanguageModel, ModelStructure, split
from lucid_jax.decode.options import DecodeOptions
from lucid_jax.decode.prefill import open_cache, room_for
from lucid_jax.decode.prefill_apart import prefill_prompts
from lucid_jax.decode.prompts import pad_prompts, seen_tokens
from lucid_jax.decode.sampling import Sampling
from lucid_jax.decode.speculation_loop import (
    SpeculationLoop,
    SpeculationSetup,
    decode_rounds,
    start_rounds,
)
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


def speculate(
    model: LanguageModel,
    prompts: ArrayLike | Sequence[Sequence[int]],
    *,
    draft: LanguageModel | NGram | Tree,
    max_new_tokens: int,
    draft_tokens: int = 4,
    cache: LayerSpec | Sequence[LayerSpec] | None = None,
    draft_cache: LayerSpec | Sequence[LayerSpec] | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop_tokens: Sequence[int] = (),
    prefill_chunk: int = 512,
    sharding: PartitionSpec | NamedSharding | None = None,
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
        sharding: as for `generate`, of both caches.

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
    options = DecodeOptions.of(
        max_new_tokens=max_new_tokens,
        cache=cache,
        sampling=sampling,
        seed=seed,
        stop_tokens=stop_tokens,
        prefill_chunk=prefill_chunk,
        sharding=sharding,
    )
    drafter, draft_model, draft_params = _drafter(model, draft, draft_tokens, options.sampling)
    if draft_model is None and draft_cache is not None:
        raise ValueError("NGram() has no model, so no draft_cache; leave it out")
    tokens, lengths = pad_prompts(prompts, model.config.vocab_size)
    spare = 0 if drafter.tree is None else drafter.tree.nodes - drafter.tree.depth

    def prefilled(
        one: LanguageModel, structure: ModelStructure, params: Any, spec: Any, name: str
    ) -> tuple[jax.Array, CacheState]:
        own = dataclasses.replace(options, cache=spec)
        state, room = open_cache(one, own, lengths, spare=spare, slack=drafter.width)
        _check_can_take_back(state, drafter, name)
        return prefill_prompts(
            structure, params, state, tokens, lengths, options.prefill_chunk, room
        )

    structure, params = split(model)
    last, state = prefilled(model, structure, params, cache, "cache")
    draft_state = None
    if draft_model is not None and isinstance(drafter, ModelDrafter | TreeDrafter):
        _, draft_state = prefilled(
            draft_model, drafter.structure, draft_params, draft_cache, "draft_cache"
        )
    setup = SpeculationSetup(structure, drafter, options.sampling, options.stops)
    need = tokens.shape[1] + options.max_new_tokens - 1 + spare
    text = Text(
        history=_with_room_for(tokens, need),
        filled=lengths,
        left=np.full_like(lengths, options.max_new_tokens),
        seen=seen_tokens(tokens, lengths, model, options.sampling),
    )
    loop = start_rounds(
        setup, params, (state, draft_state), text, last, jax.random.key(options.seed)
    )
    return _result(_finished(setup, (params, draft_params), loop, need), lengths, max_new_tokens)


def _finished(
    setup: SpeculationSetup, params: Any, loop: SpeculationLoop, need: int
) -> SpeculationLoop:
    """Goes on until all rows are done; caches that can grow do so between calls."""
    while not bool(np.all(loop.done)):
        loop, stop_at = _grown(loop, need, setup.drafter.width)
        loop = decode_rounds(setup, params, loop, stop_at)
        for one in (loop.cache, loop.draft_cache):
            if one is not None:
                introspection.check_overflow(one)
    return loop


def _drafter(
    model: LanguageModel, draft: Any, draft_tokens: int, sampling: Sampling
) -> tuple[Drafter, LanguageModel | None, Any]:
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
    structure, params = split(draft_model)
    if not isinstance(draft, Tree):
        return ModelDrafter(structure, width), draft_model, params
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
    return TreeDrafter(structure, tree), draft_model, params


def _check_can_take_back(state: CacheState, drafter: Drafter, name: str) -> None:
    if drafter.tree is not None:
        check_tree_layers(state)
        sizes = {layer.capacity for layer in state.layers}
        if len(sizes) > 1:
            raise ValueError(
                f"a tree of drafts needs layers of one capacity, got {sorted(sizes)} in {name}="
            )
        return
    for stored, layer in zip(state.each_stack, state.layers, strict=True):
        index = state.owners[stored[0]]
        if layer.lookback is not None and layer.lookback < drafter.width:
            raise ValueError(
                f"layer {index} of {name}= is {layer.spec}, which can take back {layer.lookback} "
                f"tokens, but up to {drafter.width} drafts may be rejected; give Sliding "
                f"slack={drafter.width} (KIVI residual={drafter.width}), or lower draft_tokens"
            )


def _with_room_for(tokens: np.ndarray, need: int) -> np.ndarray:
    """Prompts with room for new tokens: as the default cache has, so that few shapes are compiled."""
    rows, longest = tokens.shape
    # One more, as the last token is in no cache.
    history = np.zeros((rows, room_for(need) + 1), np.int32)
    history[:, :longest] = tokens
    return history


def _grown(loop: SpeculationLoop, need: int, width: int) -> tuple[SpeculationLoop, np.int32]:
    """The loop with room for a round at least, and up to how many tokens a row may start one."""

    def bound(loop: SpeculationLoop) -> int:
        states = [state for state in (loop.cache, loop.draft_cache) if state is not None]
        room = [layer.capacity for s in states for layer in s.layers if layer.bounded]
        smallest = min(room, default=need)
        return np.iinfo(np.int32).max if smallest >= need else smallest - width

    longest = int(np.max(np.where(loop.done, 0, loop.filled)))
    if longest > bound(loop):
        # No more than rows can come to need: layers of fixed size beside them have just that.
        slots = min(longest + width, need)
        grown = [
            None if state is None else verbs.grow(state, slots)
            for state in (loop.cache, loop.draft_cache)
        ]
        loop = loop.replace(cache=grown[0], draft_cache=grown[1])
    return loop, np.int32(bound(loop))


def _result(loop: SpeculationLoop, lengths: np.ndarray, max_new_tokens: int) -> Speculation:
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
