"""README's "Bring your own model": caches in modules of flax and in plain JAX change no output.

The functions are README's own, so that what people copy is what is tested.
"""

import contextlib
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import lucid_jax as lj
from tests.test_readme import BLOCKS

B, T, H, D = 2, 10, 4, 8
WIDTH = H * D
CHUNKS = ([T], [4, 1, 5], [1] * T)


@pytest.fixture(scope="module")
def readme():
    """What the section defines."""
    names = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(next(block for block in reversed(BLOCKS) if "class Attention" in block), names)
    return names


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(3), (B, T, WIDTH))


def empty(spec, **changes):
    sizes = {"num_layers": 1, "batch_size": B, "num_kv_heads": H, "head_dim": D, "axes": "BTHD"}
    return lj.init_cache(spec, **sizes | changes)


def in_chunks(step, state, x, sizes):
    """The outputs of a step (state, tokens) -> (out, state) over consecutive chunks."""
    outs, start = [], 0
    for size in sizes:
        out, state = step(state, x[:, start : start + size])
        outs.append(out)
        start += size
    return jnp.concatenate(outs, axis=1)


@pytest.mark.parametrize("sizes", CHUNKS, ids=str)
@pytest.mark.parametrize("spec", [lj.Static(16), lj.Dynamic()], ids=str)
def test_flax_nnx_attention(readme, x, spec, sizes):
    """flax's own `nnx.MultiHeadAttention`, its weights untouched, against its uncached output."""
    attention = nnx.MultiHeadAttention(
        H, WIDTH, decode=False, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0)
    )
    expected = attention(x, is_causal=True)
    out = in_chunks(lambda s, x: readme["cached"](attention, x, s), empty(spec), x, sizes)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_flax_nnx_attention_in_a_compiled_loop(readme, x):
    """One program for all steps: the state is the loop's carry."""
    attention = nnx.MultiHeadAttention(H, WIDTH, decode=False, rngs=nnx.Rngs(1))
    graph, params = nnx.split(attention)

    @jax.jit
    def run(params, state, x):
        module = nnx.merge(graph, params)

        def step(state, token):
            return readme["cached"](module, token[:, None], state)[::-1]

        return jax.lax.scan(step, state, x.swapaxes(0, 1))[1][:, :, 0].swapaxes(0, 1)

    out = run(params, empty(lj.Static(16)), x)
    np.testing.assert_allclose(out, attention(x, is_causal=True), atol=1e-5)


@pytest.mark.parametrize("sizes", CHUNKS, ids=str)
def test_linen_module(readme, x, sizes):
    """With the parameters of linen's own attention, which has no cache here."""
    plain, cached = linen.MultiHeadDotProductAttention(H), readme["Attention"](H)
    params = plain.init(jax.random.key(0), x)
    expected = plain.apply(params, x, mask=linen.make_causal_mask(x[..., 0]))
    out = in_chunks(lambda s, x: cached.apply(params, x, s), empty(lj.Static(16)), x, sizes)
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("sizes", CHUNKS, ids=str)
def test_a_scan_over_layers(readme, x, sizes):
    """Against dense causal attention, layer after layer."""
    layers = 3
    keys = jax.random.split(jax.random.key(5), 2)
    wqkv = jax.random.normal(keys[0], (layers, 3, WIDTH, H, D)) / 6
    wo = jax.random.normal(keys[1], (layers, H, D, WIDTH)) / 6
    expected = x
    for into, out_of in zip(wqkv, wo, strict=True):
        q, k, v = jnp.einsum("btd,cdne->cbtne", expected, into)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        expected = expected + jnp.einsum("btne,ned->btd", mixed, out_of)

    @jax.jit
    def step(state, x):
        weights = (jnp.arange(layers), wqkv, wo)
        (out, state), _ = jax.lax.scan(readme["layer"], (x, state), weights)
        return out, state

    state = empty(lj.Static(16), num_layers=layers, stacked=True)
    np.testing.assert_allclose(in_chunks(step, state, x, sizes), expected, atol=1e-4)
