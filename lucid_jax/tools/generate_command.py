"""`lucid-jax generate`: a prompt continued, its text streamed, and what that took."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from lucid_jax.cache.introspection import capacity, nbytes
from lucid_jax.cache.layouts.base import LayerSpec
from lucid_jax.cache.verbs import grow
from lucid_jax.decode import NGram, speculate, stream, stream_uncached
from lucid_jax.decode.prefill import room_for
from lucid_jax.decode.storage import empty_cache
from lucid_jax.models.checkpoint import embedded_draft_path, load_model
from lucid_jax.models.transformer import Transformer
from lucid_jax.tools.cache_options import check_words, name_of, sampling_of, slides, spec_of

if TYPE_CHECKING:
    from lucid_jax.models.tokenizer import Tokenizer  # needs the text extra

Spec = LayerSpec | list[LayerSpec]


@dataclasses.dataclass(frozen=True)
class _Request:
    """A prompt, what continues it, and how."""

    model: Transformer
    tokenizer: Tokenizer
    text: str  # what is printed before the answer
    prompt: list[int]
    spec: Spec  # the cache
    chosen: bool  # whether the options say so, rather than leave it to the decoders
    decoding: dict[str, Any]  # what all decoders are asked for


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of the compiled loop."""

    tokens: int
    seconds: float
    compiled: bool


def generate_command(options: argparse.Namespace) -> None:
    """Continues a prompt, with drafts, with a cache or without."""
    _check_together(options)
    request = _request(options)
    if options.draft:
        _with_drafts(options, request)
        return

    def pieces() -> Iterator[list[list[int]]]:
        if options.no_cache:
            return stream_uncached(request.model, [request.prompt], **request.decoding)
        cache = request.spec if request.chosen else None
        return stream(request.model, [request.prompt], cache=cache, **request.decoding)

    warm_up = pieces()
    for _ in range(2):  # compiles prefill and loop, so that the times below are of running them
        next(warm_up, None)
    del warm_up
    _print_note(options, request)  # after all that can fail, which is one line
    calls = _print_text(request, pieces)
    _print_speed(request, calls)
    _print_cache(options, request, len(request.prompt) + sum(call.tokens for call in calls) - 1)


def _check_together(options: argparse.Namespace) -> None:
    """Refuses options that do not go with each other."""
    if options.no_cache and options.draft:
        raise ValueError("--draft needs a cache; leave out --no-cache")
    if options.no_cache and (options.cache, options.codec) != ("auto", "none"):
        raise ValueError("--no-cache recomputes everything; leave out --cache and --codec")
    if options.capacity is not None and (
        options.cache not in ("auto", "static") or options.no_cache
    ):
        raise ValueError("--capacity is for --cache static; leave it out")


def _request(options: argparse.Namespace) -> _Request:
    check_words(options)  # a bad word should not wait for a model
    model, tokenizer = load_model(
        options.checkpoint, jnp.dtype(options.dtype), rope_by_place=options.rope_by_place
    )
    if options.chat:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": options.prompt}])
    else:
        prompt = tokenizer.encode_prompt(options.prompt)
    need = len(prompt) + options.max_new_tokens - 1
    slots = room_for(need) if options.capacity is None else options.capacity
    return _Request(
        model=model,
        tokenizer=tokenizer,
        text="" if options.chat else options.prompt,
        prompt=prompt,
        spec=spec_of(options, model, need, slots),
        # What the decoders choose themselves, they open in steps that most prompts share.
        chosen=(options.cache, options.codec, options.capacity) != ("auto", "none", None),
        decoding={
            "max_new_tokens": options.max_new_tokens,
            "sampling": sampling_of(options),
            "seed": options.seed,
            "stop_tokens": model.config.eos_token_ids,
        },
    )


def _print_note(options: argparse.Namespace, request: _Request) -> None:
    """Says on stderr if the text goes beyond what the model was trained for."""
    need = len(request.prompt) + options.max_new_tokens - 1
    trained = request.model.config.max_position_embeddings
    if need > trained and not (options.rope_by_place and slides(request.spec)):
        print(
            f"note: {need} positions are more than the {trained} this model was trained for",
            file=sys.stderr,
        )


def _print_text(request: _Request, pieces: Callable[[], Iterator[list[list[int]]]]) -> list[_Call]:
    """Prints the prompt and what follows, as it comes."""
    print(request.text, end="", flush=True)
    text = request.tokenizer.stream(after=request.prompt)
    calls = []
    with _CompileCounter() as compiles:
        before, started = compiles.count, time.perf_counter()
        for (new,) in pieces():
            seconds = time.perf_counter() - started
            calls.append(_Call(len(new), seconds, compiles.count > before))
            print("".join(text.push(token) for token in new), end="", flush=True)
            before, started = compiles.count, time.perf_counter()
    print(text.flush(), flush=True)
    return calls


def _print_speed(request: _Request, calls: list[_Call]) -> None:
    first, *decoding = calls
    steady = [call for call in decoding if not call.compiled]
    tokens, seconds = sum(c.tokens for c in steady), sum(c.seconds for c in steady)
    length = len(request.prompt)
    print(f"\nprefill: {length} tokens at {length / first.seconds:,.0f} tokens/s")
    if tokens:
        print(f"decode:  {tokens} tokens at {tokens / seconds:,.0f} tokens/s")
    else:
        print("decode:  no further token")


def _print_cache(options: argparse.Namespace, request: _Request, stored: int) -> None:
    if options.no_cache:
        print("cache:   none; every token recomputed all before it")
        return
    cache = grow(empty_cache(request.model, request.spec, 1), stored)
    codec = "" if options.codec == "none" else f" as {options.codec}"
    slots = sorted({capacity(cache, i) for i in range(cache.num_layers)}, reverse=True)
    used = " and ".join(f"{min(stored, n)} of {n}" for n in slots)
    name = name_of(options, request.spec)
    print(f"cache:   {name}, {used} slots used{codec}, {nbytes(cache):,} bytes")


def _with_drafts(options: argparse.Namespace, request: _Request) -> None:
    """Decodes speculatively, and prints the text at once and how the drafts fared."""
    if options.draft == "ngram":
        draft: Transformer | NGram = NGram()
    else:
        folder = embedded_draft_path() if options.draft == "embedded" else options.draft
        draft, _ = load_model(folder, jnp.dtype(options.dtype))
    drafts = 3  # on CPU a chunk of six costs twice what one token does, one of four less
    decode = partial(
        speculate, request.model, [request.prompt], draft=draft, draft_tokens=drafts,
        cache=_with_slack(request.spec, drafts) if request.chosen else None, **request.decoding,
    )  # fmt: skip
    decode()  # compiles
    _print_note(options, request)
    started = time.perf_counter()
    result = decode()
    seconds = time.perf_counter() - started
    (new,) = result.rows()
    text = request.tokenizer.stream(after=request.prompt)
    continued = "".join([*map(text.push, new), text.flush()])
    print(f"{request.text}{continued}\n")
    print(f"decode:  {len(new)} tokens at {len(new) / seconds:,.0f} tokens/s, prefill included")
    print(
        f"drafts:  {result.accepted[0]} of {result.proposed[0]} accepted "
        f"({100 * result.acceptance:.0f}%), {result.rounds[0]} passes of the model"
    )


def _with_slack(spec: Spec, slack: int) -> Spec:
    """A spec whose windows can take so many tokens back."""
    if isinstance(spec, list):
        return [one if one.bounded else one.but(slack=slack) for one in spec]
    return spec.but(slack=slack) if slides(spec) else spec


class _CompileCounter:
    """Counts the programs XLA compiles while entered."""

    def __init__(self) -> None:
        self.count = 0

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"

    def __enter__(self) -> _CompileCounter:
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *exc: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)
