"""What JAX and its tools do with functions of a state, for several layouts and codecs.

`jax.checkpoint`, `jax.eval_shape`, compiling ahead of time, `jax.export` and Orbax: each gives what
plain calls give, and the next update of what comes back works.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import lucid_jax as lj
from tests.helpers import assert_same, make, more_layouts, queries, tokens

# A spec, or one per layer, and whether rows advance alone.
SPECS = {
    "static": (lj.Static(16), False),
    "static-fp8": (lj.Static(16, lj.codecs.Float8()), True),
    "tracked": (lj.Static(16, track=True), True),
    "dynamic-int8": (lj.Dynamic(lj.codecs.Int8()), False),
    "sliding": (lj.Sliding(6, 2, 3), True),
    "sliding-int4": (lj.Sliding(6, 2, 3, lj.codecs.Int4(group=2, rotate=True)), False),
    "sliding-kivi": (lj.Sliding(9, 2, 3, lj.codecs.KIVI(group=4, residual=3)), True),
    **{name: (new(), True) for name, new in more_layouts(16).items()},
    "shared": ([lj.Static(16), lj.Sliding(6, 1, 2, lj.codecs.Int8()), lj.Shared(0)], False),
}


@pytest.fixture(params=SPECS)
def state(request):
    """A state with a past: tokens dropped by a window, rolled back, cropped."""
    spec, ragged = SPECS[request.param]
    state = make(spec, ragged=ragged)
    for layer_idx in state.owners:
        state = lj.update(state, *tokens(layer_idx, 2, 12), layer_idx)
    return lj.crop(lj.rollback(state, 1), 8)


def step(state, query, key, value):
    """Appends and attends: (outputs, the new state)."""
    state = lj.update(state, key, value, 0)
    return lj.attend(state, query, 0), state


def inputs(seed, count=2):
    return jnp.asarray(queries(seed, 2, count)), *map(jnp.asarray, tokens(seed, 2, count))


def assert_works_like(state, other):
    """The next step of two states is the same, bit for bit."""
    assert jax.tree.structure(state) == jax.tree.structure(other)
    assert_same(state, other)
    out, state = step(state, *inputs(2))
    expected, other = step(other, *inputs(2))
    np.testing.assert_array_equal(out, expected)
    assert_same(state, other)


def test_eval_shape_says_what_a_step_gives(state):
    """Shapes, dtypes and structure, also from a state that is only described."""
    args = inputs(1)
    described = jax.eval_shape(lambda: state)
    out, new = jax.eval_shape(step, described, *args)
    expected_out, expected = step(state, *args)
    assert (out.shape, out.dtype) == (expected_out.shape, expected_out.dtype)
    assert jax.tree.structure(new) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(new), jax.tree.leaves(expected), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def test_a_step_compiled_ahead_of_time_works(state):
    """Lowered from descriptions alone, and donating: it gives what the call gives."""
    args = inputs(1)
    expected, after = jax.jit(step)(state, *args)
    described = jax.eval_shape(lambda: (state, *args))
    compiled = jax.jit(step, donate_argnums=0).lower(*described).compile()
    out, new = compiled(jax.tree.map(jnp.copy, state), *args)
    np.testing.assert_array_equal(out, expected)
    assert_works_like(new, after)
    with pytest.raises(TypeError, match=r"compiled for|tree"):
        compiled(make(lj.Static(5)), *args)  # another structure or size is refused


def test_checkpoint_changes_neither_outputs_nor_gradients(state):
    """A step that is recomputed in the backward pass: of the query, here."""
    query, key, value = inputs(1)

    def loss(query, step):
        out, new = step(state, query, key, value)
        return jnp.sum(out**2), new

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (expected, after), gradient = run(query, step)
    (kept, new), again = run(query, jax.checkpoint(step))
    np.testing.assert_allclose(kept, expected, rtol=1e-6)
    np.testing.assert_allclose(again, gradient, rtol=1e-5, atol=1e-6)
    assert np.abs(gradient).max() > 1e-3
    assert_works_like(new, after)


def test_an_exported_step_reads_back_and_runs(state):
    """States go in and come out of a serialized function, static configuration included."""
    args = inputs(1)
    expected, after = jax.jit(step)(state, *args)
    data = export.export(jax.jit(step))(state, *args).serialize()
    again = export.deserialize(data)
    assert again.in_tree == jax.tree.structure(((state, *args), {}))
    out, new = again.call(state, *args)
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)
    assert jax.tree.structure(new) == jax.tree.structure(after)
    assert_works_like(new, after)
    with pytest.raises(ValueError, match="tree"):
        again.call(make(lj.Static(5)), *args)


def test_an_exported_encoder_decoder_state_reads_back():
    """The pair of states is known to `export` as well."""
    pair = lj.EncoderDecoderState(decoder=make(ragged=True), encoder=make(lj.Static(3)))

    def run(pair, key, value):
        return pair.replace(decoder=lj.update(pair.decoder, key, value, 0))

    args = tokens(0, 2, 3)
    again = export.deserialize(export.export(jax.jit(run))(pair, *args).serialize())
    new = again.call(pair, *args)
    assert jax.tree.structure(new) == jax.tree.structure(pair)
    assert_same(new.decoder, run(pair, *args).decoder)


def test_a_codec_of_the_users_own_is_not_exported_silently():
    """Nothing could read it back, and the error says what to do."""

    class Own(lj.codecs.Identity):
        pass

    exported = export.export(jax.jit(lambda s: s))(make(lj.Static(4, Own())))
    with pytest.raises(TypeError, match="class of your own"):
        exported.serialize()


@pytest.mark.parametrize("known", [True, False], ids=["described", "as-it-was"])
def test_orbax_brings_a_state_back(state, known, tmp_path):
    """Restored into what `eval_shape` describes, or into an empty state of the same making."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Orbax's own
        import orbax.checkpoint as ocp

        target = jax.eval_shape(lambda: state) if known else jax.tree.map(jnp.zeros_like, state)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", state)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "state", target)
    assert_works_like(restored, state)
