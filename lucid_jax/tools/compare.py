"""`lucid-jax compare`: one prompt decoded with several caches, side by side.

What each cache costs (tokens a second, bytes) and what it changes: the first token that differs from
the reference's, and the texts around it.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from rich.console import Console

from lucid_jax.cache.introspection import nbytes
from lucid_jax.cache.layouts.base import LayerSpec
from lucid_jax.cache.shown import count_of, size_of
from lucid_jax.decode import Sampling, generate, stream
from lucid_jax.models.checkpoint import load_model
from lucid_jax.tools.specs import parse_spec
from lucid_jax.tools.tables import Printed, Sheet

_CONTEXT = 32  # characters shown before and after the first difference


@dataclasses.dataclass(frozen=True)
class CacheRun:
    """What one cache gave of a prompt.

    Attributes:
        name: of the cache.
        tokens: the new tokens, the stop token included.
        nbytes: of the cache at the end.
        decode_seconds: of all tokens after the first, compiling excluded; the best of several runs.
    """

    name: str
    tokens: list[int]
    nbytes: int
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Of decoding; None if there was only one token."""
        return (len(self.tokens) - 1) / self.decode_seconds if len(self.tokens) > 1 else None

    def agreement(self, reference: CacheRun) -> int:
        """How many tokens come before the first that differs from the reference's."""
        pairs = zip(self.tokens, reference.tokens, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        return min(len(self.tokens), len(reference.tokens)) if same is None else same


@dataclasses.dataclass(frozen=True)
class Comparison(Printed):
    """Runs of one prompt, the reference first; prints as a table, in text, rich and notebooks.

    Attributes:
        runs: one for each cache.
        tokenizer: turns their tokens into text.
        prompt_tokens: how many tokens the prompt had.
    """

    runs: list[CacheRun]
    tokenizer: Any
    prompt_tokens: int

    def differences(self) -> list[str]:
        """Of each run that differs, where, and a few words of both texts around it."""
        reference, *others = self.runs
        lines = []
        for run in others:
            same = run.agreement(reference)
            if run.tokens == reference.tokens:
                continue
            shared = _line(self.tokenizer.decode(reference.tokens[:same]))[-_CONTEXT:]
            theirs, ours = (
                self._onwards(tokens, same) for tokens in (reference.tokens, run.tokens)
            )
            lines.append(f"{run.name} differs after {count_of(same, 'token')}: ...{shared}")
            lines.append(f"    {reference.name}: {theirs}")
            lines.append(f"    {run.name}: {ours}")
        return lines

    def _onwards(self, tokens: Sequence[int], start: int) -> str:
        # Decoded as a whole: a token may hold a part of a character.
        before, text = (self.tokenizer.decode(part) for part in (tokens[:start], tokens))
        if start == len(tokens):
            return "(ends)"
        return _line(text[len(before) :])[:_CONTEXT] or "(stops)"

    def _sheet(self) -> Sheet:
        reference = self.runs[0]
        total = len(reference.tokens)
        rows = []
        for run in self.runs:
            speed = run.tokens_per_second
            agreement = f"{run.agreement(reference)} of {total}"
            rows.append(
                (
                    run.name,
                    "-" if speed is None else f"{speed:,.0f}",
                    size_of(run.nbytes),
                    "reference" if run is reference else agreement,
                )
            )
        differences = self.differences()
        if not differences and len(self.runs) > 1:
            differences = ["all caches gave the same tokens"]
        return Sheet(
            title=f"{count_of(self.prompt_tokens, 'token')} of prompt, {total} new",
            header=("cache", "decode tokens/s", "cache size", "tokens as the reference"),
            rows=rows,
            names=1,
            notes=tuple(differences),
        )


def default_caches(need: int) -> dict[str, LayerSpec]:
    """What is compared unless one says otherwise: the codecs, and a window of half of the text.

    Example:
        >>> list(default_caches(64))
        ['static', 'static/int8', 'static/fp8', 'static/int4', 'static/kivi', 'sliding:32']
    """
    codecs = ("int8", "fp8", "int4", "kivi")
    names = ["static", *(f"static/{codec}" for codec in codecs), f"sliding:{max(1, need // 2)}"]
    return parse_caches(",".join(names), need)


def parse_caches(text: str, need: int) -> dict[str, LayerSpec]:
    """Specs by their words: LAYOUT or LAYOUT/CODEC, as `parse_spec` takes them, with commas between.

    Args:
        text: such as "static,static/int8,sliding:64+4/int4".
        need: slots of a `static` without a number.

    Raises:
        ValueError: for a word that names nothing, or one that comes twice.

    Example:
        >>> list(parse_caches("static/none, sliding:8/int8", 20))
        ['static/none', 'sliding:8/int8']
    """
    caches: dict[str, LayerSpec] = {}
    for word in (word.strip() for word in text.split(",")):
        if word in caches:
            raise ValueError(f"{word} is there twice; leave one out")
        layout, _, codec = word.partition("/")
        caches[word] = parse_spec(layout, codec or "none", capacity=need)
    return caches


def compare(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    caches: Mapping[str, LayerSpec],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    repeats: int = 3,
) -> Comparison:
    """Decodes a prompt with each cache; the first is the reference.

    Each is run once to compile; then all in turns, so that whatever else the machine does falls on
    all of them.

    Args:
        model: as for `generate`.
        tokenizer: has `decode(ids)`.
        prompt: token ids.
        caches: specs by name.
        max_new_tokens: as for `generate`.
        sampling: greedy by default.
        seed: as for `generate`.
        repeats: timed runs of each; the fastest counts.

    Raises:
        ValueError: for no caches, or what `generate` refuses.
    """
    if not caches:
        raise ValueError("compare needs at least one cache, got none")
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "sampling": sampling,
        "seed": seed,
        "stop_tokens": model.config.eos_token_ids,
    }
    results = {
        name: generate(model, [prompt], cache=spec, **options) for name, spec in caches.items()
    }
    runs = {
        name: partial(
            stream, model, [prompt], cache=spec, tokens_per_call=max_new_tokens, **options
        )
        for name, spec in caches.items()
    }
    best = dict.fromkeys(caches, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            pieces = run()
            next(pieces)  # prefill and the first token
            started = time.perf_counter()
            for _ in pieces:
                pass
            best[name] = min(best[name], time.perf_counter() - started)
    return Comparison(
        runs=[
            CacheRun(name, result.rows()[0], _size(result.cache), best[name])
            for name, result in results.items()
        ],
        tokenizer=tokenizer,
        prompt_tokens=len(prompt),
    )


def compare_command(options: argparse.Namespace) -> None:
    """`compare` for the command line: prints the table."""
    sampling = Sampling(temperature=options.temperature)
    if options.caches is not None:
        parse_caches(options.caches, 1)  # a bad word should not wait for a model
    model, tokenizer = load_model(options.checkpoint, jnp.dtype(options.dtype))
    prompt = tokenizer.encode_prompt(options.prompt)
    need = len(prompt) + options.max_new_tokens - 1
    specs = default_caches(need) if options.caches is None else parse_caches(options.caches, need)
    comparison = compare(
        model, tokenizer, prompt, specs,
        max_new_tokens=options.max_new_tokens, sampling=sampling, seed=options.seed,
    )  # fmt: skip
    sheet, console = comparison._sheet(), Console()
    console.print(dataclasses.replace(sheet, notes=()).rich())
    for line in sheet.notes:  # not in the table, which would break them at its width
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _size(cache: Any) -> int:
    assert cache is not None
    return nbytes(cache)


def _line(text: str) -> str:
    """Text on one line."""
    return text.replace("\n", "\\n").replace("\r", "\\r")
