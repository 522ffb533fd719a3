"""Random operation sequences agree with the slow NumPy model, op by op.

{static, dynamic} x {aligned, ragged} x {eager, donated, jitted}; shapes come from few sizes, so
that compiled programs are reused.
"""

import copy

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lucid_jax as lj
from tests.helpers import make, queries, snapshot, tokens
from tests.oracle import Oracle, Refused

H, D, DV = 2, 2, 3
STEPS = {"static": 36, "dynamic": 18}
CHUNKS = {"static": (1, 3), "dynamic": (1, 20)}
REACH = {"static": 9, "dynamic": 70}  # positions drawn up to this
SPECS = {"static": lj.Static(8), "dynamic": lj.Dynamic()}

_JITTED = {
    "update": jax.jit(lj.update, static_argnames="layer_idx"),
    "crop": jax.jit(lj.crop),
    "rollback": jax.jit(lj.rollback),
    "select": jax.jit(lj.select),
    "repeat_interleave": jax.jit(lj.repeat_interleave, static_argnames="n"),
    "reset": jax.jit(lj.reset),
}


def _batches(layout, mode):
    """Batch sizes to move between: one program each, so more than one only where it is cheap."""
    return (1, 3) if (layout, mode) == ("static", "eager") else (3,)


class Pair:
    """A state and its model, driven side by side."""

    def __init__(self, layout, ragged, mode, batch):
        self.layout, self.ragged, self.mode = layout, ragged, mode
        self.batches = _batches(layout, mode)
        self.layers = 2 if layout == "static" and mode != "jitted" else 1
        self.state = make(
            SPECS[layout], batch=batch, layers=self.layers, ragged=ragged,
            heads=H, dim=D, value_dim=DV,
        )  # fmt: skip
        self.models = [
            Oracle(batch=batch, heads=H, dim=D, value_dim=DV, capacity=lj.capacity(self.state),
                   growable=layout == "dynamic", ragged=ragged)
            for _ in range(self.layers)
        ]  # fmt: skip

    @property
    def batch(self):
        return self.models[0].batch

    def call(self, verb, *args, layer=None):
        """Runs one verb on both; a refusal must raise (eager) or be flagged (traced)."""
        traced = self.mode == "jitted"
        before = copy.deepcopy(self.models)
        old, seen = self.state, None if self.mode == "donated" else snapshot(self.state)
        refused = None
        flag = {} if verb in ("reset", "repeat_interleave") else {"traced": traced}
        try:
            for model in self.models if layer is None else [self.models[layer]]:
                getattr(model, verb)(*args, **flag)
        except Refused as error:
            self.models, refused = before, error.error
        if refused is None:
            self.state = self._run(verb, args, layer)
        else:
            with pytest.raises(refused):
                self._run(verb, args, layer)
        self.compare()
        if seen is not None:  # the state before the call is still there, and as it was
            jax.tree.map(np.testing.assert_array_equal, seen, snapshot(old))

    def _run(self, verb, args, layer):
        if verb == "update":
            args = (*args[:2], layer, *args[2:])
        if self.mode == "jitted":
            args = tuple(np.int32(x) if isinstance(x, (int, list)) else x for x in args)
            if verb == "update":
                key, value, _, *rest = args
                return _JITTED[verb](
                    self.state,
                    key,
                    value,
                    layer_idx=layer,
                    **dict(zip(("cache_position", "lengths"), rest, strict=True)),
                )
            if verb == "repeat_interleave":
                return _JITTED[verb](self.state, n=int(args[0]))
            return _JITTED[verb](self.state, *args)
        in_place = self.mode == "donated" and verb != "repeat_interleave"
        if verb == "select" and len(args[0]) != self.state.batch_size:
            in_place = False
        return getattr(lj, verb)(self.state, *args, **({"donate": True} if in_place else {}))

    def compare(self):
        assert self.state.batch_size == self.batch
        flags = []
        for i, model in enumerate(self.models):
            assert lj.capacity(self.state, i) == model.capacity
            np.testing.assert_array_equal(lj.seq_length(self.state, i), model.length())
            np.testing.assert_array_equal(lj.positions(self.state, 2, i), model.positions(2))
            np.testing.assert_array_equal(self.state.layers[i].overflowed, model.overflowed())
            for ours, theirs in zip(lj.get(self.state, i), model.get(), strict=True):
                np.testing.assert_array_equal(ours, theirs)
            flags.append(model.overflowed())
        np.testing.assert_array_equal(lj.overflowed(self.state), np.any(flags, axis=0))

    def attend(self, count, layer, cache_position, lengths, seed):
        query = queries(seed, self.batch, count, 2 * H, D)
        options = {"cache_position": cache_position, "lengths": lengths}
        ours = lj.attend(self.state, query, layer, **options)
        theirs = self.models[layer].attend(query, **options)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def _update(pair, draw, seed):
    count = draw(st.sampled_from(CHUNKS[pair.layout]))
    layer = draw(st.integers(0, pair.layers - 1))
    key, value = tokens(seed, pair.batch, count, H, D, DV)
    form = draw(st.sampled_from(["append"] * 4 + ["0-D", "1-D", "2-D"]))
    place = st.integers(0, REACH[pair.layout])
    if draw(st.integers(0, 9)) == 0:  # sometimes nonsense, which must be refused
        place = st.integers(-2, REACH[pair.layout])
    shape = {"append": None, "0-D": (), "1-D": (count,), "2-D": (pair.batch, count)}[form]
    if form == "0-D" and count > 1:
        shape = (count,)
    places = None
    if shape is not None:
        size = int(np.prod(shape))
        drawn = draw(st.lists(place, min_size=size, max_size=size))
        places = np.array(drawn, np.int32).reshape(shape)
    lengths = None
    if pair.ragged and draw(st.booleans()):
        top = count + (draw(st.integers(0, 9)) == 0)
        drawn = draw(st.lists(st.integers(0, top), min_size=pair.batch, max_size=pair.batch))
        lengths = np.array(drawn, np.int32)
        if places is not None:
            places = np.maximum(places, 0)
    pair.call("update", key, value, places, lengths, layer=layer)
    if pair.layout == "dynamic" and (places is not None or count > 1):
        return  # attention reads a dynamic layer as it reads a static one; save the programs
    legal = (lengths is None or (lengths <= count).all()) and (places is None or places.min() >= 0)
    if legal and draw(st.integers(0, 2)) == 0:
        pair.attend(count, layer, places, lengths, seed)


def _rollback(pair, draw, seed):
    most = min(min(model.lengths()) for model in pair.models)
    n = st.integers(0, most) if draw(st.integers(0, 4)) else st.integers(-1, most + 2)
    if pair.ragged and draw(st.booleans()):
        drawn = draw(st.lists(n, min_size=pair.batch, max_size=pair.batch))
        pair.call("rollback", np.array(drawn, np.int32))
    else:
        pair.call("rollback", draw(n))


def _crop(pair, draw, seed):
    low = 0 if draw(st.integers(0, 5)) else -1
    pair.call("crop", draw(st.integers(low, lj.capacity(pair.state))))


def _select(pair, draw, seed):
    size = draw(st.sampled_from(pair.batches))
    low, high = (0, pair.batch - 1) if draw(st.integers(0, 4)) else (-1, pair.batch)
    pair.call("select", draw(st.lists(st.integers(low, high), min_size=size, max_size=size)))


def _repeat(pair, draw, seed):
    pair.call("repeat_interleave", max(pair.batches) // pair.batch)


def _reset(pair, draw, seed):
    pair.call("reset")


def _ensure_capacity(pair, draw, seed):
    if pair.layout == "dynamic":
        n = draw(st.sampled_from([1, 60]))
        pair.state = lj.ensure_capacity(pair.state, n)
        for model in pair.models:
            model._grow(max(model.lengths()) + n)
        pair.compare()


VERBS = [_update] * 8 + [_rollback] * 2 + [_crop] * 2 + [_select, _repeat, _reset, _ensure_capacity]


@pytest.mark.parametrize("mode", ["eager", "donated", "jitted"])
@pytest.mark.parametrize("ragged", [False, True], ids=["aligned", "ragged"])
@pytest.mark.parametrize("layout", ["static", "dynamic"])
@given(data=st.data())
def test_any_sequence_of_operations_agrees_with_the_model(layout, ragged, mode, data):
    """After every operation, possible or not, everything observable equals the model's."""
    pair = Pair(layout, ragged, mode, data.draw(st.sampled_from(_batches(layout, mode))))
    for seed in range(data.draw(st.integers(STEPS[layout] // 2, STEPS[layout]))):
        verb = data.draw(st.sampled_from(VERBS))
        verb(pair, data.draw, seed)
