"""A byte-level BPE tokenizer: text <-> lists of ids, and a decoder for streams of ids."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """Byte-level BPE over the `tokenizers` library; `decode(encode(text)) == text` for any string.

    `<|endoftext|>` separates documents and serves as both BOS and EOS. It is never produced by
    `encode`: the characters are encoded as ordinary text, so that input cannot forge a separator.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        """Wraps a byte-level tokenizer of the library.

        Raises:
          ValueError: if it is of another kind, or has no `<|endoftext|>`.
        """
        if not isinstance(backend.decoder, decoders.ByteLevel):
            raise ValueError(
                "only byte-level BPE tokenizers (GPT-2's kind) can be read; this one decodes with "
                f"{type(backend.decoder).__name__}"
            )
        self._backend = backend
        # Otherwise the library cuts `<|endoftext|>` out of the text before BPE sees it.
        self._backend.encode_special_tokens = True
        end = backend.token_to_id(END_OF_TEXT)
        if end is None:
            raise ValueError(
                f"the tokenizer has no {END_OF_TEXT!r} token; train one with Tokenizer.train "
                "or add the token to tokenizer.json"
            )
        self._end_of_text_id = int(end)

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
        return cls(backend)

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Reads a `tokenizer.json`.

        Raises:
          OSError: if the file cannot be read.
          ValueError: if it does not describe a byte-level tokenizer with `<|endoftext|>`.
        """
        return cls.from_json(Path(path).read_text("utf-8"))

    def save(self, path: Path | str) -> None:
        """Writes a `tokenizer.json`."""
        Path(path).write_text(self.to_json(), "utf-8")

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """Reads the content of a `tokenizer.json`; errors as for `load`."""
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"not the content of a tokenizer.json: {error}") from error
        return cls(backend)

    def to_json(self) -> str:
        """The content of a `tokenizer.json`."""
        return self._backend.to_str(pretty=False)

    @property
    def vocab_size(self) -> int:
        """Ids in all, the separator included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def end_of_text_id(self) -> int:
        """The id of `<|endoftext|>`: BOS, EOS and document separator."""
        return self._end_of_text_id

    def encode(self, text: str) -> list[int]:
        """Text to ids; adds no special token.

        Raises:
          UnicodeEncodeError: if the text holds a lone surrogate, which UTF-8 has no bytes for.
        """
        text.encode()  # the library's own error does not say what is wrong
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Texts to ids, in parallel."""
        return [e.ids for e in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; `<|endoftext|>` and unknown ids are left out, broken UTF-8 is U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes an id stands for: perhaps only part of a character; none if it is special."""
        return self._bytes_of.get(int(token), b"")

    def stream(self) -> StreamDecoder:
        """A decoder to feed one id at a time.

        Example:
          >>> tokenizer = Tokenizer.train(["some text"], vocab_size=300)
          >>> stream = tokenizer.stream()
          >>> "".join(stream.push(i) for i in tokenizer.encode("naïve")) + stream.flush()
          'naïve'
        """
        return StreamDecoder(self)

    @functools.cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        byte_of = _byte_of_char()
        vocab = self._backend.get_vocab(with_added_tokens=False)
        table = {token: bytes(byte_of.get(c, 0) for c in text) for text, token in vocab.items()}
        # Added tokens are stored as plain text, not in the byte alphabet.
        for token, added in self._backend.get_added_tokens_decoder().items():
            table[token] = b"" if added.special else added.content.encode()
        return table


class StreamDecoder:
    """Turns a stream of ids into text pieces that never break a UTF-8 character.

    The pieces joined, `flush` included, are what `Tokenizer.decode` returns for all the ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        """Starts an empty stream."""
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Takes one id; returns the text that is complete now, perhaps none yet."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """Ends the stream; returns an unfinished character, if any, as U+FFFD."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


@functools.cache
def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, other bytes for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    table.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return table
