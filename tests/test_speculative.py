"""`speculate`: the text of `generate`, or its distribution, whatever the drafts are worth."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

import lucid_jax as lj
from lucid_jax.decode import speculation_loop
from lucid_jax.decode import speculative as module
from lucid_jax.decode.acceptance import accept_sampled, accept_tree
from lucid_jax.decode.drafts import lookup
from lucid_jax.decode.sampling import filtered
from lucid_jax.decode.topology import Topology
from lucid_jax.models import ModelConfig, Transformer
from tests.helpers import USERS_XLA

VOCAB = 24
PROMPTS = [[1, 2, 3], list(range(5, 18)), [4]]
SIZES = {"int8": lj.codecs.Int8(), "fp8": lj.codecs.Float8(), "int4": lj.codecs.Int4(group=8)}
KIVI = lj.codecs.KIVI(group=4, residual=4)


def make_model(seed, noise=0.0, vocab=VOCAB, hidden=16, layers=1, **options):
    """A random model of strong opinions, so that its text varies; `noise` makes another like it."""
    config = ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        **options,
    )
    model = Transformer(config, rngs=nnx.Rngs(seed))
    graph, params = nnx.split(model)
    other = nnx.split(Transformer(config, rngs=nnx.Rngs(seed + 1000)))[1]
    mix = lambda a, b: 15 * (a + noise * b) if a.ndim > 1 else a  # noqa: E731
    return nnx.merge(graph, jax.tree.map(mix, params, other))


@pytest.fixture(scope="module")
def model():
    return make_model(3)


@pytest.fixture(scope="module")
def plain(model):
    """What `generate` makes of the prompts: most tests use these sizes, and so one program."""
    return lj.generate(model, PROMPTS, max_new_tokens=40)


@pytest.fixture(scope="module")
def draft():
    """Agrees with the model about half the time."""
    return make_model(3, noise=0.25)


@functools.cache
def _contrarian():
    """A draft that is always wrong: the model's own choice, plus one."""
    model = make_model(3)
    kernel = model.lm_head.kernel
    kernel.set_value(jnp.roll(kernel[...], 1, axis=1))
    return model


def _check(result, plain):
    """The same tokens and the same cache as `generate`'s, and figures that add up."""
    assert result.rows() == plain.rows()
    np.testing.assert_array_equal(result.tokens, plain.tokens)
    for layer, other in zip(result.cache.layers, plain.cache.layers, strict=True):
        np.testing.assert_array_equal(layer.length, other.length)
        np.testing.assert_array_equal(layer.position, other.position)
    ends = result.lengths - 1 - result.rounds - result.accepted
    assert ((ends == 0) | (ends == -1)).all()  # -1: a stop token among the drafts
    assert (result.accepted <= result.proposed).all()


def _drafts(model, draft):
    return {
        "model": draft,
        "self": model,
        "contrarian": _contrarian(),
        "ngram": lj.NGram(),
        "tree": lj.Tree(draft, (2, 2, 1)),
    }


@pytest.mark.parametrize("kind", ["model", "ngram", "tree"])
def test_greedy_is_greedy(model, draft, plain, kind):
    """Unequal prompts, drafts of uneven worth: token for token what `generate` gives."""
    result = lj.speculate(model, PROMPTS, draft=_drafts(model, draft)[kind], max_new_tokens=40)
    _check(result, plain)
    assert len(set(plain.rows()[0])) > 3
    assert 0 < result.acceptance < 1
    if kind != "tree":
        assert len(set(result.accepted.tolist())) > 1  # rows went at their own pace
    keys, _, valid = lj.get(result.cache, 0)
    expected, _, other = lj.get(plain.cache, 0)
    for row in range(3):
        np.testing.assert_allclose(
            keys[row][:, valid[row]], expected[row][:, other[row]], atol=1e-4
        )


LAYOUTS = {
    "static": lj.Static(60),
    "dynamic": lj.Dynamic(),
    "sliding": lj.Sliding(7, slack=4),
    "sinks": lj.Sliding(6, sinks=3, slack=5),
    "kivi": lj.Static(60, KIVI),
    "dynamic-kivi": lj.Dynamic(KIVI),
    "sliding-kivi": lj.Sliding(12, sinks=1, slack=4, codec=KIVI),
}
for _name, _codec in SIZES.items():
    LAYOUTS |= {
        _name: lj.Static(60, _codec),
        f"dynamic-{_name}": lj.Dynamic(_codec),
        f"sliding-{_name}": lj.Sliding(7, slack=4, codec=_codec),
        f"sinks-{_name}": lj.Sliding(6, sinks=3, slack=4, codec=_codec),
    }


def _same_on(model, draft, name):
    spec = LAYOUTS[name]
    plain = lj.generate(model, PROMPTS, max_new_tokens=40, cache=spec)
    own = None if isinstance(draft, lj.NGram) else lj.Dynamic()
    result = lj.speculate(
        model, PROMPTS, draft=draft, max_new_tokens=40, cache=spec, draft_cache=own
    )
    _check(result, plain)
    assert 0 < result.acceptance < 1


@pytest.mark.exhaustive
@pytest.mark.drawn
def test_greedy_on_a_window_with_a_codec(model, draft):
    """A quantized ring that wraps many times, drafts taken back out of it; stop tokens too."""
    spec = LAYOUTS["sinks-int8"]
    free = lj.generate(model, PROMPTS, max_new_tokens=40, cache=spec).rows()
    options = {"max_new_tokens": 40, "cache": spec, "stop_tokens": [free[0][25]]}
    plain = lj.generate(model, PROMPTS, **options)
    result = lj.speculate(model, PROMPTS, draft=draft, **options)
    _check(result, plain)
    assert min(result.lengths) < 40
    assert 0 < result.acceptance < 1


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", ["model", "ngram", "contrarian"])
def test_greedy_on_every_layout_and_codec(model, draft, name, kind):
    """The same for the rest of layouts x codecs."""
    if kind == "contrarian":
        spec = LAYOUTS[name]
        plain = lj.generate(model, PROMPTS, max_new_tokens=40, cache=spec)
        result = lj.speculate(model, PROMPTS, draft=_contrarian(), max_new_tokens=40, cache=spec)
        _check(result, plain)
    else:
        _same_on(model, _drafts(model, draft)[kind], name)


@pytest.mark.exhaustive
def test_greedy_on_unlike_layers():
    """A window in one layer, everything in the other."""
    model, draft = make_model(3, layers=2), make_model(3, noise=0.2, layers=2)
    spec = [lj.Sliding(9, slack=4), lj.Static(60)]
    plain = lj.generate(model, PROMPTS, max_new_tokens=40, cache=spec)
    result = lj.speculate(model, PROMPTS, draft=draft, max_new_tokens=40, cache=spec)
    _check(result, plain)
    assert 0 < result.acceptance < 1


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["static", "dynamic", "int8", "fp8", "int4", "dynamic-int4"])
@pytest.mark.parametrize("branching", [(1,), (3,), (2, 2, 1), (1, 3, 2)])
def test_trees_on_every_layout_that_holds_them(model, draft, name, branching):
    """Every codec that stores tokens one by one keeps the right path of a tree."""
    spec = LAYOUTS[name]
    plain = lj.generate(model, PROMPTS, max_new_tokens=40, cache=spec)
    roomy = lj.Static(80, spec.codec) if isinstance(spec, lj.Static) else spec
    for tree in (lj.Tree(draft, branching), lj.Tree(model, branching)):
        result = lj.speculate(
            model, PROMPTS, draft=tree, max_new_tokens=40, cache=roomy, draft_cache=roomy
        )
        _check(result, plain)
        if tree.model is model:
            depth = len(branching)
            assert result.rounds.tolist() == [math.ceil(39 / (depth + 1))] * 3


def test_drafts_that_are_always_right_or_wrong(model, plain):
    """The model as its own draft: K + 1 tokens a round. One that is never right: one token."""
    own = lj.speculate(model, PROMPTS, draft=model, max_new_tokens=40)
    _check(own, plain)
    assert own.acceptance == 1
    assert own.rounds.tolist() == [math.ceil(39 / 5)] * 3
    wrong = lj.speculate(model, PROMPTS, draft=_contrarian(), max_new_tokens=40)
    _check(wrong, plain)
    assert wrong.acceptance == 0
    assert wrong.rounds.tolist() == [39] * 3


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["model", "tree"])
def test_stop_tokens_end_a_row_inside_a_run_of_drafts(model, draft, plain, kind):
    """A row ends at its stop token, wherever in a round that is, and its cache with it."""
    stops = sorted({row[n] for row, n in zip(plain.rows(), (11, 7, 19), strict=True)})
    plain = lj.generate(model, PROMPTS, max_new_tokens=40, stop_tokens=stops)
    assert len(set(plain.lengths.tolist())) > 1
    for one in (draft, model):
        one = lj.Tree(one, (2, 1, 1)) if kind == "tree" else one
        result = lj.speculate(model, PROMPTS, draft=one, max_new_tokens=40, stop_tokens=stops)
        _check(result, plain)


@pytest.mark.exhaustive
def test_a_row_does_not_depend_on_its_neighbours(model, draft):
    """Alone or in a batch, greedy or sampled, a row gets the same tokens and figures."""
    for sampling in (None, lj.Sampling(0.9, top_k=9)):
        options = {"max_new_tokens": 25, "sampling": sampling, "draft": draft, "seed": 3}
        together = lj.speculate(model, PROMPTS, **options)
        alone = lj.speculate(model, PROMPTS[:1], **options)
        assert alone.rows() == together.rows()[:1]
        for name in ("rounds", "proposed", "accepted"):
            assert getattr(alone, name)[0] == getattr(together, name)[0]


@pytest.mark.exhaustive
def test_repetition_penalty_sees_the_drafts_before_it(model, draft):
    """Greedy with a penalty: what a token costs depends on the drafts accepted with it."""
    sampling = lj.Sampling(repetition_penalty=1.7)
    plain = lj.generate(model, PROMPTS, max_new_tokens=24, sampling=sampling)
    assert plain.rows() != lj.generate(model, PROMPTS, max_new_tokens=24).rows()
    for one in (draft, lj.Tree(draft, (2, 2))):
        result = lj.speculate(model, PROMPTS, draft=one, max_new_tokens=24, sampling=sampling)
        _check(result, plain)
        assert result.acceptance > 0
    own = lj.speculate(model, PROMPTS, draft=model, max_new_tokens=24, sampling=sampling)
    assert own.acceptance == 1


# --- n-grams ---------------------------------------------------------------------------------------


def _lookup_reference(tokens, width, longest, shortest):
    for n in range(longest, shortest - 1, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[len(tokens) - n :]:
                copied = list(tokens)
                source = start + n
                for i in range(width):
                    copied.append(copied[source + i])
                return copied[len(tokens) :]
    return None


@pytest.mark.parametrize("spec", [lj.NGram(), lj.NGram(4, 2), lj.NGram(1)], ids=str)
def test_lookup_is_the_obvious_search(spec):
    """Against Python lists, on texts of few letters and every length."""
    rng = np.random.default_rng(0)
    rows, size = 200, 24
    history = rng.integers(0, 3, (rows, size)).astype(np.int32)
    filled = rng.integers(1, size + 1, rows).astype(np.int32)
    tokens, found = jax.jit(lookup, static_argnums=(2, 3))(history, filled, spec, 5)
    some = 0
    for row in range(rows):
        text = history[row, : filled[row]].tolist()
        expected = _lookup_reference(text, 5, spec.max_ngram, spec.min_ngram)
        assert bool(found[row]) == (expected is not None)
        if expected is not None:
            assert tokens[row].tolist() == expected
            some += 1
    assert 0 < some < rows


# --- sampling --------------------------------------------------------------------------------------


def _p_value(counts, expected):
    """Of a chi-square test; rare cells are taken together, and impossible ones must be empty."""
    counts, expected = np.ravel(counts), np.ravel(expected)
    assert counts[expected == 0].sum() == 0
    rare = expected < 5
    cells = [*zip(counts[~rare], expected[~rare], strict=True)]
    if expected[rare].sum() > 0:
        cells.append((counts[rare].sum(), expected[rare].sum()))
    observed, wanted = np.array(cells).T
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    return float(scipy.stats.chi2.sf(statistic, len(cells) - 1))


def _joint(model, prompt, count, sampling):
    """The exact distribution of the next `count` tokens, one axis each."""
    vocab = model.config.vocab_size
    joint = np.ones(1)
    for n in range(count):
        texts = np.array([[*prompt, *more] for more in itertools.product(range(vocab), repeat=n)])
        seen = np.zeros((len(texts), vocab), bool)
        np.put_along_axis(seen, texts, True, axis=1)
        logits = model(jnp.asarray(texts))[:, -1]
        p = np.asarray(jax.nn.softmax(filtered(logits, sampling, jnp.asarray(seen)), axis=-1))
        joint = (joint[:, None] * p).ravel()
    return joint


# A correct rule fails once in a million; see what a wrong one gives in
# `test_a_wrong_distribution_fails_the_test`.
UNLIKELY = 1e-6


def _samples_follow_the_model(draft, sampling, runs=5, rows=4000):
    """The drafts' acceptance, and how likely such samples are if the model drew them."""
    model, count = make_model(5, vocab=5, hidden=8), 3
    prompt = [1, 2, 1]
    counts, accepted = np.zeros(5**count, int), []
    for seed in range(runs):
        result = lj.speculate(
            model, [prompt] * rows, draft=draft, draft_tokens=2, max_new_tokens=count + 1,
            sampling=sampling, seed=seed,
        )  # fmt: skip
        cells = np.ravel_multi_index(tuple(result.tokens[:, :count].T), (5,) * count)
        counts += np.bincount(cells, minlength=5**count)
        accepted.append(result.acceptance)
    expected = _joint(model, prompt, count, sampling) * rows * runs
    assert (expected > 25).sum() > 5  # a distribution, not one text
    return np.mean(accepted), _p_value(counts, expected)


@pytest.mark.exhaustive
def test_sampled_tokens_follow_the_model():
    """Three tokens' joint distribution is the model's own, with a draft of quite another opinion."""
    draft = make_model(5, noise=1.0, vocab=5, hidden=8)
    acceptance, p = _samples_follow_the_model(draft, lj.Sampling(8.0), runs=1)
    assert 0.2 < acceptance < 0.95
    assert p > UNLIKELY


@pytest.mark.exhaustive
def test_sampled_tokens_follow_the_model_with_ngrams():
    """The same with drafts that are certain of themselves."""
    acceptance, p = _samples_follow_the_model(lj.NGram(), lj.Sampling(8.0))
    assert 0.05 < acceptance < 0.95
    assert p > UNLIKELY


@pytest.mark.exhaustive
def test_a_wrong_distribution_fails_the_test(monkeypatch):
    """So many samples show it if certain drafts count as drawn at random."""

    def wrong(logits, probs, *rest):
        return accept_sampled(logits, jnp.full_like(probs, 1 / probs.shape[-1]), *rest)

    monkeypatch.setattr(speculation_loop, "accept_sampled", wrong)
    speculation_loop.decode_rounds.clear_cache()
    try:
        _, p = _samples_follow_the_model(lj.NGram(), lj.Sampling(8.0))
    finally:
        speculation_loop.decode_rounds.clear_cache()
    assert p < UNLIKELY


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "sampling",
    [
        lj.Sampling(6.0, top_k=3),
        lj.Sampling(6.0, top_p=0.8),
        lj.Sampling(6.0, min_p=0.2, repetition_penalty=2.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["model", "ngram"])
def test_sampled_tokens_follow_the_filtered_model(kind, sampling):
    """Draft and model go through the same filters; what is ruled out never appears."""
    draft = lj.NGram() if kind == "ngram" else make_model(5, noise=1.0, vocab=5, hidden=8)
    acceptance, p = _samples_follow_the_model(draft, sampling)
    assert 0.05 < acceptance < 1
    assert p > UNLIKELY


def test_a_wrong_rule_fails_the_test():
    """The chi-square test sees it when drafts are accepted as if they came from another q."""
    rows, vocab = 20_000, 5
    p = np.array([0.4, 0.3, 0.2, 0.1, 0.0], np.float32)
    q = np.array([0.1, 0.2, 0.2, 0.3, 0.2], np.float32)
    drafts = jnp.asarray(np.random.default_rng(0).choice(vocab, (rows, 1), p=q), jnp.int32)
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(p)), (rows, 2, vocab))
    keys = jax.random.split(jax.random.key(0), rows)

    def first_tokens(claimed):
        probs = jnp.broadcast_to(jnp.asarray(claimed), (rows, 1, vocab))
        ones = jnp.ones(rows, jnp.int32)
        tokens, _ = jax.jit(accept_sampled)(logits, probs, drafts, ones, keys)
        return np.bincount(np.asarray(tokens[:, 0]), minlength=vocab)

    assert _p_value(first_tokens(q), p * rows) > UNLIKELY
    always = np.full(vocab, 1e-9, np.float32)  # p / q is large: whatever is possible is accepted
    assert _p_value(first_tokens(always), p * rows) < 1e-9
    assert _p_value(first_tokens(p), p * rows) < 1e-9


def test_rejection_gives_the_certain_token_where_only_it_is_left():
    """A certain draft that the model rules out is refused, and one it is sure of is accepted."""
    logits = jnp.log(jnp.array([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]]))
    keys = jax.random.split(jax.random.key(0), 1)
    for drafts, tokens, accepted in (
        ([0, 1], [0, 1, 2], 2),
        ([0, 2], [0, 1], 1),
        ([2, 2], [0], 0),
    ):
        drafts = jnp.array([drafts], jnp.int32)
        two = jnp.array([2], jnp.int32)
        got, count = accept_sampled(logits, jax.nn.one_hot(drafts, 3), drafts, two, keys)
        assert count.tolist() == [accepted]
        assert got[0, : accepted + 1].tolist() == tokens


# --- trees -----------------------------------------------------------------------------------------


def test_a_tree_is_walked_from_the_root():
    """The child that the target wants is taken, and no other branch counts."""
    tree = Topology((2, 2))
    assert tree.nodes == 6
    assert tree.children[0].tolist() == [1, 2]
    assert tree.children[2].tolist() == [5, 6]
    assert tree.sees[5].tolist() == [True, False, True, False, False, True, False]
    drafts = jnp.array([[10, 11, 12, 13, 12, 14]], jnp.int32)
    wants = {0: 11, 1: 12, 2: 14, 6: 9, 5: 8}
    best = jnp.array([[wants.get(node, 0) for node in range(7)]])
    logits = jax.nn.one_hot(best, 16)
    for count, tokens, path in ((6, [11, 14, 9], [0, 2, 6]), (5, [11, 14], [0, 2]), (1, [11], [0])):
        got, accepted, nodes = accept_tree(logits, drafts, jnp.array([count], jnp.int32), tree)
        kept = int(accepted[0]) + 1
        assert got[0, :kept].tolist() == tokens
        assert nodes[0, :kept].tolist() == path


# --- cost ------------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch):
    """The arguments of the compiled loop, as a call of `speculate` would pass them."""

    def run(model, **options):
        calls = []
        with monkeypatch.context() as patch:
            patch.setattr(module, "decode_rounds", lambda *args: calls.append(args) or 1 / 0)
            with pytest.raises(ZeroDivisionError):
                lj.speculate(model, PROMPTS, max_new_tokens=20, **options)
        return calls[0]

    return run


@pytest.mark.parametrize(
    "kind",
    ["model", *(pytest.param(k, marks=pytest.mark.exhaustive) for k in ("eight", "ngram", "tree"))],
)
def test_the_loop_has_no_buffer_sized_temporaries(model, draft, kind, started):
    """Temporaries of the compiled loop do not grow with the capacity, but for a tree's mask."""

    def temporaries(capacity):
        spec = lj.Static(capacity)
        options = {"cache": spec} | ({} if kind == "ngram" else {"draft_cache": spec})
        options |= {"draft_tokens": 8} if kind == "eight" else {}
        drafts = {"eight": draft, **_drafts(model, draft)}
        args = started(model, draft=drafts[kind], **options)
        memory = speculation_loop.decode_rounds.lower(*args).compile(USERS_XLA).memory_analysis()
        return memory.temp_size_in_bytes, lj.nbytes(args[2].cache)

    (small, little), (large, much) = temporaries(1024), temporaries(32768)
    if kind == "tree":
        nodes, rows = 11, len(PROMPTS)
        assert large - small <= (much - little) // 2
        assert large - small <= 32768 * rows * (nodes * 4 + 16)
    else:
        assert large <= small + 1024


@pytest.mark.exhaustive
def test_more_drafts_than_eight_take_no_longer_to_compile(model, draft, started):
    """The program holds no more steps of the draft model; and the texts are the same."""

    def size(count):
        args = started(model, draft=draft, draft_tokens=count)
        return len(speculation_loop.decode_rounds.lower(*args).compile(USERS_XLA).as_text())

    few, many = size(8), size(32)
    assert size(2) < few and many < 1.2 * few
    plain = lj.generate(model, PROMPTS, max_new_tokens=60)
    for count in (1, 8, 9, 32):
        fast = lj.speculate(model, PROMPTS, draft=draft, draft_tokens=count, max_new_tokens=60)
        assert fast.rows() == plain.rows()


def test_equal_models_share_a_program(model, draft):
    """As a model that is loaded again does: its structure is the one that was compiled for."""
    options = {"draft": draft, "max_new_tokens": 9, "cache": lj.Static(40)}
    lj.speculate(model, PROMPTS, **options)
    before = speculation_loop.decode_rounds._cache_size()
    lj.speculate(make_model(3), PROMPTS, **options)
    assert speculation_loop.decode_rounds._cache_size() == before


@pytest.mark.exhaustive
def test_compiles_once_or_as_often_as_a_cache_grows(model, draft):
    """One program for a static cache; for dynamic ones one for each of log2 capacities."""
    before = speculation_loop.decode_rounds._cache_size()
    for new in (90, 100, 120):
        lj.speculate(
            model, [[1, 2]], draft=draft, max_new_tokens=new,
            cache=lj.Static(130), draft_cache=lj.Static(130),
        )  # fmt: skip
    assert speculation_loop.decode_rounds._cache_size() == before + 1
    options = {"cache": lj.Dynamic(), "draft_cache": lj.Dynamic()}
    result = lj.speculate(model, [[1, 2]], draft=draft, max_new_tokens=200, **options)
    assert speculation_loop.decode_rounds._cache_size() <= before + 1 + 3
    assert lj.capacity(result.cache) == 256
    assert result.rows() == lj.generate(model, [[1, 2]], max_new_tokens=200).rows()


# --- room and refusals -----------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["model", "self", "tree"])
def test_exactly_enough_capacity(model, draft, kind):
    """Drafts need no slots but those of the tokens they become; a tree those of its side branches."""
    one = _drafts(model, draft)[kind]
    need = 3 + 12 - 1 + (10 - 3 if kind == "tree" else 0)
    options = {"draft": one, "max_new_tokens": 12, "draft_cache": lj.Static(need)}
    result = lj.speculate(model, [[1, 2, 3]], cache=lj.Static(need), **options)
    assert result.rows() == lj.generate(model, [[1, 2, 3]], max_new_tokens=12).rows()
    with pytest.raises(ValueError, match=f"need {need} slots, but the capacity is {need - 1}"):
        lj.speculate(model, [[1, 2, 3]], cache=lj.Static(need - 1), **options)


def test_a_cache_that_grows_beside_one_with_exactly_enough(model):
    """Growing one for the last rounds does not ask the other for more than the text needs."""
    prompts = [[1 + i % 9 for i in range(62)], [4]]
    plain = lj.generate(model, prompts, max_new_tokens=4)
    result = lj.speculate(model, prompts, draft=model, max_new_tokens=4, draft_cache=lj.Dynamic())
    assert result.rows() == plain.rows()


@pytest.mark.exhaustive
def test_one_token_and_one_draft(model, draft):
    """The smallest of everything."""
    plain = lj.generate(model, PROMPTS, max_new_tokens=7)
    result = lj.speculate(model, PROMPTS, draft=draft, draft_tokens=1, max_new_tokens=7)
    _check(result, plain)
    one = lj.speculate(model, PROMPTS, draft=draft, max_new_tokens=1)
    assert one.rows() == [row[:1] for row in plain.rows()]
    assert one.rounds.tolist() == [0, 0, 0]
    assert one.acceptance == 0


@pytest.mark.exhaustive
def test_continuing_from_the_returned_cache(model, draft):
    """The cache that comes back is `generate`'s: it lacks only each row's last token."""
    longer = lj.generate(model, PROMPTS[1:2], max_new_tokens=13).rows()[0]
    for one in (draft, lj.Tree(draft, (2, 2))):
        result = lj.speculate(model, PROMPTS[1:2], draft=one, max_new_tokens=12, cache=lj.Dynamic())
        logits, _ = model(jnp.array([result.rows()[0][-1:]]), result.cache)
        assert int(jnp.argmax(logits[0, -1])) == longer[12]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"cache": lj.Sliding(8, slack=3)}, ValueError, "slack=4"),
        ({"draft_cache": lj.Sliding(8)}, ValueError, "layer 0 of draft_cache"),
        ({"cache": lj.Static(40, lj.codecs.KIVI(4, 3))}, ValueError, "residual=4"),
        ({"draft_tokens": 0}, ValueError, "draft_tokens"),
        ({"draft": "ngram"}, TypeError, "NGram"),
        ({"draft": lj.NGram(), "draft_cache": lj.Static(9)}, ValueError, "no draft_cache"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
    ],
)
def test_bad_options(model, draft, options, error, match):
    """What cannot work is refused before anything runs, with the fix."""
    with pytest.raises(error, match=match):
        lj.speculate(model, PROMPTS, **({"draft": draft, "max_new_tokens": 9} | options))


def test_bad_drafts(model, draft):
    """Another vocabulary, a sampled tree, a tree on a ring, unequal layers, an n-gram of nothing."""
    with pytest.raises(ValueError, match="vocabulary of 24 tokens, got 9"):
        lj.speculate(model, PROMPTS, draft=make_model(0, vocab=9), max_new_tokens=4)
    tree = {"draft": lj.Tree(draft), "max_new_tokens": 4}
    with pytest.raises(ValueError, match="greedily"):
        lj.speculate(model, PROMPTS, sampling=lj.Sampling(1.0), **tree)
    with pytest.raises(ValueError, match="use a chain"):
        lj.speculate(model, PROMPTS, cache=lj.Sliding(9, slack=20), **tree)
    two = make_model(0, layers=2)
    with pytest.raises(ValueError, match="one capacity"):
        lj.speculate(two, PROMPTS, cache=[lj.Static(40), lj.Static(50)], **tree)
    placed = Transformer(model.config, rope_by_place=True, rngs=nnx.Rngs(0))
    for target, one in ((placed, draft), (model, placed)):
        with pytest.raises(ValueError, match=r"rope_by_place=True.*use a chain"):
            lj.speculate(target, PROMPTS, draft=lj.Tree(one), max_new_tokens=4)
    with pytest.raises(ValueError, match=r"of 24, got branching=\(2, 25\)"):
        lj.speculate(model, PROMPTS, draft=lj.Tree(draft, (2, 25)), max_new_tokens=4)
    with pytest.raises(ValueError, match="branching"):
        lj.speculate(model, PROMPTS, draft=lj.Tree(draft, ()), max_new_tokens=4)
    with pytest.raises(ValueError, match="at least min_ngram"):
        lj.NGram(2, 3)


# --- the draft that ships --------------------------------------------------------------------------


def test_the_shipped_draft_belongs_to_the_shipped_model():
    """Same tokenizer, and small; the folder is complete."""
    pytest.importorskip("tokenizers")
    from lucid_jax.models import embedded_draft_path, load_model
    from lucid_jax.models.checkpoint import embedded_model_path

    draft, tokenizer = load_model(embedded_draft_path())
    model, other = load_model()
    assert tokenizer.to_json() == other.to_json()
    assert draft.config.vocab_size == model.config.vocab_size
    size = lambda folder: (folder / "model.safetensors").stat().st_size  # noqa: E731
    assert size(embedded_draft_path()) < 4.5e5 < size(embedded_model_path()) / 15


@pytest.mark.exhaustive
def test_the_shipped_draft_knows_what_the_model_will_say():
    """Documentation text: most drafts are accepted, and the text is the model's own."""
    pytest.importorskip("tokenizers")
    from lucid_jax.models import embedded_draft_path, load_model

    draft, _ = load_model(embedded_draft_path())
    model, tokenizer = load_model()
    texts = ["Return a new list containing", "Open the file and return", "This module provides"]
    prompts = [tokenizer.encode_prompt(text) for text in texts]
    plain = lj.generate(model, prompts, max_new_tokens=100)
    result = lj.speculate(model, prompts, draft=draft, draft_tokens=3, max_new_tokens=100)
    assert result.rows() == plain.rows()
    assert result.acceptance > 0.6
    assert result.rounds.max() < 60


def test_a_windowed_model_drafts_on_its_own_rings(draft):
    model = make_model(3, model_type="mistral", sliding_window=8)
    fast = lj.speculate(model, PROMPTS, draft=draft, max_new_tokens=40)
    assert {type(layer.spec) for layer in fast.cache.layers} == {lj.Sliding}
    _check(fast, lj.generate(model, PROMPTS, max_new_tokens=40))
