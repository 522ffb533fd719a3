"""Counters of all layers as parts of one array: of what comes out nothing differs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lucid_jax as lj
from lucid_jax.cache import counting
from lucid_jax.cache.counting import counted_together
from tests.helpers import make, tokens


@pytest.fixture
def as_on_gpus(monkeypatch):
    """What is chosen by platform is what NVIDIA's GPUs get, here and in no other module."""

    class Lax:
        optimization_barrier = staticmethod(jax.lax.optimization_barrier)

        @staticmethod
        def platform_dependent(*args, cuda, default):
            return cuda(*args)

    monkeypatch.setattr(counting, "lax", Lax)


SPECS = {
    "alike": lj.Static(8),
    "of two kinds": [lj.Static(8), lj.Sliding(4, sinks=1), lj.Static(8, lj.codecs.Int8())],
    "sharing": [lj.Static(8), lj.Shared(0), lj.Static(8)],
}


@pytest.mark.parametrize("ragged", [False, True], ids=["aligned", "ragged"])
@pytest.mark.parametrize("spec", SPECS)
def test_the_state_stays_as_it_is(spec, ragged, as_on_gpus):
    """Layer by layer, also where a layer refuses what does not fit."""

    def step(state, key, value, together):
        state = counted_together(state, None) if together else state
        for index in range(3):
            if state.owns(index):
                state = lj.update(state, key, value, index)
        return state

    states = [make(SPECS[spec], layers=3, ragged=ragged)] * 2
    for seed in range(3):  # of which 8 slots hold two
        new = tokens(seed, 2, 3)
        states = [
            jax.jit(step, static_argnums=3)(state, *new, together)
            for state, together in zip(states, (True, False), strict=True)
        ]
        jax.tree.map(np.testing.assert_array_equal, *states)
        assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    assert np.any(states[0].layers[0].overflowed)


def test_it_is_mapped(as_on_gpus):
    state = make(lj.Static(8), layers=2)
    states = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    got = jax.vmap(partial(counted_together, lengths=None))(states)
    jax.tree.map(np.testing.assert_array_equal, got, states)


@pytest.mark.parametrize("options", [{"layers": 1}, {"layers": 2, "stacked": True}], ids=str)
def test_counters_that_are_one_array_or_one_layer_stay(options, as_on_gpus):
    state = make(lj.Static(8), **options)
    assert not jax.make_jaxpr(partial(counted_together, lengths=None))(state).eqns


def test_lengths_are_an_array_for_all_layers_already(as_on_gpus):
    state = make(lj.Static(8), layers=2, ragged=True)
    assert not jax.make_jaxpr(lambda state, x: counted_together(state, x))(state, jnp.ones(2)).eqns


def test_outside_of_a_trace_nothing_is_computed():
    state = make(lj.Static(8), layers=2)
    assert counted_together(state, None) is state


def test_what_the_compiler_divides_stays(as_on_gpus):
    """Rows of a batch may lie on several devices, and layers apart from each other."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    state = make(lj.Static(8), layers=2, ragged=True)
    state = jax.device_put(state, lj.shardings(state, mesh, batch="x"))
    with jax.set_mesh(mesh):
        assert not jax.make_jaxpr(partial(counted_together, lengths=None))(state).eqns
