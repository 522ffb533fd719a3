"""`PromptCache`: prompts that begin alike are prefilled once.

A trie on the host. A node is a chunk of tokens that some prompt had next, and holds what they added
to the cache, on the host. (After RadixAttention, Zheng et al. 2024, and vLLM's prefix caching.)
"""

from __future__ import annotations

import dataclasses
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from lucid_jax.cache import verbs
from lucid_jax.cache.argument_checks import check_count
from lucid_jax.cache.cut_and_join import cut, join
from lucid_jax.cache.layouts.base import LayerSpec
from lucid_jax.cache.rows import insert
from lucid_jax.cache.sharding import of_one_row
from lucid_jax.cache.state import CacheState
from lucid_jax.decode import prompt_files
from lucid_jax.decode.language_model import LanguageModel, ModelStructure, split
from lucid_jax.decode.options import DecodeOptions
from lucid_jax.decode.prefill import open_cache, prefill
from lucid_jax.decode.prompt_chunks import ROOT, Content, name_of
from lucid_jax.decode.prompts import pad_prompts
from lucid_jax.decode.storage import empty_cache


@dataclasses.dataclass(frozen=True)
class Prefilled:
    """What `PromptCache.prefill` returns.

    Attributes:
        cache: a ragged state of B rows, holding the prompts.
        hidden: (B, E), the hidden state of each prompt's last token: `model.logits` takes
            `hidden[:, None]`.
        reused: of each prompt, how many tokens were found and not computed again.
    """

    cache: CacheState
    hidden: jax.Array
    reused: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Stats:
    """What a prompt cache has done so far.

    Attributes:
        prompts: prompts prefilled.
        hits: those of which something was found.
        reused: prompt tokens that were found.
        computed: prompt tokens that went through the model.
        evicted: chunks dropped to keep within `max_bytes`.
    """

    prompts: int = 0
    hits: int = 0
    reused: int = 0
    computed: int = 0
    evicted: int = 0


@dataclasses.dataclass(frozen=True)
class _Node:
    """A node of the trie."""

    before: str  # the name of its parent
    content: Content


class PromptCache:
    """Remembers what prompts left in the cache, so that the next prompt that begins alike reuses it.

    The longest stored beginning is reused, in whole chunks; the rest is prefilled chunk by chunk and
    remembered. A beginning that many prompts share is stored once, whatever the layout and the codec.
    When `max_bytes` are full, the chunks not used for longest go, ends of prompts before their
    beginnings.

    Reuse is exact: chunks are cut at multiples of `chunk` from the first token, so the same programs
    compute the same numbers, and what is reused is bit for bit what would be computed. For the same
    reason tokens that decoding wrote are not taken in.

    Not for several threads at once.

    Example:
        >>> from flax import nnx
        >>> import lucid_jax as lj
        >>> from lucid_jax.models import ModelConfig, Transformer
        >>> config = ModelConfig(vocab_size=64, hidden_size=32, num_attention_heads=2)
        >>> model = Transformer(config, rngs=nnx.Rngs(0))
        >>> prompts = lj.PromptCache(model, lj.Static(64), max_bytes=1 << 20, chunk=8)
        >>> system = list(range(1, 21))
        >>> for question in ([30, 31], [40, 41, 42]):
        ...     result = lj.generate(
        ...         model, [system + question], max_new_tokens=4, prompt_cache=prompts
        ...     )
        >>> prompts.stats
        Stats(prompts=2, hits=1, reused=16, computed=29, evicted=0)
    """

    def __init__(
        self,
        model: LanguageModel,
        spec: LayerSpec | Sequence[LayerSpec],
        *,
        max_bytes: int,
        chunk: int = 64,
    ) -> None:
        """An empty prompt cache.

        Args:
            model: whose prompts they are. Its weights must not change afterwards.
            spec: of the cache that prompts are prefilled into, or one per layer. Of a layer that
                drops tokens segments are smallest with `chunk` up to its capacity.
            max_bytes: the most that is kept on the host, in bytes of arrays. A longer prompt works,
                and its beginning is kept.
            chunk: tokens of a node. Smaller chunks reuse more of a beginning that two prompts share,
                larger ones prefill faster.

        Raises:
            ValueError: for a chunk below 1 or a negative `max_bytes`, or a spec the model cannot take.
        """
        self.max_bytes = check_count(max_bytes, "max_bytes")
        self.chunk = check_count(chunk, "chunk", 1)
        # Not the caller's list, which may change.
        self.spec = tuple(spec) if isinstance(spec, Sequence) else spec
        self._model = model
        self._structure, self._params = split(model)
        self._weights = jax.tree.leaves(self._params)  # as they are now: the model may get others
        self._stats = Stats()
        self._nbytes = 0
        # The trie, by name, the least recently used first. A node is used whenever one behind it is,
        # and comes after it: so the first has no children, and no node outlives its parent.
        self._nodes: OrderedDict[str, _Node] = OrderedDict()

    def __repr__(self) -> str:
        """How full it is."""
        return (
            f"PromptCache({self.spec}, chunk={self.chunk}, {len(self)} chunks, "
            f"{self._nbytes} of {self.max_bytes} bytes)"
        )

    def __len__(self) -> int:
        """Chunks stored."""
        return len(self._nodes)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays stored, on the host."""
        return self._nbytes

    @property
    def stats(self) -> Stats:
        """What it has done so far."""
        return self._stats

    def clear(self) -> None:
        """Forgets all prompts; `stats` go on."""
        self._nodes.clear()
        self._nbytes = 0

    def lookup(self, prompt: Sequence[int]) -> int:
        """How many tokens of a prompt's beginning are stored. Does not count as use.

        Raises:
            ValueError: for an empty prompt, or an id outside the vocabulary.
        """
        tokens, _ = pad_prompts([prompt], self._model.config.vocab_size)
        return self.chunk * len(self._find(self._names(tokens[0])))

    def prefill(
        self,
        prompts: ArrayLike | Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 1,
        model: LanguageModel | None = None,
        sharding: PartitionSpec | NamedSharding | None = None,
    ) -> Prefilled:
        """Puts prompts into a cache, computing only what is not stored; and stores that.

        Prompts go one after another, so those of one batch share their beginnings too.

        Args:
            prompts: token ids, one list per row, of any lengths; or an int array (B, T).
            max_new_tokens: as `generate` will be asked for: they must fit too.
            model: that will go on from there, to be sure that it is the same.
            sharding: of the cache, as for `init_cache`. What is remembered is whole, on the host, and
                serves other shardings too; their sums then may differ in the last bits.

        Raises:
            ValueError: for an empty prompt, an id outside the vocabulary, what does not fit the cache,
                or another model, or weights that changed since this prompt cache was made.
        """
        return self.prefill_for(
            *split(self._model if model is None else model), prompts, max_new_tokens, sharding
        )

    def prefill_for(
        self,
        structure: ModelStructure,
        params: Any,
        prompts: ArrayLike | Sequence[Sequence[int]],
        max_new_tokens: int,
        sharding: PartitionSpec | NamedSharding | None = None,
    ) -> Prefilled:
        """`prefill` for a model that was `split` already: hashing it again would take longer."""
        tokens, lengths = pad_prompts(prompts, self._model.config.vocab_size)
        self._check_model(structure, params)
        unplaced = DecodeOptions.of(max_new_tokens=max_new_tokens, cache=self.spec)
        options = dataclasses.replace(unplaced, sharding=sharding)
        # Refuses what does not fit, before anything is computed.
        jax.eval_shape(lambda: open_cache(self._model, unplaced, lengths))
        rows = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
        if len(rows) == 1:
            reused, hidden, state = self._prefill_row(rows[0], sharding)
            return Prefilled(state, hidden, (reused,))
        (state, _), lasts, found = open_cache(self._model, options, lengths), [], []
        for index, row in enumerate(rows):
            reused, hidden, single = self._prefill_row(row, of_one_row(sharding))
            state = insert(state, np.array([index]), single, donate=True)
            lasts.append(hidden)
            found.append(reused)
        return Prefilled(state, jnp.concatenate(lasts), tuple(found))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes all chunks to a folder, which is made if missing; those there already stay.

        A save that fails leaves what was saved before.

        Raises:
            CacheFileError: if files cannot hold caches of this spec.
            OSError: if a file cannot be written.
        """
        nodes = [(name, node.before, node.content) for name, node in self._nodes.items()]
        prompt_files.write(Path(folder), self._model, self.spec, self.chunk, nodes)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        model: LanguageModel,
        spec: LayerSpec | Sequence[LayerSpec],
        *,
        max_bytes: int,
    ) -> PromptCache:
        """Reads what `save` wrote; where `max_bytes` are less, what was used latest.

        Args:
            folder: what `save` was given.
            model: the model it was saved for. Its configuration and a checksum of each weight are
                compared.
            spec: the spec it was saved with.
            max_bytes: as for a new one.

        Raises:
            CacheFileError: if it is of another model or spec, or damaged.
            FileNotFoundError: if there is none.
        """
        chunk, nodes = prompt_files.read(Path(folder), model, spec)
        loaded = cls(model, spec, max_bytes=max_bytes, chunk=chunk)
        for name, before, content in nodes:
            if loaded._nbytes + _nbytes(content) > loaded.max_bytes:
                break
            loaded._nodes[name] = _Node(before, content)
            loaded._nodes.move_to_end(name, last=False)
            loaded._nbytes += _nbytes(content)
        return loaded

    def _check_model(self, structure: ModelStructure, params: Any) -> None:
        """Raises unless a model has the very weights that this prompt cache was made for."""
        ours, theirs = self._weights, jax.tree.leaves(params)
        same = len(ours) == len(theirs) and all(a is b for a, b in zip(ours, theirs, strict=True))
        if not same or structure != self._structure:
            raise ValueError(
                "this prompt cache holds what another model computed, or its weights have changed "
                "since; make a PromptCache(model, ...) for this one"
            )

    def _prefill_row(self, tokens: np.ndarray, sharding: Any) -> tuple[int, jax.Array, CacheState]:
        """Tokens found, the last one's hidden state (1, E), and a state of one row."""
        names = list(self._names(tokens))
        path = self._find(names)
        self._use(path)
        found = [self._nodes[name].content for name in path]
        begin = self.chunk * len(path)
        state = empty_cache(self._model, self.spec, 1, sharding=sharding)
        state = verbs.grow(state, max(begin, 1))
        for content in found:
            state = join(state, content.segments)
        hidden = jnp.asarray(found[-1].hidden) if found else None

        waiting: Any = None  # what to store, one chunk behind, so that the device need not wait
        for start in range(begin, len(tokens), self.chunk):
            part = tokens[start : start + self.chunk]
            # By and by, so that a chunk's program does not depend on what comes after it.
            state = verbs.grow(state, start + len(part))
            length = np.array([len(part)], np.int32)
            hidden, state = prefill(
                self._structure, self._params, state, part[None], length, self.chunk
            )
            self._add(path, names, waiting)
            full = len(part) == self.chunk
            waiting = Content(part, hidden, cut(state, self.chunk)) if full else None
        self._add(path, names, waiting)

        assert hidden is not None
        computed = len(tokens) - begin
        self._count(prompts=1, hits=int(begin > 0), reused=begin, computed=computed)
        return begin, hidden, state

    # --- the trie ------------------------------------------------------------------------------

    def _names(self, tokens: np.ndarray) -> Iterator[str]:
        """The name of each whole chunk: it stands for all tokens up to the chunk's end."""
        name = ROOT
        for begin in range(0, len(tokens) // self.chunk * self.chunk, self.chunk):
            name = name_of(name, tokens[begin : begin + self.chunk])
            yield name

    def _find(self, names: Iterable[str]) -> list[str]:
        """The longest stored beginning of a prompt: a path of nodes from the root."""
        return list(takewhile(self._nodes.__contains__, names))

    def _use(self, path: Sequence[str]) -> None:
        for name in reversed(path):
            self._nodes.move_to_end(name)

    def _add(self, path: list[str], names: Sequence[str], content: Content | None) -> None:
        """Stores the prompt's next chunk, which makes the path longer, if there is room."""
        if content is None:
            return
        nbytes = _nbytes(content)
        # Chunks are all of one size: where there is no room for one, there is none for those after it.
        if (len(path) + 1) * nbytes > self.max_bytes:
            return
        while self._nbytes + nbytes > self.max_bytes:
            _, oldest = self._nodes.popitem(last=False)
            self._nbytes -= _nbytes(oldest.content)
            self._count(evicted=1)
        before, name = path[-1] if path else ROOT, names[len(path)]
        # Copies: a view into a buffer would keep it alive.
        self._nodes[name] = _Node(before, jax.tree.map(np.array, content))
        self._nbytes += nbytes
        path.append(name)
        self._use(path)

    def _count(self, **more: int) -> None:
        counts = {name: getattr(self._stats, name) + n for name, n in more.items()}
        self._stats = dataclasses.replace(self._stats, **counts)


def _nbytes(content: Content) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(content))
