"""`lucid-jax chat` and `generate --chat`: what is asked, what is fed, and what is printed."""

import io
import re

import pytest
from flax import nnx

from lucid_jax.decode import generate
from lucid_jax.models import Transformer, load_model, save_model
from lucid_jax.models.chat import ChatTemplate
from lucid_jax.tools import cli
from lucid_jax.tools.chat_command import Transcript
from tests.helpers import TINY_CONFIG

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Writes answers without the spaces that they came with.
TRIMMING = PLAIN.replace("m.content", "m.content | trim")


@pytest.fixture(scope="module")
def tokenizer():
    from lucid_jax.models.tokenizer import Tokenizer

    trained = Tokenizer.train(["[user] and [assistant] and [system]"], TINY_CONFIG.vocab_size)
    trained.chat_template = ChatTemplate(PLAIN)
    return trained


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A tiny model with random weights, told how to chat."""
    path = tmp_path_factory.mktemp("model")
    save_model(path, Transformer(TINY_CONFIG, rngs=nnx.Rngs(0)), tokenizer)
    return path


def chat(monkeypatch, lines, *arguments):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return cli.main(["chat", "--temperature", "0", *map(str, arguments)])


def test_what_is_fed_is_what_the_template_writes(tokenizer):
    transcript = Transcript(tokenizer, "Be brief.")
    first, goes_on = transcript.ask("Hi")
    assert goes_on
    transcript.answered(" Yes? ")
    second, goes_on = transcript.ask("No")
    assert goes_on
    text = "[system]Be brief.<|endoftext|>[user]Hi<|endoftext|>[assistant]"
    assert first == tokenizer.encode_rendered(text)
    assert second == tokenizer.encode_rendered("<|endoftext|>[user]No<|endoftext|>[assistant]")
    transcript.reset()
    assert transcript.ask("Hi") == (first, True)


def test_a_turn_that_was_not_answered_was_not_said(tokenizer):
    transcript = Transcript(tokenizer)
    transcript.ask("Hi")
    assert transcript.ask("No")[0] == tokenizer.encode_rendered("[user]No<|endoftext|>[assistant]")


def test_what_a_template_rewrites_is_fed_anew(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", ChatTemplate(TRIMMING))
    transcript = Transcript(tokenizer)
    transcript.ask("Hi")
    transcript.answered(" Yes? ")
    whole = "[user]Hi<|endoftext|>[assistant]Yes?<|endoftext|>[user]No<|endoftext|>[assistant]"
    assert transcript.ask("No") == (tokenizer.encode_rendered(whole), False)
    assert transcript.ask("No") == (tokenizer.encode_rendered(whole), True)  # to an empty cache


def test_a_conversation(folder, monkeypatch, capsys):
    lines = ["Hi", "", "No", "/reset", "Hi", "/what", "/quit", "never said"]
    assert chat(monkeypatch, lines, "--checkpoint", folder, "--max-new-tokens", 9) == 0
    out = capsys.readouterr().out
    figures = re.findall(
        r"^\[(\d+) tokens read, first answer token after [\d.]+ s(?:, then [\d,]+ tokens/s)?; "
        r"(\d+) tokens so far, cache ([\d,]+) bytes\]$",
        out,
        re.M,
    )
    assert len(figures) == 3
    model, tokenizer = load_model(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    (answer,) = generate(
        model, [ids], max_new_tokens=9, stop_tokens=model.config.eos_token_ids
    ).rows()
    text = tokenizer.decode(answer)
    assert out.startswith(text + "\n[")
    assert int(figures[0][0]) == len(ids)
    # The second turn is what closes the first answer, the question, and what opens the answer.
    more = len(tokenizer.encode_rendered("<|endoftext|>[user]No<|endoftext|>[assistant]"))
    assert int(figures[1][0]) == more
    assert figures[2] == figures[0]
    assert "(/reset forgets" in out


def test_a_full_cache_is_a_line_and_not_the_end(folder, monkeypatch, capsys):
    flags = ("--checkpoint", folder, "--max-new-tokens", 4, "--capacity", 40)
    assert chat(monkeypatch, ["Hi", "x" * 60, "/reset", "Hi"], *flags) == 0
    printed = capsys.readouterr()
    assert re.fullmatch(
        r"lucid-jax chat: error: a turn of \d+ tokens after \d+ does not fit the cache: .*\n",
        printed.err,
    )
    first, again = re.findall(r"\[(\d+ tokens read), .*; (\d+ tokens so far)", printed.out)
    assert first == again


def test_a_window_never_fills(folder, monkeypatch, capsys):
    flags = ("--checkpoint", folder, "--max-new-tokens", 20)
    flags += ("--cache", "sliding:24+4", "--rope-by-place")
    assert chat(monkeypatch, ["Hi"] * 4, *flags) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    sizes = re.findall(r"(\d+) tokens so far, cache ([\d,]+) bytes", printed.out)
    assert len(sizes) == 4
    assert len({size for _, size in sizes}) == 1
    assert int(sizes[-1][0]) > TINY_CONFIG.max_position_embeddings


def test_a_text_beyond_what_the_model_was_trained_for_is_noted_once(folder, monkeypatch, capsys):
    flags = ("--checkpoint", folder, "--max-new-tokens", 20, "--cache", "dynamic")
    assert chat(monkeypatch, ["Hi"] * 3, *flags) == 0
    assert capsys.readouterr().err.count("note: the text is longer than the 32 positions") == 1


def test_generate_asks_as_the_template_writes(folder, capsys):
    flags = ["--checkpoint", str(folder), "--max-new-tokens", "9", "--temperature", "0"]
    assert cli.main(["generate", "--chat", "Hi", *flags]) == 0
    out = capsys.readouterr().out
    model, tokenizer = load_model(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    stops = model.config.eos_token_ids
    (answer,) = generate(model, [ids], max_new_tokens=9, stop_tokens=stops).rows()
    assert out.startswith(tokenizer.decode(answer) + "\n")
    assert f"prefill: {len(ids)} tokens" in out


@pytest.mark.parametrize("command", [["chat"], ["generate", "--chat", "Hi"]])
def test_a_model_without_a_template_is_one_line(command, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    assert cli.main(command) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(
        r"lucid-jax \w+: error: this tokenizer came without a chat template.*\n", err
    )
