"""The tokenizer: text and ids there and back, streaming, files."""

import sys
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from lucid_jax.models.tokenizer import END_OF_TEXT, Tokenizer

TEXTS = [
    "Return a list of the items in the mapping.",
    "naïve café — “quoted” 日本語 🙂\n\t\x00",
] * 4


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=300)


@settings(deadline=None)
@given(
    text=st.text() | st.sampled_from([f"a {END_OF_TEXT} b", "<|endo", " \n\n\r\n\t x", "\ufffd"])
)
def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    assert tokenizer.end_of_text_id not in ids
    assert tokenizer.decode(ids) == text
    assert _streamed(tokenizer, ids) == text


def test_prompts_of_other_threads_cannot_forge_a_separator(tokenizer: Tokenizer):
    """`encode_prompt` takes special tokens out of its text, and out of no text but its own."""
    text = f"a {END_OF_TEXT} b"
    plain, prompt = tokenizer.encode(text), tokenizer.encode_prompt(text)
    assert tokenizer.end_of_text_id not in plain
    assert prompt.count(tokenizer.end_of_text_id) == 2
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(1) as pool:
            others = pool.submit(lambda: [tokenizer.encode_prompt(text) for _ in range(3000)])
            while not others.done():
                assert tokenizer.encode(text) == plain
            assert all(one == prompt for one in others.result())
    finally:
        sys.setswitchinterval(interval)


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 299), max_size=20))
def test_streaming_any_ids_gives_what_decode_gives(tokenizer: Tokenizer, ids: list[int]):
    assert _streamed(tokenizer, ids) == tokenizer.decode(ids)
    assert tokenizer.decode(ids) == tokenizer._backend.decode(ids)


def test_a_stream_holds_back_half_a_character(tokenizer: Tokenizer):
    plain = Tokenizer.train(["a"], vocab_size=257)  # bytes only
    stream = plain.stream()
    assert [stream.push(i) for i in plain.encode("é!")] == ["", "é", "!"]
    stream.push(plain.encode("é")[0])
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_tokenizer_survives_saving(tokenizer: Tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.end_of_text_id == tokenizer.end_of_text_id
    assert loaded.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_tokenizer_errors():
    with pytest.raises(ValueError, match="at least 257"):
        Tokenizer.train(TEXTS, vocab_size=100)
    with pytest.raises(ValueError, match=r"not the content of a tokenizer\.json"):
        Tokenizer.from_json("{}")
    with pytest.raises(UnicodeEncodeError):
        Tokenizer.train(TEXTS, vocab_size=257).encode("\ud800")


def _streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = tokenizer.stream()
    return "".join(stream.push(i) for i in ids) + stream.flush()
