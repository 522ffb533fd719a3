"""`lucid-jax chat`: a conversation whose cache is kept between turns."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax.numpy as jnp

from lucid_jax.cache.introspection import nbytes
from lucid_jax.decode import Conversation
from lucid_jax.models.checkpoint import load_model
from lucid_jax.tools.cache_options import check_words, sampling_of, slides, spec_of

if TYPE_CHECKING:
    from lucid_jax.models.tokenizer import Tokenizer  # needs the text extra

_HELP = "/reset forgets the conversation, /quit ends it"


def chat_command(options: argparse.Namespace) -> None:
    """Reads turns from the terminal, or from lines piped in, and answers each."""
    check_words(options)
    model, tokenizer = load_model(
        options.checkpoint, jnp.dtype(options.dtype), rope_by_place=options.rope_by_place
    )
    transcript = Transcript(tokenizer, options.system)
    trained = model.config.max_position_embeddings
    capacity = min(trained, 2048) if options.capacity is None else options.capacity
    spec = spec_of(options, model, capacity, capacity)
    talk = Conversation(
        model,
        cache=spec,
        sampling=sampling_of(options),
        seed=options.seed,
        stop_tokens=model.config.eos_token_ids,
    )
    if sys.stdin.isatty():
        print(f"({_HELP})")
    noted = options.rope_by_place and slides(spec)
    for line in _turns():
        if line == "/reset":
            transcript.reset()
            talk.reset()
        elif line == "/quit":
            return
        elif line.startswith("/"):
            print(f"({_HELP})")
        else:
            _answer(talk, transcript, line, options.max_new_tokens)
            if talk.stored > trained and not noted:
                noted = True
                print(
                    f"note: the text is longer than the {trained} positions this model was trained "
                    "for; --cache sliding:1024+4 --rope-by-place goes on without end",
                    file=sys.stderr,
                )


class Transcript:
    """What was said, as a chat template writes it, and how much of that the cache has.

    Attributes:
        tokenizer: whose ids they are.
    """

    def __init__(self, tokenizer: Tokenizer, system: str | None = None):
        """An empty conversation; `system` opens it, where the model knows of such messages."""
        self.tokenizer, self._system = tokenizer, system
        self.reset()
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hello"}]
        )  # raises if it has none

    def reset(self) -> None:
        """Forgets what was said."""
        self._messages: list[dict[str, str]] = []
        if self._system is not None:
            self._messages.append({"role": "system", "content": self._system})
        self._told = ""

    def ask(self, text: str) -> tuple[list[int], bool]:
        """A turn as ids, up to where the answer begins, and whether they go on from what was told.

        If not, as a template may write earlier answers otherwise than they came, they are the whole.
        """
        asked = [*self._messages, {"role": "user", "content": text}]
        template = self.tokenizer.chat_template
        assert template is not None
        whole = template.render(asked)
        goes_on = whole.startswith(self._told)
        if not goes_on:
            self._told = ""
        self._asked, self._whole = asked, whole
        return self.tokenizer.encode_rendered(whole[len(self._told) :]), goes_on

    def answered(self, text: str) -> None:
        """Takes in the answer to the latest `ask`."""
        self._messages = [*self._asked, {"role": "assistant", "content": text}]
        self._told = self._whole + text


def _turns() -> Iterator[str]:
    """Lines that say something."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            yield line


def _answer(talk: Conversation, transcript: Transcript, line: str, most: int) -> None:
    """Prints an answer as it comes, and what it took; what the cache cannot take is one line."""
    ids, goes_on = transcript.ask(line)
    if not goes_on:
        talk.reset()
    text, pieces = transcript.tokenizer.stream(after=ids), []
    times = [time.perf_counter()]
    count = 0
    try:
        for part in talk.say(ids, max_new_tokens=most):
            times.append(time.perf_counter())
            count += len(part)
            pieces.append("".join(map(text.push, part)))  # a stop token has no text
            print(pieces[-1], end="", flush=True)
    except ValueError as error:
        print(f"lucid-jax chat: error: {error}; /reset does", file=sys.stderr)
        return
    pieces.append(text.flush())
    print(pieces[-1])
    transcript.answered("".join(pieces))
    first, rest = times[1] - times[0], times[-1] - times[1]
    speed = f", then {(count - 1) / rest:,.0f} tokens/s" if count > 1 else ""
    print(
        f"[{len(ids)} tokens read, first answer token after {first:.1f} s{speed}; "
        f"{talk.stored:,} tokens so far, cache {nbytes(talk.cache):,} bytes]",
        flush=True,
    )
