"""`Transformer(scan_layers=True)`: the same model, of which one turn of its layers is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lucid_jax as lj
from lucid_jax.models import ModelConfig, Transformer, load_model, save_model
from tests.helpers import USERS_XLA

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
# Alike layers; a sliding and a global one in turns, and a sliding one left over; learned positions.
KINDS = {
    "llama": {},
    "gemma2": {"model_type": "gemma2", "sliding_window": 8, "head_dim": 16},
    "gpt2": {"model_type": "gpt2", "max_position_embeddings": 64},
}
TURNS = {"llama": (1, 5), "gemma2": (2, 2), "gpt2": (1, 5)}
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11, 12, 13]]


def both(kind="llama", layers=5, **options):
    """A model whose layers are unrolled, and the same one that scans over them."""
    config = ModelConfig(**SIZES, num_hidden_layers=layers, **KINDS[kind])
    return [
        Transformer(config, scan_layers=scanned, rngs=nnx.Rngs(0), **options)
        for scanned in (False, True)
    ]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_every_kind_of_cache_gives_the_logits_of_the_unrolled_model(kind):
    plain, scanned = both(kind)
    assert (scanned.turns.period, scanned.turns.count) == TURNS[kind]
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 64)
    expected = plain(tokens)
    np.testing.assert_allclose(scanned(tokens), expected, atol=1e-5)
    state = plain.init_cache(plain.cache_spec(16), 2)
    assert scanned.init_cache(plain.cache_spec(16), 2).stacked
    for cache in (state, lj.stack(state)):
        for model in (plain, scanned):
            out, after = model(tokens[:, :9], cache)
            rest, _ = model(tokens[:, 9:], after)
            got = jnp.concatenate([out, rest], axis=1)
            np.testing.assert_allclose(got, expected, atol=1e-5)
    stateful = lj.nn.DynamicKVCache()
    np.testing.assert_allclose(scanned(tokens, stateful), expected, atol=1e-5)
    assert stateful.get_seq_length(4) == 12


@pytest.mark.parametrize(
    "codec", [lj.codecs.Identity(), lj.codecs.Int8()], ids=["identity", "int8"]
)
def test_decoders_choose_the_same_tokens(kind, codec):
    plain, scanned = both(kind)
    specs = plain.cache_spec(64, codec)
    expected, got = (
        lj.generate(model, PROMPTS, max_new_tokens=10, cache=specs).tokens
        for model in (plain, scanned)
    )
    np.testing.assert_array_equal(got, expected)
    expected, got = (
        lj.beam_search(model, PROMPTS, max_new_tokens=6, num_beams=3).sequences
        for model in (plain, scanned)
    )
    np.testing.assert_array_equal(got, expected)


def test_drafts_and_shared_prompts_go_on_as_before():
    plain, scanned = both()
    expected = lj.generate(plain, PROMPTS, max_new_tokens=10).tokens
    drafted = lj.speculate(scanned, PROMPTS, draft=lj.NGram(), max_new_tokens=10)
    np.testing.assert_array_equal(drafted.tokens, expected)
    prompts = lj.PromptCache(scanned, lj.Static(64), max_bytes=1 << 20, chunk=4)
    for _ in range(2):
        again = lj.generate(scanned, PROMPTS, max_new_tokens=10, prompt_cache=prompts)
        np.testing.assert_array_equal(again.tokens, expected)
    assert prompts.stats.reused > 0


def test_gradients_of_stacked_weights_are_those_of_each_layer(kind):
    plain, scanned = both(kind)
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 64)

    def loss(model):
        return jnp.sum(jnp.sin(model(tokens)))

    each, stacks = (nnx.grad(loss)(model)["layers"] for model in (plain, scanned))
    turns = scanned.turns
    for index, grads in stacks.items():
        for turn in turns.turns_of(index) or [None]:
            mine = jax.tree.map(lambda x, turn=turn: x if turn is None else x[turn], grads)
            theirs = each[turns.layer_of(index, turn or 0)]
            for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
                np.testing.assert_allclose(a, b, atol=1e-4)


def test_weights_are_read_into_stacks_and_written_as_they_were(tmp_path):
    plain, tokenizer = load_model()
    scanned, _ = load_model(scan_layers=True)
    for name, model in (("plain", plain), ("scanned", scanned)):
        save_model(tmp_path / name, model, tokenizer)
    one, other = (tmp_path / name / "model.safetensors" for name in ("plain", "scanned"))
    assert one.read_bytes() == other.read_bytes()
    prompt = [tokenizer.encode("The old man")]
    expected, got = (lj.generate(m, prompt, max_new_tokens=8).tokens for m in (plain, scanned))
    np.testing.assert_array_equal(got, expected)


def decode(model, steps=4):
    """A compiled decode loop of a model: from a cache and a token to a cache."""
    graph, params = nnx.split(model)
    state = model.init_cache(lj.Static(2048), 1)

    def run(state, params, token):
        model = nnx.merge(graph, params)

        def step(_, carry):
            state, token = carry
            logits, state = model(token, state)
            return state, jnp.argmax(logits, axis=-1).astype(jnp.int32)

        return jax.lax.fori_loop(0, steps, step, (state, token))

    lowered = jax.jit(run, donate_argnums=0).lower(state, params, jnp.zeros((1, 1), jnp.int32))
    return lowered, state


def test_a_decode_loop_is_as_large_a_program_whatever_the_number_of_layers():
    def products(layers, which):
        return decode(both(layers=layers)[which])[0].as_text().count("dot_general")

    assert products(2, 0) < products(6, 0)
    assert products(2, 1) == products(6, 1)


def test_a_decode_loop_is_in_place():
    lowered, state = decode(both()[1])
    memory = lowered.compile(USERS_XLA).memory_analysis()
    assert memory.alias_size_in_bytes >= lj.nbytes(state)
    assert memory.temp_size_in_bytes < lj.nbytes(state) / 5 / 2  # half a layer
