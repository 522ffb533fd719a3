"""Beam search: a plain reference, transformers' hypotheses, and what the compiled search costs."""

import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lucid_jax as lj
from lucid_jax.decode import BeamResult, beam, beam_loop, beam_search, generate
from lucid_jax.decode import prefill as prefill_module
from lucid_jax.decode.options import DecodeOptions
from lucid_jax.decode.prompts import pad_prompts
from lucid_jax.models import ModelConfig, Transformer, load_model
from tests.helpers import USERS_XLA, assert_same, check_beams, make, tokens
from tests.plain_beam import search

FIXTURES = Path(__file__).parent / "fixtures"
RECORDED = json.loads((FIXTURES / "beam" / "cases.json").read_text())
PROMPTS = [[5, 6, 7], list(range(20, 31)), [44]]
STOPS = [2, 15]
NEW = 10


@functools.cache
def model():
    """Random, with large weights: likelihoods differ by so much that rounding decides nothing."""
    return load_model(FIXTURES / "beam")[0]


@functools.cache
def last_logits(spec=None, rows=4, length=24):
    """A function from token lists to the logits after each, through a fresh cache row each."""
    graph, params = nnx.split(model())

    @jax.jit
    def run(params, padded, lengths):
        net = nnx.merge(graph, params)
        state = net.init_cache(lj.Static(length) if spec is None else spec, rows, ragged=True)
        hidden, _ = net.hidden(padded, state, lengths=lengths)
        return net.logits(prefill_module.hidden_at(hidden, lengths)[:, None])[:, 0]

    def logits(texts):
        padded, lengths = pad_prompts(texts + [[0]] * (rows - len(texts)), 64)
        padded = np.pad(padded, ((0, 0), (0, length - padded.shape[1])))
        return np.asarray(run(params, padded, lengths), np.float64)[: len(texts)]

    return logits


def check(result, expected):
    """The result holds these hypotheses of each prompt."""
    assert result.rows() == [[text for _, text in row] for row in expected]
    scores = [[score for score, _ in row] for row in expected]
    np.testing.assert_allclose(result.scores, scores, atol=1e-4, rtol=1e-5)


RULES = [
    {},
    {"early_stopping": True, "length_penalty": 0.6},
    {"early_stopping": "never", "length_penalty": 2.0},
    {"early_stopping": "never", "length_penalty": 0.0},
    {"length_penalty": -1.0},
]


@pytest.mark.parametrize(
    "history", ["tree", "reorder", pytest.param("gather", marks=pytest.mark.exhaustive)]
)
def test_hypotheses_are_those_of_a_plain_search(history, compilations):
    """Every rule, prompts of unequal length, however the past is kept; rules compile nothing."""
    compiled = functools.partial(
        beam_search, model(), PROMPTS, num_beams=3, num_return_sequences=3, max_new_tokens=NEW,
        stop_tokens=STOPS, history=history,
    )  # fmt: skip
    plain = functools.partial(search, last_logits(), width=3, new=NEW, stops=STOPS)
    before = None
    for rules in RULES:
        result = compiled(**rules)
        before = compilations() if before is None else before
        assert compilations() == before
        expected = [plain(prompt, **rules)[0] for prompt in PROMPTS]
        before = compilations()
        check(result, expected)
        assert result.history == history
        assert (result.sequences[np.arange(NEW) >= result.lengths[..., None]] == 0).all()


def test_a_plain_search_says_how_close_it_was():
    """Two hypotheses of equal length n differ least: their scores by log(10 / 9) / n ** 2."""
    logits = np.log([0.5, 0.45, 0.05])
    found, margin = search(
        lambda texts: np.stack([logits] * len(texts)), [7], 2, 2, length_penalty=2.0, stops=[1]
    )
    assert [text for _, text in found] == [[0, 0], [0, 1]]
    assert margin == pytest.approx(np.log(10 / 9) / 2)  # one sum down by this, the other up


@pytest.mark.exhaustive
def test_a_repetition_penalty():
    """Tokens of the prompt and of the beam's own past become less likely, not those of others."""
    options = {"repetition_penalty": 1.3, "length_penalty": 0.6}
    result = beam_search(
        model(), PROMPTS, num_beams=3, num_return_sequences=3, max_new_tokens=NEW,
        stop_tokens=STOPS, **options,
    )  # fmt: skip
    plain = functools.partial(search, last_logits(), width=3, new=NEW, stops=STOPS)
    check(result, [plain(prompt, **options)[0] for prompt in PROMPTS])


def cases():
    """The recorded cases by what is compiled: beams, stop tokens, repetition penalty or none."""
    groups = {}
    for index, case in enumerate(RECORDED["cases"]):
        name = f"{case['num_beams']} beams, {len(case['stop_tokens'])} stops"
        name += f", repetition {case['repetition_penalty']}"
        groups.setdefault(name, []).append(index)
    rare = [pytest.mark.exhaustive]
    return [
        pytest.param(group, id=name, marks=rare if name[0] in "25" else [])
        for name, group in groups.items()
    ]


@pytest.mark.parametrize("group", cases())
def test_hypotheses_are_those_of_transformers(group):
    """All hypotheses of 50 random prompts, in 17 settings, as transformers 5 found them."""
    expected = np.load(FIXTURES / "beam" / "expected.npz")
    for index in group:
        check_beams(model(), RECORDED, expected, index)


def test_moving_only_what_parted_loses_nothing():
    """Prompts one by one: in a batch, the shortest prompt has more than its own share moved."""
    expected = np.load(FIXTURES / "beam" / "expected.npz")
    (index, *_), *_ = (param.values[0] for param in cases() if param.id.startswith("5"))
    case = RECORDED["cases"][index]
    for row, prompt in enumerate(RECORDED["prompts"]):
        result = beam_search(
            model(), [prompt], max_new_tokens=RECORDED["max_new_tokens"], cache=lj.Static(40),
            num_return_sequences=5, history="reorder", **case,
        )  # fmt: skip
        np.testing.assert_array_equal(result.sequences[0], expected[f"sequences_{index}"][row])


def test_hypotheses_of_a_fresh_model_are_those_of_transformers(tmp_path):
    """The same against the library itself, where it is installed."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("record_beam", FIXTURES / "record_beam.py")
    record = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(record)
    theirs = record.tiny_llama(seed=1)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((FIXTURES / "beam" / "tokenizer.json").read_bytes())
    ours, _ = load_model(tmp_path)
    case = {"num_beams": 3, "length_penalty": 1.5, "early_stopping": False, "stop_tokens": [7, 8]}
    for prompt in PROMPTS:
        result = beam_search(ours, [prompt], max_new_tokens=9, num_return_sequences=3, **case)
        sequences, lengths, scores = record.expected(theirs, prompt, case, new=9)
        np.testing.assert_array_equal(result.sequences[0], sequences)
        np.testing.assert_array_equal(result.lengths[0], lengths)
        np.testing.assert_allclose(result.scores[0], scores, atol=1e-4)


def test_a_prompt_does_not_depend_on_its_batch():
    """Each prompt alone, and prefilled in other chunks, gives what it gives in the batch."""
    options = {"num_beams": 3, "max_new_tokens": NEW, "stop_tokens": STOPS}
    together = beam_search(model(), PROMPTS, **options)
    cut = beam_search(model(), PROMPTS, prefill_chunk=4, **options)
    assert cut.rows() == together.rows()
    alone = beam_search(model(), PROMPTS[1:2], cache=lj.Static(60), **options)
    assert alone.rows() == together.rows()[1:2]
    np.testing.assert_allclose(alone.scores, together.scores[1:2], atol=1e-4)


@pytest.mark.exhaustive
def test_one_beam_without_stop_tokens_is_greedy():
    """Nothing to choose from: the tokens of `generate`; the score is their log-probability."""
    result = beam_search(model(), PROMPTS, num_beams=1, max_new_tokens=NEW, length_penalty=0.0)
    assert [row for (row,) in result.rows()] == generate(
        model(), PROMPTS, max_new_tokens=NEW
    ).rows()
    np.testing.assert_allclose(result.sums[-1], result.scores, atol=1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("spec", "history"),
    [
        (lj.Dynamic(), "tree"),
        (lj.Static(60, track=True), "tree"),
        (lj.Static(60, lj.codecs.Int8()), "tree"),
        (lj.Static(24), "reorder"),
        (lj.Dynamic(lj.codecs.Int4()), "tree"),
        ([lj.Static(50), lj.Static(50, lj.codecs.Int8())], "tree"),
        ([lj.Static(50), lj.Dynamic()], "reorder"),
        ([lj.Static(50), lj.Shared(0)], "tree"),
        (lj.Sliding(6, sinks=1), "reorder"),
        (lj.Sliding(5), "gather"),
        (lj.Static(60, lj.codecs.KIVI(group=4, residual=3)), "reorder"),
        (lj.Sliding(12, sinks=1, codec=lj.codecs.KIVI(group=4, residual=3)), "reorder"),
        ([lj.Sliding(6), lj.Dynamic(lj.codecs.Int4())], "reorder"),
    ],
    ids=str,
)
def test_any_cache_searches_as_it_would_alone(spec, history):
    """Hypotheses are those of a plain search whose every text goes through a row of its own.

    "tree" and "reorder" are what is chosen by default.
    """
    options = {"num_beams": 4, "max_new_tokens": NEW, "stop_tokens": STOPS}
    asked = "gather" if history == "gather" else None
    result = beam_search(
        model(), PROMPTS, cache=spec, num_return_sequences=4, history=asked, **options
    )
    assert result.history == history
    logits = last_logits(tuple(spec) if isinstance(spec, list) else spec)
    check(result, [search(logits, prompt, 4, NEW, stops=STOPS)[0] for prompt in PROMPTS])


def test_a_prompt_is_prefilled_once_not_once_per_beam(monkeypatch):
    """Prefill sees each prompt's tokens in one row, and a tree's cache never has more rows."""
    fed = []
    prefill = prefill_module._prefill
    monkeypatch.setattr(
        prefill_module,
        "_prefill",
        lambda graph, params, state, chunk, counts, last: (
            fed.append((chunk.shape[0], state.batch_size, counts.sum()))
            or prefill(graph, params, state, chunk, counts, last)
        ),
    )
    options = DecodeOptions.of(max_new_tokens=NEW, stop_tokens=STOPS)
    for history, rows in (("tree", 3), ("reorder", 9)):
        fed.clear()
        state = beam.prefilled(model(), PROMPTS, options, 3, history)[2]
        assert fed == [(3, 3, sum(map(len, PROMPTS)))]
        assert state.batch_size == rows


@pytest.mark.parametrize("history", ["tree", "reorder"])
@pytest.mark.exhaustive
def test_the_search_makes_no_second_cache(history):
    """The compiled loop's scratch memory is far below one buffer of the cache it is given."""
    options = DecodeOptions.of(max_new_tokens=NEW, stop_tokens=STOPS, cache=lj.Static(30000))
    rules = beam.as_rules(options, 1.0, False, 64)
    start = beam.prefilled(model(), PROMPTS[:1], options, 4, history)
    buffer = start[2].layers[0].key.nbytes
    memory = beam_loop.search_from.lower(*start, rules).compile(USERS_XLA).memory_analysis()
    assert memory.temp_size_in_bytes < buffer / 2
    assert memory.alias_size_in_bytes >= 4 * buffer  # keys and values of two layers, in place


def test_heirs_keep_their_beams_number():
    """A beam's best continuation stays in its row; the others fill the rows of beams that died."""
    parent = np.random.default_rng(0).integers(0, 5, (200, 11))
    order = np.argsort(np.random.default_rng(1).random((200, 11)))[:, :5]
    settled = np.asarray(beam_loop._settled(jnp.asarray(parent), jnp.asarray(order)))
    for parents, chosen, placed in zip(parent, order, settled, strict=True):
        assert sorted(placed) == sorted(chosen)
        for number in range(5):
            heirs = [c for c in chosen if parents[c] == number]
            assert not heirs or placed[number] == heirs[0]


def test_fewer_hypotheses_than_beams():
    """Where there are not W different texts, the rest is empty and scored -inf."""
    config = ModelConfig(
        vocab_size=2, hidden_size=8, intermediate_size=8, num_attention_heads=1, num_hidden_layers=1,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    two = Transformer(config, rngs=nnx.Rngs(0))
    result = beam_search(two, [[1]], num_beams=4, max_new_tokens=1, num_return_sequences=4)
    assert result.lengths.tolist() == [[1, 1, 0, 0]]
    assert sorted(result.sequences[0, :2, 0]) == [0, 1]
    assert np.isneginf(result.scores[0]).tolist() == [False, False, True, True]
    np.testing.assert_allclose(np.exp(result.scores[0, :2]).sum(), 1, rtol=1e-5)
    assert result.rows()[0][2:] == [[], []]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_beams": 0}, "num_beams must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"num_return_sequences": 3}, "at most num_beams, got 3 and 2"),
        ({"early_stopping": "always"}, "'never', got 'always'"),
        ({"early_stopping": 1}, "'never', got 1"),
        ({"length_penalty": float("nan")}, "length_penalty=nan"),
        ({"length_penalty": 1e3}, "length_penalty=1000"),
        ({"length_penalty": -1e3}, "positive float32"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"prefill_chunk": 0}, "prefill_chunk must be at least 1"),
        ({"stop_tokens": range(64)}, "at least one must not be a stop token"),
        ({"history": "trees"}, "history must be 'tree', 'reorder' or 'gather'"),
        ({"cache": lj.Static(5)}, "do not fit"),
        ({"cache": lj.Static(7), "history": "tree"}, "takes 9 slots, but the capacity is 7"),
        ({"cache": lj.Sliding(9), "history": "tree"}, "tree.*Sliding.*history='reorder'"),
        ({"cache": [lj.Static(9), lj.Static(10)], "history": "tree"}, "different capacities"),
    ],
)
def test_bad_input(options, match):
    """What makes no sense is refused before anything runs, with the reason."""
    with pytest.raises(ValueError, match=match):
        beam_search(model(), [[1, 2, 3]], **({"num_beams": 2, "max_new_tokens": 4} | options))


def test_models_whose_positions_count_slots_get_a_row_per_beam():
    """Windows and rotary positions by place would count other branches too."""

    class Windowed(Transformer):
        windows = (None, 3)

    config = model().config
    windowed = nnx.eval_shape(lambda: Windowed(config, rngs=nnx.Rngs(0)))
    by_place = nnx.eval_shape(lambda: Transformer(config, rope_by_place=True, rngs=nnx.Rngs(0)))
    for net, reason in ((windowed, "windows"), (by_place, "rotary")):
        with pytest.raises(ValueError, match=reason):
            beam_search(net, [[1]], num_beams=2, max_new_tokens=2, history="tree")
        options = DecodeOptions.of(max_new_tokens=2, cache=lj.Static(9))
        assert beam._open_cache(net, options, np.array([1]), 2, None)[2] == "reorder"


# --- reorder(since=) -------------------------------------------------------------------------------

KIVI = lj.codecs.KIVI(group=4, residual=2)
LAYOUTS = {
    "static": lj.Static(90),
    "dynamic": lj.Dynamic(),
    "int4": lj.Static(90, lj.codecs.Int4()),
    "tracked": lj.Static(90, track=True),
    "kivi": lj.Static(90, KIVI),
    "sliding": lj.Sliding(30, 2, 3),
    "sliding-kivi": lj.Sliding(30, 2, 3, KIVI),
}


def beams_of(spec, ragged, shared=7, own=60):
    """Two prompts of `shared` tokens, three rows each, which then went on differently."""
    state = make(spec, batch=2, ragged=ragged)
    counts = {"lengths": [shared, shared - 3]} if ragged else {}
    state = lj.update(state, *tokens(0, 2, shared), 0, **counts)
    state = lj.repeat_interleave(state, 3)
    counts = {"lengths": [own, 5, own - 9, 4, 33, 0]} if ragged else {}
    return lj.update(state, *tokens(1, 6, own), 0, **counts)


EVERYDAY = [("static", True), ("kivi", False)]
REST = [(name, ragged) for name in LAYOUTS for ragged in (False, True)]


@pytest.mark.parametrize(
    ("name", "ragged"),
    [
        *EVERYDAY,
        *(pytest.param(*x, marks=pytest.mark.exhaustive) for x in REST if x not in EVERYDAY),
    ],
)
def test_reorder_since_the_beams_parted_equals_reorder(name, ragged):
    """Whether eager, donated or traced, with one position or one per row; also what comes next."""
    rows = [2, 1, 1, 5, 3, 4]
    since = np.array([7, 7, 7, 4, 4, 4] if ragged else [7] * 6)
    expected = lj.reorder(beams_of(LAYOUTS[name], ragged), rows)
    for place in (since, since.min()):
        state = beams_of(LAYOUTS[name], ragged)
        moved = [
            lj.reorder(state, rows, since=place),
            jax.jit(lambda s, p: lj.reorder(s, jnp.array(rows), since=p))(state, place),
            lj.reorder(state, rows, since=place, donate=True),
        ]
        for result in moved:
            assert_same(result, expected)
    new = tokens(2, 6, 9)
    assert_same(lj.update(moved[-1], *new, 0), lj.update(expected, *new, 0))


def test_what_is_shared_is_not_moved():
    """Told that rows share five tokens, `reorder` leaves those where they are, true or not."""
    state = lj.update(make(lj.Static(80), batch=2), *tokens(0, 2, 70), 0)
    keys = np.asarray(lj.get(state, 0)[0])
    swapped = np.asarray(lj.get(lj.reorder(state, [1, 0], since=5), 0)[0])
    np.testing.assert_array_equal(swapped[:, :, :5], keys[:, :, :5])
    np.testing.assert_array_equal(swapped[:, :, 5:], keys[::-1, :, 5:])
    still = np.asarray(lj.get(lj.reorder(state, [1, 0], since=70), 0)[0])
    np.testing.assert_array_equal(still, keys)
    # A traced position out of range is taken for the nearest in range.
    run = jax.jit(lambda s, p: lj.reorder(s, jnp.array([1, 0]), since=p))
    for place, same in ((-3, 0), (1000, 70)):
        got = np.asarray(lj.get(run(state, np.int32(place)), 0)[0])
        np.testing.assert_array_equal(got[:, :, same:], keys[::-1, :, same:])


def test_a_row_that_has_not_packed_what_it_shares_gets_it():
    """Eight tokens are shared, but in the shorter row only four of them are quantized so far."""
    state = make(lj.Static(40, KIVI), batch=1, ragged=True)
    state = lj.repeat_interleave(lj.update(state, *tokens(0, 1, 8), 0), 2)
    state = lj.update(state, *tokens(1, 2, 12), 0, lengths=[0, 12])
    assert_same(lj.reorder(state, [1, 1], since=8), lj.reorder(state, [1, 1]))


@pytest.mark.parametrize(
    ("rows", "since", "error", "match"),
    [
        ([0, 1, 1], 2, ValueError, "must stay 2, got 3"),
        ([0, 1], [2], ValueError, r"shape \(2,\), got \(1,\)"),
        ([0, 1], [[2, 2]], ValueError, r"shape \(2,\), got \(1, 2\)"),
        ([0, 1], -1, ValueError, r"\[0, 5\], got -1"),
        ([0, 1], [5, 6], ValueError, "nothing beyond what they hold"),
        ([0, 1], 2.0, TypeError, "since must hold integers"),
        ([0, 1], True, TypeError, "since must hold integers"),
        ([0, 2], 2, IndexError, "got 2"),
    ],
)
def test_reorder_since_refuses(rows, since, error, match):
    """A claim that cannot be true, or is none."""
    state = lj.update(make(lj.Static(8)), *tokens(0, 2, 5), 0)
    with pytest.raises(error, match=match):
        lj.reorder(state, rows, since=since)


# --- the picture -----------------------------------------------------------------------------------


class Letters:
    """Decodes an id to a letter."""

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)


@pytest.mark.parametrize("spec", [lj.Chunked(4), lj.Sliding(4)], ids=str)
def test_a_model_whose_own_cache_drops_tokens_reorders_rows(monkeypatch, spec):
    """Attention in blocks is no window: what cannot be a tree is seen from the cache it asks for."""
    monkeypatch.setattr(Transformer, "cache_spec", lambda self, length, *, slack=0: spec)
    expected = beam_search(model(), [[1, 2, 3]], num_beams=2, max_new_tokens=4, cache=spec)
    result = beam_search(model(), [[1, 2, 3]], num_beams=2, max_new_tokens=4)
    assert result.history == "reorder"
    np.testing.assert_array_equal(result.sequences, expected.sequences)
    with pytest.raises(ValueError, match="does not store each token by itself"):
        beam_search(model(), [[1, 2, 3]], num_beams=2, max_new_tokens=4, history="tree")


def test_the_beam_tree_is_drawn():
    """Live beams in grey, a coloured line for each hypothesis, which ends at its own length."""
    result = BeamResult(
        sequences=np.array([[[1, 4, 0], [2, 5, 6], [0, 0, 0]]]),
        lengths=np.array([[2, 3, 0]]),
        scores=np.array([[-0.5, -1.25, -np.inf]]),
        tokens=np.array([[[1, 2, 0]], [[3, 5, 0]], [[6, 7, 0]]]),
        parents=np.array([[[0, 0, 0]], [[0, 1, 0]], [[1, 1, 0]]]),
        sums=np.array([[[-1.0, -2, -np.inf]], [[-2.0, -3, -np.inf]], [[-3.0, -4, -np.inf]]]),
        ends=np.array([[0, 1, 0]]),
        history="tree",
    )
    figure = lj.plot_beam_tree(result, Letters())
    (axes,) = figure.axes
    assert sorted(text.get_text() for text in axes.texts) == ["b", "c", "d", "e", "f", "g"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["-0.500", "-1.250"]
    lines = [line.get_ydata() for line in axes.lines if not line.get_label().startswith("_")]
    assert [list(y) for y in lines] == [[1.0, 0.0, 0.3], [1.0, 1.0, 1.0, 1.3]]
    assert {text.get_text() for text in lj.plot_beam_tree(result).axes[0].texts} == set("123456")
    with pytest.raises(ValueError, match="row"):
        lj.plot_beam_tree(result, row=1)
