"""Backends of attention: all say the same, one from outside is a function, and learned sinks."""

import functools
import inspect
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import lucid_jax as lj
from lucid_jax.attention import NotMe, backends, blocks, by_row, prefix
from lucid_jax.cache.reading import slot_runs
from tests.helpers import DV, D, H, filled, make, more_layouts, poison, queries, tokens
from tests.oracle import Arithmetic, Oracle, Window

B, N = 2, 2 * H
BACKENDS = ["walk", "dense"]
LAYOUTS = {
    "static": lj.Static(24), "dynamic": lj.Dynamic(), "sliding": lj.Sliding(7, 2, 3),
    **{name: new() for name, new in more_layouts(5).items()},
}  # fmt: skip
CODECS = {
    "identity": lj.codecs.Identity(),
    "int8": lj.codecs.Int8(),
    "fp8": lj.codecs.Float8(),
    "int4": lj.codecs.Int4(rotate=True),
    "kivi": lj.codecs.KIVI(group=4, residual=3),
}
SINKS = np.float32([0.5, -1.0, 2.0, -np.inf])  # the last head has none
DRAWN = np.random.default_rng(0)


def _spec(layout, codec="identity"):
    return LAYOUTS[layout].but(codec=CODECS[codec])


# --- one from outside ----------------------------------------------------------------------------


def plain_product(query, slot_runs, mask, scores):
    """A backend as a user writes it: one softmax over all parts, by what the mask says of them."""
    if scores.softcap is not None:
        return NotMe("takes no softcap")
    if scores.rope is not None or scores.sink_logits is not None:
        return NotMe("takes neither RoPE by place nor sinks")
    (sight,) = mask.sights
    grouped = query.reshape(len(query), mask.num_kv_heads, -1, *query.shape[2:]) * scores.scale
    columns, values = [], []
    for slot_run in slot_runs:
        key, value = (
            slot_run.key_form.decode(slot_run.key),
            slot_run.value_form.decode(slot_run.value),
        )
        seen, bias = mask.seen(slot_run, sight), mask.bias_of(slot_run)
        one = jnp.einsum("bhgtd,bhsd->bhgts", grouped, key)
        one = one if bias is None else one + bias
        columns.append(jnp.where(seen, one, -jnp.inf))
        values.append(value)
    every = jnp.concatenate(columns, axis=-1)
    lse = jax.nn.logsumexp(every, axis=-1)
    weights = jnp.exp(every - jnp.where(jnp.isneginf(lse), 0, lse)[..., None])
    out = jnp.einsum("bhgts,bhsd->bhgtd", weights, jnp.concatenate(values, axis=2))
    return out.reshape(*query.shape[:3], -1), lse.reshape(query.shape[:3])


@pytest.fixture
def plain(monkeypatch):
    """`register`, undone after the test; returns a function that registers `plain_product`."""
    own = {name: backends._BY_NAME[name] for name in BACKENDS}  # a doctest leaves one more
    monkeypatch.setattr(backends, "_BY_NAME", own)
    monkeypatch.setattr(backends, "_TRIED", dict(backends._TRIED))
    return functools.partial(lj.attention.register, "plain", plain_product)


OPTIONS = {
    "plain": {},
    "window": {"window": 3},
    "mask and bias": {"mask": DRAWN.random((N, 3, 24)) > 0.3,
                      "bias": DRAWN.standard_normal((B, 1, 1, 24)).astype(np.float32)},
    "not causal": {"causal": False},
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("codec", ["identity", "kivi"])
@pytest.mark.parametrize("ragged", [False, True], ids=["aligned", "ragged"])
def test_a_backend_from_outside_needs_no_more_than_what_it_is_given(plain, ragged, codec, option):
    """Parts and a mask say all: whatever the layout and codec, it agrees with the walk."""
    plain()
    state = make(_spec("static", codec), ragged=ragged)
    state = lj.update(state, *tokens(0, B, 11), 0, lengths=[11, 4] if ragged else None)
    options = {**OPTIONS[option], "lengths": [3, 2] if ragged else None, "return_lse": True}
    got, expected = (
        lj.attend(state, queries(0, B, 3), 0, implementation=name, **options)
        for name in ("plain", "walk")
    )
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_extend_hands_a_backend_what_a_ring_is_about_to_lose(plain):
    """What is overwritten, the ring and the new chunk are parts of one call."""
    plain()
    state = lj.update(make(_spec("sliding")), *tokens(0, B, 9), 0)
    query, (key, value) = queries(1, B, 7), tokens(1, B, 7)
    got, expected = (
        lj.extend(state, query, key, value, 0, implementation=name)[0] for name in ("plain", "walk")
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_a_backend_that_does_not_take_a_call_passes_it_on(plain):
    """On its platforms it is asked first; named, it says what it lacks."""
    asked = []

    def asking(*call):
        asked.append(call[0].shape)
        return plain_product(*call)

    plain.keywords["platforms"] = ["cpu"]
    functools.partial(lj.attention.register, "asking", asking)(platforms=["cpu"])
    state = lj.update(make(), *tokens(0, B, 4), 0)
    query = queries(0, B, 2)
    expected = lj.attend(state, query, 0, softcap=2.0, implementation="walk")
    assert not asked
    np.testing.assert_array_equal(lj.attend(state, query, 0, softcap=2.0), expected)
    assert asked == [query.shape]
    for traced in (False, True):
        run = functools.partial(lj.attend, layer_idx=0, softcap=2.0, implementation="asking")
        with pytest.raises(ValueError, match=r"does not take this call: it takes no softcap; drop"):
            (jax.jit(run) if traced else run)(state, query)


def test_a_backend_registered_later_is_asked_by_calls_seen_before(plain):
    """Programs are kept by the backends they were made for."""
    state = lj.update(make(), *tokens(0, B, 4), 0)
    query = queries(0, B, 2)
    assert np.any(lj.attend(state, query, 0))
    nothing = lambda query, slot_runs, mask, scores: (  # noqa: E731
        jnp.zeros((*query.shape[:3], DV)), jnp.zeros(query.shape[:3]))  # fmt: skip
    lj.attention.register("nothing", nothing, platforms=["cpu"])
    assert not np.any(lj.attend(state, query, 0))
    assert np.any(lj.attend(state, query, 0, implementation="walk"))


def test_names_and_platforms_that_are_not_there_are_refused(plain):
    """What there is stands in the message."""
    state = make()
    with pytest.raises(ValueError, match=r"'walk', 'dense', .*or None .* got 'flash'"):
        lj.attend(state, queries(0, B, 1), 0, implementation="flash")
    plain()
    with pytest.raises(ValueError, match="a backend 'plain' already"):
        plain()
    with pytest.raises(ValueError, match=r"among \('cpu', 'gpu', 'tpu'\), got \['cuda'\]"):
        lj.attention.register("other", plain_product, platforms=["cuda"])


def test_public_signatures_say_what_they_take():
    """No `Any`, and what `return_lse` does to the result is told apart."""
    verbs = (lj.attend, lj.extend, lj.extend_leaves)
    for function in (*verbs, lj.merge, lj.attention.register):
        assert "Any" not in str(inspect.signature(function)), function
    for function in verbs:
        assert len(typing.get_overloads(function)) == 3


# --- which is tried where ------------------------------------------------------------------------


def test_a_mask_is_data(plain):
    """Masks, scores and parts are arrays and static facts that are hashable: no closures."""

    def look(query, slot_runs, mask, scores):
        call = (slot_runs, mask, scores)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(call))
        hash(jax.tree.structure(call))
        return NotMe("only looks")

    lj.attention.register("look", look)
    state = lj.update(make(_spec("sliding", "kivi"), ragged=True), *tokens(0, B, 4), 0)
    mask, bias = np.ones((1, 17), bool), np.zeros((1, 17), np.float32)
    with pytest.raises(ValueError, match="it only looks"):
        lj.extend(
            state, queries(0, B, 9), *tokens(0, B, 9), 0, mask=mask[:, :1], bias=bias[:, :1],
            sink_logits=SINKS, rope_theta=100.0, implementation="look",
        )  # fmt: skip


@pytest.mark.parametrize("count, capacity, codec, taken", [
    (1, 1 << 20, "int8", True), (40, 24, "identity", True),
    (40, 1 << 15, "identity", False), (1, 32, "int4", False), (1, 32, "kivi", False),
])  # fmt: skip
def test_the_product_comes_first_on_accelerators_where_it_needs_little(
    plain, count, capacity, codec, taken
):
    """Past that, the walk's memory, linear in queries and slots, is worth its launches."""
    kernel, first, then = backends._TRIED["gpu"]
    assert kernel is backends.mosaic_gpu
    assert backends._TRIED["tpu"] == (backends.pallas_tpu, first, then)
    answers = []

    def ask(*call):
        answers.append(first(*call))
        return then(*call)

    lj.attention.register("ask", ask)
    state = jax.eval_shape(lambda: make(lj.Static(capacity, CODECS[codec]), batch=1))
    jax.eval_shape(
        lambda s, q: lj.attend(s, q, 0, implementation="ask"),
        state,
        jax.ShapeDtypeStruct((1, N, count, D), jnp.float32),
    )
    assert (first, then) == (prefix.dense_if_small, backends.walk)
    assert [isinstance(answer, NotMe) for answer in answers] == [not taken]


@pytest.mark.parametrize("backend", ["walk", "dense"])
def test_a_query_of_an_empty_cache_sees_its_sink(backend):
    """As of cross-attention to nothing: out is zero, and `merge` is told of the sink's share."""
    state = lj.init_cache(lj.Static(4), num_layers=1, batch_size=1, num_kv_heads=1, head_dim=2)
    out, lse = lj.attend(
        state, jnp.ones((1, 1, 2, 2)), 0, return_lse=True, sink_logits=jnp.array([2.0]),
        causal=False, implementation=backend,
    )  # fmt: skip
    assert not out.any()
    np.testing.assert_allclose(lse, 2.0)


def test_the_product_leaves_stacked_layers_to_the_walk(plain):
    """XLA on TPU copies the whole stack to read one layer's slots of it at once."""
    answers = []

    def ask(*call):
        answers.append(prefix.dense_if_small(*call))
        return backends.walk(*call)

    lj.attention.register("ask", ask)
    for stacked in (False, True):
        state = lj.init_cache(
            lj.Static(24), num_layers=2, batch_size=1, num_kv_heads=H, head_dim=D, stacked=stacked
        )
        lj.attend(state, jnp.ones((1, N, 1, D)), 0, implementation="ask")
    assert [isinstance(answer, NotMe) for answer in answers] == [False, True]


def test_the_platform_is_that_of_the_default_device(monkeypatch):
    """Programs compiled for another device than the process's first are asked for it."""
    assert backends.to_try(None) == (backends.walk,)
    with jax.default_device(jax.devices("cpu")[0]):
        assert backends.to_try(None) == (backends.walk,)
    monkeypatch.setattr(jax, "default_backend", lambda: "cuda")
    assert backends.to_try(None) == backends._TRIED["gpu"]
    monkeypatch.setattr(jax, "default_backend", lambda: "a new one")
    assert backends.to_try(None) == (backends.walk,)


@pytest.mark.parametrize("where, capacity, runs", [
    ("gpu", 2048, 0), ("gpu", 32760, 0), ("gpu", 32768, 1), ("gpu", 131072, 3),
    ("tpu", 1016, 0), ("tpu", 1024, 1), ("tpu", 8192, 4),
])  # fmt: skip
def test_the_product_is_one_block_and_at_most_one_choice(where, capacity, runs, monkeypatch):
    """Of a decode step: its only loop is the one that is entered where something is not finite."""
    for module in (prefix, blocks):
        monkeypatch.setattr(module, "platform", lambda: where)
    state = jax.eval_shape(lambda: make(lj.Static(capacity), batch=1))
    query = jax.ShapeDtypeStruct((1, N, 1, D), jnp.float32)
    sizes = []
    jax.eval_shape(lambda s: sizes.extend(prefix._sizes(slot_runs(s.layers[0])[0])), state)
    assert len(sizes) == 1 + runs and sizes[-1] == capacity

    def count(name):
        run = functools.partial(lj.attend, layer_idx=0, implementation=name)
        jaxpr = str(jax.make_jaxpr(run)(state, query))
        return jaxpr.count(" while["), jaxpr.count(" cond[")

    assert count("dense") == (2, min(runs, 1))  # the second is inside the first
    rows = {"key": jax.ShapeDtypeStruct((1, H, N // H, D), jnp.float32)}
    assert count("walk") == (int(blocks.block_size(rows) < capacity), 0)


LONG = prefix.OTHERS_RUNS.short * prefix.OTHERS_RUNS.share + 500


@pytest.mark.parametrize(
    "where, batch, heads, queries, dim, size",
    [
        ("cpu", 1, 2, 4, 64, 512),
        ("cpu", 64, 8, 4, 128, 64),  # all keys of a block stay in the caches
        ("cpu", 32, 2, 4, 64, 128),
        ("cpu", 1, 2, 2048, 64, 256),  # and so do its scores
        ("cpu", 64, 64, 4096, 256, 64),  # but it is never less than a row's worth
        ("cpu", 0, 2, 4, 64, 512),
        ("gpu", 8, 8, 4, 128, 512),
        ("tpu", 8, 8, 4, 128, 4096),
        ("tpu", 1, 8, 2048, 128, 1024),
        ("tpu", 8, 8, 2048, 128, 256),
    ],
)
def test_the_walk_reads_as_much_at_once_as_its_platform_likes(
    where, batch, heads, queries, dim, size, monkeypatch
):
    """Few turns of the loop, but what a turn holds stays in the caches of a CPU."""
    cpu = blocks.SIZES["cpu"]._replace(most=512)  # as users have it
    monkeypatch.setattr(blocks, "SIZES", {**blocks.SIZES, "cpu": cpu})
    monkeypatch.setattr(blocks, "platform", lambda: where)
    rows = jax.ShapeDtypeStruct((batch, heads, queries, dim), jnp.float32)
    assert blocks.block_size({"key": rows}) == size


def test_what_looks_for_tokens_that_are_not_finite_holds_small_blocks(monkeypatch):
    """It hardly ever runs, and its memory is taken all the same: of a TPU's blocks that is too much."""
    sizes, blocks_of = [], blocks._blocks_of

    def spy(slots, *rest):
        sizes.append(slots)
        return blocks_of(slots, *rest)

    monkeypatch.setattr(blocks, "_blocks_of", spy)
    monkeypatch.setattr(blocks, "SIZES", {"cpu": blocks.Sizes(8, 16, 1 << 19, 1 << 20)})
    jax.eval_shape(lambda state, query: lj.attend(state, query, 0), make(), queries(0, B, 2))
    assert sizes == [16, 8]


@pytest.mark.parametrize("slots", [8, 64])
@pytest.mark.parametrize("ragged", [False, True], ids=["aligned", "ragged"])
def test_few_slots_are_read_at_once_where_most_are_in_use(slots, ragged, monkeypatch):
    """A decode step then reads the leaf where it lies; where few are in use, a block at a time."""
    monkeypatch.setattr(blocks, "SIZES", {"cpu": blocks.Sizes(8, 8, 1 << 19, 1 << 20)})
    calls, at_once = [], by_row.at_once_or_each_block

    def spy(slot_run, rows, body, carry):
        def counted(carry, block):
            jax.debug.callback(lambda: calls.append(block.size))
            return body(carry, block)

        return at_once(slot_run, rows, counted, carry)

    monkeypatch.setattr(by_row, "at_once_or_each_block", spy)
    full, _, _ = filled(slots, lj.Static(slots), ragged=ragged)
    query = queries(0, B, 1)
    for length in (0, 1, slots // 2, slots // 2 + 1, slots):
        state = poison(lj.rollback(full, slots - length))
        calls.clear()
        out = lj.attend(state, query, 0)
        jax.effects_barrier()
        expected = [8] * (length // 8 + (length % 8 > 0))
        assert calls == ([slots] if 2 * length > slots or 0 < length <= slots == 8 else expected)
        dense = lj.attend(state, query, 0, implementation="dense")
        np.testing.assert_allclose(out, dense, atol=1e-5)


@pytest.fixture
def read_slots(monkeypatch):
    """Blocks of eight slots; returns a list of how many slots of all rows each of them held."""
    monkeypatch.setattr(blocks, "SIZES", {"cpu": blocks.Sizes(8, 8, 1 << 19, 1 << 20)})
    read, body = [], blocks.softmax_block

    def spy(reader, rows, stored, care, running, block):
        jax.debug.callback(lambda: read.append(len(running.top) * block.size))
        return body(reader, rows, stored, care, running, block)

    monkeypatch.setattr(blocks, "softmax_block", spy)
    return read


@pytest.mark.parametrize("lengths, slots", [
    ([64, 5, 9, 0], 64 + 8 + 16),
    ([30, 28, 25, 30], 4 * 32),  # little is to be saved
    ([64, 24, 64, 24], 2 * 64 + 2 * 24),
    ([0, 0, 0, 0], 0),
    ([1, 0, 0, 0], 8),
])  # fmt: skip
@pytest.mark.parametrize("codec", ["identity", "int4"])
def test_rows_of_clearly_unequal_lengths_are_read_up_to_their_own_ends(
    read_slots, codec, lengths, slots
):
    """Of a decode step on CPU; a block of all rows goes to the end of the longest."""
    state = make(lj.Static(72, CODECS[codec]), batch=4, ragged=True)
    state = poison(lj.update(state, *tokens(0, 4, 64), 0, lengths=lengths))
    query = queries(0, 4, 1)
    got = jax.jit(lambda state: lj.attend(state, query, 0, return_lse=True))(state)
    jax.effects_barrier()
    assert sum(read_slots) == slots
    expected = lj.attend(state, query, 0, return_lse=True, implementation="dense")
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


ROW_OPTIONS = {
    "plain": {},
    "window": {"window": 9},
    "by place": {"rope_theta": 1e4},
    "sinks": {"sink_logits": SINKS, "softcap": 3.0},
    "mask": {"mask": DRAWN.random((3, N, 1, 40)) > 0.3},
    "mask of all rows": {"mask": DRAWN.random((1, 1, 1, 40)) > 0.3},
    "bias": {"bias": DRAWN.standard_normal((3, 1, 1, 40)).astype(np.float32)},
}
ROW_LAYOUTS = {
    "static": lj.Static(40), "sliding": lj.Sliding(35, 3, 2),
    **{name: new() for name, new in more_layouts(40).items()},
}  # fmt: skip
ROW_CASES = [
    pytest.param(
        layout, codec, option, id=f"{layout}-{codec}-{option}",
        marks=() if layout == "static" and (option == "plain" or codec == "identity")
        else pytest.mark.exhaustive,
    )
    for layout in ROW_LAYOUTS
    for codec in CODECS
    for option in ROW_OPTIONS
]  # fmt: skip


@pytest.mark.parametrize("layout, codec, option", ROW_CASES)
def test_what_a_row_reads_by_itself_is_what_it_reads_with_the_others(
    read_slots, layout, codec, option
):
    """Whatever the layout, the codec and the mask; also of one row's NaN, and under vmap."""
    options = {**ROW_OPTIONS[option], "return_lse": True}
    state = make(ROW_LAYOUTS[layout].but(codec=CODECS[codec]), batch=3, ragged=True)
    layer = state.layers[0]
    # A layer that drops tokens is asked before it does.
    width = layer.capacity + (not layer.bounded)
    options |= {
        name: np.resize(options[name], (*options[name].shape[:-1], width))
        for name in {"mask", "bias"} & set(options)
    }
    state = poison(lj.update(state, *tokens(0, 3, 33), 0, lengths=[33, 3, 10]))
    query, new = queries(1, 3, 1), tokens(1, 3, 1)

    def step(query, implementation=None):
        return lj.extend(state, query, *new, 0, implementation=implementation, **options)[0]

    apart, both = jax.jit(step)(query), jax.vmap(step)(jnp.stack([query, -query]))
    jax.effects_barrier()
    assert 8 in read_slots
    together, other = step(query, "dense"), step(-query, "dense")
    for a, b, c, d in zip(apart, together, both, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(c[0], b, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(c[1], d, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ragged", [False, True], ids=["aligned", "ragged"])
@pytest.mark.parametrize("codec", ["identity", pytest.param("kivi", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("window", [None, 100, 3000])
def test_the_product_reads_the_least_run_that_holds_what_is_in_use(window, codec, ragged):
    """Of lengths around the sizes it chooses from, from the start or a window on."""
    codec = lj.codecs.KIVI(group=5, residual=3) if codec == "kivi" else CODECS[codec]
    assert len(prefix._sizes(slot_runs(make(lj.Static(LONG, codec)).layers[0])[0])) == 2
    query = queries(0, 1, 2, heads=1)
    for length in (1, 2049, LONG):
        state = make(lj.Static(LONG, codec), batch=1, heads=1, ragged=ragged)
        state = lj.update(state, *tokens(0, 1, length, heads=1), 0)
        for state_ in (state, poison(state)):
            got, expected = (
                lj.attend(state_, query, 0, window=window, implementation=name, return_lse=True)
                for name in ("dense", "walk")
            )
            for a, b in zip(got, expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


# --- learned sinks -------------------------------------------------------------------------------

SINK_CASES = [
    pytest.param(
        name, layout, codec, ragged, id=f"{name}-{layout}-{codec}-{'ragged' if ragged else 'aligned'}",
        marks=() if (layout, codec) in {("static", "identity"), ("sliding", "kivi")}
        else pytest.mark.exhaustive,
    )
    for name in BACKENDS
    for layout in LAYOUTS
    for codec in CODECS
    for ragged in (False, True)
]  # fmt: skip


@pytest.mark.parametrize("name, layout, codec, ragged", SINK_CASES)
def test_sinks_are_one_more_column_of_the_softmax(name, layout, codec, ragged):
    """They scale what the same call gives without, and the log-sum-exp counts them."""
    state, query = make(_spec(layout, codec), ragged=ragged), queries(0, B, 6)
    lengths = np.int32([6, 4]) if ragged else None
    options = {"return_lse": True, "implementation": name, "softcap": 3.0}
    for seed in range(2):
        new = tokens(seed, B, 6)
        (plain, lse), _ = lj.extend(state, query, *new, 0, lengths=lengths, **options)
        walked, _ = lj.extend(
            state, query, *new, 0, lengths=lengths, **{**options, "implementation": "walk"}
        )
        for a, b in zip((plain, lse), walked, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        (out, with_sink), state = lj.extend(
            state, query, *new, 0, lengths=lengths, sink_logits=SINKS, **options
        )
        sinks = np.broadcast_to(SINKS[:, None], lse.shape)
        if ragged:  # padding sees nothing, not even a sink
            sinks = np.where(np.arange(6) < lengths[:, None, None], sinks, -np.inf)
        np.testing.assert_allclose(with_sink, np.logaddexp(lse, sinks), rtol=1e-5, atol=1e-6)
        share = np.exp(np.where(np.isneginf(lse), -np.inf, lse - with_sink))
        np.testing.assert_allclose(out, plain * share[..., None], rtol=1e-5, atol=1e-6)
    if not ragged:
        got = lj.attend(state, query[:, :, -1:], 0, sink_logits=SINKS, **options)
        for a, b in zip(got, (out, with_sink), strict=True):
            np.testing.assert_allclose(a, b[:, :, -1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sinks_agree_with_a_dense_model(name, layout, groups):
    """Against float64 attention over lists of tokens, without GQA and with it."""
    state = make(_spec(layout))
    rings = {"static": None, "dynamic": None, "sliding": Window(7, 2, 3)}
    model = Oracle(batch=B, heads=H, dim=D, value_dim=DV, capacity=64, growable=True, ragged=False,
                   sliding=rings[layout] if layout in rings else Arithmetic(_spec(layout)))  # fmt: skip
    for seed, count in enumerate((4, 1, 3)):
        new, query = tokens(seed, B, count), queries(seed, B, count, heads=H * groups)
        state, _ = lj.update(state, *new, 0), model.update(*new)
        sinks = SINKS[: H * groups]
        got = lj.attend(state, query, 0, sink_logits=sinks, implementation=name)
        expected = model.attend(query, sink_logits=sinks)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_where_nothing_is_seen_the_sink_alone_is_left(name):
    """Zeros, and its logit; a head whose logit is -inf sees nothing at all."""
    out, lse = lj.attend(
        lj.crop(lj.update(make(), *tokens(0, B, 3), 0), 0), queries(0, B, 2), 0,
        sink_logits=SINKS, implementation=name, return_lse=True,
    )  # fmt: skip
    assert not np.asarray(out).any()
    np.testing.assert_array_equal(lse, np.broadcast_to(SINKS[:, None], lse.shape))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ragged", [False, pytest.param(True, marks=pytest.mark.exhaustive)],
                         ids=["aligned", "ragged"])  # fmt: skip
def test_gradients_by_sinks_and_past_them(name, layout, ragged):
    """By the sinks, queries, keys and values, through output and log-sum-exp: finite differences."""
    query, (key, value) = queries(0, B, 5), tokens(0, B, 5)
    lengths = [5, 3] if ragged else None

    def f(sinks, query, key, value):
        (out, lse), _ = lj.extend(
            lj.grow(make(_spec(layout), ragged=ragged), 8), query, key, value, 0, lengths=lengths,
            sink_logits=sinks, implementation=name, return_lse=True,
        )  # fmt: skip
        return out, jnp.where(jnp.isfinite(lse), lse, 0)

    given = [jnp.asarray(x) for x in (np.nan_to_num(SINKS, neginf=0.3), query, key, value)]
    check_grads(jax.jit(f), given, order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-2)
    bfloat = jax.grad(lambda s: jnp.sum(f(s, *given[1:])[1]))(given[0].astype(jnp.bfloat16))
    assert bfloat.dtype == jnp.bfloat16
    # What is not there gets no gradient, nor makes one NaN.
    none = jax.grad(lambda s: sum(jnp.sum(x) for x in f(s, *given[1:])))(jnp.asarray(SINKS))
    assert np.all(np.isfinite(none)) and none[3] == 0 and np.all(np.asarray(none)[:3] != 0)


@pytest.mark.parametrize("bad, error, message", [
    (np.ones(3, np.float32), ValueError, r"one logit per query head, \(4,\), got \(3,\)"),
    (np.ones((1, N), np.float32), ValueError, r"\(4,\), got \(1, 4\)"),
    (np.ones(N, np.int32), TypeError, "floating point, got int32"),
    ("abcd", TypeError, "^sink_logits must be an array of numbers, got str"),
    ([None] * N, TypeError, "^sink_logits must be an array of numbers, got list"),
])  # fmt: skip
def test_sinks_of_another_shape_or_dtype_are_refused(bad, error, message):
    """In both verbs."""
    query = queries(0, B, 1)
    with pytest.raises(error, match=message):
        lj.attend(make(), query, 0, sink_logits=bad)
    with pytest.raises(error, match=message):
        lj.extend(make(), query, *tokens(0, B, 1), 0, sink_logits=bad)


def test_merge_takes_sinks_of_one_part():
    """What they weigh is in its log-sum-exp."""
    state = lj.update(make(), *tokens(0, B, 6), 0)
    query = queries(0, B, 1)
    first = np.arange(8) < 3
    slot_runs = [
        lj.attend(state, query, 0, mask=mask, sink_logits=sinks, return_lse=True)
        for mask, sinks in ((first, SINKS), (~first, None))
    ]
    out, lse = lj.merge(*zip(*slot_runs, strict=True))
    expected = lj.attend(state, query, 0, sink_logits=SINKS, return_lse=True)
    np.testing.assert_allclose(out, expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, expected[1], rtol=1e-5, atol=1e-6)
