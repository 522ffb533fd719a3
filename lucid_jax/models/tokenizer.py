"""Tokenizers from tokenizer.json: text <-> lists of ids, and a decoder for streams of ids.

Both kinds that language models use: byte-level BPE (GPT-2, Llama 3, Qwen), and pieces of text with a
visible space and single bytes for what has no piece (SentencePiece's: Llama 2, Mistral, Gemma).
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from lucid_jax.models.chat import ChatTemplate, Message, read_template
from lucid_jax.models.config import read_object

END_OF_TEXT = "<|endoftext|>"
SETTINGS, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


class Tokenizer:
    """A tokenizer.json over the `tokenizers` library, decoding to bytes.

    `encode` takes text as text: the characters of a special token are encoded as any others, so that
    input cannot forge a separator. `encode_prompt` is for what a model is to continue, and
    `apply_chat_template` for a conversation.

    Attributes:
      chat_template: how the model was told of conversations, if it was.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        add_bos: int | None = None,
        chat_template: ChatTemplate | None = None,
    ):
        """Wraps a tokenizer of the library.

        Args:
          backend: the tokenizer.
          add_bos: an id to start prompts with, if its own post-processor does not.
          chat_template: see `Tokenizer`.

        Raises:
          ValueError: if its decoder is of a kind that is not known.
        """
        self._backend = backend
        # Otherwise the library cuts special tokens out of the text before BPE sees it.
        self._backend.encode_special_tokens = True
        self._spelling = _spelling(json.loads(backend.to_str())["decoder"])
        self._add_bos = add_bos
        self.chat_template = chat_template

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 2048) -> Tokenizer:
        """Learns merges from `texts`.

        Args:
          texts: training documents.
          vocab_size: ids in all: 256 bytes, `<|endoftext|>` and the merges. At least 257.

        Returns:
          The tokenizer; `<|endoftext|>` has id 0.

        Raises:
          ValueError: if `vocab_size` has no room for the 256 bytes and the separator.
        """
        if vocab_size < 257:
            raise ValueError(
                f"vocab_size must be at least 257 (256 bytes and {END_OF_TEXT!r}), got {vocab_size}"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        # A document begins after a separator.
        backend.post_processor = processors.TemplateProcessing(
            single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
        )
        return cls(backend)

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Reads a `tokenizer.json`, and what lies beside it.

        That is, of a `tokenizer_config.json`, `add_bos_token` and the chat template, which a
        `chat_template.jinja` may also hold.

        Raises:
          OSError: if a file cannot be read.
          ValueError: if they do not describe a tokenizer, or one that decodes in an unknown way.
        """
        path = Path(path)
        beside = {
            name: path.with_name(name).read_text("utf-8")
            for name in (SETTINGS, _TEMPLATE)
            if path.with_name(name).is_file()
        }
        return cls.from_json(
            path.read_text("utf-8"), beside.get(SETTINGS, "{}"), beside.get(_TEMPLATE)
        )

    def save(self, path: Path | str) -> None:
        """Writes a `tokenizer.json`."""
        Path(path).write_text(self.to_json(), "utf-8")

    @classmethod
    def from_json(cls, text: str, settings: str = "{}", template: str | None = None) -> Tokenizer:
        """Reads the content of a `tokenizer.json` and, perhaps, of what `load` reads beside it.

        Errors as for `load`.
        """
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"not the content of a tokenizer.json: {error}") from error
        given = read_object(settings, SETTINGS)
        bos = given.get("bos_token") if given.get("add_bos_token") else None
        bos = bos.get("content") if isinstance(bos, dict) else bos
        if bos is not None and not isinstance(bos, str):
            raise ValueError(f"tokenizer_config.json must have a text as bos_token, got {bos!r}")
        add_bos = None if bos is None else backend.token_to_id(bos)
        return cls(backend, add_bos, read_template(given, template))

    def to_json(self) -> str:
        """The content of a `tokenizer.json`."""
        return self._backend.to_str(pretty=False)

    def settings(self) -> dict[str, Any]:
        """What a `tokenizer_config.json` has to say beside `to_json`: perhaps nothing."""
        found: dict[str, Any] = {}
        if self.chat_template is not None:
            found |= {**self.chat_template.tokens, "chat_template": self.chat_template.source}
        if self._add_bos is not None:
            found |= {"add_bos_token": True, "bos_token": self._backend.id_to_token(self._add_bos)}
        return found

    @property
    def vocab_size(self) -> int:
        """One more than the highest id of the vocabulary.

        Special tokens that were added to it may lie beyond: Gemma 3's text models have no embedding
        for their tokenizer's image token.
        """
        return 1 + max(self._backend.get_vocab(with_added_tokens=False).values(), default=-1)

    @property
    def end_of_text_id(self) -> int:
        """The id of `<|endoftext|>`: BOS, EOS and document separator.

        Raises:
          ValueError: if there is no such token.
        """
        end = self._backend.token_to_id(END_OF_TEXT)
        if end is None:
            raise ValueError(
                f"the tokenizer has no {END_OF_TEXT!r} token; encode_prompt starts a text as this "
                "tokenizer does, and the model's config.eos_token_ids end it"
            )
        return int(end)

    @property
    def start(self) -> list[int]:
        """What `encode_prompt` puts before a text: perhaps nothing."""
        return self.encode_prompt("")

    def encode(self, text: str) -> list[int]:
        """Text to ids; adds no special token, and takes none from the text.

        Raises:
          UnicodeEncodeError: if the text holds a lone surrogate, which UTF-8 has no bytes for.
        """
        text.encode()  # the library's own error does not say what is wrong
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """A prompt to ids, as transformers does: special tokens in the text are taken as such.

        What starts a text comes first: what the post-processor of tokenizer.json adds, or else the
        `bos_token` if tokenizer_config.json says `add_bos_token`.

        Raises:
          UnicodeEncodeError: as for `encode`.

        Example:
          >>> tokenizer = Tokenizer.train(["some text"], vocab_size=300)
          >>> tokenizer.encode_prompt("text") == [tokenizer.end_of_text_id, *tokenizer.encode("text")]
          True
        """
        text.encode()
        ids = self._prompt_backend.encode(text).ids
        return ids if self._add_bos is None or ids[:1] == [self._add_bos] else [self._add_bos, *ids]

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """A conversation to ids, as transformers does: a prompt for the assistant's answer.

        Special tokens in what was said are taken as such, like those of `encode_prompt`; clean what
        strangers say. The template itself puts what starts a text before it.

        Args:
          messages: what was said so far, oldest first: a `role` and a `content` each.
          add_generation_prompt: as for `ChatTemplate.render`.
          variables: as for `ChatTemplate.render`.

        Raises:
          ValueError: if there is no template, or as for `ChatTemplate.render`.
          ModuleNotFoundError: as for `ChatTemplate.render`.

        Example:
          ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])
        """
        if self.chat_template is None:
            raise ValueError(
                "this tokenizer came without a chat template, as those of models that were not "
                "trained to chat; continue text by encode_prompt, or set tokenizer.chat_template to a "
                "ChatTemplate"
            )
        text = self.chat_template.render(
            messages, add_generation_prompt=add_generation_prompt, **variables
        )
        return self.encode_rendered(text)

    def encode_rendered(self, text: str) -> list[int]:
        """What a chat template wrote to ids: special tokens as such, and nothing put before it.

        Raises:
          UnicodeEncodeError: for lone surrogates, which are no text.
        """
        text.encode()
        return self._prompt_backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Texts to ids, in parallel."""
        return [e.ids for e in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; special tokens and unknown ids are left out, broken UTF-8 is U+FFFD."""
        stream = self.stream()
        return "".join([*map(stream.push, ids), stream.flush()])

    def token_bytes(self, token: int) -> bytes:
        """The bytes an id stands for: perhaps only part of a character; none if it is special."""
        return self._bytes_of.get(int(token), b"")

    def stream(self, after: Iterable[int] = ()) -> StreamDecoder:
        """A decoder to feed one id at a time.

        Args:
          after: ids that come before, a prompt's: their text is not returned. At the very start of a
            text some tokenizers drop the space that they put there to encode it.

        Example:
          >>> tokenizer = Tokenizer.train(["some text"], vocab_size=300)
          >>> stream = tokenizer.stream()
          >>> "".join(stream.push(i) for i in tokenizer.encode("naïve")) + stream.flush()
          'naïve'
        """
        stream = StreamDecoder(self)
        for token in after:
            stream.push(token)
        return stream

    @functools.cached_property
    def _prompt_backend(self) -> tokenizers.Tokenizer:
        """The same but for special tokens: switching one to and fro would reach into other threads."""
        backend = tokenizers.Tokenizer.from_str(self.to_json())
        backend.encode_special_tokens = False
        return backend

    @functools.cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        vocab = self._backend.get_vocab(with_added_tokens=False)
        table = {token: self._spelling.bytes_of(text) for text, token in vocab.items()}
        plain = self._spelling.byte_level  # whose alphabet added tokens are not written in
        for token, added in self._backend.get_added_tokens_decoder().items():
            text = added.content.encode() if plain else self._spelling.bytes_of(added.content)
            table[token] = b"" if added.special else text
        return table


class StreamDecoder:
    """Turns a stream of ids into text pieces that never break a UTF-8 character.

    The pieces joined, `flush` included, are what `Tokenizer.decode` returns for all the ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        """Starts an empty stream."""
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = tokenizer._spelling.strip

    def push(self, token: int) -> str:
        """Takes one id; returns the text that is complete now, perhaps none yet."""
        return self._stripped(self._decoder.decode(self._tokenizer.token_bytes(token)))

    def flush(self) -> str:
        """Ends the stream; returns an unfinished character, if any, as U+FFFD."""
        text = self._stripped(self._decoder.decode(b"", final=True))
        self._decoder.reset()
        self._strip = self._tokenizer._spelling.strip
        return text

    def _stripped(self, text: str) -> str:
        """Without the spaces that the start of a text still has to lose."""
        while self._strip and text:
            spaced = text.startswith(" ")
            self._strip = self._strip - 1 if spaced else 0
            text = text[1:] if spaced else text
        return text


@dataclass(frozen=True)
class _Spelling:
    """How a vocabulary spells bytes.

    Attributes:
      byte_level: in GPT-2's alphabet, a character a byte; otherwise as text.
      replace: what to replace in text: (visible space, space).
      byte_fallback: whether pieces such as `<0xE2>` stand for single bytes.
      strip: spaces to take from the start of a text.
    """

    byte_level: bool = False
    replace: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip: int = 0

    def bytes_of(self, piece: str) -> bytes:
        """The bytes of a piece."""
        if self.byte_level:
            return bytes(_byte_of_char().get(char, 0) for char in piece)
        if self.byte_fallback and (byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)):
            return bytes([int(byte[1], 16)])
        for old, new in self.replace:
            piece = piece.replace(old, new)
        return piece.encode()


def _spelling(decoder: dict[str, Any] | None) -> _Spelling:
    """What the decoder of a tokenizer.json does, as a rule for one piece at a time."""
    decoder = decoder or {"type": "None"}
    steps: list[dict[str, Any]] = decoder.get("decoders", [decoder])
    byte_level = byte_fallback = False
    replace: list[tuple[str, str]] = []
    strip = 0
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                byte_level = True
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                replace.append((old, new))
            case {"type": "Strip", "content": " ", "start": start, "stop": 0}:
                strip = start
            case {"type": "Metaspace", "replacement": old, **rest}:
                replace.append((old, " "))
                strip = int(rest.get("prepend_scheme", "always") != "never")
            case _:
                raise ValueError(
                    "tokenizer.json decodes in a way that is not known "
                    f"({', '.join(one['type'] for one in steps)}); known are ByteLevel, and "
                    "Replace, ByteFallback, Fuse, Strip and Metaspace"
                )
    return _Spelling(byte_level, tuple(replace), byte_fallback, strip)


@functools.cache
def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, other bytes for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    table.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return table
