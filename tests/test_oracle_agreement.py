"""Random operation sequences agree with the slow NumPy model, op by op.

{static, dynamic, sliding} x {aligned, ragged} x {eager, donated, jitted}, and the codecs; shapes come
from few sizes, so that compiled programs are reused.
"""

import dataclasses
import functools

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lucid_jax as lj
from tests.helpers import make, more_layouts, queries, snapshot, tokens
from tests.oracle import Arithmetic, Codec, Oracle, Refused, Window

H, D, DV = 2, 2, 3
EXAMPLES = hypothesis.settings().max_examples


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a layout is driven: steps in a row, tokens in a chunk, places drawn up to `reach`."""

    spec: object
    steps: int
    chunks: tuple
    reach: int
    sliding: Window | None = None
    batches: tuple = (3,)  # sizes to move between: each has its own programs
    layers: int = 1
    arithmetic: bool = False  # whether what is stored is what the layout's own functions say


LAYOUTS = {
    "static": Layout(lambda codec: lj.Static(8, codec), 18, (1, 3), 9, layers=2),
    "dynamic": Layout(lambda codec: lj.Dynamic(codec), 10, (1, 20), 70),
    "sliding": Layout(lambda codec: lj.Sliding(5, 2, 1, codec), 18, (1, 2, 8), 12, Window(5, 2, 1)),
    "ring": Layout(lambda codec: lj.Sliding(4, 0, 2, codec), 18, (1, 3, 8), 12, Window(4, 0, 2)),
    **{name: Layout(new, 18, (1, 2, 8), 12, Arithmetic(new(lj.codecs.Identity())), arithmetic=True)
       for name, new in more_layouts(5).items()},
}  # fmt: skip

CODECS = {
    "identity": lj.codecs.Identity(),
    "int8": lj.codecs.Int8(),
    "fp8": lj.codecs.Float8(),
    "int4": lj.codecs.Int4(rotate=True),
    "kivi": lj.codecs.KIVI(group=2, residual=2),
}

_JITTED = {
    "update": jax.jit(lj.update, static_argnames="layer_idx"),
    "extend": jax.jit(lj.extend, static_argnames="layer_idx"),
    "crop": jax.jit(lj.crop),
    "rollback": jax.jit(lj.rollback),
    "select": jax.jit(lj.select),
    "repeat_interleave": jax.jit(lj.repeat_interleave, static_argnames="n"),
    "reset": jax.jit(lj.reset),
}


@functools.cache
def _model_of(codec):
    """What the model is told of a codec: what stored tokens read back as."""
    if codec == "identity":
        return Codec()
    forms = CODECS[codec].forms("float32", D, DV)

    @jax.jit
    def read_back(key, value):
        pairs = zip(forms, (key[None], value[None]), strict=True)
        return [form.decode(form.encode(tokens))[0] for form, tokens in pairs]

    return Codec(read_back, CODECS[codec].unit, CODECS[codec].tail)


class Pair:
    """A state and its model, driven side by side."""

    def __init__(self, layout, codec, ragged, mode, batch=None):
        self.layout, self.codec, self.ragged, self.mode = LAYOUTS[layout], codec, ragged, mode
        self.batches = self.layout.batches if batch is None else (1, 3)
        self.layers = self.layout.layers if mode != "jitted" else 1
        self.state = make(
            self.layout.spec(CODECS[codec]), batch=batch or self.batches[0], layers=self.layers,
            ragged=ragged, heads=H, dim=D, value_dim=DV,
        )  # fmt: skip
        self.models = [
            Oracle(batch=self.state.batch_size, heads=H, dim=D, value_dim=DV,
                   capacity=lj.capacity(self.state), growable=layout == "dynamic", ragged=ragged,
                   sliding=self._sliding(), codec=_model_of(codec))
            for _ in range(self.layers)
        ]  # fmt: skip

    def _sliding(self):
        if not self.layout.arithmetic:
            return self.layout.sliding
        return Arithmetic(self.state.layers[0].spec)

    @property
    def batch(self):
        return self.models[0].batch

    def call(self, verb, *args, layer=None):
        """Runs one verb on both; a refusal must raise (eager) or be flagged (traced)."""
        traced = self.mode == "jitted"
        before = [model.copy() for model in self.models]
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
                if self.codec == "identity":
                    np.testing.assert_array_equal(ours, theirs)
                else:
                    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
            flags.append(model.overflowed())
        np.testing.assert_array_equal(lj.overflowed(self.state), np.any(flags, axis=0))

    def attend(self, count, layer, cache_position, lengths, seed):
        query = queries(seed, self.batch, count, 2 * H, D)
        options = {"cache_position": cache_position, "lengths": lengths}
        ours = lj.attend(self.state, query, layer, **options)
        theirs = self.models[layer].attend(query, **options)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)

    def extend(self, key, value, places, lengths, layer, seed):
        """One possible `extend` on both; nothing is said of queries whose tokens are gone."""
        query = queries(seed, self.batch, key.shape[2], 2 * H, D)
        options = {"cache_position": places, "lengths": lengths}
        model = self.models[layer]
        model.update(key, value, **options)
        run, more = lj.extend, {"donate": self.mode == "donated"}
        if self.mode == "jitted":
            run, more = _JITTED["extend"], {}
        ours, self.state = run(self.state, query, key, value, layer_idx=layer, **options, **more)
        self.compare()
        if model.has_what_is_seen(model.asked(key.shape[2], **options)) or places is None:
            theirs = model.attend(query, **options)
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def _update(pair, draw, seed):
    layout = pair.layout
    count = draw(st.sampled_from(layout.chunks))
    layer = draw(st.integers(0, pair.layers - 1))
    key, value = tokens(seed, pair.batch, count, H, D, DV)
    form = "append"
    if CODECS[pair.codec].unit == 1:
        forms = {layout.chunks[0]: ["0-D"], layout.chunks[1]: ["1-D", "2-D"]}  # few programs
        form = draw(st.sampled_from(["append"] * 3 + forms.get(count, [])))
    place = st.integers(0, layout.reach)
    if draw(st.integers(0, 9)) == 0:  # sometimes nonsense, which must be refused
        place = st.integers(-2, layout.reach)
    shape = {"append": None, "0-D": (), "1-D": (count,), "2-D": (pair.batch, count)}[form]
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
    legal = (lengths is None or (lengths <= count).all()) and (places is None or places.min() >= 0)
    attends = legal and draw(st.integers(0, 2)) == 0
    if layout.sliding:
        # A long chunk can only be read before it is written; places are those before the window
        # moves on.
        short = count <= layout.sliding.slack + 1
        if attends and (not short or places is not None):
            return pair.extend(key, value, places, lengths, layer, seed)
        attends = attends and short and places is None
    pair.call("update", key, value, places, lengths, layer=layer)
    if layout is LAYOUTS["dynamic"] and (places is not None or count > 1):
        return  # attention reads a dynamic layer as it reads a static one; save the programs
    if attends:
        pair.attend(count, layer, places, lengths, seed)


def _rollback(pair, draw, seed):
    most = min(min(model.lengths()) for model in pair.models)
    if pair.layout.sliding and draw(st.booleans()):
        most = min(most, pair.layout.sliding.slack)
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
    if pair.layout is LAYOUTS["dynamic"]:
        n = draw(st.sampled_from([1, 60]))
        pair.state = lj.ensure_capacity(pair.state, n)
        for model in pair.models:
            model._grow(max(model.lengths()) + n)
        pair.compare()


VERBS = [_update] * 8 + [_rollback] * 2 + [_crop] * 2 + [_select, _repeat, _reset, _ensure_capacity]


def _drive(pair, data):
    most = pair.layout.steps
    for seed in range(data.draw(st.integers(most // 2, most))):
        verb = data.draw(st.sampled_from(VERBS))
        verb(pair, data.draw, seed)


@pytest.mark.parametrize("mode", ["eager", "donated", "jitted"])
@pytest.mark.parametrize("ragged", [False, True], ids=["aligned", "ragged"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "ring"])
@hypothesis.settings(max_examples=EXAMPLES // 2)
@given(data=st.data())
def test_any_sequence_of_operations_agrees_with_the_model(layout, ragged, mode, data):
    """After every operation, possible or not, everything observable equals the model's."""
    several = (layout, ragged, mode) == ("static", True, "eager")
    batch = data.draw(st.sampled_from([1, 3])) if several else None
    _drive(Pair(layout, "identity", ragged, mode, batch), data)


@pytest.mark.parametrize("layout, codec, ragged, mode", [
    ("static", "int8", False, "eager"),
    ("static", "kivi", True, "donated"),
    ("dynamic", "kivi", False, "eager"),
    ("ring", "identity", False, "eager"),
    ("ring", "int4", False, "donated"),
    ("ring", "kivi", True, "eager"),
    ("sliding", "fp8", False, "donated"),
    ("sliding", "kivi", False, "jitted"),
    *((layout, "kivi", True, "eager") for layout in more_layouts(5)),
])  # fmt: skip
@hypothesis.settings(max_examples=EXAMPLES // 4)
@given(data=st.data())
def test_any_sequence_of_operations_on_a_codec_agrees_with_the_model(
    layout, codec, ragged, mode, data
):
    """The same of tokens that read back as the codec's forms say, quantized when it is their turn."""
    _drive(Pair(layout, codec, ragged, mode), data)
