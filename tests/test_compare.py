"""`lucid-jax compare`: what it says of texts that differ; each run is what `generate` gives."""

import jax
import pytest
from flax import nnx

import lucid_jax as lj
from lucid_jax.decode import generate
from lucid_jax.models import ModelConfig, Transformer
from lucid_jax.tools import cli
from lucid_jax.tools.compare import CacheRun, Comparison, compare, default_caches, parse_caches


class Letters:
    """A tokenizer of one letter a token."""

    end_of_text_id = 0

    def decode(self, ids):
        return "".join("\n" if i == 1 else chr(ord("a") + i % 26) for i in ids)


def shown(*texts):
    tokens = {name: [ord(c) - ord("a") for c in text] for name, text in texts}
    runs = [CacheRun(name, ids, 2048, 0.5) for name, ids in tokens.items()]
    return Comparison(runs, Letters(), prompt_tokens=3)


def test_where_texts_first_differ():
    """The words before, and both continuations; line breaks are shown, not printed."""
    result = shown(("plain", "dogbcat"), ("same", "dogbcat"), ("other", "dogbdig"), ("new", "x"))
    assert [run.agreement(result.runs[0]) for run in result.runs] == [7, 7, 4, 0]
    assert result.differences() == [
        "other differs after 4 tokens: ...dog\\n",
        "    plain: cat",
        "    other: dig",
        "new differs after 0 tokens: ...",
        "    plain: dog\\ncat",
        "    new: x",
    ]


def test_a_text_that_ends_early_differs():
    result = shown(("plain", "dogs"), ("short", "dog"))
    assert result.runs[1].agreement(result.runs[0]) == 3
    assert result.differences() == [
        "short differs after 3 tokens: ...dog",
        "    plain: s",
        "    short: (ends)",
    ]


def test_the_table():
    """Figures by hand: 6 tokens after the first in half a second."""
    text = str(shown(("plain", "dogecat"), ("other", "dogedig")))
    lines = [line.split() for line in text.splitlines()]
    assert ["plain", "12", "2.0", "KiB", "reference"] in lines
    assert ["other", "12", "2.0", "KiB", "4", "of", "7"] in lines
    assert text.startswith("3 tokens of prompt, 7 new")
    assert "all caches gave the same tokens" not in text
    assert "all caches gave the same tokens" in str(shown(("plain", "dog"), ("same", "dog")))


def test_one_token_has_no_speed():
    assert shown(("plain", "d")).runs[0].tokens_per_second is None
    assert "-" in str(shown(("plain", "d")))


def test_words_name_caches():
    assert parse_caches("static, static/int8,sliding:6+2/kivi:4+2", 9) == {
        "static": lj.Static(9),
        "static/int8": lj.Static(9, lj.codecs.Int8()),
        "sliding:6+2/kivi:4+2": lj.Sliding(6, sinks=2, codec=lj.codecs.KIVI(4, 2)),
    }
    first, *_, last = default_caches(30).values()
    assert (first, last) == (lj.Static(30), lj.Sliding(15))


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    model = Transformer(config, rngs=nnx.Rngs(0))
    # Weights so large that what is forgotten changes what is said.
    nnx.update(model, jax.tree.map(lambda x: 20 * x, nnx.state(model)))
    return model


@pytest.mark.exhaustive
def test_each_run_is_what_generate_gives(model):
    caches = parse_caches("static,sliding:4/int8", 17)
    result = compare(model, Letters(), [5, 6, 7, 8, 9, 10], caches, max_new_tokens=12, repeats=1)
    assert [run.name for run in result.runs] == list(caches)
    assert result.prompt_tokens == 6
    for run, spec in zip(result.runs, caches.values(), strict=True):
        expected = generate(
            model, [[5, 6, 7, 8, 9, 10]], max_new_tokens=12, cache=spec, stop_tokens=[0]
        )
        assert run.tokens == expected.rows()[0]
        assert run.nbytes == lj.nbytes(expected.cache)
        assert run.decode_seconds > 0
    assert result.runs[0].agreement(result.runs[0]) == len(result.runs[0].tokens)
    assert result.runs[1].agreement(result.runs[0]) < 12, "a window of 4 must show"


def test_no_caches(model):
    with pytest.raises(ValueError, match="at least one cache"):
        compare(model, Letters(), [5], {}, max_new_tokens=2)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    pytest.importorskip("tokenizers")
    from lucid_jax.models.checkpoint import save_model
    from lucid_jax.models.tokenizer import Tokenizer

    path = tmp_path_factory.mktemp("model")
    save_model(path, model, Tokenizer.train(["some text about a list and a dict"], 270))
    return path


def test_the_command_prints_a_line_for_each_cache(folder, capsys):
    arguments = ["some text", "--checkpoint", str(folder), "--max-new-tokens", "9"]
    assert cli.main(["compare", *arguments, "--caches", "static,sliding:2"]) == 0
    out = capsys.readouterr().out
    for name in ("static", "sliding:2"):
        assert any(line.split()[:1] == [name] for line in out.splitlines())
    assert "reference" in out
    assert "sliding:2 differs after" in out


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--caches", "magic"], "sliding:WINDOW"),
        (["--caches", "static/int5"], "int8"),
        (["--caches", ""], "sliding:WINDOW"),
        (["--caches", "static,static"], "there twice"),
        (["--caches", "static:2"], "do not fit the cache"),
        (["--max-new-tokens", "0"], "at least 1"),
        (["--temperature", "-1"], "temperature"),
        (["--seed", "-1"], "seed"),
        (["--checkpoint", "no/such/folder"], "config.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, capsys, flags, match):
    arguments = ["compare", "a prompt", "--max-new-tokens", "4", "--checkpoint", str(folder)]
    assert cli.main([*arguments, *flags]) == 2
    err = capsys.readouterr().err
    assert match in err
    assert err.count("\n") == 1
