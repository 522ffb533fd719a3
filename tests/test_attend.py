"""`attend` against dense float64 attention over the model's tokens."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import lucid_jax as lj
from tests.helpers import DV, D, H, filled, make, poison, queries, stored, tokens
from tests.oracle import Oracle

pytestmark = pytest.mark.usefixtures("each_backend")
B = 2


class Both:
    """A state and its model, given the same tokens."""

    def __init__(self, capacity=8, *, ragged=False, heads=H, dim=D, value_dim=DV, dtype=np.float32,
                 batch=B):  # fmt: skip
        sizes = {"heads": heads, "dim": dim, "value_dim": value_dim, "ragged": ragged}
        self.sizes, self.dtype, self.batch = (heads, dim, value_dim), dtype, batch
        self.state = make(lj.Static(capacity), batch=batch, dtype=dtype, **sizes)
        self.model = Oracle(batch=batch, capacity=capacity, growable=False, **sizes)

    def update(self, count, seed=0, **options):
        key, value = (x.astype(self.dtype) for x in tokens(seed, self.batch, count, *self.sizes))
        self.state = lj.update(self.state, key, value, 0, **options)
        self.model.update(key.astype(np.float32), value.astype(np.float32), **options)
        return self

    def crop(self, n):
        self.state = lj.crop(self.state, n)
        self.model.crop(n)
        return self

    def rollback(self, n):
        self.state = lj.rollback(self.state, n)
        self.model.rollback(n)
        return self

    def query(self, count, groups=2, seed=0):
        return queries(seed, self.batch, count, self.sizes[0] * groups, self.sizes[1])

    def check(self, count, groups=2, tolerance=1e-5, **options):
        query = self.query(count, groups).astype(self.dtype)
        expected = self.model.attend(query.astype(np.float32), **options)
        got = lj.attend(self.state, query, 0, **options)
        assert got.dtype == self.dtype and got.shape == expected.shape
        np.testing.assert_allclose(np.float64(got), expected, rtol=tolerance, atol=tolerance)
        return got


# --- shapes and sizes ----------------------------------------------------------------------------


@pytest.mark.parametrize("heads, groups", [(2, 1), (2, 3), (1, 4), (1, 1), (3, 2)])
@pytest.mark.parametrize("count", [1, 5])
def test_heads_of_a_group_share_their_key_value_head(heads, groups, count):
    """MHA, GQA and MQA; values of another width than keys."""
    Both(heads=heads).update(7).check(count, groups)


@pytest.mark.parametrize("dim, value_dim", [(1, 1), (4, 9), (16, 2)])
def test_values_need_not_be_as_wide_as_keys(dim, value_dim):
    """The output has the values' width, the scale the keys'."""
    Both(dim=dim, value_dim=value_dim).update(6).check(3)


@pytest.mark.parametrize("capacity", [1, 255, 256, 257, 700])
def test_capacities_around_the_block_size(capacity):
    """Full, nearly empty and in between; the last block may overlap the one before."""
    full = Both(capacity, heads=1).update(capacity)
    for length in {min(capacity, n) for n in (1, 254, 256, 257, 511, 513, capacity)}:
        both = copy.deepcopy(full).rollback(capacity - length)
        both.check(1)
    both.check(min(capacity, 3), window=min(capacity, 300))


def test_each_chunk_sees_the_past_and_itself():
    """Prefill, a burst, single steps: every query at its own position."""
    both = Both(16)
    for seed, count in enumerate((6, 1, 3, 1, 5)):
        both.update(count, seed=seed).check(count)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.bfloat16, 2e-2), (jnp.float16, 2e-3)])
def test_narrow_dtypes_are_accumulated_in_float32(dtype, tolerance):
    """Close to the exact answer on the rounded tokens, in the query's dtype."""
    Both(300, dtype=jnp.dtype(dtype), heads=1).update(290).check(2, tolerance=tolerance)


def test_a_float32_query_over_a_bfloat16_cache_loses_nothing_more():
    """The output is the query's dtype, exact to float32 on the stored tokens."""
    both = Both(dtype=jnp.dtype(jnp.bfloat16)).update(7)
    query = both.query(2)
    got = lj.attend(both.state, query, 0)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, both.model.attend(query), rtol=1e-5, atol=1e-5)


# --- positions -----------------------------------------------------------------------------------


def test_one_query_sees_every_stored_token_not_the_first_alone():
    """Causality is by position, not aligned to the top left."""
    both = Both().update(6)
    seen = lj.attend(both.state, both.query(1), 0, causal=False)
    np.testing.assert_allclose(both.check(1), seen, rtol=1e-5)


def test_causal_false_shows_every_query_everything():
    """Cross-attention, with any number of queries."""
    both = Both().update(5)
    for count in (1, 4, 9):
        both.check(count, causal=False)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("change", [lambda b: b.crop(3), lambda b: b.rollback(4),
                                    lambda b: b.crop(6).rollback(2).update(1, seed=3),
                                    lambda b: b.rollback(5).update(2, seed=4).crop(2)])  # fmt: skip
def test_after_crop_and_rollback(ragged, change):
    """Lengths and positions part ways; queries still see what is theirs."""
    both = change(Both(ragged=ragged).update(7))
    both.check(2)
    both.check(1, window=2)
    both.check(2, causal=False)


@pytest.mark.parametrize("width", [2, 4])
def test_a_window_of_w_is_the_query_and_the_w_minus_1_before_it(width):
    """At W - 1, W and W + 1 stored tokens, token by token and in one chunk."""
    both = Both(16)
    for seed in range(6):
        both.update(1, seed=seed).check(1, window=width)
    both.update(4, seed=9).check(4, window=width)
    # Counted by hand: with equal scores the output is the mean of exactly `width` values.
    zero = np.zeros((B, H, 1, D), np.float32)
    got = lj.attend(both.state, zero, 0, window=width)
    expected = stored(both.state, row=1)[1][:, -width:].mean(axis=1)
    np.testing.assert_allclose(got[1, :, 0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ragged", [False, True])
def test_a_window_skips_blocks_of_a_long_cache(ragged):
    """Start and stop of the blocks read follow the window, across block borders."""
    both = Both(700, heads=1, ragged=ragged).update(600)
    for width in (1, 88, 89, 345, 10_000):
        both.check(2, window=width)


def test_ragged_queries_beyond_a_rows_length_return_zeros():
    """A padded chunk: only the first lengths[b] queries of a row are real."""
    both = Both(16, ragged=True, batch=3)
    for seed, lengths in enumerate(([4, 0, 2], [0, 3, 1], [2, 4, 4])):
        got = both.update(4, seed=seed, lengths=np.int32(lengths)).check(4, lengths=lengths)
        for row, real in enumerate(lengths):
            assert not np.asarray(got[row, :, real:]).any()
            assert np.asarray(got[row, :, :real]).all()
        both.check(4, lengths=lengths, window=3)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("places", [6, [3, 0], [2, 2], [[0, 5], [6, 1]], np.uint8([1, 7])], ids=str)
def test_queries_placed_like_their_tokens_see_up_to_their_own_place(ragged, places):
    """`cache_position` in every form, after a crop too."""
    count = np.shape(places)[-1] if np.shape(places) else 1
    both = Both(ragged=ragged).update(7).crop(5)
    both.update(count, seed=1, cache_position=np.asarray(places))
    both.check(count, cache_position=places)
    both.check(count, cache_position=places, window=3)


def test_places_and_lengths_together():
    """A padded chunk written by place: the padding's queries return zeros."""
    both = Both(ragged=True).update(3)
    options = {"cache_position": np.int32([[1, 4], [2, 0]]), "lengths": np.int32([2, 1])}
    both.update(2, seed=1, **options).check(2, **options)


# --- scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"scale": 1.0}, {"scale": 0.01}, {"scale": 0.0}, {"softcap": 2.0}, {"softcap": 0.1},
     {"softcap": 30.0, "scale": 3.0, "window": 4}, {"scale": 1 / np.sqrt(7)}],
    ids=str,
)  # fmt: skip
def test_scale_and_softcap(options):
    """The cap comes after the scale."""
    Both().update(7).check(3, **options)


FORMS = ["C", "1C", "TC", "T1", "11TC", "1N1C", "B11C", "BNTC", "B1T1", "1", ""]


def _of_form(form, capacity, count, rng):
    sizes = {"B": B, "N": 2 * H, "T": count, "C": capacity, "1": 1}
    return rng.standard_normal([sizes[axis] for axis in form]).astype(np.float32)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_masks_and_biases_broadcast(form, ragged):
    """Every broadcast form of (B, N, T, C), together and alone, after the softcap."""
    both = Both(ragged=ragged).update(6)
    rng = np.random.default_rng(len(form))
    mask = _of_form(form, 8, 3, rng) > -0.5
    bias = _of_form(form, 8, 3, rng)
    both.check(3, mask=mask, bias=bias, softcap=3.0)
    if form in ("1C", "BNTC"):
        both.check(3, mask=mask)
        both.check(3, bias=bias)


@pytest.mark.parametrize("capacity", [597, 600])
@pytest.mark.parametrize("form", ["C", "BNTC"])
def test_masks_and_biases_are_cut_into_blocks(form, capacity):
    """The slot axis lines up when it is longer than a block and not a multiple of it, nor of tiles."""
    rng = np.random.default_rng(0)
    both = Both(capacity).update(capacity - 1)
    mask, bias = _of_form(form, capacity, 2, rng) > 0, _of_form(form, capacity, 2, rng)
    both.check(2, mask=mask, bias=bias)


def test_the_gradient_of_a_bias_has_its_shape():
    """Where there are more slots than the capacity, of which it says nothing."""
    state, *_ = filled(12, lj.Static(13))
    rng = np.random.default_rng(0)
    bias = _of_form("BNTC", 13, 2, rng)

    def loss(bias, implementation):
        query = queries(0, B, 2)
        return jnp.sum(lj.attend(state, query, 0, bias=bias, implementation=implementation) ** 2)

    got, expected = (jax.grad(loss)(bias, backend) for backend in ("walk", "dense"))
    assert got.shape == bias.shape
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert np.asarray(got[..., :11]).all() and not np.asarray(got[..., 12:]).any()


def test_a_bias_of_minus_infinity_hides():
    """As a mask does, a whole row of it included."""
    both = Both().update(6)
    bias = np.zeros((3, 8), np.float32)
    bias[0, 2:], bias[1] = -np.inf, -np.inf
    hidden = both.check(3, mask=bias == 0)
    np.testing.assert_allclose(
        lj.attend(both.state, both.query(3), 0, bias=bias), hidden, rtol=1e-5, atol=1e-6
    )
    assert not np.asarray(hidden[:, :, 1]).any()


# --- nothing, NaN, extremes ----------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [False, True])
def test_a_query_that_sees_nothing_returns_zeros(ragged):
    """An empty cache, a cropped one, or a mask that hides everything: zeros, not NaN."""
    both = Both(ragged=ragged)
    assert not np.asarray(both.check(2)).any()
    both.update(3).crop(0)
    assert not np.asarray(both.check(2)).any()
    both.update(3)
    assert not np.asarray(both.check(2, mask=np.zeros((1,), bool))).any()
    both.check(5)  # the first two queries are older than anything stored


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_what_dead_slots_hold_does_not_matter(bad, ragged, dtype):
    """NaN or infinity left behind by a rollback never reaches an output."""
    state = make(ragged=ragged, dtype=dtype)
    good = [jnp.asarray(x, dtype) for x in tokens(0, B, 4)]
    state = lj.update(state, *good, 0)
    expected = lj.attend(state, queries(0, B, 2), 0, softcap=3.0)
    spoilt = lj.update(state, *(jnp.full_like(x, bad) for x in good), 0)
    back = lj.rollback(spoilt, 4)
    for other in (back, poison(back), poison(state)):
        got = lj.attend(other, queries(0, B, 2), 0, softcap=3.0)
        np.testing.assert_array_equal(got, expected)


def test_large_scores_stay_finite():
    """Scores of 1e8 and of -1e8: the softmax picks the largest, nothing overflows."""
    for sign in (1, -1):
        key = np.zeros((B, H, 6, D), np.float32)
        key[:, :, :, 0] = np.float32([1, 2, 3, 6, 5, 4]) * 1e4 * sign
        value = tokens(0, B, 6)[1]
        state = lj.update(make(), key, value, 0)
        query = np.full((B, H, 1, D), 1e4, np.float32)
        best = 3 if sign > 0 else 0
        got = lj.attend(state, query, 0)[:, :, 0]
        np.testing.assert_allclose(got, value[:, :, best], rtol=1e-5)


def test_jitted_attend_agrees_with_eager_for_every_option():
    """Traced state, query, mask, bias, lengths and places give what concrete ones give."""
    both = Both(ragged=True).update(6)
    query = both.query(3)
    rng = np.random.default_rng(0)
    options = {
        "mask": rng.standard_normal((3, 8)) > -1,
        "bias": rng.standard_normal((B, 1, 1, 8)).astype(np.float32),
        "lengths": np.int32([3, 1]),
        "cache_position": np.int32([[1, 2, 3], [5, 0, 0]]),
    }
    run = jax.jit(lambda s, q, o: lj.attend(s, q, 0, window=4, softcap=9.0, scale=0.3, **o))
    eager = lj.attend(both.state, query, 0, window=4, softcap=9.0, scale=0.3, **options)
    np.testing.assert_allclose(run(both.state, query, options), eager, rtol=1e-6, atol=1e-6)
    both.check(3, window=4, softcap=9.0, scale=0.3, **options)


# --- what is refused -----------------------------------------------------------------------------

Q = queries(0, B, 3)
ERRORS = {
    "rank": ({"query": Q[0]}, ValueError, "batch, heads, seq, head_dim.*\\(4, 3, 4\\)"),
    "batch": ({"query": Q[:1]}, ValueError, "batch=2.*\\(1, 4, 3, 4\\)"),
    "heads": ({"query": Q[:, :3]}, ValueError, "multiple of 2.*\\(2, 3, 3, 4\\)"),
    "no heads": ({"query": Q[:, :0]}, ValueError, "heads"),
    "head_dim": ({"query": Q[..., :3]}, ValueError, "head_dim=4.*\\(2, 4, 3, 3\\)"),
    "integers": ({"query": Q.astype(np.int32)}, TypeError, "floating.*int32"),
    "layer": ({"layer_idx": 1}, ValueError, "\\[0, 1\\).*1"),
    "negative layer": ({"layer_idx": -1}, ValueError, "\\[0, 1\\).*-1"),
    "lengths": ({"lengths": [1, 2]}, ValueError, "ragged"),
    "places": ({"cache_position": [1, 2]}, ValueError, "\\(3,\\).*\\(2,\\)"),
    "float places": ({"cache_position": [1.0, 2.0, 3.0]}, TypeError, "integers.*float"),
    "window 0": ({"window": 0}, ValueError, "at least 1.*0"),
    "float window": ({"window": 2.0}, TypeError, "integer.*2.0"),
    "window without causality": ({"window": 2, "causal": False}, ValueError, "causal"),
    "softcap": ({"softcap": 0.0}, ValueError, "positive.*0.0"),
    "mask dtype": ({"mask": np.ones(8, np.float32)}, TypeError, "boolean.*float32"),
    "bias dtype": ({"bias": np.ones(8, bool)}, TypeError, "floating.*bool"),
    "mask length": ({"mask": np.ones(7, bool)}, ValueError, "\\(2, 4, 3, 8\\).*\\(7,\\)"),
    "bias rank": ({"bias": np.ones((1,) * 5, np.float32)}, ValueError, "\\(2, 4, 3, 8\\).*1, 1"),
}


@pytest.mark.parametrize("changes, error, message", ERRORS.values(), ids=ERRORS)
def test_a_wrong_call_says_what_was_expected_and_what_came(changes, error, message):
    """The same exception eagerly and while tracing."""
    state = lj.update(make(), *tokens(0, B, 4), 0)
    arguments = {"query": Q, "layer_idx": 0, **changes}
    with pytest.raises(error, match=message):
        lj.attend(state, **arguments)
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda s: lj.attend(s, **arguments), state)


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"causal": False}, {"cache_position": []}],
                         ids=str)  # fmt: skip
def test_no_queries_give_no_outputs(options):
    """A chunk of zero queries is as fine as an update of zero tokens."""
    state = lj.update(make(), *tokens(0, B, 4), 0)
    assert lj.attend(state, Q[:, :, :0], 0, **options).shape == (B, 2 * H, 0, DV)


@pytest.mark.parametrize("width", [2**31 - 1, 2**31, 2**63])
def test_a_window_wider_than_int32_is_no_window(width):
    """Six queries over three tokens: their positions less the width must not wrap around."""
    state = lj.update(make(), *tokens(0, B, 3), 0)
    query = queries(0, B, 6)
    np.testing.assert_array_equal(
        lj.attend(state, query, 0, window=width), lj.attend(state, query, 0)
    )


@pytest.mark.parametrize("ragged", [False, True], ids=["aligned", "ragged"])
def test_attention_starts_reading_at_the_window(ragged, monkeypatch):
    """Cost follows the window: slots before it are skipped, cropped and quantized layers too."""
    codec = lj.codecs.KIVI(group=4, residual=2)
    for spec, first in ((lj.Static(40), 22), (lj.Static(40, codec), 22 + 8 % 4)):
        state = lj.crop(lj.update(make(spec, ragged=ragged), *tokens(0, 2, 38), 0), 30)
        layer = state.layers[0]
        oldest = jnp.full_like(layer.position, 30)  # position 8 is the first that is left
        assert layer.first_slot(oldest) == first
    ring = make(lj.Sliding(8), ragged=ragged).layers[0]
    assert ring.first_slot(ring.position) == 0
    state = lj.update(make(ragged=ragged), *tokens(0, 2, 5), 0)
    assert np.any(lj.attend(state, queries(0, 2, 1), 0, window=2))
    # And attend goes by it: from past the end on, it reads nothing.
    monkeypatch.setattr(type(layer), "first_slot", lambda self, oldest: self.slots_in_use())
    jax.clear_caches()
    assert not np.any(lj.attend(state, queries(0, 2, 1), 0, window=2))
    jax.clear_caches()


# --- each query's own visibility ------------------------------------------------------------------

BROKEN = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}


@pytest.mark.parametrize("bad", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("spec", [lj.Static(8), lj.Sliding(4, 1, 3)], ids=["static", "sliding"])
def test_a_broken_token_reaches_only_queries_that_see_it(spec, where, bad):
    """One call is token by token also where a later token is not finite."""
    key, value = tokens(0, B, 5)
    query = queries(0, B, 5)
    (key if where == "key" else value)[:, 0, 2, 1] = bad
    whole, _ = lj.extend(make(spec), query, key, value, 0)
    state, one_by_one = make(spec), []
    for i in range(5):
        out, state = lj.extend(state, *(x[:, :, i : i + 1] for x in (query, key, value)), 0)
        one_by_one.append(out)
    assert np.isfinite(np.asarray(whole)[:, :, :2]).all()
    assert not np.isfinite(np.asarray(whole)[:, 0, 2]).all()
    np.testing.assert_allclose(whole, np.concatenate(one_by_one, axis=2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("how", ["mask", "bias", "window", "mask of a head"])
def test_what_hides_a_token_hides_its_nan(how, count):
    """A mask, a bias of -inf or a window: a broken token that it hides leaves no trace."""
    key, value = tokens(0, B, 6)
    clean = lj.update(make(), key, value, 0)
    value[:, :, 1] = np.nan
    key[:, :, 1] = np.nan
    state = lj.update(make(), key, value, 0)
    query = queries(0, B, count)
    hides = np.arange(8) != 1
    options = {
        "mask": {"mask": hides},
        "bias": {"bias": np.where(hides, np.float32(0.5), -np.inf)},
        "window": {"window": 2},
        "mask of a head": {
            "mask": hides[None, None, None] | (np.arange(2 * H) == 0)[:, None, None]
        },
    }[how]
    got, expected = (np.asarray(lj.attend(s, query, 0, **options)) for s in (state, clean))
    if how == "mask of a head":
        assert np.isnan(got[:, 0]).all()
        got, expected = got[:, 1:], expected[:, 1:]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("codec", [lj.codecs.Int8(), lj.codecs.Float8(), lj.codecs.Int4()], ids=str)
def test_a_broken_token_of_a_codec_reaches_only_queries_that_see_it(codec):
    """Its scale tells: earlier queries of the chunk are as without it."""
    key, value = tokens(0, B, 4)
    query = queries(0, B, 4)
    clean, _ = lj.extend(make(lj.Static(8, codec)), query, key, value, 0)
    value[:, :, 3] = np.nan
    got, _ = lj.extend(make(lj.Static(8, codec)), query, key, value, 0)
    np.testing.assert_allclose(got[:, :, :3], clean[:, :, :3], rtol=1e-6)
    assert np.isnan(np.asarray(got)[:, :, 3]).all()


@pytest.mark.parametrize("ragged", [False, True], ids=["aligned", "ragged"])
def test_after_a_rollback_a_ring_answers_only_queries_it_still_can(ragged):
    """Tokens that were rolled back have overwritten what older queries should see."""
    spec = lj.Sliding(9, 0, 4)
    state = lj.rollback(lj.update(make(spec, ragged=ragged), *tokens(0, B, 18), 0), 3)
    plain = lj.update(make(spec, ragged=ragged), *(x[:, :, :15] for x in tokens(0, B, 18)), 0)
    query = queries(0, B, 3)
    with pytest.raises(ValueError, match=r"3 queries came, .* at most 2 are left to ask"):
        lj.attend(state, query, 0)
    got = lj.attend(state, query[:, :, 1:], 0)
    np.testing.assert_allclose(got, lj.attend(plain, query[:, :, 1:], 0), rtol=1e-6)
    step = checkify.checkify(jax.jit(lambda s, q: lj.attend(s, q, 0)))
    assert (
        "more queries than the tokens rolled back have left"
        in step(lj.checked(state), query)[0].get()
    )
    assert step(lj.checked(state), query[:, :, 1:])[0].get() is None
    # A window of fewer tokens does not reach what is gone.
    narrow, expected = (lj.attend(s, query, 0, window=2) for s in (state, plain))
    np.testing.assert_allclose(narrow, expected, rtol=1e-6)
    if ragged:  # a row's own padding asks nothing
        assert lj.attend(state, query, 0, lengths=[2, 1]).shape == (*query.shape[:3], DV)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced arguments"])
@pytest.mark.parametrize("spec", [lj.Dynamic(), lj.Dynamic(lj.codecs.KIVI(4, 3))], ids=str)
def test_a_mask_of_the_capacity_is_taken_by_a_call_that_grows(spec, traced):
    """What it says of the slots there were holds; of those that were added it hides nothing."""
    state, *_ = filled(60, spec)
    key, value = tokens(1, 2, 9)
    query = queries(1, 2, 9)
    rng = np.random.default_rng(2)
    mask, bias = rng.random((9, 64)) > 0.3, rng.standard_normal((9, 64)).astype(np.float32)
    whole = {
        "mask": np.concatenate([mask, np.ones((9, 64), bool)], 1),
        "bias": np.concatenate([bias, np.zeros((9, 64), np.float32)], 1),
    }

    def run(**options):
        if not traced:
            return lj.extend(state, query, key, value, 0, **options)[0]
        return jax.jit(lambda q, o: lj.extend(state, q, key, value, 0, **o)[0])(query, options)

    assert lj.capacity(state) == 64
    expected = run(**whole)
    np.testing.assert_array_equal(run(mask=mask, bias=bias), expected)
    np.testing.assert_array_equal(run(mask=whole["mask"], bias=bias), expected)
    assert not np.array_equal(run(bias=bias), expected)
    with pytest.raises(ValueError, match=r"mask must broadcast .* 128\), got \(63,\)"):
        run(mask=np.ones(63, bool))
    ring = make(lj.Sliding(5))
    with pytest.raises(ValueError, match="mask must broadcast"):
        lj.extend(ring, query, key, value, 0, mask=np.ones(5, bool))
