"""The tokenizer that a GGUF file's metadata describes, built with the `tokenizers` library.

Two kinds of vocabulary: byte-level BPE with merges ("gpt2": Llama 3, SmolLM), and pieces with scores as
SentencePiece has them ("llama": Llama 2, Mistral).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from lucid_jax.models.chat import ChatTemplate
from lucid_jax.models.tokenizer import Tokenizer

_KEY = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # types of tokens
_SPACE = "\u2581"  # as pieces spell it
# How text is cut into words before merges, by `tokenizer.ggml.pre`: names that llama.cpp takes alike.
_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling")
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
_QWEN2 = ("qwen2", "stablelm2", "hunyuan", "megrez", "deepseek-r1-qwen")
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer of a file; None if it has no vocabulary.

    Raises:
      ValueError: if it is of a kind that is not known, or inconsistent.
    """
    kind = metadata.get(_KEY + "model", "none")
    if kind in ("none", "no_vocab"):
        return None
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"it has a {kind!r} vocabulary ({_KEY}model); supported are 'gpt2' (byte-level BPE) and "
            "'llama' (SentencePiece)"
        )
    tokens = _listed(metadata, "tokens", str)
    types = _listed(metadata, "token_type", int) if _KEY + "token_type" in metadata else []
    types = types or [_NORMAL] * len(tokens)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ValueError(
            f"the vocabulary has {len(tokens)} tokens, {len(set(tokens))} different ones, and "
            f"{len(types)} types; expected as many of each"
        )
    if metadata.get(_KEY + "add_eos_token"):
        raise ValueError(f"{_KEY}add_eos_token is set: prompts that end cannot be continued")
    backend = (_byte_level if kind == "gpt2" else _pieces)(metadata, tokens, types)
    _add_special(backend, tokens, types)
    special = _special_tokens(metadata, tokens)
    if _adds_bos(metadata, kind):
        if "bos_token" not in special:
            raise ValueError(f"prompts begin with a token that {_KEY}bos_token_id does not name")
        start = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=[start, "$A"], special_tokens=[(start, tokens.index(start))]
        )
    source = metadata.get("tokenizer.chat_template")
    if source is not None and not isinstance(source, str):
        raise ValueError(f"tokenizer.chat_template must be a text, got {source!r}")
    return Tokenizer(backend, chat_template=ChatTemplate(source, special) if source else None)


def _byte_level(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int]
) -> tokenizers.Tokenizer:
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = []
    for line in _listed(metadata, "merges", str):
        cut = line.find(" ", 1)
        left, right = line[:cut], line[cut + 1 :]
        if cut < 0 or not {left, right, left + right} <= vocab.keys():
            raise ValueError(
                f"{_KEY}merges has {line!r}; expected two tokens that make a third, and a space between"
            )
        merges.append((left, right))
    pre = metadata.get(_KEY + "pre")
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in _LLAMA3))
    backend.pre_tokenizer = _cutter(pre)
    backend.decoder = decoders.ByteLevel()
    return backend


def _cutter(pre: Any) -> pre_tokenizers.PreTokenizer:
    """What cuts text into words."""
    if pre in _GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in _DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if pre in _LLAMA3 or pre in _QWEN2:
        words = Regex(_WORDS % ("{1,3}" if pre in _LLAMA3 else ""))
        bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), bytewise])
    raise ValueError(
        f"it cuts text into words in a way that is not known ({_KEY}pre={pre!r}); known are "
        f"{', '.join((*_GPT2, *_DIGITS, *_LLAMA3, *_QWEN2))}"
    )


def _pieces(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int]
) -> tokenizers.Tokenizer:
    if metadata.get(_KEY + "remove_extra_whitespaces"):
        raise ValueError(f"{_KEY}remove_extra_whitespaces is set, which is not supported")
    vocab = {token: index for index, token in enumerate(tokens)}
    lacking = [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocab]
    if lacking:
        raise ValueError(f"the vocabulary lacks {len(lacking)} of the tokens <0x00> to <0xFF>")
    merges = _merges(tokens, types, _listed(metadata, "scores", float))
    unknown = tokens[types.index(_UNKNOWN)] if _UNKNOWN in types else None
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = metadata.get(_KEY + "add_space_prefix", True)
    backend.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(_SPACE)] if prefix else []), normalizers.Replace(" ", _SPACE)]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    return backend


def _merges(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """The merges that make each piece, best score first, as transformers derives them.

    Llama's own code merges the pair whose piece has the best score, whatever two pieces make it up.
    """
    if len(scores) != len(tokens):
        raise ValueError(f"the vocabulary has {len(tokens)} tokens and {len(scores)} scores")
    score_of = {
        token: score
        for token, kind, score in zip(tokens, types, scores, strict=True)
        if kind == _NORMAL
    }
    long = [score for token, score in score_of.items() if len(token) > 1]
    if len(set(long)) != len(long):
        raise ValueError(
            f"the scores of {len(long)} pieces have only {len(set(long))} values, which leaves open "
            "which pieces to merge first"
        )
    letters = sorted({letter for token in score_of for letter in token} - set(score_of))
    if letters:
        raise ValueError(
            f"the vocabulary lacks {len(letters)} letters of its own pieces, such as {letters[0]!r}"
        )
    merges = [
        (score, len(token[:cut]), (token[:cut], token[cut:]))
        for token, score in score_of.items()
        for cut in range(1, len(token))
        if token[:cut] in score_of and token[cut:] in score_of
    ]
    return [pair for _, _, pair in sorted(merges, reverse=True)]


def _add_special(backend: tokenizers.Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Tokens that are found in text before it is cut."""
    for kind in (_CONTROL, _USER_DEFINED):
        special = kind == _CONTROL
        added = [
            AddedToken(token, special=special, normalized=False)
            for token, of_kind in zip(tokens, types, strict=True)
            if of_kind == kind and token
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(added)


def _special_tokens(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    """What chat templates call `bos_token` and so on."""
    found = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = metadata.get(f"{_KEY}{key}_token_id")
        if isinstance(token, int) and 0 <= token < len(tokens):
            found[f"{name}_token"] = tokens[token]
    return found


def _adds_bos(metadata: Mapping[str, Any], kind: str) -> bool:
    """Whether prompts begin with BOS: llama.cpp's defaults where the file does not say."""
    default = kind == "llama" or metadata.get(_KEY + "pre") in _LLAMA3
    return bool(metadata.get(_KEY + "add_bos_token", default))


def _listed(metadata: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    values = metadata.get(_KEY + name)
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"the metadata must list {_KEY}{name} as {kind.__name__}, one a token")
    return values
