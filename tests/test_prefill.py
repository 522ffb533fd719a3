"""Prompts of a batch: fed together where they are alike, else each by itself, to the same end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lucid_jax as lj
from lucid_jax.decode import prefill as together
from lucid_jax.decode import prefill_apart as apart
from lucid_jax.decode.options import DecodeOptions
from lucid_jax.models import ModelConfig, Transformer

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LENGTHS = (3, 520, 600, 90)
NEW = 4


@pytest.fixture(scope="module")
def model():
    return Transformer(ModelConfig(**SIZES), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(1, 50, n).tolist() for n in LENGTHS]


@pytest.fixture
def fed(monkeypatch):
    """The shape of each chunk that a model is fed."""
    shapes, real = [], together._prefill

    def spy(structure, params, state, chunk, *rest):
        shapes.append(chunk.shape)
        return real(structure, params, state, chunk, *rest)

    monkeypatch.setattr(together, "_prefill", spy)
    return shapes


@pytest.mark.parametrize(
    "cache",
    [None, lj.Static(700, lj.codecs.Int8()), lj.Dynamic(), lj.Sliding(64, sinks=2)],
    ids=["own", "int8", "dynamic", "sliding"],
)
def test_unequal_prompts_are_not_padded_to_the_longest(model, prompts, cache, fed):
    """They are computed one by one, and the cache is what all of them together would have made."""
    result = lj.generate(model, prompts, max_new_tokens=NEW, cache=cache)
    assert fed == [(1, 16), (1, 512), (1, 16), (1, 512), (1, 128), (1, 128)]
    for row, prompt in enumerate(prompts):
        alone = lj.generate(model, [prompt], max_new_tokens=NEW, cache=cache)
        assert alone.rows() == [result.rows()[row]]
        for layer in range(SIZES["num_hidden_layers"]):
            (keys, _, valid), (lone, _, seen) = (
                lj.get(one.cache, layer) for one in (result, alone)
            )
            stored = np.asarray(keys[row])[:, np.asarray(valid[row])]
            np.testing.assert_allclose(
                stored, np.asarray(lone[0])[:, np.asarray(seen[0])], rtol=1e-4, atol=1e-5
            )


def test_beams_and_drafts_start_from_prompts_fed_one_by_one(model, prompts, fed):
    """Whatever decodes next: it is prefill that has changed."""
    greedy = lj.generate(model, prompts, max_new_tokens=NEW).rows()
    beams = lj.beam_search(model, prompts, num_beams=2, max_new_tokens=NEW)
    drafted = lj.speculate(model, prompts, draft=lj.NGram(), max_new_tokens=NEW)
    assert max(rows for rows, _ in fed) == 1
    assert drafted.rows() == greedy
    for row, prompt in enumerate(prompts):
        alone = lj.beam_search(model, [prompt], num_beams=2, max_new_tokens=NEW)
        assert alone.rows()[0] == beams.rows()[row]


@pytest.mark.parametrize(
    "lengths, largest, expected",
    [
        ((600, 590, 580), 512, False),  # alike
        ((3, 20, 40), 512, False),  # a call each would read the weights more often
        ((3, 520, 600, 90), 512, True),
        ((1, 5000), 512, True),
        ((5000,), 512, False),
        ((5000, 1), 128, True),
    ],
)
def test_what_is_alike_or_short_stays_together(lengths, largest, expected):
    """Where a batch wastes little it is one call a chunk, as ever."""
    assert together.better_apart(np.array(lengths), largest) is expected


def test_a_divided_cache_is_filled_together(model, prompts, fed):
    """A row by itself would leave the other devices idle."""
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    result = lj.generate(model, prompts, max_new_tokens=NEW, sharding=sharding)
    assert fed == [(4, 512), (4, 128)]
    assert result.rows() == lj.generate(model, prompts, max_new_tokens=NEW).rows()


def test_a_prompt_of_many_chunks_is_one_program(model):
    """What a row was before is only asked for where rows have ended."""
    before = together._prefill._cache_size()
    lj.generate(model, [list(range(1, 49)) * 7], max_new_tokens=1, prefill_chunk=16)
    assert together._prefill._cache_size() == before + 1


def test_a_cache_that_rows_are_put_into_is_made_once(model, prompts, monkeypatch):
    """Zeros for the prompts, then more of them for the new tokens, would be touched twice."""
    made = []

    def spy(state, slots):
        made.append(lj.capacity(state))
        return real(state, slots)

    real = apart.with_slots
    monkeypatch.setattr(apart, "with_slots", spy)
    result = lj.generate(model, prompts, max_new_tokens=500)
    assert made == [lj.capacity(result.cache)] == [2048]
    assert result.lengths.tolist() == [500] * len(prompts)


def test_narrow_floats_are_fed_one_by_one_too(prompts):
    """On CPU they are stored as bits."""
    model = Transformer(ModelConfig(**SIZES), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    result = lj.generate(model, prompts, max_new_tokens=NEW)
    assert lj.seq_length(result.cache).tolist() == [n + NEW - 1 for n in LENGTHS]


@pytest.mark.parametrize("slack", [0, 1, 4, 8])
def test_windows_with_room_for_drafts_have_eights_of_slots(slack):
    """On TPUs of other numbers of slots XLA copied all to attend to them, at each token."""
    config = ModelConfig(**SIZES, model_type="mistral", sliding_window=16)
    model = Transformer(config, rngs=nnx.Rngs(0))
    options = DecodeOptions.of(max_new_tokens=40)
    state, _ = together.open_cache(model, options, np.array([3, 5]), slack=slack)
    for layer in state.layers:
        assert layer.num_slots % 8 == 0
        assert layer.lookback >= slack
