"""The command line, called in-process: output, figures, and one-line errors with exit code 2."""

import itertools
import json
import os
import re
import subprocess
import sys

import jax
import pytest
from flax import nnx

import lucid_jax as lj
from lucid_jax.models import ModelConfig, Transformer
from lucid_jax.tools import cli, generate_command, program_store

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
        ([], r"static, 16 of 256 slots"),
        (["--cache", "static", "--capacity", "40"], r"static, 16 of 40 slots"),
        (["--cache", "dynamic"], r"dynamic, 16 of 64 slots"),
        (["--cache", "sliding:6+2"], r"sliding:6\+2, 8 of 8 slots"),
        (
            ["--cache", "sliding:6+2", "--codec", "int4-rotated", "--rope-by-place"],
            r"sliding:6\+2, 8 of 8 slots used as int4-rotated",
        ),
        (["--codec", "kivi:4+2"], r"static, 16 of 256 slots used as kivi:4\+2"),
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
@pytest.mark.exhaustive
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


@pytest.mark.exhaustive
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
        (["--seed", str(2**63)], "below 2**63"),
        (["--max-new-tokens", "-3"], "at least 1"),
        (["--max-new-tokens", str(2**31 - 1)], "positions of int32"),
        (["--max-new-tokens", str(2**31 - 1), "--draft", "ngram"], "positions of int32"),
        (["--max-new-tokens", str(2**62)], "below 2**31"),
        (["--max-new-tokens", "9" * 4000], "below 2**31, got 999"),
        (["--max-new-tokens", str(2**30)], "bytes, but the device has"),
        (["--capacity", str(2**62)], "below 2**31"),
        (["--capacity", str(2**31 - 8)], "bytes, but the device has"),
        (["--cache", f"static:{2**62}"], "below 2**31"),
        (["--cache", f"sliding:{2**62}"], "below 2**31"),
        (["--cache", f"sliding:4+{2**62}"], "below 2**31"),
        (["--cache", f"sliding:{2**31 - 8}"], "bytes, but the device has"),
        (["--codec", f"int4:{2**62}"], "below 2**31"),
        (["--codec", f"kivi:4+{2**62}"], "below 2**31"),
        (["--temperature", "1e-300"], "temperature must be"),
        (["--repetition-penalty", "1e300"], "repetition_penalty must be"),
        (["--repetition-penalty", "nan"], "repetition_penalty must be"),
        (["--top-p", "nan"], "top_p"),
        (["--min-p", "nan"], "min_p"),
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
        (["--context", "-1"], "at least 1"),
        (["--context", str(2**62)], "below 2**31"),
        (["--bytes", str(2**80)], "below 2**63"),
        (["--cache", f"sliding:{2**62}"], "below 2**31"),
        (["--cache", f"sliding:{2**31 - 8}"], "bytes, but the device has"),
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


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--max-new-tokens", "0"], "at least 1"),
        (["--max-new-tokens", str(2**62)], "below 2**31"),
        (["--max-new-tokens", str(2**30)], "bytes, but the device has"),
        (["--seed", "-1"], "seed"),
        (["--temperature", "inf"], "temperature"),
        (["--caches", f"sliding:{2**62}"], "below 2**31"),
    ],
)
def test_bad_input_to_compare_is_one_line_and_exit_code_2(folder, capsys, flags, match):
    """As to the other commands."""
    assert cli.main(["compare", "abcd", "--checkpoint", str(folder), *flags]) == 2
    err = capsys.readouterr().err
    assert match in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "not enough memory"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 12\nbytes"),
            "RESOURCE_EXHAUSTED: 12 bytes",
        ),
        (OverflowError("layer 0: a compiled step"), "layer 0: a compiled step"),
    ],
)
def test_what_fails_late_is_one_line_too(folder, capsys, monkeypatch, error, message):
    """Memory may be short when nothing that was asked for is too large."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(generate_command, "stream", fail)
    assert generate("a", "--checkpoint", folder) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_errors_of_ours_keep_their_traceback(folder, monkeypatch):
    """What XLA finds wrong, but for memory, is not the user's mistake."""

    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: no")

    monkeypatch.setattr(generate_command, "stream", fail)
    with pytest.raises(jax.errors.JaxRuntimeError):
        generate("a", "--checkpoint", folder)


def test_a_window_of_more_than_the_text_is_of_the_text(folder, tmp_path, capsys):
    """However large, it asks for no more memory, and scores the same."""
    text = tmp_path / "text.txt"
    text.write_text("some text about a list")
    common = ["eval", "--checkpoint", str(folder), "--text", str(text), "--context"]
    outputs = []
    for context in ("300", str(2**31 - 1)):
        assert cli.main([*common, context]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_no_end_of_new_tokens_takes_no_memory(folder, capsys):
    """On a window, a stream keeps no more than a call's tokens."""
    from lucid_jax.models.checkpoint import load_model

    model, _ = load_model(folder)
    pieces = lj.stream(
        model, [[1, 2]], max_new_tokens=2**31 - 9, cache=lj.Sliding(4), tokens_per_call=300
    )
    plain = lj.generate(model, [[1, 2]], max_new_tokens=1201, cache=lj.Sliding(4)).rows()
    assert [token for (row,) in itertools.islice(pieces, 5) for token in row] == plain[0]


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


# --- compiled programs, kept for the next run ------------------------------------------------------


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Where they go, which is not the user's folder; without the one that the suite has set up."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    before = jax.config.jax_compilation_cache_dir
    program_store.configure({"jax_compilation_cache_dir": None})
    yield tmp_path / "cache" / "lucid-jax" / "programs"
    program_store.configure({"jax_compilation_cache_dir": before})


COUNTING = """
import json, sys, jax
from lucid_jax.tools.cli import main
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.split("/")[-1]))
code = main(sys.argv[1:])
print()
print(json.dumps([code, events.count("compile_requests_use_cache"), events.count("cache_hits")]))
"""


@pytest.mark.exhaustive
def test_the_second_run_compiles_nothing(folder, programs):
    """In two processes: all programs of the second come from the first, which wrote them all."""
    flags = ["--checkpoint", str(folder), "--max-new-tokens", "3", "--seed", "5"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    texts, counts, files = [], [], []
    for prompt in ("abcd", "abcd", "another prompt"):
        run = subprocess.run(
            [sys.executable, "-c", COUNTING, "generate", prompt, *flags],
            env=environment, check=True, capture_output=True, text=True,
        )  # fmt: skip
        assert run.stderr == ""
        text, _, last = run.stdout.rstrip("\n").rpartition("\n")
        texts.append(text.split("\n\nprefill")[0])
        counts.append(json.loads(last))
        files.append(sorted(path.name for path in programs.iterdir() if "atime" not in path.name))
    (code, requests, hits), second, third = counts
    assert code == 0 and hits == 0 < requests <= 40 and len(files[0]) == requests
    assert second == third == [0, requests, requests]
    assert files[0] == files[1] == files[2] and texts[0] == texts[1]


@pytest.fixture
def hits():
    """Compiles a program anew, and tells whether JAX found it in its cache."""
    events = []

    def listen(event, **_):
        events.append(event)

    def run():
        events.clear()
        assert jax.jit(lambda x: x * 3 + 1)(2) == 7
        return "/jax/compilation_cache/cache_hits" in events

    jax.monitoring.register_event_listener(listen)
    yield run
    jax.monitoring.unregister_event_listener(listen)


def test_the_folder_is_used_while_a_command_runs(programs, hits):
    """And JAX is left as it was found."""
    with program_store.opened():
        assert not hits() and hits()
        assert list(programs.iterdir())
    assert not hits() and jax.config.jax_compilation_cache_dir is None


def test_a_damaged_program_is_compiled_again(programs, hits, recwarn):
    """Silently."""
    with program_store.opened():
        hits()
    for path in programs.iterdir():
        path.write_bytes(b"junk")
    with program_store.opened():
        assert not hits()
    assert not recwarn.list


def test_a_folder_that_cannot_be_is_done_without(tmp_path, programs, monkeypatch, hits):
    """Here a file is in its place."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with program_store.opened():
        assert not hits() and not hits()


def test_a_folder_of_the_users_own_is_kept(tmp_path, programs, hits):
    """As of JAX_COMPILATION_CACHE_DIR, which JAX reads into its configuration."""
    program_store.configure({"jax_compilation_cache_dir": str(tmp_path / "own")})
    with program_store.opened():
        assert not hits() and hits()
    assert list((tmp_path / "own").iterdir()) and not programs.exists()


def test_no_compile_cache(folder, programs, capsys):
    """The flag leaves no trace."""
    flags = ["--checkpoint", folder, "--max-new-tokens", 2]
    assert generate("abcd", *flags, "--no-compile-cache") == 0
    assert not programs.exists()
    assert generate("abcd", *flags) == 0
    assert programs.exists()


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
    from lucid_jax.tools import bench, measure

    row = measure.Row("append", "1 token", "copying", 2.0, 0.5)
    monkeypatch.setattr(bench, "GROUPS", (lambda repeats, quick: [row],))
    bench.run_bench(quick=True)
    out = capsys.readouterr().out
    assert "4.0x" in out
    assert "copying" in out


def test_inspect_reports_on_decode_steps(folder, capsys):
    """A chunk of a prompt and a token, for a cache that is described in words."""
    arguments = ["--cache", "static", "--codec", "int8", "--batch", "2", "--length", "2048"]
    assert cli.main(["inspect", "--checkpoint", str(folder), *arguments]) == 0
    out = capsys.readouterr().out
    assert "prompt on cpu" in out and "token on cpu" in out
    assert len(re.findall(r"^ donated +[\d.]+ KiB$", out, re.M)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "abacus"], "a target is cpu, "),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
    ],
)
def test_inspect_refuses_what_cannot_be(folder, capsys, arguments, message):
    assert cli.main(["inspect", "--checkpoint", str(folder), *arguments]) == 2
    assert message in capsys.readouterr().err
