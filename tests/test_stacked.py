"""Stacked states: verbs do what they do to layers apart, and a scan over layers is in place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lucid_jax as lj
from tests.helpers import USERS_XLA, H, make, queries, tokens

L, B = 3, 2
LAYOUTS = {
    "static": lambda codec: lj.Static(16, codec),
    "dynamic": lambda codec: lj.Dynamic(codec),
    "sliding": lambda codec: lj.Sliding(9, 2, 3, codec),
    "chunked": lambda codec: lj.Chunked(9, 3, codec),
}
CODECS = {
    "identity": lj.codecs.Identity(),
    "int8": lj.codecs.Int8(),
    "int4": lj.codecs.Int4(rotate=True),
    "kivi": lj.codecs.KIVI(group=4, residual=3),
    "simulated": lj.codecs.Simulated(lj.codecs.KIVI(group=4, residual=3)),
}
EVERYDAY = {
    ("static", "identity", "ragged"), ("static", "int8", "aligned"),
    ("sliding", "identity", "aligned"), ("sliding", "int8", "ragged"),
}  # fmt: skip


@pytest.fixture(
    params=[
        pytest.param(
            case, id="-".join(case), marks=() if case in EVERYDAY else (pytest.mark.exhaustive,)
        )
        for case in [(a, b, c) for a in LAYOUTS for b in CODECS for c in ("aligned", "ragged")]
    ]
)
def case(request):
    """A layout, a codec, and whether rows are ragged."""
    return request.param


@pytest.fixture
def empty(case):
    """A function that makes an empty cache of the case, of L layers."""
    layout, codec, rows = case
    spec = LAYOUTS[layout](CODECS[codec])
    return functools.partial(make, spec, batch=B, layers=L, ragged=rows == "ragged")


def _leaves(state):
    """All arrays of a state, layer by layer, as NumPy's."""
    return [np.asarray(x) for x in jax.tree.leaves(lj.unstack(state).layers)]


def assert_same(stacked, plain, **close):
    """A stacked state holds what another does."""
    assert stacked.stacked and not plain.stacked
    for a, b in zip(_leaves(stacked), _leaves(plain), strict=True):
        if close:
            np.testing.assert_allclose(np.float64(a), np.float64(b), **close)
        else:
            np.testing.assert_array_equal(a, b)


def _new(seed, count):
    return [jnp.asarray(x) for x in tokens(seed, B, count)]


def _filled(state, *counts):
    """A state whose layers were given so many tokens."""
    for layer_idx, count in enumerate(counts):
        if count:
            state = lj.update(state, *_new(layer_idx, count), layer_idx)
    return state


def _both(empty, *counts):
    return _filled(empty(stacked=True), *counts), _filled(empty(), *counts)


def test_a_stacked_state_is_one_layer_state_of_each_kind(empty):
    state = empty(stacked=True)
    assert len(state.layers) == 1 and state.num_layers == L and state.batch_size == B
    assert jax.tree.structure(lj.stack(empty())) == jax.tree.structure(state)
    assert lj.nbytes(state) == lj.nbytes(empty())
    assert all(len(leaf) == L for leaf in jax.tree.leaves(state))
    assert jax.tree.structure(lj.unstack(state)) == jax.tree.structure(empty())
    assert_same(lj.stack(_filled(empty(), 5, 3, 4)), _filled(empty(), 5, 3, 4))


VERBS = {
    "crop": lambda s: lj.crop(s, 3),
    "rollback": lambda s: lj.rollback(s, 2),
    "rollback rows": lambda s: lj.rollback(s, np.array([2, 0])) if s.ragged else s,
    "select": lambda s: lj.select(s, [1, 1]),
    "select fewer": lambda s: lj.select(s, [1]),
    "repeat": lambda s: lj.repeat_interleave(s, 2),
    "reorder": lambda s: lj.reorder(s, [1, 0]),
    "reorder since": lambda s: lj.reorder(s, [1, 0], since=4),
    "reset": lj.reset,
    "grow": lambda s: lj.ensure_capacity(s, 4) if s.layers[0].bounded else s,
    "astype": lambda s: lj.astype(s, jnp.bfloat16),
    "free": lambda s: lj.free(s, [1]) if s.ragged else s,
    "extract": lambda s: lj.extract(s, 1),
    "insert": lambda s: lj.insert(s, [1], lj.extract(s, 0)) if s.ragged else s,
    "concat": lambda s: lj.concat([s, lj.extract(s, 0)]) if s.ragged else s,
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_verbs_over_the_whole_cache(empty, verb):
    """Of layers at different positions too, eager and traced: bit for bit what they do apart."""
    stacked, plain = _both(empty, 9, 7, 12)
    try:
        expected = verb(plain)
    except ValueError as error:
        with pytest.raises(ValueError) as other:
            verb(stacked)
        assert str(other.value) == str(error)
        return
    assert_same(verb(stacked), expected)
    if verb is not VERBS["grow"]:
        assert_same(jax.jit(verb)(stacked), expected)


def _layer_verbs(state, layer_idx):
    """What a layer is asked, and the state after it was written every way."""
    state = lj.update(state, *_new(5, 1), layer_idx)
    if state.layers[0].packing.codec.unit == 1:
        state = lj.update(state, *_new(6, 2), layer_idx, np.array([1, 4], np.int32))
    if state.ragged:
        state = lj.update(state, *_new(7, 3), layer_idx, lengths=np.array([3, 1], np.int32))
    out, state = lj.extend(state, queries(0, B, 4), *_new(8, 4), layer_idx)
    query = queries(1, B, 2)
    seen = lj.attend(state, query, layer_idx, window=5, softcap=9.0, return_lse=True)
    asked = [
        lj.get(state, layer_idx), lj.valid(state, layer_idx), lj.seq_length(state, layer_idx),
        lj.positions(state, 2, layer_idx), lj.stored_positions(state, layer_idx),
        jnp.int32(lj.capacity(state, layer_idx)),
    ]  # fmt: skip
    return (out, seen, asked), state


def test_a_traced_layer_index_is_the_layer_of_that_number(empty):
    """In a scan over layers, against a loop over layers by themselves."""
    stacked, plain = _both(empty, 3, 1, 5)

    @jax.jit
    def scanned(state):
        return jax.lax.scan(lambda s, i: _layer_verbs(s, i)[::-1], state, jnp.arange(L))

    stacked, got = scanned(stacked)
    for layer_idx in range(L):
        expected, plain = _layer_verbs(plain, layer_idx)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a[layer_idx], b, rtol=2e-5, atol=2e-5)
    assert_same(stacked, plain, rtol=1e-6, atol=1e-6)


def test_a_traced_layer_index_out_of_range_writes_nothing_and_says_so(empty):
    state = _filled(empty(stacked=True), 5, 6, 7)

    @jax.jit
    def run(state, layer_idx):
        state = lj.update(state, *_new(9, 2), layer_idx)
        return lj.extend(state, queries(1, B, 3), *_new(9, 3), layer_idx)

    for bad in (-1, L, 99):
        out, after = run(state, jnp.int32(bad))
        assert not np.any(out)
        assert np.all(lj.overflowed(after))
        with pytest.raises(OverflowError, match=r"layer [02]"):
            lj.check_overflow(after)
        clear = jax.tree.map(lambda x: x & False if x.dtype == bool else x, after)
        assert_same(clear, lj.unstack(state))
    _, after = run(state, jnp.int32(1))
    assert not np.any(lj.overflowed(after))


def test_compact_and_keep_path(empty, case):
    if case[0] not in ("static", "dynamic") or case[1] == "kivi":
        pytest.skip("windows and groups of tokens do not evict; test_rows says so")
    if case[1] == "simulated":
        pytest.skip("groups of tokens do not evict")
    stacked, plain = _both(empty, 7, 7, 7)
    keep = np.arange(lj.capacity(plain)) % 3 != 1
    one, other = (lj.compact(s, keep, 1) for s in (stacked, plain))
    for layer_idx in range(L):
        for a, b in zip(lj.get(one, layer_idx), lj.get(other, layer_idx), strict=True):
            np.testing.assert_array_equal(a, b)
        for ask in (lj.positions, lj.stored_positions):
            n = (2,) if ask is lj.positions else ()
            a, b = (np.asarray(ask(s, *n, layer_idx)) for s in (one, other))
            # Of a stack all layers have positions by head.
            b = b if a.ndim == b.ndim else np.broadcast_to(b.reshape(-1, 1, b.shape[-1]), a.shape)
            np.testing.assert_array_equal(a, b)
    tracked = lj.stack(
        functools.reduce(lambda s, i: lj.compact(s, np.ones(1, bool), i), range(L), plain)
    )
    scanned, _ = jax.jit(
        lambda s: jax.lax.scan(lambda s, i: (lj.compact(s, keep, i), None), s, jnp.arange(L))
    )(tracked)
    assert_same(scanned, functools.reduce(lambda s, i: lj.compact(s, keep, i), range(L), plain))
    if stacked.ragged:
        path = ([4, 3], [[0, 2], [1, 2]], [2, 1])
        assert_same(lj.keep_path(stacked, *path), lj.keep_path(plain, *path))


def test_save_and_load(empty, tmp_path):
    state = _filled(empty(stacked=True), 5, 6, 7)
    lj.save(tmp_path / "state", state)
    back = lj.load(tmp_path / "state")
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert_same(back, lj.unstack(state))
    assert_same(*(_filled(s, 1, 2, 3) for s in (back, lj.unstack(state))))


def test_reports_say_what_they_say_of_layers_apart(empty):
    stacked, plain = _both(empty, 5, 6, 7)
    assert lj.memory_report(stacked).rows == lj.memory_report(plain).rows
    assert stacked._repr_html_().count("<tr>") == plain._repr_html_().count("<tr>")
    assert f"{L} stacked" in repr(stacked) and "5 to 7" in repr(stacked)
    if not stacked.ragged:
        assert lj.nn.KVCache.from_state(stacked).get_seq_length(1) == 6


# --- layers of several kinds, and layers that read others' tokens --------------------------------

MIXED = [lj.Sliding(4), lj.Static(16), lj.Sliding(4), lj.Static(16), lj.Sliding(4), lj.Shared(3)]


def test_layers_of_several_kinds_are_named_by_one_that_is_alike():
    state = make(MIXED, stacked=True)
    assert [len(layer.position) for layer in state.layers] == [3, 2]

    def turn(state, number):
        for like in range(2):
            layer_idx = lj.LayerLike(like, number * 2 + like)
            state = lj.update(
                state, *(x + number.astype(x.dtype) for x in _new(like, 3)), layer_idx
            )
        return state, None

    state, _ = jax.jit(lambda s: jax.lax.scan(turn, s, jnp.arange(2)))(state)
    plain = make(MIXED)
    for layer_idx in range(4):
        new = (x + np.float32(layer_idx // 2) for x in _new(layer_idx % 2, 3))
        plain = lj.update(plain, *new, layer_idx)
    assert_same(state, plain)
    np.testing.assert_array_equal(lj.get(state, 5)[0], lj.get(state, 3)[0])
    with pytest.raises(TypeError, match="LayerLike"):
        jax.jit(lambda s, i: lj.valid(s, i))(state, 0)
    after = jax.jit(lambda s, i: lj.update(s, *_new(0, 1), lj.LayerLike(1, i)))(state, jnp.int32(2))
    assert lj.overflowed(after)  # layer 2 is of another kind


def test_a_traced_index_of_a_layer_that_reads_another_reads_and_never_writes():
    state = make([lj.Static(8), lj.Static(8), lj.Shared(0)], stacked=True)
    state = _filled(state, 3)
    got = jax.jit(lambda s, i: lj.get(s, i))(state, 2)
    np.testing.assert_array_equal(got[0], lj.get(state, 0)[0])
    after = jax.jit(lambda s, i: lj.update(s, *_new(0, 1), i))(state, 2)
    assert lj.overflowed(after) and lj.seq_length(after) == 3
    with pytest.raises(ValueError, match="shares the tokens of layer 0"):
        lj.update(state, *_new(0, 1), 2)


# --- what is refused ------------------------------------------------------------------------------


def test_a_traced_index_of_layers_apart_is_refused_with_the_fix():
    with pytest.raises(TypeError, match=r"stacked=True.*stack\(state\)"):
        jax.jit(lambda s, i: lj.valid(s, i))(make(layers=2), 0)
    with pytest.raises(TypeError, match="layer_idx must hold integers"):
        jax.jit(lambda s, i: lj.valid(s, i))(make(layers=2, stacked=True), 0.5)
    with pytest.raises(ValueError, match=r"\[0, 2\)"):
        lj.valid(make(layers=2, stacked=True), 2)
    for verb in (lj.stack, lj.unstack):
        with pytest.raises(TypeError, match="takes a CacheState"):
            verb(None)


@pytest.mark.parametrize(
    "use",
    [
        lambda s: lj.update(s, *_new(0, 1), 0),
        lambda s: lj.get(s, 0),
        lambda s: lj.attend(s, queries(0, B, 1), 0),
        lambda s: lj.crop(s, 1),
        lambda s: lj.rollback(s, 1),
        lambda s: lj.select(s, [0]),
        lj.reset,
        lj.stack,
        lambda s: lj.concat([s, s]),
        lambda s: lj.free(s, [0]),
    ],
    ids=[
        "update",
        "get",
        "attend",
        "crop",
        "rollback",
        "select",
        "reset",
        "stack",
        "concat",
        "free",
    ],
)
@pytest.mark.parametrize("codec", ["identity", "int8"])
def test_states_stacked_by_hand_are_refused_but_in_vmap_and_scan(use, codec):
    one = make(lj.Static(8, CODECS[codec]), ragged=True)
    one = lj.update(one, *_new(0, 3), 0)
    many = jax.tree.map(lambda x: jnp.stack([x, x]), one)
    with pytest.raises(ValueError, match=r"stacked by hand.*stacked=True.*stack\(state\)"):
        use(many)
    expected = use(one)
    by_scan = jax.lax.scan(lambda _, s: (None, use(s)), None, many)[1]
    for got in (jax.vmap(use)(many), by_scan):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(np.float32(a[1]), np.float32(b), rtol=1e-5, atol=1e-5)


# --- in place ------------------------------------------------------------------------------------


def _decode(state, query, key, value):
    """A token through all layers, twice, as a decode loop does it."""

    def layer(carry, layer_idx):
        query, state = carry
        out, state = lj.extend(state, query, key, value, layer_idx)
        return (jnp.pad(out, ((0, 0),) * 3 + ((0, query.shape[-1] - out.shape[-1]),)), state), None

    def token(_, carry):
        return jax.lax.scan(layer, carry, jnp.arange(L, dtype=jnp.int32))[0]

    return jax.lax.fori_loop(0, 2, token, (query, state))


def _big(layout, codec, rows):
    spec = {"static": lj.Static(4096, codec), "sliding": lj.Sliding(4000, 96, codec=codec)}[layout]
    return make(
        spec, batch=B, layers=L, dim=16, value_dim=16, ragged=rows == "ragged", stacked=True
    )


IN_PLACE = {
    "decode": _decode,
    "crop": lambda s, *_: lj.crop(s, 5),
    "reorder": lambda s, *_: lj.select(s, jnp.array([1, 0])),
    "rollback": lambda s, *_: lj.rollback(s, 1),
}


@pytest.mark.parametrize("verb", IN_PLACE.values(), ids=IN_PLACE)
@pytest.mark.parametrize("rows", ["aligned", "ragged"])
@pytest.mark.parametrize("codec", ["identity", "int8"])
@pytest.mark.parametrize("layout", ["static", "sliding"])
def test_donated_steps_move_no_layer(layout, codec, rows, verb):
    """No temporaries of a layer's size, and no copy of a leaf, in the compiled program."""
    state = _big(layout, CODECS[codec], rows)
    new = [jnp.ones((B, n, 1, 16)) for n in (2 * H, H, H)]
    compiled = jax.jit(verb, donate_argnums=0).lower(state, *new).compile(USERS_XLA)
    memory = compiled.memory_analysis()
    tokens_ = sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim > 3)
    assert memory.alias_size_in_bytes >= tokens_
    # Of a layer, a quarter at most: blocks of 256 slots of 4096 are on their way.
    assert memory.temp_size_in_bytes < tokens_ / L / 4
    shape = jax.tree.leaves(state.layers[0].leaves)[0].shape
    leaf = f"[{','.join(map(str, shape[:4]))}"
    copies = [x for x in compiled.as_text().splitlines() if " copy(" in x and leaf in x]
    assert not copies


def test_a_stack_that_is_copied_would_be_seen():
    """The check above fails where a scan takes the cache apart and puts it together again."""
    state = _big("static", CODECS["identity"], "aligned")

    def by_xs(state):
        one = lj.CacheState(lj.unstack(state).layers[:1], reads=(0,), owners=(0,))
        leaves = (state.layers[0].leaves, state.layers[0].counters())

        def layer(_, x):
            mine = one.layers[0].replace(leaves=x[0], **x[1])
            new = lj.update(one.with_layers([mine]), *(jnp.ones((B, H, 1, 16)) for _ in "kv"), 0)
            return None, (new.layers[0].leaves, new.layers[0].counters())

        return jax.lax.scan(layer, None, leaves)[1]

    memory = jax.jit(by_xs, donate_argnums=0).lower(state).compile(USERS_XLA).memory_analysis()
    tokens_ = sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim > 3)
    assert memory.temp_size_in_bytes > tokens_ / L / 4


def test_one_program_for_all_layers(compilations):
    state = make(layers=4, stacked=True)
    query = jnp.asarray(queries(0, B, 1))
    news = [_new(i, 1) for i in range(8)]
    _, state = lj.extend(state, query, *news[0], 0, donate=True)
    state = lj.update(state, *news[1], 1, donate=True)
    before = compilations()
    for layer_idx in (1, 2, 3):
        _, state = lj.extend(state, query, *news[layer_idx], layer_idx, donate=True)
        state = lj.update(state, *news[4 + layer_idx], layer_idx, donate=True)
    assert compilations() == before
    assert [int(lj.seq_length(state, i)) for i in range(4)] == [1, 3, 2, 2]


def test_a_donated_stack_is_gone_and_says_so():
    state = _filled(make(layers=2, stacked=True), 3)
    key = state.layers[0].key.unsafe_buffer_pointer()
    after = lj.update(state, *_new(1, 1), 1, donate=True)
    assert after.layers[0].key.unsafe_buffer_pointer() == key
    with pytest.raises(RuntimeError, match="donated"):
        lj.get(state, 0)
    kept = lj.rollback(after, 0)  # shares the buffers
    assert kept.layers[0].key is after.layers[0].key


# --- transformations -------------------------------------------------------------------------------


def _run(state, query, key, value):
    out, state = _decode(state, query, key, value)
    return out, lj.rollback(lj.crop(lj.select(state, jnp.array([1, 0])), 6), 1)


def _args(state):
    return [jnp.asarray(x) for x in (queries(3, B, 1), *_new(3, 1))]


def test_64_bits_change_nothing(empty):
    state = _filled(empty(stacked=True), 5, 6, 7)
    expected = jax.jit(_run)(state, *_args(state))
    with jax.enable_x64(True):
        got = jax.jit(_run)(state, *_args(state))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=1e-5, atol=1e-5)


def test_vmap_over_stacked_states(empty):
    states = [_filled(empty(stacked=True), n, 3, n + 1) for n in (4, 6)]
    args = _args(states[0])
    many = jax.tree.map(lambda *x: jnp.stack(x), *states)
    got = jax.vmap(_run, in_axes=(0, None, None, None))(many, *args)
    for i, state in enumerate(states):
        expected = _run(state, *args)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(np.float64(a[i]), np.float64(b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["static", "sliding"])
def test_gradients_are_those_of_layers_apart(layout):
    spec = LAYOUTS[layout](CODECS["identity"])

    def loss(stacked, query, key, value):
        state = make(spec, batch=B, layers=L, stacked=stacked)

        def layer(carry, layer_idx):
            query, state = carry
            moved = key * jnp.float32(1 + layer_idx)
            out, state = lj.extend(state, query, moved, value, layer_idx)
            return (jnp.concatenate([out, query[..., -1:]], axis=-1), state), None

        carry = (query, state)
        if stacked:
            carry, _ = jax.lax.scan(layer, carry, jnp.arange(L, dtype=jnp.int32))
        else:
            for layer_idx in range(L):
                carry, _ = layer(carry, layer_idx)
        query, state = carry
        state = lj.select(lj.crop(state, 3), [1, 0])
        return jnp.sum(jnp.sin(query)) + jnp.sum(jnp.cos(lj.get(state, 1)[0]))

    args = [jnp.asarray(x) for x in (queries(0, B, 5), *tokens(0, B, 5))]
    got, expected = (
        jax.grad(functools.partial(loss, stacked), (0, 1, 2))(*args) for stacked in (True, False)
    )
    for a, b in zip(got, expected, strict=True):
        assert np.any(b)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    if layout == "static":
        with pytest.raises(TypeError, match="gradient cannot be stored"):
            spec8 = lj.Static(8, lj.codecs.Int8())
            state = make(spec8, layers=L, stacked=True)
            jax.grad(lambda k: jnp.sum(lj.get(lj.update(state, k, args[2], 0), 0)[0]))(args[1])


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_stack_is_divided_over_a_mesh(kind):
    kinds = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), axis_types=kinds)
    with jax.set_mesh(mesh):
        state = make(
            lj.Static(16), batch=B, layers=L, ragged=True, stacked=True,
            sharding=jax.P("dp", "tp"),
        )  # fmt: skip
        assert tuple(state.layers[0].key.sharding.spec)[:3] == (None, "dp", "tp")
        assert tuple(state.layers[0].position.sharding.spec) == (None, "dp")
        where = jax.NamedSharding(mesh, jax.P("dp", "tp"))
        args = [jax.device_put(x, where) for x in _args(state)]
        out, state = jax.jit(_decode)(state, *args)
        after = lj.crop(lj.select(state, [1, 0]), 1)
        for new in (state, after, lj.stack(lj.unstack(state))):
            assert new.layers[0].key.sharding.is_equivalent_to(state.layers[0].key.sharding, 5)
    plain = make(lj.Static(16), batch=B, layers=L, ragged=True, stacked=True)
    expected, plain = jax.jit(_decode)(plain, *_args(plain))
    np.testing.assert_allclose(np.asarray(out), expected, rtol=1e-5, atol=1e-5)
    assert_same(lj.crop(lj.select(plain, [1, 0]), 1), lj.unstack(after), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_a_stack_inside_shard_map():
    mesh = jax.make_mesh((2,), ("dp",), axis_types=(jax.sharding.AxisType.Auto,))
    state = make(lj.Static(16), batch=B, layers=L, ragged=True, stacked=True)
    where = jax.tree.map(lambda s: s.spec, lj.shardings(state, mesh, batch="dp"))
    args, rows = _args(state), jax.P("dp")

    def run(state, query, key, value):
        out, state = _decode(state, query, key, value)
        return out, lj.crop(lj.select(state, jnp.array([0])), 1)

    got = jax.jit(
        jax.shard_map(run, mesh=mesh, in_specs=(where, rows, rows, rows), out_specs=(rows, where))
    )(state, *args)
    out, state = _decode(state, *args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves((out, lj.crop(state, 1))), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-5)
