"""The command line: `lucid-jax generate`, `compare`, `eval` and `bench`.

Bad input ends in one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import jax
import jax.numpy as jnp

from lucid_jax.cache.ring import Sliding
from lucid_jax.cache.state import capacity, grow, nbytes
from lucid_jax.decode import NGram, Sampling, speculate, stream, stream_uncached
from lucid_jax.specs import CODECS, LAYOUTS, parse_codec, parse_spec

if TYPE_CHECKING:
    from lucid_jax.cache.layer import LayerSpec
    from lucid_jax.models.corpus import Document
    from lucid_jax.models.transformer import Transformer


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    parser = _Parser(prog="lucid-jax", description="KV caches for JAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(commands.add_parser("generate", help="continue a prompt, streaming the text"))
    _add_compare(
        commands.add_parser("compare", help="one prompt with several caches, side by side")
    )
    _add_eval(commands.add_parser("eval", help="bits per byte of text under a given cache"))
    bench = commands.add_parser("bench", help="measure the cache on this machine")
    bench.add_argument("--json", action="store_true", help="print JSON instead of a table")
    bench.add_argument(
        "--quick", action="store_true", help="smaller sizes and fewer repeats, to see that it runs"
    )
    options = parser.parse_args(argv)
    try:
        if options.command == "bench":
            from lucid_jax.bench import run_bench

            run_bench(as_json=options.json, quick=options.quick)
            return 0
        run = {"generate": _generate, "compare": _compare, "eval": _eval}[options.command]
        return run(options)
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"lucid-jax {options.command}: error: {message}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name != "tokenizers":
            raise
        print(
            f"lucid-jax {options.command}: error: text needs the tokenizers package; "
            "install it with: pip install 'lucid-jax[text]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue")
    _add_cache(parser)
    parser.add_argument(
        "--capacity", type=int, metavar="N",
        help="slots of the static cache; by default just what the prompt and new tokens need",
    )  # fmt: skip
    parser.add_argument(
        "--draft", metavar="DRAFT",
        help="decode speculatively: ngram, embedded (the shipped model's draft) or a model folder",
    )  # fmt: skip
    parser.add_argument("--no-cache", action="store_true", help="recompute everything, to compare")
    parser.add_argument("--max-new-tokens", type=int, default=120, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="0 keeps all tokens")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P")
    parser.add_argument("--repetition-penalty", type=float, default=1.1, metavar="X")
    parser.add_argument("--seed", type=int, default=0)
    _add_model(parser)


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache", default="auto", metavar="LAYOUT",
        help=f"{LAYOUTS}; default: what the model asks for, rings for its layers with a window and "
        "static for the others",
    )  # fmt: skip
    parser.add_argument(
        "--codec", default="none", metavar="CODEC", help=f"{CODECS}; default: %(default)s"
    )
    parser.add_argument(
        "--rope-by-place", action="store_true",
        help="rotary positions count places in the cache: with a sliding one, text of any length "
        "keeps to the positions that the model was trained for",
    )  # fmt: skip


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", metavar="DIR",
        help="model folder as from the Hugging Face hub (config.json, *.safetensors, tokenizer.json); "
        "by default the small model that ships with the package",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue")
    parser.add_argument(
        "--caches", metavar="LIST",
        help="LAYOUT or LAYOUT/CODEC with commas between, the reference first, such as "
        "static,static/int8,sliding:64+4/int4; by default all codecs and a window of half the text. "
        f"LAYOUT: {LAYOUTS}. CODEC: {CODECS}",
    )  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=120, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--seed", type=int, default=0)
    _add_model(parser)


def _add_eval(parser: argparse.ArgumentParser) -> None:
    _add_cache(parser)
    parser.add_argument(
        "--context", type=int, metavar="N",
        help="tokens of a window of text; by default what the model was trained for",
    )  # fmt: skip
    parser.add_argument(
        "--text", metavar="FILE",
        help="UTF-8 text to score; by default the documentation held out of the shipped model",
    )  # fmt: skip
    parser.add_argument("--bytes", type=int, metavar="N", help="score only the first N bytes")
    _add_model(parser)


def _generate(options: argparse.Namespace) -> int:
    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {options.max_new_tokens}")
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed must be in [0, 2**63), got {options.seed}")
    if options.no_cache and options.draft:
        raise ValueError("--draft needs a cache; leave out --no-cache")
    if options.no_cache and (options.cache, options.codec) != ("auto", "none"):
        raise ValueError("--no-cache recomputes everything; leave out --cache and --codec")
    if options.capacity is not None and (
        options.cache not in ("auto", "static") or options.no_cache
    ):
        raise ValueError("--capacity is for --cache static; leave it out")
    sampling = Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
    )
    from lucid_jax.models.checkpoint import load_model

    _check_words(options)  # a bad word should not wait for a model
    model, tokenizer = load_model(
        options.checkpoint, jnp.dtype(options.dtype), rope_by_place=options.rope_by_place
    )
    prompt = tokenizer.encode_prompt(options.prompt)
    need = len(prompt) + options.max_new_tokens - 1
    trained = model.config.max_position_embeddings
    slots = need if options.capacity is None else options.capacity
    spec = _spec(options, model, slots)
    if need > trained and not (options.rope_by_place and isinstance(spec, Sliding)):
        print(
            f"note: {need} positions are more than the {trained} this model was trained for",
            file=sys.stderr,
        )

    if options.draft:
        return _generate_with_drafts(options, model, tokenizer, prompt, spec, sampling)

    def pieces() -> Iterator[list[list[int]]]:
        common = {
            "max_new_tokens": options.max_new_tokens,
            "sampling": sampling,
            "seed": options.seed,
            "stop_tokens": model.config.eos_token_ids,
        }
        if options.no_cache:
            return stream_uncached(model, [prompt], **common)
        return stream(model, [prompt], cache=spec, **common)

    warm_up = pieces()
    for _ in range(2):  # compiles prefill and loop, so that the times below are of running them
        next(warm_up, None)
    del warm_up

    print(options.prompt, end="", flush=True)
    text = tokenizer.stream(after=prompt)
    calls: list[tuple[int, float, bool]] = []  # tokens, seconds, whether something was compiled
    with _CompileCounter() as compiles:
        before, started = compiles.count, time.perf_counter()
        for (new,) in pieces():
            seconds = time.perf_counter() - started
            calls.append((len(new), seconds, compiles.count > before))
            print("".join(text.push(token) for token in new), end="", flush=True)
            before, started = compiles.count, time.perf_counter()
    print(text.flush(), flush=True)

    (_, prefill_seconds, _), *decoding = calls
    steady = [(n, s) for n, s, compiled in decoding if not compiled]
    tokens, seconds = sum(n for n, _ in steady), sum(s for _, s in steady)
    print(f"\nprefill: {len(prompt)} tokens at {len(prompt) / prefill_seconds:,.0f} tokens/s")
    if tokens:
        print(f"decode:  {tokens} tokens at {tokens / seconds:,.0f} tokens/s")
    else:
        print("decode:  no further token")
    if options.no_cache:
        print("cache:   none; every token recomputed all before it")
    else:
        stored = len(prompt) + sum(n for n, _, _ in calls) - 1
        cache = grow(model.init_cache(spec, 1, ragged=True), stored)
        codec = "" if options.codec == "none" else f" as {options.codec}"
        slots = sorted({capacity(cache, i) for i in range(len(cache.layers))}, reverse=True)
        used = " and ".join(f"{min(stored, n)} of {n}" for n in slots)
        print(f"cache:   {_name(options, spec)}, {used} slots used{codec}, {nbytes(cache):,} bytes")
    return 0


def _check_words(options: argparse.Namespace) -> None:
    layout = "static" if options.cache == "auto" else options.cache
    parse_spec(layout, options.codec, capacity=1)


def _spec(
    options: argparse.Namespace, model: Transformer, length: int
) -> LayerSpec | list[LayerSpec]:
    """The cache that the options name, for texts of `length` tokens."""
    if options.cache != "auto":
        return parse_spec(options.cache, options.codec, capacity=length)
    specs = model.cache_spec(length, parse_codec(options.codec))
    return specs[0] if len(set(specs)) == 1 else specs


def _name(options: argparse.Namespace, spec: LayerSpec | list[LayerSpec]) -> str:
    """A spec in words."""
    if options.cache != "auto":
        return options.cache
    specs = spec if isinstance(spec, list) else [spec]
    rings = {one.window for one in specs if isinstance(one, Sliding)}
    names = ["static"] * (not all(isinstance(one, Sliding) for one in specs))
    return " and ".join([*names, *(f"sliding:{window}" for window in rings)])


def _compare(options: argparse.Namespace) -> int:
    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {options.max_new_tokens}")
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed must be in [0, 2**63), got {options.seed}")
    sampling = Sampling(temperature=options.temperature)
    from lucid_jax.compare import parse_caches, run_compare
    from lucid_jax.models.checkpoint import load_model

    if options.caches is not None:
        parse_caches(options.caches, 1)  # a bad word should not wait for a model
    model, tokenizer = load_model(options.checkpoint, jnp.dtype(options.dtype))
    run_compare(
        model, tokenizer, options.prompt, caches=options.caches, sampling=sampling,
        max_new_tokens=options.max_new_tokens, seed=options.seed,
    )  # fmt: skip
    return 0


def _generate_with_drafts(
    options: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    prompt: list[int],
    spec: Any,
    sampling: Sampling,
) -> int:
    from lucid_jax.models.checkpoint import embedded_draft_path, load_model

    if options.draft == "ngram":
        draft: Any = NGram()
    else:
        folder = embedded_draft_path() if options.draft == "embedded" else options.draft
        draft, _ = load_model(folder, jnp.dtype(options.dtype))
    drafts = 3  # on CPU a chunk of six costs twice what one token does, one of four less

    def with_slack(one: LayerSpec) -> LayerSpec:  # so many tokens may be taken back
        return dataclasses.replace(one, slack=drafts) if isinstance(one, Sliding) else one

    spec = [with_slack(one) for one in spec] if isinstance(spec, list) else with_slack(spec)
    run = partial(
        speculate, model, [prompt], draft=draft, draft_tokens=drafts, cache=spec,
        max_new_tokens=options.max_new_tokens, sampling=sampling, seed=options.seed,
        stop_tokens=model.config.eos_token_ids,
    )  # fmt: skip
    run()  # compiles
    started = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - started
    (new,) = result.rows()
    stream = tokenizer.stream(after=prompt)
    text = "".join([*map(stream.push, new), stream.flush()])
    print(f"{options.prompt}{text}\n")
    print(f"decode:  {len(new)} tokens at {len(new) / seconds:,.0f} tokens/s, prefill included")
    print(
        f"drafts:  {result.accepted[0]} of {result.proposed[0]} accepted "
        f"({100 * result.acceptance:.0f}%), {result.rounds[0]} passes of the model"
    )
    return 0


def _eval(options: argparse.Namespace) -> int:
    _check_words(options)
    for name in ("context", "bytes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    from lucid_jax.models.checkpoint import load_model
    from lucid_jax.models.corpus import Document, num_bytes, python_corpus
    from lucid_jax.models.evaluate import bits_per_byte, pack

    model, tokenizer = load_model(
        options.checkpoint, jnp.dtype(options.dtype), rope_by_place=options.rope_by_place
    )
    context = options.context or model.config.max_position_embeddings
    spec = _spec(options, model, context)
    documents: Sequence[Document]
    if options.text is None:
        documents = python_corpus().held_out
    else:
        documents = [Document("file", options.text, Path(options.text).read_text("utf-8"))]
    if options.bytes is not None:
        documents = _first_bytes(documents, options.bytes)
    stream, size = pack(tokenizer, documents), num_bytes(documents)
    if not size:
        raise ValueError("there is no text to score")
    plain = bits_per_byte(model, stream, size, context)
    cached = bits_per_byte(model, stream, size, context, cache=spec)
    cache = grow(model.init_cache(spec, 1), context)
    print(f"text:    {size:,} bytes, {len(stream) - 1:,} tokens in windows of {context}")
    print(f"plain:   {plain:.4f} bits per byte, attention without a cache")
    shown = _name(options, spec) if isinstance(spec, list) else spec
    print(f"cache:   {cached:.4f} bits per byte ({100 * (cached / plain - 1):+.2f}%), {shown}")
    print(f"memory:  {nbytes(cache):,} bytes a sequence")
    return 0


def _first_bytes(documents: Sequence[Document], limit: int) -> list[Document]:
    """Documents up to a number of UTF-8 bytes, the last one cut short."""
    kept = []
    for document in documents:
        text = document.text.encode()[: max(limit, 0)].decode(errors="ignore")
        limit -= len(document.text.encode())
        if text:
            kept.append(dataclasses.replace(document, text=text))
    return kept


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


if __name__ == "__main__":
    raise SystemExit(main())
