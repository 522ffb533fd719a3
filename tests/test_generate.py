"""`generate` and `stream`: cached decoding equals recomputing everything, and compiles once."""

import gc
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lucid_jax as lj
from lucid_jax.decode import Sampling, generate, generate_uncached, stream, stream_uncached
from lucid_jax.decode.language_model import split
from lucid_jax.decode.options import DecodeOptions
from lucid_jax.decode.prefill import open_cache
from lucid_jax.decode.token_loop import LoopSetup, TokenLoop, decode_tokens
from lucid_jax.models import T5, ModelConfig, T5Config, Transformer
from tests.helpers import USERS_XLA

PROMPTS = [[1, 2, 3], list(range(5, 24)), [4]]
SAMPLED = Sampling(1.0, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
CACHES = {"static": None, "roomy": lj.Static(200), "dynamic": lj.Dynamic()}


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return Transformer(config, rngs=nnx.Rngs(3))


def step_by_step(model, prompt, count):
    """Greedy decoding with nothing but the model: the whole text goes in for every token."""
    tokens = list(prompt)
    for _ in range(count):
        padded = jnp.array([tokens + [0] * (64 - len(tokens))])
        tokens.append(int(jnp.argmax(model(padded)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_cached_equals_recomputed(model, name, sampling):
    """A batch of unequal prompts gives the same tokens with any cache and with none."""
    options = {"max_new_tokens": 70, "sampling": sampling, "seed": 7, "stop_tokens": [0]}
    cached = generate(model, PROMPTS, cache=CACHES[name], **options)
    plain = generate_uncached(model, PROMPTS, **options)
    assert cached.rows() == plain.rows()
    np.testing.assert_array_equal(cached.lengths, plain.lengths)


def test_greedy_equals_the_model_alone(model):
    """The loop's greedy tokens are the argmaxes of full forward passes."""
    result = generate(model, PROMPTS, max_new_tokens=12)
    assert result.rows() == [step_by_step(model, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_a_batch_equals_its_first_row_alone(model, sampling):
    """A row does not depend on its neighbours (draws are tied to the row's number)."""
    options = {"max_new_tokens": 40, "sampling": sampling, "stop_tokens": [0]}
    together = generate(model, PROMPTS, **options).rows()
    assert generate(model, PROMPTS[:1], **options).rows()[0] == together[0]
    if sampling.temperature == 0:
        for prompt, row in zip(PROMPTS, together, strict=True):
            assert generate(model, [prompt], **options).rows() == [row]


@pytest.mark.parametrize("chunk", [1, 5, 16, 512])
def test_any_prefill_chunk_gives_the_same(model, chunk):
    """How a prompt is cut for prefill does not show, neither in tokens nor in the cache."""
    expected = generate(model, PROMPTS, max_new_tokens=10)
    result = generate(model, PROMPTS, max_new_tokens=10, prefill_chunk=chunk)
    assert result.rows() == expected.rows()
    for layer, other in zip(result.cache.layers, expected.cache.layers, strict=True):
        np.testing.assert_array_equal(layer.length, other.length)
    np.testing.assert_allclose(lj.get(result.cache, 1)[0], lj.get(expected.cache, 1)[0], atol=1e-5)


@pytest.mark.parametrize(
    "spec",
    [
        lj.Sliding(7, sinks=2),
        pytest.param(
            lj.Sliding(12, sinks=1, codec=lj.codecs.KIVI(group=4, residual=3)),
            marks=pytest.mark.exhaustive,
        ),
        lj.Static(120, lj.codecs.Int8()),
        pytest.param([lj.Sliding(6), lj.Dynamic(lj.codecs.Int4())], marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_any_cache_decodes_the_same_however_it_is_fed(model, spec):
    """Prefill in chunks longer or shorter than the window, then a loop that wraps it many times."""
    runs = [
        generate(model, PROMPTS, max_new_tokens=60, cache=spec, prefill_chunk=chunk)
        for chunk in (3, 512)
    ]
    assert runs[0].rows() == runs[1].rows()
    alone = generate(model, PROMPTS[1:2], max_new_tokens=60, cache=spec)
    assert alone.rows() == runs[0].rows()[1:2]
    if isinstance(spec, lj.Sliding):
        assert lj.nbytes(alone.cache) == lj.nbytes(model.init_cache(spec, 1, ragged=True))


def test_a_window_that_holds_everything_changes_nothing(model):
    """A ring that never drops a token decodes as a static cache does."""
    plain = generate(model, PROMPTS, max_new_tokens=30)
    assert generate(model, PROMPTS, max_new_tokens=30, cache=lj.Sliding(64)).rows() == plain.rows()


def test_stop_tokens_end_a_row_and_the_loop(model):
    """A row ends with its stop token, sits out afterwards, and the loop ends with the last row."""
    free = generate(model, PROMPTS, max_new_tokens=40).rows()
    stop = free[0][5]
    first = [row.index(stop) + 1 if stop in row else 40 for row in free]
    result = generate(model, PROMPTS, max_new_tokens=40, stop_tokens=[stop])
    assert result.rows() == [row[:n] for row, n in zip(free, first, strict=True)]
    # The cache holds prompt and new tokens but the last; nothing was written after the stop.
    expected = [len(p) + n - 1 for p, n in zip(PROMPTS, first, strict=True)]
    assert lj.seq_length(result.cache).tolist() == expected
    calls = list(stream(model, PROMPTS[:1], max_new_tokens=400, stop_tokens=[stop]))
    assert sum(len(row) for (row,) in calls) == first[0]
    assert len(calls) <= 3


@pytest.mark.parametrize("per_call", [1, 3, 8, 100])
def test_streaming_gives_the_same_tokens(model, per_call):
    """Joined, streamed pieces are what `generate` returns, cached or not."""
    options = {"max_new_tokens": 20, "sampling": SAMPLED, "stop_tokens": [0]}
    expected = generate(model, PROMPTS, **options).rows()
    for run in (stream, stream_uncached):
        rows = [[], [], []]
        for new in run(model, PROMPTS, tokens_per_call=per_call, **options):
            for row, tokens in zip(rows, new, strict=True):
                row.extend(tokens)
        assert rows == expected


def test_structures_are_one_object_while_in_use():
    """Equal models share it, and with the last program and model it goes."""

    class Scaled(nnx.Module):
        def __init__(self, factor):
            self.factor = factor
            self.weight = nnx.Param(jnp.ones(2))

    one, same, other = (split(Scaled(factor))[0] for factor in (2, 2, 3))
    assert one is same is not other and one != other
    gone = [weakref.ref(one), weakref.ref(other)]
    del one, same, other
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_one_compile_on_a_static_cache(model):
    """256 tokens are one program, however many calls the stream is cut into."""
    before = decode_tokens._cache_size()
    generate(model, [[1, 2]], max_new_tokens=256)
    assert decode_tokens._cache_size() == before + 1
    for _ in stream(model, [[1, 2]], max_new_tokens=256):
        pass
    assert decode_tokens._cache_size() == before + 1


def test_logarithmic_compiles_on_a_dynamic_cache(model):
    """256 tokens from one compile at most ceil(log2(256)) + 2 programs."""
    before = decode_tokens._cache_size()
    result = generate(model, [[1]], max_new_tokens=256, cache=lj.Dynamic())
    assert decode_tokens._cache_size() - before <= 8 + 2
    assert lj.capacity(result.cache) == 256


@pytest.mark.parametrize("batch", [1, 3])
def test_the_loop_has_no_buffer_sized_temporaries(model, batch):
    """Temporaries of the compiled decode loop do not grow with the capacity."""

    def temporaries(capacity):
        state = model.init_cache(lj.Static(capacity), batch, ragged=True)
        zero = jnp.zeros(batch, jnp.int32)
        loop = TokenLoop(
            cache=state,
            token=zero,
            done=zero > 0,
            produced=zero,
            step=jnp.int32(1),
            out=jnp.zeros((batch, 64), jnp.int32),
            seen=None,
            key=jax.random.key(0),
        )
        structure, params = split(model)
        setup = LoopSetup(structure, Sampling(), (0,))
        lowered = decode_tokens.lower(setup, params, loop, np.int32(64))
        return lowered.compile(USERS_XLA).memory_analysis().temp_size_in_bytes

    small, large = temporaries(1024), temporaries(65536)
    assert large <= small + 1024


def test_continuing_from_the_returned_cache(model):
    """The returned cache lacks only the last token: feeding it continues the text."""
    result = generate(model, [PROMPTS[1]], max_new_tokens=5, cache=lj.Dynamic())
    last = jnp.array([result.rows()[0][-1:]])
    logits, _ = model(last, result.cache)
    longer = generate(model, [PROMPTS[1]], max_new_tokens=6).rows()[0]
    assert int(jnp.argmax(logits[0, -1])) == longer[5]


def test_bfloat16_decodes():
    """A bfloat16 model with a bfloat16 cache runs, and its cache is half the size."""
    config = ModelConfig(vocab_size=32, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    half = Transformer(config, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    with jax.numpy_dtype_promotion("standard"):  # flax's RMSNorm mixes bfloat16 and float32
        result = generate(half, [[1, 2, 3]], max_new_tokens=6)
    assert result.lengths.tolist() == [6]
    assert result.cache.layers[0].dtype == jnp.bfloat16


@pytest.fixture(scope="module")
def half():
    """A small bfloat16 model."""
    config = ModelConfig(vocab_size=32, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    return Transformer(config, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))


DECODERS = {
    "generate": lambda model, **options: (
        generate(model, [[1, 2]], max_new_tokens=2, **options).cache
    ),
    "prompt cache": lambda model, cache=None: (
        lj.PromptCache(model, cache or lj.Static(64), max_bytes=1 << 20, chunk=2)
        .prefill([[1, 2, 3]])
        .cache
    ),
    "beam_search, speculate": lambda model, cache=None: open_cache(
        model, DecodeOptions.of(max_new_tokens=2, cache=cache), np.array([2])
    )[0],
}


@pytest.mark.parametrize("decode", DECODERS.values(), ids=DECODERS)
def test_decoders_store_narrow_floats_in_place(half, decode):
    """As bits on CPU, where no codec was asked for, whatever the layout."""
    chosen = lj.codecs.Bits() if jax.default_backend() == "cpu" else lj.codecs.Identity()
    with jax.numpy_dtype_promotion("standard"):  # flax's RMSNorm mixes bfloat16 and float32
        for cache, codec in (
            (lj.Static(64), chosen),
            ([lj.Dynamic()], chosen),
            (lj.Static(64, lj.codecs.Int8()), lj.codecs.Int8()),
        ):
            (layer,) = decode(half, cache=cache).layers
            assert layer.packing.codec == layer.spec.codec == codec
            assert type(layer.spec) is type(cache[0] if isinstance(cache, list) else cache)
        (layer,) = decode(half).layers
        assert layer.packing.codec == chosen


@pytest.mark.parametrize(
    ("prompts", "options", "match"),
    [
        ([], {}, "at least one row"),
        ([[]], {}, "empty"),
        ([1, 2], {}, "list of token ids"),
        ([[64]], {}, r"\[0, 64\)"),
        ([[-1]], {}, r"\[0, 64\)"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[1, 2, 3]], {"cache": lj.Static(2)}, "do not fit"),
        ([[1, 2, 3]], {"cache": lj.Static(6), "max_new_tokens": 5}, "capacity is 6"),
    ],
)
def test_bad_input(model, prompts, options, match):
    """What cannot be decoded is refused before anything runs, with the reason."""
    with pytest.raises(ValueError, match=match):
        generate(model, prompts, **({"max_new_tokens": 4} | options))


def test_float_tokens_are_a_type_error(model):
    """Token ids that are not integers are refused."""
    with pytest.raises(TypeError, match="integers"):
        generate(model, [[1.5]], max_new_tokens=1)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("spec", [None, lj.Static(8), lj.Sliding(4), lj.Dynamic()], ids=str)
def test_no_tokens_change_nothing(kind, spec):
    """As a chunk that happens to be empty: no logits, and the cache as it was."""
    if kind == "t5":
        config = T5Config(16, 8, 4, 8, num_layers=1, num_heads=2)
        one = T5(config, rngs=nnx.Rngs(0)).given([[1, 2, 3]])
    else:
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = ModelConfig(vocab_size=16, **sizes, model_type=kind)
        one = Transformer(config, rngs=nnx.Rngs(0))
    none, cache = jnp.zeros((1, 0), jnp.int32), None
    if spec is not None:
        cache = lj.grow(one.init_cache(spec, 1), 4)
        _, cache = one.hidden(jnp.array([[1, 2]]), cache)
    hidden, after = one.hidden(none, cache)
    assert one.logits(hidden).shape == (1, 0, 16)
    chex.assert_trees_all_equal(after, cache)


@pytest.mark.parametrize("decode", [generate, generate_uncached, lj.beam_search, lj.speculate])
@pytest.mark.parametrize(
    ("stops", "error", "match"),
    [
        (2, TypeError, r"list of token ids, got 2"),
        ([2.0], TypeError, "a stop token must be an integer"),
        ([True], TypeError, "a stop token must be an integer"),
        ([-1], ValueError, "a stop token must be at least 0"),
    ],
)
def test_bad_stop_tokens(model, decode, stops, error, match):
    """A stop token that no choice can equal is a mistake, not a row that never stops."""
    extra = {"num_beams": 2} if decode is lj.beam_search else {}
    extra |= {"draft": lj.NGram()} if decode is lj.speculate else {}
    with pytest.raises(error, match=match):
        decode(model, [[1, 2]], max_new_tokens=2, stop_tokens=stops, **extra)


def test_the_order_of_stop_tokens_compiles_nothing(model):
    """Nor do repeats or NumPy's integers."""
    options = {"max_new_tokens": 9, "cache": lj.Static(10)}
    generate(model, [[1, 2]], stop_tokens=[3, 5], **options)
    before = decode_tokens._cache_size()
    for stops in ([5, 3], [3, 3, 5], np.array([5, 3])):
        generate(model, [[1, 2]], stop_tokens=stops, **options)
    assert decode_tokens._cache_size() == before


@pytest.mark.parametrize("length", [3, 250, 300])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_the_default_cache_has_room_for_prompt_and_new_tokens(model, half, length, dtype):
    """Prefilled at the size of the prompt, then enlarged: as if it had been so large from the start."""
    one = half if dtype == jnp.bfloat16 else model
    prompt = np.random.default_rng(length).integers(0, 32, length).tolist()
    with jax.numpy_dtype_promotion("standard"):  # flax's RMSNorm mixes bfloat16 and float32
        result = generate(one, [prompt, [1, 2]], max_new_tokens=260)
        options = {"max_new_tokens": 260, "cache": lj.Static(length + 259)}
        assert result.rows() == generate(one, [prompt, [1, 2]], **options).rows()
    capacity = 512 if length < 253 else 1024
    for layer in result.cache.layers:
        assert isinstance(layer.spec, lj.Static) and layer.capacity == capacity
        assert layer.dtype == dtype and layer.num_slots == capacity
    assert lj.seq_length(result.cache).tolist() == [length + 259, 261]


def test_exactly_enough_capacity(model):
    """The last new token needs no slot: prompt + new - 1 slots are enough."""
    result = generate(model, [[1, 2, 3]], max_new_tokens=5, cache=lj.Static(7))
    assert result.rows() == generate(model, [[1, 2, 3]], max_new_tokens=5).rows()
    assert lj.seq_length(result.cache).tolist() == [7]
