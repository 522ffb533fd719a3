"""The command line: `lucid-jax generate`, `chat`, `compare`, `eval`, `inspect` and `bench`.

Bad input ends in one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from typing import NoReturn

import jax

from lucid_jax.io.checked_file import short
from lucid_jax.tools import program_store
from lucid_jax.tools.bench import run_bench
from lucid_jax.tools.chat_command import chat_command
from lucid_jax.tools.compare import compare_command
from lucid_jax.tools.eval_command import eval_command
from lucid_jax.tools.generate_command import generate_command
from lucid_jax.tools.inspect_command import inspect_command
from lucid_jax.tools.specs import CODECS, LAYOUTS
from lucid_jax.tools.targets import TARGETS, MissingCompiler

_COMMANDS = {
    "generate": generate_command,
    "chat": chat_command,
    "compare": compare_command,
    "eval": eval_command,
    "inspect": inspect_command,
}


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
    _add_chat(commands.add_parser("chat", help="a conversation whose cache is kept between turns"))
    _add_compare(
        commands.add_parser("compare", help="one prompt with several caches, side by side")
    )
    _add_eval(commands.add_parser("eval", help="bits per byte of text under a given cache"))
    _add_inspect(
        commands.add_parser("inspect", help="what a TPU's or GPU's compiler makes of decode steps")
    )
    bench = commands.add_parser("bench", help="measure the cache on this machine")
    bench.add_argument("--json", action="store_true", help="print JSON instead of a table")
    bench.add_argument(
        "--quick", action="store_true", help="smaller sizes and fewer repeats, to see that it runs"
    )
    options = parser.parse_args(argv)
    try:
        if options.command == "bench":
            run_bench(as_json=options.json, quick=options.quick)
            return 0
        _check_numbers(options)
        with contextlib.nullcontext() if options.no_compile_cache else program_store.opened():
            _COMMANDS[options.command](options)
            return 0
    except MissingCompiler as error:
        print(f"lucid-jax {options.command}: error: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError, OverflowError, MemoryError, jax.errors.JaxRuntimeError) as error:
        message = " ".join(str(error).split())
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in message:
            raise
        if isinstance(error, MemoryError | jax.errors.JaxRuntimeError):
            message = f"not enough memory; ask for less ({message or 'out of memory'})"
        print(f"lucid-jax {options.command}: error: {message}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name not in ("tokenizers", "gguf", "jinja2"):
            raise
        message = str(error)
        if error.name == "tokenizers":
            message = (
                "text needs the tokenizers package; install it with: pip install 'lucid-jax[text]'"
            )
        print(f"lucid-jax {options.command}: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue")
    parser.add_argument(
        "--chat", action="store_true",
        help="the prompt is a question, asked as the chat template of the checkpoint writes it",
    )  # fmt: skip
    _add_cache(parser)
    parser.add_argument(
        "--capacity", type=int, metavar="N",
        help="slots of the static cache; by default what the prompt and new tokens need, rounded up to "
        "a power of two",
    )  # fmt: skip
    parser.add_argument(
        "--draft", metavar="DRAFT",
        help="decode speculatively: ngram, embedded (the shipped model's draft) or a model folder",
    )  # fmt: skip
    parser.add_argument("--no-cache", action="store_true", help="recompute everything, to compare")
    _add_sampling(parser, max_new_tokens=120)
    _add_model(parser)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    _add_cache(parser)
    parser.add_argument(
        "--capacity", type=int, metavar="N",
        help="tokens of the whole conversation in a static cache; by default 2048, or what the model "
        "was trained for if that is less. --cache sliding:1024+4 --rope-by-place never fills",
    )  # fmt: skip
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    _add_sampling(parser, max_new_tokens=512)
    _add_model(parser)
    parser.set_defaults(chat=True)


def _add_sampling(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    """How tokens are chosen, and how many."""
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N")
    parser.add_argument(
        "--temperature", type=float, help="0 is greedy; default: 0.7, in a conversation 0.2"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="0 keeps all tokens")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P")
    parser.add_argument(
        "--repetition-penalty", type=float, metavar="X",
        help="default: 1.1, in a conversation 1, none",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)


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
        "--checkpoint", metavar="PATH",
        help="model folder as from the Hugging Face hub (config.json, *.safetensors, tokenizer.json), "
        "or a GGUF file of a Llama; by default the small model that ships with the package",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--no-compile-cache", action="store_true",
        help="compile everything anew; otherwise compiled programs are kept in the user's cache folder "
        "for the next run",
    )  # fmt: skip


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
        help="UTF-8 text to score; in a checkout by default the documentation held out of the shipped "
        "model",
    )  # fmt: skip
    parser.add_argument("--bytes", type=int, metavar="N", help="score only the first N bytes")
    _add_model(parser)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    _add_cache(parser)
    parser.add_argument(
        "--target", default="cpu", metavar="TARGET",
        help=f"{TARGETS}; it need not be there, but its compiler must; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="rows; default: 1")
    parser.add_argument(
        "--length", type=int, metavar="N",
        help="tokens that a row can hold; by default what the model was trained for",
    )  # fmt: skip
    _add_sampling(parser, max_new_tokens=120)
    _add_model(parser)
    parser.set_defaults(chat=False)


def _check_numbers(options: argparse.Namespace) -> None:
    """Refuses counts that cannot be, before anything is loaded: positions are int32."""
    bounds = {"max_new_tokens": (1, 31), "capacity": (1, 31), "context": (1, 31), "bytes": (1, 63)}
    bounds |= {"batch": (1, 31), "length": (1, 31)}
    for name, (least, bits) in (bounds | {"seed": (0, 63)}).items():
        value = getattr(options, name, None)
        if value is None or least <= value < 1 << bits:
            continue
        wanted = f"at least {least}" if value < least else f"below 2**{bits}"
        raise ValueError(f"--{name.replace('_', '-')} must be {wanted}, got {short(value)}")


if __name__ == "__main__":
    raise SystemExit(main())
