"""GGUF files: the same model as from a Hugging Face folder, or one line that says what is wrong.

`fixtures/record_gguf.py` says how K-quants and SentencePiece's ids were recorded.
"""

import dataclasses
import functools
import itertools
import json
import shutil
import sys
from pathlib import Path

import gguf
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from hypothesis import given

from lucid_jax.models import CheckpointError, load_model, load_pretrained, save_model
from lucid_jax.models.gguf_file import GgufFile
from lucid_jax.models.gguf_tokenizer import read_tokenizer
from lucid_jax.models.tokenizer import Tokenizer
from lucid_jax.tools import cli
from tests import gguf_files

FIXTURES = Path(__file__).parent / "fixtures"
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def parts_of(name, kind="F32"):
    """Metadata and tensors of a recorded model's file."""
    folder = FIXTURES / "pretrained" / name
    metadata, tensors = gguf_files.converted(folder, kind)
    if name == "llama3":
        config = json.loads((folder / "config.json").read_text())
        tensors["rope_freqs.weight"] = gguf_files.rope_factors(config)
    return metadata, tensors


def written(path, name="llama", kind="F32", metadata=None, tensors=None):
    """A recorded model's file, with changes; None leaves one out."""
    parts = [dict(part) for part in parts_of(name, kind)]
    for part, changes in zip(parts, (metadata, tensors), strict=True):
        part |= changes or {}
        for key in [key for key, value in part.items() if value is None]:
            del part[key]
    return gguf_files.write(path / "model.gguf", *parts)


@functools.cache
def from_folder(name):
    return load_pretrained(FIXTURES / "pretrained" / name)[0]


def assert_same_weights(model, other):
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(other))


# --- the model ---------------------------------------------------------------------------------------


@pytest.mark.whole
@pytest.mark.parametrize("name", ["llama", "llama3", "linear"])
def test_a_file_is_the_model_of_the_folder(tmp_path, name):
    """Weights, biases, and positions stretched in both of llama.cpp's ways."""
    model, tokenizer = load_pretrained(str(written(tmp_path, name)))
    expected = from_folder(name)
    assert tokenizer is None
    assert dataclasses.replace(model.config, rms_norm_eps=1e-6) == expected.config
    assert model.config.rms_norm_eps == pytest.approx(1e-6)
    assert_same_weights(model, expected)


def test_logits_are_those_of_the_folder(tmp_path):
    """As transformers recorded them, and also where layers are scanned."""
    expected = safetensors.numpy.load_file(FIXTURES / "pretrained/llama3/expected.safetensors")
    tokens, length = expected["tokens"][:1], int(expected["lengths"][0])
    path = written(tmp_path, "llama3")
    for scan_layers in (False, True):
        graph, params = nnx.split(load_pretrained(path, scan_layers=scan_layers)[0])
        logits = jax.jit(lambda p, t, graph=graph: nnx.merge(graph, p)(t))(params, tokens)
        np.testing.assert_allclose(
            logits[:, :length], expected["prefill"][:1, :length], atol=1e-4, rtol=0
        )


@pytest.mark.whole
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_a_quantized_file_is_the_folder_of_what_its_blocks_say(tmp_path, kind):
    folder = tmp_path / "folder"
    shutil.copytree(FIXTURES / "pretrained" / "llama", folder)
    tensors = {}
    for name, value in safetensors.numpy.load_file(folder / "model.safetensors").items():
        blocks = gguf_files.stored(value, kind)
        tensors[name] = value
        if isinstance(blocks, tuple):
            tensors[name] = gguf.dequantize(blocks[0], gguf.GGMLQuantizationType[kind])
            assert not np.array_equal(tensors[name], value)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    path = written(tmp_path, kind=kind)
    assert_same_weights(load_pretrained(path)[0], load_pretrained(folder)[0])


def test_k_quants_are_what_ggml_reads(tmp_path):
    recorded = np.load(FIXTURES / "gguf" / "k_quants.npz")
    tensors = {kind: (recorded[kind], kind) for kind in K_QUANTS}
    path = gguf_files.write(tmp_path / "k.gguf", {"general.architecture": "llama"}, tensors)
    with GgufFile(path) as file:
        for kind in K_QUANTS:
            values = file.read(kind)
            assert values.dtype == np.float32 and values.shape == (2, 256)
            np.testing.assert_allclose(values, recorded[f"{kind}_values"], rtol=1e-6)


def test_a_model_in_k_quants(tmp_path):
    """Rows of 256, two blocks of which were recorded; the head is the embedding table."""
    metadata, tensors = parts_of("llama")
    recorded = np.load(FIXTURES / "gguf" / "k_quants.npz")
    rows = {
        "attn_k": 16,
        "attn_v": 16,
        "attn_q": 32,
        "ffn_gate": 40,
        "ffn_up": 40,
        "token_embd": 96,
    }
    wide = {}
    for name in tensors:
        module, count = name.split(".")[-2], 256
        if module == "output":
            continue
        if module.endswith("norm"):
            wide[name] = np.ones(count, np.float32)
        elif module in rows:
            blocks = np.tile(recorded["Q4_K"], (rows[module] // 2, 1))
            wide[name] = (blocks, "Q4_K")
        else:
            wide[name] = np.ones((count, {"attn_output": 32, "ffn_down": 40}[module]), np.float32)
    metadata = {**metadata, "llama.embedding_length": 256, "llama.attention.key_length": 8}
    model, _ = load_pretrained(gguf_files.write(tmp_path / "k.gguf", metadata, wide), "bfloat16")
    embedding = model.embed_tokens.embedding[...]
    assert model.lm_head is None and embedding.dtype == "bfloat16"
    np.testing.assert_array_equal(
        np.asarray(embedding[:2]), recorded["Q4_K_values"].astype(embedding.dtype)
    )


def test_tied_heads(tmp_path):
    model, _ = load_pretrained(written(tmp_path, tensors={"output.weight": None}))
    assert model.lm_head is None and model.config.tie_word_embeddings


def test_only_what_the_file_needs_is_read_at_once(tmp_path, monkeypatch):
    """Each tensor once, when the model takes it."""
    reads, read = [], GgufFile.read
    monkeypatch.setattr(GgufFile, "read", lambda self, name: reads.append(name) or read(self, name))
    load_pretrained(written(tmp_path))
    assert sorted(reads) == sorted(parts_of("llama")[1])


def test_other_alignments(tmp_path):
    assert_same_weights(
        load_pretrained(written(tmp_path, metadata={"general.alignment": 256}))[0],
        from_folder("llama"),
    )


def test_stretched_positions_by_yarn_and_by_the_older_key(tmp_path):
    yarn = {
        "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 32,
    }  # fmt: skip
    scaling = load_pretrained(written(tmp_path, metadata=yarn))[0].config.rope_scaling
    assert (scaling.factor, scaling.original_max_position_embeddings) == (4.0, 32)
    path = written(tmp_path, metadata={"llama.rope.scale_linear": 2.0})
    assert load_pretrained(path)[0].config.rope_scaling.factor == 2.0
    ones = {"rope_freqs.weight": np.ones(4, np.float32)}
    assert load_pretrained(written(tmp_path, tensors=ones))[0].config.rope_scaling is None


# --- what is refused ---------------------------------------------------------------------------------

_LIST = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b"]}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "qwen2"}, "architecture 'qwen2'"),
        ({"general.type": "adapter"}, "'adapter' of a model"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"llama.block_count": None}, "lacks llama.block_count"),
        ({"llama.block_count": 9_000}, "tensors of 2 layers"),
        ({"llama.feed_forward_length": 64}, r"should have shape \(32, 64\)"),
        ({"llama.attention.head_count": [4, 2]}, "num_attention_heads must be a positive integer"),
        ({"llama.attention.head_count": 0}, "num_attention_heads must be a positive integer"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count=4 for heads of 8"),
        ({"llama.attention.value_length": 4}, "llama.attention.value_length=4 for heads of 8"),
        ({"llama.expert_count": 8}, "llama.expert_count=8; only 0"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale=0.5, which is not supported"),
        (
            {"llama.rope.scaling.type": "longrope"},
            "'longrope'; supported are none, linear and yarn",
        ),
        ({"llama.rope.scaling.type": "linear"}, "lacks llama.rope.scaling.factor"),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": "two"},
            "factor of LinearScaling must be a positive number",
        ),
        ({"llama.vocab_size": None}, "lacks llama.vocab_size"),
        ({"tokenizer.ggml.eos_token_id": 96}, r"eos_token_id must be an integer in \[0, 96\)"),
        ({"tokenizer.ggml.eos_token_id": [2]}, "eos_token_id must be"),
        ({"tokenizer.ggml.model": "bert"}, "'bert' vocabulary"),
        ({"tokenizer.ggml.model": "gpt2"}, "must list tokenizer.ggml.tokens as str"),
        (_LIST, "must list tokenizer.ggml.merges as str"),
        ({**_LIST, "tokenizer.ggml.merges": ["ab"]}, "'ab'; expected two tokens"),
        ({**_LIST, "tokenizer.ggml.merges": ["a b"]}, "'a b'; expected two tokens that make"),
        ({**_LIST, "tokenizer.ggml.tokens": ["a", "a"]}, "2 tokens, 1 different"),
        ({**_LIST, "tokenizer.ggml.token_type": [1]}, "1 types"),
        ({**_LIST, "tokenizer.ggml.add_eos_token": True}, "add_eos_token is set"),
        ({**_LIST, "tokenizer.ggml.model": "llama"}, "lacks 256 of the tokens <0x00> to <0xFF>"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, metadata, message):
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(written(tmp_path, metadata=metadata))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blk.1.attn_k.weight": None}, r"1 are missing \['blk.1.attn_k.weight'\]"),
        ({"blk.1.attn_q_norm.weight": np.ones(8, np.float32)}, r"1 are not known"),
        (
            {"output_norm.weight": np.ones(8, np.float32)},
            r"shape \(32,\) by the metadata, got \(8,\)",
        ),
        ({"output_norm.weight": np.ones(32, np.int32)}, "'output_norm.weight' as I32"),
        ({"output_norm.weight": np.ones(32, np.float64)}, "'output_norm.weight' as F64"),
        ({"rope_freqs.weight": np.array([1, 5, 2, 3], np.float32)}, "not those of Llama 3"),
    ],
)
def test_tensors_that_are_not_the_metadatas(tmp_path, tensors, message):
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(written(tmp_path, tensors=tensors))


def test_stretched_twice(tmp_path):
    path = written(tmp_path, "llama3", metadata={"llama.rope.scaling.type": "linear"})
    with pytest.raises(
        CheckpointError, match=r"both rope_freqs.weight and llama.rope.scaling.type"
    ):
        load_pretrained(path)


def test_files_that_are_none(tmp_path):
    path = tmp_path / "model.gguf"
    with pytest.raises(CheckpointError, match="cannot be opened: No such file"):
        load_pretrained(path)
    path.write_bytes(b"GIF8")
    with pytest.raises(CheckpointError, match="not a GGUF file: it does not begin with GGUF"):
        load_pretrained(path)
    for version, message in ((1, "version 1 of the format"), (3 << 24, "big-endian")):
        path.write_bytes(b"GGUF" + version.to_bytes(4, "little") + bytes(16))
        with pytest.raises(CheckpointError, match=message):
            load_pretrained(path)
    with pytest.raises(CheckpointError, match=r"no config.json, but model.gguf: give that file's"):
        load_pretrained(tmp_path)


def test_damaged_headers(tmp_path):
    """Counts without end, names twice, types that do not exist: named, and at once."""
    path = tmp_path / "model.gguf"

    def number(value, size=8):
        return value.to_bytes(size, "little")

    def text(value):
        return number(len(value)) + value

    start = b"GGUF" + number(3, 4)
    one = text(b"key") + number(4, 4) + number(7, 4)
    tensor = text(b"name") + number(1, 4) + number(4)
    for content, message in (
        (start + number(0) + number(1 << 60), "not a complete GGUF file"),
        (start + number(1 << 60) + number(0), "not a complete GGUF file"),
        (start + number(0) + number(1) + number(1 << 60), "not a complete GGUF file"),
        (start + number(0) + number(2) + one + one, "'key' twice"),
        (start + number(0) + number(1) + text(b"k") + number(13, 4) + one, "values of kind 13"),
        (
            start
            + number(0)
            + number(1)
            + text(b"k")
            + number(9, 4)
            + number(0, 4)
            + number(1 << 62),
            "not a complete GGUF file",
        ),
        (
            start + number(0) + number(1) + text(b"k") + number(9, 4) + number(9, 4) + number(1),
            "values of kind 9",
        ),
        (start + number(0) + number(1) + text(b"\xff"), "not UTF-8"),
        (start + number(1) + number(0) + text(b"name") + number(9, 4), "9 dimensions"),
        (start + number(2) + number(0) + (tensor + number(0, 4) + number(0)) * 2, "'name' twice"),
        (start + number(1) + number(0) + tensor + number(99, 4) + number(0), "as 99, which"),
        (start + number(1) + number(0) + tensor + number(3, 4) + number(0), "blocks of 32"),
        (start + number(1) + number(0) + tensor + number(0, 4) + number(5), "begins at 5"),
        (start + number(1) + number(0) + tensor + number(0, 4) + number(1 << 62), "not a complete"),
        (
            start
            + number(0)
            + number(1)
            + text(b"general.alignment")
            + number(4, 4)
            + number(3, 4),
            "not a power of two",
        ),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            GgufFile(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A file with everything in it, and a place for damaged ones."""
    folder = tmp_path_factory.mktemp("gguf")
    path = chatty(folder)
    assert isinstance(load_model(path)[1], Tokenizer)
    return path.read_bytes(), folder / "damaged.gguf"


@given(part=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_short(whole, part):
    content, path = whole
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(CheckpointError):
        load_pretrained(path)


@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_a_changed_byte_gives_a_model_or_an_error(whole, place, value):
    content, path = whole
    header = len(content) - sum(x.nbytes for x in parts_of("llama")[1].values())
    damaged = bytearray(content)
    damaged[int(place * header)] = value
    path.write_bytes(damaged)
    try:
        model, tokenizer = load_pretrained(path)
    except CheckpointError as error:
        assert str(path) in str(error)
    else:
        assert model.config.num_hidden_layers == 2
        assert tokenizer is None or tokenizer.vocab_size <= model.config.vocab_size


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = written(tmp_path)
    with GgufFile(path) as file:
        path.write_bytes(path.read_bytes()[:-2000])
        with pytest.raises(CheckpointError, match="not a complete GGUF file"):
            file.read(list(file.tensors)[-1])


# --- tokenizers --------------------------------------------------------------------------------------


@functools.cache
def trained(vocab_size=None):
    """A byte-level tokenizer, and its tokens and merges."""
    tokenizer = Tokenizer.train(["some text about cats, don't 123456"] * 3, vocab_size or 280)
    model = json.loads(tokenizer.to_json())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return tokenizer, tokens, [" ".join(pair) for pair in model["merges"]]


def byte_level(pre="gpt-2", **changes):
    """Metadata of its vocabulary, with two more tokens; the model then has as many."""
    _, tokens, merges = trained()
    tokens = [*tokens, "<|im_start|>", "<|im_end|>", "<think>"]
    named = {
        "model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges,
        "token_type": [3, *[1] * (len(tokens) - 4), 3, 3, 4], "bos_token_id": 0,
        **changes,
    }  # fmt: skip
    return {f"tokenizer.ggml.{name}": value for name, value in named.items()}


def chatty(path, **changes):
    """A recorded model with that vocabulary and a chat template."""
    metadata = {**byte_level(**changes), "tokenizer.chat_template": TEMPLATE}
    count = len(metadata["tokenizer.ggml.tokens"])
    wide = {
        name: np.resize(parts_of("llama")[1][name], (count, 32))
        for name in ("token_embd.weight", "output.weight")
    }
    return written(path, metadata={**metadata, "llama.vocab_size": count}, tensors=wide)


def test_byte_level_merges():
    """As the tokenizer they come from; a prompt begins with BOS only where the file says so."""
    original = trained()[0]
    tokenizer = read_tokenizer(byte_level())
    for text in ("some text about cats", "naïve 日本語 🙂\n\n  x", "don't 1234", ""):
        ids = tokenizer.encode(text)
        assert ids == original.encode(text) and tokenizer.decode(ids) == text
        assert tokenizer.encode_prompt(text) == ids
    begun = read_tokenizer(byte_level(add_bos_token=True))
    assert begun.encode_prompt("cats") == [0, *original.encode("cats")]
    with pytest.raises(ValueError, match="bos_token_id does not name"):
        read_tokenizer(byte_level(add_bos_token=True, bos_token_id=999))


def test_special_tokens_are_found_in_prompts_only():
    tokenizer = read_tokenizer(byte_level())
    _, tokens, _ = trained()
    text, ids = "<|im_start|>cats<think>", [len(tokens), *tokenizer.encode("cats"), len(tokens) + 2]
    assert tokenizer.encode_prompt(text) == ids
    assert tokenizer.decode(ids) == "cats<think>"  # what is special says nothing
    assert len(tokens) not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.whole
@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["some", "\u0120text", "'s", "\u0120", "\u01201234", "!!", "\u010a\u010a"]),
        ("smollm", ["some", "\u0120text", "'s", "\u0120\u0120", *"1234", "!!", "\u010a\u010a"]),
        (
            "llama-bpe",
            ["some", "\u0120text", "'s", "\u0120", "\u0120", "123", "4", "!!\u010a\u010a"],
        ),
        ("qwen2", ["some", "\u0120text", "'s", "\u0120", "\u0120", *"1234", "!!\u010a\u010a"]),
    ],
)
def test_how_text_is_cut_into_words(pre, words):
    """Each of llama.cpp's ways that are known."""
    backend = read_tokenizer(byte_level(pre))._backend
    cut = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str("some text's  1234!!\n\n")]
    assert "".join(cut) == "".join(words)
    assert cut == words


def test_a_way_to_cut_that_is_not_known():
    for pre in ("tekken", "default", None):
        with pytest.raises(ValueError, match=f"tokenizer.ggml.pre={pre!r}"):
            read_tokenizer(byte_level(pre))


def test_llama_3_takes_whole_words_before_merging():
    """Its vocabulary has words that no merges make."""
    _, tokens, merges = trained()
    added = {"tokens": [*tokens, "zebra"], "token_type": [1] * (len(tokens) + 1), "merges": merges}
    assert read_tokenizer(byte_level("llama-bpe", **added)).encode("zebra") == [len(tokens)]
    assert len(read_tokenizer(byte_level(**added)).encode("zebra")) > 1


@functools.cache
def recorded_pieces():
    return json.loads((FIXTURES / "gguf" / "pieces.json").read_text("utf-8"))


def pieces(**changes):
    """Metadata of the recorded SentencePiece vocabulary."""
    recorded = recorded_pieces()
    named = {
        "model": "llama", "tokens": recorded["tokens"], "scores": recorded["scores"],
        "token_type": recorded["types"], "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
        **changes,
    }  # fmt: skip
    return {f"tokenizer.ggml.{name}": value for name, value in named.items()}


def test_pieces_are_sentencepieces():
    tokenizer, recorded = read_tokenizer(pieces()), recorded_pieces()
    assert len(recorded["texts"]) == 12
    for text, ids in zip(recorded["texts"], recorded["ids"], strict=True):
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text.replace("\u2581", " ")
    assert tokenizer.encode_prompt("some text") == [1, *tokenizer.encode("some text")]
    assert tokenizer.encode_prompt("<s>") == [1, 1]
    bare = read_tokenizer(pieces(add_space_prefix=False, add_bos_token=False))
    assert bare.encode_prompt(" two  spaces") == tokenizer.encode("two  spaces")
    assert bare.decode(bare.encode(" two  spaces")) == " two  spaces"


def merged_by_score(text, tokens, scores, types):
    """What llama.cpp does: of all neighbours that make up a piece, join those of the best score."""
    score_of = {t: s for t, s, kind in zip(tokens, scores, types, strict=True) if kind == 1}
    ids = {token: index for index, token in enumerate(tokens)}
    parts = list("\u2581" + text.replace(" ", "\u2581")) if text else []
    while True:
        joined = [a + b for a, b in itertools.pairwise(parts)]
        scored = [(score_of[x], -i) for i, x in enumerate(joined) if x in score_of]
        if not scored:
            break
        at = -max(scored)[1]
        parts[at : at + 2] = [joined[at]]
    spelled = ([part] if part in score_of else part.encode() for part in parts)
    return [ids[x if isinstance(x, str) else f"<0x{x:02X}>"] for part in spelled for x in part]


@given(
    text=st.text(st.sampled_from("  aetcho-\n_é日🙂"), max_size=20)
    | st.lists(st.sampled_from(["the", " cache", "tokens", "layer", "", " "])).map("".join)
)
def test_pieces_are_joined_by_score(text):
    recorded = recorded_pieces()
    described = (recorded[name] for name in ("tokens", "scores", "types"))
    assert read_pieces().encode(text) == merged_by_score(text, *described)


@functools.cache
def read_pieces():
    return read_tokenizer(pieces())


def test_pieces_that_make_no_tokenizer():
    recorded = recorded_pieces()
    scores = recorded["scores"]
    for changes, message in (
        ({"scores": scores[:-1]}, r"600 tokens and 599 scores"),
        ({"scores": [0.0] * len(scores)}, "which pieces to merge first"),
        ({"tokens": [*recorded["tokens"][:-1], "\u03c9x"]}, "letters of its own pieces, such as"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is set"),
    ):
        with pytest.raises(ValueError, match=message):
            read_tokenizer(pieces(**changes))


def test_no_vocabulary(tmp_path):
    path = written(tmp_path, metadata={"tokenizer.ggml.model": "no_vocab"})
    assert load_pretrained(path)[1] is None
    with pytest.raises(CheckpointError, match="has no vocabulary"):
        load_model(path)


def test_more_tokens_than_the_model_has(tmp_path):
    with pytest.raises(CheckpointError, match="has 283 tokens but says vocab_size=96"):
        load_pretrained(written(tmp_path, metadata={**byte_level(token_type=[1] * 283)}))


# --- text and chat -----------------------------------------------------------------------------------

SAID = [{"role": "user", "content": "some text"}]


def test_a_chat_by_the_template_inside(tmp_path):
    """And as a Hugging Face folder, which save_model makes of the file."""
    model, tokenizer = load_model(chatty(tmp_path, eos_token_id=281))
    ids = tokenizer.apply_chat_template(SAID)
    start, end = (tokenizer.encode_prompt(f"<|im_{x}|>") for x in ("start", "end"))
    assert (start, end) == ([280], [281])
    said = tokenizer.encode("user\nsome text")
    assert ids == [
        *start,
        *said,
        *end,
        *tokenizer.encode("\n"),
        *start,
        *tokenizer.encode("assistant\n"),
    ]
    assert tokenizer.chat_template.tokens == {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
    }
    save_model(tmp_path / "folder", model, tokenizer)
    again, reread = load_model(tmp_path / "folder")
    assert again.config == model.config
    assert_same_weights(again, model)
    assert reread.apply_chat_template(SAID) == ids
    assert reread.chat_template.tokens == tokenizer.chat_template.tokens


def test_a_template_that_is_no_text(tmp_path):
    path = written(tmp_path, metadata={**byte_level(), "tokenizer.chat_template": 5})
    with pytest.raises(CheckpointError, match="chat_template must be a text"):
        load_pretrained(path)


def test_the_command_line_takes_a_file(tmp_path, capsys):
    arguments = ["generate", "some", "--checkpoint", str(chatty(tmp_path)), "--max-new-tokens", "4"]
    assert cli.main([*arguments, "--no-compile-cache"]) == 0
    assert capsys.readouterr().out.startswith("some")


def test_without_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    path = str(tmp_path / "model.gguf")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lucid-jax\[gguf\]'"):
        load_pretrained(path)
    assert cli.main(["generate", "some", "--checkpoint", path]) == 2
    assert "pip install 'lucid-jax[gguf]'" in capsys.readouterr().err
