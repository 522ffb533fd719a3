"""The command line, called in-process: output, figures, and one-line errors with exit code 2."""

import json
import re

import pytest
from flax import nnx

from lucid_jax import cli
from lucid_jax.models import ModelConfig, Transformer

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with random weights."""
    from lucid_jax.models.checkpoint import save_model
    from lucid_jax.models.tokenizer import Tokenizer

    tokenizer = Tokenizer.train(["some text about a list and a dict"], 270)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    path = tmp_path_factory.mktemp("model")
    save_model(path, Transformer(config, rngs=nnx.Rngs(0)), tokenizer)
    return path


def generate(*arguments):
    return cli.main(["generate", *map(str, arguments)])


@pytest.mark.parametrize(
    ("flags", "cache_line"),
    [
        ([], r"static, 16 of 16 slots"),
        (["--cache", "static", "--capacity", "40"], r"static, 16 of 40 slots"),
        (["--cache", "dynamic"], r"dynamic, 16 of 64 slots"),
        (["--cache", "sliding:6+2"], r"sliding:6\+2, 8 of 8 slots"),
        (
            ["--cache", "sliding:6+2", "--codec", "int4-rotated", "--rope-by-place"],
            r"sliding:6\+2, 8 of 8 slots used as int4-rotated",
        ),
        (["--codec", "kivi:4+2"], r"static, 16 of 16 slots used as kivi:4\+2"),
        (["--no-cache"], r"none"),
    ],
)
def test_generate_prints_text_and_figures(folder, capsys, flags, cache_line):
    """Text starts with the prompt; prefill, decode and cache lines follow."""
    common = ["--checkpoint", folder, "--max-new-tokens", 12, "--temperature", 0]
    assert generate("abcd", *common, *flags) == 0
    out = capsys.readouterr().out
    assert out.startswith("abcd")
    assert re.search(r"^prefill: 5 tokens at [\d,]+ tokens/s$", out, re.M)
    assert re.search(r"^decode:  (\d+ tokens at [\d,]+ tokens/s|no further token)$", out, re.M)
    assert re.search(rf"^cache:   {cache_line}", out, re.M)


@pytest.mark.parametrize("draft", ["ngram", None])
def test_generate_with_drafts(folder, capsys, draft):
    """The same greedy text as without, and how many drafts were accepted."""
    common = ["abcd", "--checkpoint", folder, "--max-new-tokens", 12, "--temperature", 0]
    common += ["--cache", "sliding:6+2"]
    assert generate(*common) == 0
    text = capsys.readouterr().out.split("\n\nprefill")[0]
    assert generate(*common, "--draft", draft or folder) == 0
    out = capsys.readouterr().out
    assert out.split("\n\ndecode")[0] == text
    assert re.search(r"^drafts:  \d+ of \d+ accepted \(\d+%\), \d+ passes", out, re.M)


def test_same_seed_same_text_with_any_cache(folder, capsys):
    """Sampling is seeded, and the cache does not change the text."""

    def text(*flags):
        options = ("--checkpoint", folder, "--max-new-tokens", 20, "--temperature", 1.5)
        generate("some", *options, *flags)
        return capsys.readouterr().out.split("\nprefill:")[0]

    first = text("--seed", 1)
    assert first == text("--seed", 1, "--cache", "dynamic") == text("--seed", 1, "--no-cache")
    assert first != text("--seed", 2)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--checkpoint", "no/such/folder"], "config.json"),
        (["--capacity", "3"], "do not fit the cache"),
        (["--capacity", "0"], "at least 1"),
        (["--capacity", "9", "--cache", "dynamic"], "leave it out"),
        (["--max-new-tokens", "0"], "at least 1"),
        (["--max-new-tokens", "many"], "invalid int"),
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--top-p", "0"], "top_p"),
        (["--top-k", "-2"], "top_k"),
        (["--min-p", "7"], "min_p"),
        (["--repetition-penalty", "0"], "repetition_penalty"),
        (["--seed", "-1"], "seed"),
        (["--cache", "magic"], "sliding:WINDOW"),
        (["--cache", "sliding"], "sliding:WINDOW"),
        (["--cache", "dynamic:4"], "dynamic"),
        (["--cache", "static:4"], "do not fit the cache"),
        (["--codec", "int5"], "int8"),
        (["--codec", "none-rotated"], "int8"),
        (["--codec", "int4", "--no-cache"], "leave out"),
        (["--no-cache", "--draft", "ngram"], "--draft needs a cache"),
        (["--codec", "kivi", "--cache", "sliding:8"], "window of at least"),
        (["--frobnicate"], "unrecognized"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, capsys, flags, match):
    """Nonsense never shows a traceback."""
    arguments = ["a prompt of some length", "--max-new-tokens", "4", "--checkpoint", str(folder)]
    try:
        code = generate(*arguments, *flags)
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2
    assert match in err
    assert err.count("\n") == 1


def test_eval_prints_bits_per_byte_with_and_without_the_cache(folder, tmp_path, capsys):
    """A cache that holds all costs nothing, one that forgets or rounds changes the figure."""
    text = tmp_path / "text.txt"
    text.write_text("some text about a list and a dict, and more text about a dict. " * 6)

    def figures(*flags):
        common = ["--checkpoint", str(folder), "--text", str(text), "--context", "100"]
        assert cli.main(["eval", *common, *flags]) == 0
        out = capsys.readouterr().out
        plain, cached = (
            float(re.search(rf"^{name}: +([\d.]+) bits per byte", out, re.M)[1])
            for name in ("plain", "cache")
        )
        return plain, cached, int(re.search(r"^memory: +([\d,]+)", out, re.M)[1].replace(",", ""))

    plain, exact, size = figures()
    assert plain == exact > 0
    assert figures("--cache", "dynamic")[:2] == (plain, exact)
    plain_again, forgetful, small = figures("--cache", "sliding:2")
    assert plain_again == plain != forgetful and small < size / 8
    _, packed, smaller = figures("--codec", "int4")
    assert abs(packed - plain) < 0.05 and smaller < size / 2
    assert figures("--bytes", "50")[0] != plain


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--text", "no/such/file"], "no/such/file"),
        (["--context", "0"], "at least 1"),
        (["--bytes", "0"], "at least 1"),
        (["--cache", "magic"], "sliding:WINDOW"),
        (["--cache", "static:5", "--context", "9"], "capacity"),
    ],
)
def test_bad_input_to_eval_is_one_line_and_exit_code_2(folder, capsys, flags, match):
    """Nonsense never shows a traceback."""
    assert cli.main(["eval", "--checkpoint", str(folder), *flags]) == 2
    err = capsys.readouterr().err
    assert match in err
    assert err.count("\n") == 1


def test_a_file_of_another_format(folder, tmp_path, capsys):
    """Weights that are not safetensors are refused by name."""
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "model.safetensors").write_text("not tensors")
    assert generate("a", "--checkpoint", tmp_path) == 2
    err = capsys.readouterr().err
    assert "model.safetensors" in err
    assert err.count("\n") == 1


def test_a_command_is_needed(capsys):
    """No command: one line, exit code 2."""
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.exhaustive
def test_bench_prints_json_for_machines(capsys):
    """Every group of comparisons is there, with a positive ratio."""
    assert cli.main(["bench", "--quick", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["environment"]["backend"] == "cpu"
    operations = {row["operation"] for row in report["rows"]}
    assert operations == {
        "append", "sliding append", "append + attend", "attend", "reorder", "crop", "eager update",
        "decode", "beam search", "prefill", "speculate",
    }  # fmt: skip
    assert all(row["ratio"] > 0 for row in report["rows"])


def test_bench_prints_a_table(capsys, monkeypatch):
    """Without --json there is one line per comparison."""
    from lucid_jax import bench

    row = bench.Row("append", "1 token", "copying", 2.0, 0.5)
    monkeypatch.setattr(bench, "GROUPS", (lambda repeats, quick: [row],))
    bench.run_bench(quick=True)
    out = capsys.readouterr().out
    assert "4.0x" in out
    assert "copying" in out
