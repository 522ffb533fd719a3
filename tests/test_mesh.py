"""Verbs on meshes of eight devices: the same results as on one, where they belong, and in place."""

import functools
import itertools
import math
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lucid_jax as lj
from lucid_jax.attention import backends, programs
from lucid_jax.attention.walk import walk
from lucid_jax.cache.tiles import divided_by_compiler
from lucid_jax.models import T5, ModelConfig, T5Config, Transformer
from tests.helpers import LAYOUTS, SEED, make, queries, tokens
from tests.test_laws import CODECS, draw_pairs

B = 8
CAPACITY = 600  # more than one block of attention, also in a window of half of it
TOKENS = P("dp", "tp")
KINDS = {"explicit": AxisType.Explicit, "auto": AxisType.Auto, "manual": AxisType.Auto}

# One of each kind everyday; CI takes all layouts and codecs that its seed draws.
EVERYDAY = {
    ("static", "int8", "ragged", "explicit"),
    ("static", "identity", "aligned", "auto"),
    ("sliding", "kivi", "ragged", "manual"),
}


def _cases():
    draw = random.Random(SEED)
    drawn = {
        (*pair, draw.choice(["aligned", "ragged"]), kind)
        for pair, kind in itertools.product(sorted(draw_pairs(SEED)), KINDS)
    }
    for case in sorted(EVERYDAY | drawn):
        marks = () if case in EVERYDAY else pytest.mark.exhaustive
        yield pytest.param(case, id="-".join(case), marks=marks)


@pytest.fixture(params=_cases())
def case(request):
    """Names of a layout and a codec, "aligned" or "ragged", and the kind of mesh axes."""
    return request.param


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("dp", "tp"), axis_types=(KINDS[kind],) * 2)


@pytest.fixture(params=["explicit", "auto"])
def mesh(request):
    """Eight devices: four for rows, two for heads."""
    return mesh_of(request.param)


def _new(seed, count, dtype=jnp.float32):
    key, value = (jnp.asarray(x, dtype) for x in tokens(seed, B, count))
    return jnp.asarray(queries(seed, B, count)), key, value


def _empty(case, **options):
    layout, codec, rows, _ = case
    spec = LAYOUTS[layout](CAPACITY, CODECS[codec][0])
    sizes = {"batch": B, "dtype": CODECS[codec][1], "ragged": rows == "ragged"}
    return lj.grow(make(spec, **sizes, **options), CAPACITY)


def _kept(state, query, key, value):
    """What verbs make of a state that move no rows, by name."""
    few = [x[:, :, :2] for x in (query, key, value)]
    after = lj.update(state, *few[1:], 0)
    layer = state.layers[0]
    made = {
        "update": after,
        "attend": lj.attend(after, few[0], 0, return_lse=True),
        "all": lj.attend(after, few[0], 0, causal=False),
        "window": lj.attend(after, few[0], 0, window=3, softcap=5.0),
        "extend": lj.extend(state, query, key, value, 0),
        "get": lj.get(state, 0),
        "asked": (lj.valid(state), lj.positions(state, 2), lj.stored_positions(state)),
        "length": (lj.seq_length(state), lj.overflowed(state)),
        "crop": lj.crop(state, 5),
        "rollback": lj.rollback(state, jnp.int32(2)),
        "reset": lj.reset(state),
    }
    if state.ragged:
        lengths = jnp.arange(state.batch_size, dtype=jnp.int32) % 3
        made["padded"] = lj.extend(state, *few, 0, lengths=lengths)
        made["free"] = lj.free(state, jnp.array([1]))
    if layer.packing.codec.unit == 1:
        made["place"] = lj.update(state, *few[1:], 0, jnp.array([1, 9]))
    if layer.packing.codec.unit == 1 and layer.bounded:
        slots = lj.capacity(state)  # Dynamic layers have grown past CAPACITY
        scores = jnp.where(lj.valid(state), jnp.arange(slots, dtype=jnp.float32), -jnp.inf)
        scores = jnp.broadcast_to(
            scores.reshape(-1, 1, slots), (state.batch_size, layer.num_kv_heads, slots)
        )
        made["compact"] = lj.compact(state, lj.scoring.keep_best(scores, 3), 0)
        if state.ragged:
            n, path = jnp.full(state.batch_size, 4), jnp.array([[0, 2]] * state.batch_size)
            made["keep_path"] = lj.keep_path(state, n, path, jnp.full_like(n, 2))
    return made


def _moved(state):
    """What verbs make of a state that move rows, by name."""
    flipped = jnp.arange(state.batch_size, dtype=jnp.int32)[::-1]
    made = {
        "select": lj.select(state, flipped),
        "reorder": lj.reorder(state, flipped, since=jnp.int32(9)),
        "repeat": lj.repeat_interleave(state, 2),
        "extract": lj.extract(state, jnp.int32(1)),
    }
    if state.ragged:
        made["insert"] = lj.insert(state, jnp.array([0]), made["extract"])
        made["concat"] = lj.concat([state, made["select"]])
    return made


def _gradients(state, query, key, value):
    """Of the query, and of tokens where the codec has any."""
    wanted = (0, 1, 2) if state.layers[0].packing.codec == lj.codecs.Identity() else (0,)

    def loss(*new):
        out, _ = lj.extend(state, *new, 0)
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    return {"gradient": jax.grad(loss, wanted)(query, key, value)}


def _everything(state, *new):
    return {**_kept(state, *new), **_moved(state), **_gradients(state, *new)}


def _assert_close(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        pairs = zip(jax.tree.leaves(got[name]), jax.tree.leaves(expected[name]), strict=True)
        for x, y in pairs:
            assert x.dtype == y.dtype
            np.testing.assert_allclose(
                np.asarray(x, np.float32), np.asarray(y, np.float32), 1e-4, 1e-4, err_msg=name
            )


def _specs(tree, ragged):
    """How arrays are divided: (B, heads, ...), and (B, ...) if rows are ragged."""
    return jax.tree.map(
        lambda x: TOKENS if x.ndim > 2 else P("dp") if ragged and x.ndim else P(), tree
    )


def _assert_placed(made, ragged, mesh):
    """Every array of at least three axes is divided by rows, as far as they are, and heads."""
    for name, tree in made.items():
        for leaf, spec in zip(
            jax.tree.leaves(tree), jax.tree.leaves(_specs(tree, ragged)), strict=True
        ):
            if leaf.ndim > 2:
                spec = P(None, "tp") if leaf.shape[0] % 4 else spec
                where = NamedSharding(mesh, spec)
                assert leaf.sharding.is_equivalent_to(where, leaf.ndim), (name, leaf.sharding)


def test_a_mesh_gives_what_one_device_gives(case, each_backend):
    """Every verb and gradient, on Explicit and Auto axes, and in shard_map with its checks."""
    _, codec, rows, kind = case
    ragged = rows == "ragged"
    new = _new(1, 6, CODECS[codec][1])
    state = lj.update(_empty(case), *_new(0, 300, CODECS[codec][1])[1:], 0)
    mesh = mesh_of(kind)
    divided = jax.device_put(state, lj.shardings(state, mesh, batch="dp", heads="tp"))
    placed = jax.device_put(new, NamedSharding(mesh, TOKENS))
    run = jax.jit(lambda *args: _everything(*args))  # traced afresh for each backend
    if kind != "manual":
        with jax.set_mesh(mesh):
            got = run(divided, *placed)
        _assert_close(got, run(state, *new))
        # What has another number of rows lies where the compiler puts it, if it may choose.
        moved = {"repeat", "extract", "concat"} if kind == "auto" else set()
        _assert_placed({n: x for n, x in got.items() if n not in moved}, ragged, mesh)
        return
    # In shard_map each device has a cache of its own.
    part = lambda tree, i: jax.tree.map(lambda x: x.addressable_shards[i].data, tree)  # noqa: E731
    shapes = jax.eval_shape(_everything, part(divided, 0), *part(placed, 0))
    everywhere = jax.shard_map(
        _everything,
        mesh=mesh,
        in_specs=(_specs(state, ragged), *[TOKENS] * 3),
        out_specs=_specs(shapes, ragged),
    )
    got = jax.jit(everywhere)(divided, *placed)
    for i in range(mesh.size):
        here = jax.device_put((part(divided, i), *part(placed, i)), jax.devices()[0])
        _assert_close(part(got, i), run(*here))


def _collectives(text):
    """The number of elements of each collective's results in a compiled program."""
    names = (
        "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    )
    sizes = []
    for results in re.findall(rf"= (.*?) (?:{names})(?:-start)?\(", text):
        shapes = re.findall(r"\[([\d,]*)\]", results)
        sizes.append(sum(math.prod(int(n) for n in s.split(",") if n) for s in shapes))
    return sizes


@pytest.mark.parametrize("rows", ["aligned", "ragged"])
@pytest.mark.parametrize(
    "codec",
    ["identity", *(pytest.param(x, marks=pytest.mark.exhaustive) for x in ("int8", "kivi"))],
)
def test_no_collective_moves_the_cache(mesh, codec, rows, each_backend):
    """Only verbs that move rows send tokens from device to device."""
    state = _empty(("static", codec, rows, None))
    divided = jax.device_put(state, lj.shardings(state, mesh, batch="dp", heads="tp"))
    new = jax.device_put(_new(1, 6, CODECS[codec][1]), NamedSharding(mesh, TOKENS))
    with jax.set_mesh(mesh):
        afresh = lambda *args: _kept(*args)  # noqa: E731, for each backend
        kept = jax.jit(afresh).lower(divided, *new).compile().as_text()
        moved = jax.jit(_moved).lower(divided).compile().as_text()
    assert max(_collectives(kept), default=0) <= 2 * B  # counters: a longest length, a flag
    assert max(_collectives(moved)) > CAPACITY  # this test can see one


@pytest.fixture
def asked(monkeypatch):
    """What attention was asked for while it was traced: (rows, query heads) of each call."""
    found = []

    def probe(query, runs, mask, scores):
        assert not any(map(divided_by_compiler, jax.tree.leaves([run.leaves for run in runs])))
        found.append(query.shape[:2])
        return walk(query, runs, mask, scores)

    monkeypatch.setitem(backends._TRIED, "cpu", (probe,))
    monkeypatch.setattr(programs, "OWN", {probe})
    return found


def _layer_by_layer(state, query, key, value):
    """All layers of a stack in a loop, and one of them once more."""

    def step(state, layer):
        state = lj.update(state, key, value, layer)
        out, state = lj.extend(state, query, key, value, layer)
        return state, out

    state, out = jax.lax.scan(step, state, jnp.arange(2))
    return out, lj.attend(state, query, 1, return_lse=True), state


@pytest.mark.parametrize("rows", ["aligned", "ragged"])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_each_device_attends_for_what_it_holds(rows, kv_heads, asked):
    """Under `Explicit` axes: no collective at all, and kernels may run. Also of one head of keys."""
    mesh = mesh_of("explicit")
    spec = lj.Static(CAPACITY)
    state = make(spec, batch=B, heads=kv_heads, ragged=rows == "ragged", layers=2, stacked=True)
    new = _new(1, 2)
    new = (new[0], *(x[:, :kv_heads] for x in new[1:]))
    where = TOKENS if kv_heads > 1 else P("dp")
    divided = jax.device_put(
        state, lj.shardings(state, mesh, batch="dp", heads="tp" if kv_heads > 1 else None)
    )
    placed = [
        jax.device_put(x, NamedSharding(mesh, p))
        for x, p in zip(new, (TOKENS, where, where), strict=True)
    ]
    expected = _layer_by_layer(state, *new)
    asked.clear()
    with jax.set_mesh(mesh):
        program = jax.jit(lambda *args: _layer_by_layer(*args)).lower(divided, *placed).compile()
        got = program(divided, *placed)
    assert set(asked) == {(B // 4, new[0].shape[1] // 2)}
    assert _collectives(program.as_text()) == []
    _assert_close({"all": got}, {"all": expected})
    assert got[0].sharding.spec[:3] == (None, "dp", "tp")


def test_queries_of_one_head_on_several_devices_are_left_to_the_compiler():
    """Keys of two heads on all devices, queries of theirs divided."""
    mesh, state = mesh_of("explicit"), make(lj.Static(CAPACITY), batch=B)
    new = _new(1, 2)
    where = (P("dp", "tp"), P("dp"), P("dp"))
    placed = [jax.device_put(x, NamedSharding(mesh, p)) for x, p in zip(new, where, strict=True)]
    divided = jax.device_put(state, lj.shardings(state, mesh, batch="dp"))
    out, after = jax.jit(lambda *args: lj.extend(*args, 0))(divided, *placed)
    _assert_close({"all": (out, after)}, {"all": lj.extend(state, *new, 0)})
    assert out.sharding.spec[:2] == ("dp", "tp")


def _extended(state, query, key, value):
    return lj.extend(state, query, key, value, 0)


def _written(state, query, key, value):
    """At places of each row, of which the layer's one length is the largest."""
    places = jnp.arange(2 * len(key)).reshape(-1, 2)[::-1]
    return lj.extend(state, query, key, value, 0, cache_position=places)


def _in_plain_loops(state, query, key, value):
    """By a backend that knows nothing of meshes."""

    def plain(query, runs, mask, scores):
        zeros = jnp.zeros(query.shape, query.dtype)
        total, _ = jax.lax.scan(lambda x, _: (x + query, None), zeros, length=2)
        return jnp.pad(total[..., : value.shape[-1]], [(0, 0)] * 4), jnp.sum(total, -1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends._TRIED, "cpu", (plain,))
        return _extended(state, query, key, value)


LEFT = {
    "one row": ((1, 2), P("dp", "tp"), P("dp", "tp"), 2, _extended),
    "one length": ((2, 2), P("dp", "tp"), P("dp", "tp"), 2, _written),
    "queries of one head along the rows": ((4, 1), P("dp"), P(None, "dp"), 1, _extended),
    "queries divided further": ((2, 2), P(None, "tp"), P("dp", "tp"), 2, _extended),
    "a backend of one's own": ((2, 2), P("dp", "tp"), P("dp", "tp"), 2, _in_plain_loops),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_a_device_cannot_do_by_itself_is_left_to_the_compiler(name):
    sizes, of_state, of_query, heads, run = LEFT[name]
    rows = 1 if name == "one row" else 4
    devices = jax.devices()[: math.prod(sizes)]
    mesh = jax.make_mesh(sizes, ("dp", "tp"), devices=devices)
    state = make(lj.Static(16), batch=rows, heads=heads)
    query, key, value = (x[:rows] for x in _new(1, 2))
    new = (query, key[:, :heads], value[:, :heads])
    batch, by_heads = (*of_state, None)[:2]
    where = lj.shardings(state, mesh, batch=batch, heads=by_heads)
    placed = [
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip(new, (of_query, of_state, of_state), strict=True)
    ]
    got = jax.jit(lambda *args: run(*args))(jax.device_put(state, where), *placed)
    _assert_close({"all": got}, {"all": run(state, *new)})


def test_states_along_the_mesh_are_mapped_over():
    """Along rows of the mesh lie states, which `vmap` hides."""
    mesh, new = mesh_of("explicit"), _new(1, 2)
    states = jax.vmap(lambda key, value: lj.update(make(batch=2), key, value, 0))
    split_rows = [x.reshape(4, 2, *x.shape[1:]) for x in new]
    run = jax.vmap(lambda state, query: lj.attend(state, query, 0))
    given = (states(*split_rows[1:]), split_rows[0])

    def put(x):
        return jax.device_put(
            x, NamedSharding(mesh, P("dp", None, "tp") if x.ndim > 3 else P("dp"))
        )

    got = jax.jit(run)(*jax.tree.map(put, given))
    _assert_close({"all": got}, {"all": run(*given)})


def test_decoders_attend_on_each_device(asked):
    """In their loops too, whose model the compiler divides."""
    model = _model()
    expected = lj.generate(model, PROMPTS, max_new_tokens=3)
    asked.clear()
    with jax.set_mesh(mesh_of("explicit")):
        got = lj.generate(model, PROMPTS, max_new_tokens=3, sharding=TOKENS)
    assert set(asked) == {(1, 2)}
    np.testing.assert_array_equal(got.tokens, expected.tokens)


CALLS = {
    "update": lambda s, new: lj.update(s, *new[1:], 0, donate=True),
    "extend": lambda s, new: lj.extend(s, *new, 0, donate=True)[1],
    "crop": lambda s, new: lj.crop(s, 4, donate=True),
    "rollback": lambda s, new: lj.rollback(s, 1, donate=True),
    "select": lambda s, new: lj.select(s, np.arange(B)[::-1], donate=True),
    "reset": lambda s, new: lj.reset(s, donate=True),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("rows", ["aligned", "ragged"])
def test_a_donated_state_is_reused_where_it_is(mesh, rows, call):
    """Each device's part stays at its address; the old state stays valid if it is not donated."""
    with jax.set_mesh(mesh):
        state = _empty(("static", "identity", rows, None), sharding=TOKENS)
    new = jax.device_put(_new(1, 2), NamedSharding(mesh, TOKENS))
    state = lj.update(state, *new[1:], 0)
    before = jax.tree.map(lambda x: x.sharding, state)
    place = lambda s: [  # noqa: E731
        part.data.unsafe_buffer_pointer()
        for leaf in (s.layers[0].key, s.layers[0].value)
        for part in leaf.addressable_shards
    ]
    addresses = place(state)
    after = CALLS[call](state, new)
    assert place(after) == addresses
    for x, was in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        assert x.sharding.is_equivalent_to(was, x.ndim)
    assert state.layers[0].key.is_deleted()


@pytest.mark.parametrize("rows", ["aligned", "ragged"])
def test_a_state_that_was_never_placed_takes_divided_tokens(mesh, rows):
    """Eagerly, in jit and as the carry of a loop."""
    state = _empty(("static", "identity", rows, None))
    new = _new(1, 2)
    divided = jax.device_put(new, NamedSharding(mesh, TOKENS))

    def thrice(state, *new):
        def step(state, _):
            out, state = lj.extend(state, *new, 0)
            return state, out

        return jax.lax.scan(step, state, length=3)

    grows = _empty(("dynamic", "identity", rows, None))
    more = [jax.device_put(x, NamedSharding(mesh, TOKENS)) for x in _new(1, CAPACITY * 2)[1:]]
    expected = {
        "once": lj.extend(state, *new, 0),
        "in place": lj.update(state, *new[1:], 0),
        "grown": lj.update(grows, *map(np.asarray, more), 0),
        "thrice": thrice(state, *new),
    }
    got = {
        "once": lj.extend(state, *divided, 0),
        "grown": lj.update(grows, *more, 0),
        "in place": lj.update(jax.tree.map(jnp.copy, state), *divided[1:], 0, donate=True),
    }
    _assert_placed(got, rows == "ragged", mesh)
    assert not any(x.is_deleted() for x in jax.tree.leaves((state, grows)))
    with jax.set_mesh(mesh):
        got["thrice"] = jax.jit(thrice)(state, *divided)
    _assert_close(got, expected)


@pytest.mark.parametrize("tokens", ["made before", "made within"])
def test_what_was_never_placed_works_where_a_mesh_is_in_force(mesh, tokens):
    """A state made before `jax.set_mesh`, and tokens made before it, or within and so on the mesh."""
    new, old = _new(1, 2), _new(2, 4)[1:]
    specs = lj.Static(16), lj.Sliding(9, slack=3)
    states = [lj.update(make(spec, batch=B), *old, 0) for spec in specs]
    expected = [_kept(state, *new) for state in states]
    with jax.set_mesh(mesh):
        if tokens == "made within":
            new = jax.tree.map(lambda x: jnp.zeros_like(x) + np.asarray(x), new)
        for state, kept in zip(states, expected, strict=True):
            _assert_close(_kept(state, *new), kept)
            _assert_close(jax.jit(_kept)(state, *new), kept)


WRAPPERS = {
    "static": lambda: lj.nn.StaticKVCache(64, 1),
    "dynamic": lambda: lj.nn.DynamicKVCache(lj.codecs.Int8()),
    "sliding": lambda: lj.nn.SlidingKVCache(9, sinks=2, slack=3),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_stateful_cache_lies_where_its_first_tokens_lie(mesh, kind):
    """Of any kind, whether the mesh is in force or not; its updates are in place."""
    lead = NamedSharding(mesh, P("dp", "tp"))

    def use(put):
        cache, made = WRAPPERS[kind](), {}
        for step, count in enumerate((70 if kind == "dynamic" else 3, 1, 1)):
            query, key, value = (put(x) for x in _new(step, count))
            value = jnp.concatenate([value, value[..., :1]], axis=-1)  # as wide as keys
            made[f"update {step}"] = cache.update(key, value, 0)
        before = _places(cache)
        made["extend"] = cache.extend(query, key, value, 0)
        cache.store(key, value, 0)
        made["attend"] = cache.attend(query, 0)
        cache.rollback(1)
        cache.crop(5)
        assert _places(cache) == before
        cache.batch_select_indices(np.arange(B)[::-1])
        return made | {"state": cache.to_state()}

    expected = use(lambda x: x)
    got = use(lambda x: jax.device_put(x, lead))
    _assert_close(got, expected)
    _assert_placed(got, False, mesh)


def _places(cache):
    """The address of each device's part of the keys."""
    leaf = jax.tree.leaves(cache._layers["0"].layer.key)[0]
    return [part.data.unsafe_buffer_pointer() for part in leaf.addressable_shards]


def test_attention_makes_its_cache_where_its_keys_lie(mesh):
    """`MultiHeadAttention` with divided projections, eagerly and in `nnx.jit`."""
    hidden = np.random.default_rng(0).standard_normal((B, 3, 16), np.float32)

    def build():
        return lj.nn.MultiHeadAttention(
            16, num_heads=4, num_kv_heads=2, rope_theta=1e4, rngs=nnx.Rngs(0)
        )

    plain, divided = build(), build()
    parameters = nnx.state(divided)
    where = NamedSharding(mesh, P(None, "tp"))
    nnx.update(divided, jax.tree.map(lambda x: jax.device_put(x, where), parameters))
    placed = jax.device_put(hidden, NamedSharding(mesh, P("dp")))
    for call in (lambda m, x, c: m(x, cache=c), nnx.jit(lambda m, x, c: m(x, cache=c))):
        caches = lj.nn.StaticKVCache(8, 1), lj.nn.StaticKVCache(8, 1)
        for _ in range(2):
            got = call(divided, placed, caches[1])
            np.testing.assert_allclose(got, call(plain, jnp.asarray(hidden), caches[0]), 1e-4, 1e-5)
        _assert_placed({"cache": caches[1].to_state()}, False, mesh)


def test_init_cache_divides_from_the_start(mesh):
    """By the mesh in force or a given one, eagerly and in jit; no device ever holds the whole."""
    specs = [lj.Static(64, lj.codecs.Int8(), track=True), lj.Sliding(9, 2, 3, lj.codecs.KIVI(4, 3))]
    init = functools.partial(make, specs, batch=B, ragged=True)
    with jax.set_mesh(mesh):
        states = [init(sharding=TOKENS), jax.jit(lambda: init(sharding=TOKENS))()]
        program = jax.jit(lambda: init(sharding=TOKENS)).lower().compile()
    states.append(init(sharding=NamedSharding(mesh, TOKENS)))
    for state in states:
        where = lj.shardings(state, mesh, batch="dp", heads="tp")
        for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
            assert not np.asarray(leaf).any() or leaf.dtype == jnp.int32  # positions of no token
        assert jax.tree.structure(state) == jax.tree.structure(init())
    memory = program.memory_analysis()
    counters = 4 * len(specs) * B * 4
    assert memory.output_size_in_bytes <= lj.nbytes(states[0]) / 8 + 2 * counters
    assert memory.temp_size_in_bytes <= counters


def test_shardings_of_a_whole_state(mesh):
    """Rows on the first axis of every leaf that has rows, heads on the second of tokens' leaves."""
    sizes = {"batch": B, "ragged": True}
    decoder = make(lj.Static(64, lj.codecs.Int8()), **sizes)
    both = lj.EncoderDecoderState(decoder=decoder, encoder=make(lj.Static(9), batch=4, ragged=True))
    where = lj.shardings(jax.eval_shape(lambda: both), mesh, batch="dp", heads="tp")
    specs = {
        leaf.ndim: s.spec for leaf, s in zip(*map(jax.tree.leaves, (both, where)), strict=True)
    }
    assert specs == {1: P("dp"), 3: P("dp", "tp"), 4: P("dp", "tp")}  # int8 scales have three
    with jax.set_mesh(mesh):
        assert lj.shardings(both, batch="dp", heads="tp") == where
    alone = lj.shardings(make(), mesh, heads=("tp",))
    assert alone.layers[0].position.spec == P() and alone.layers[0].key.spec == P(None, ("tp",))


def test_what_cannot_be_divided_is_refused(mesh):
    """The message names the axis, the numbers and what to do."""
    with pytest.raises(ValueError, match=r"no mesh is in force; pass one"):
        lj.shardings(make())
    with pytest.raises(ValueError, match=r"batch='x' is not an axis of the mesh.*'dp', 'tp'"):
        lj.shardings(make(), mesh, batch="x")
    with pytest.raises(ValueError, match=r"batch='dp' divides over 4 devices.*2 rows; choose"):
        lj.shardings(make(), mesh, batch="dp")
    with pytest.raises(ValueError, match=r"heads='dp' divides over 4 .* 2 key/value heads"):
        make(sharding=NamedSharding(mesh, P(None, "dp")))
    with pytest.raises(ValueError, match=r"heads=\('tp', 'y'\) is not an axis"):
        lj.shardings(make(), mesh, heads=("tp", "y"))
    with pytest.raises(ValueError, match="no mesh is in force"):
        make(sharding=TOKENS)
    with pytest.raises(ValueError, match=r"PartitionSpec\(batch, heads\); slots and widths"):
        make(sharding=NamedSharding(mesh, P(None, None, "tp")))
    with pytest.raises(TypeError, match="or a NamedSharding with one, got str"):
        make(sharding="dp")


PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [3]]
SAMPLING = lj.Sampling(temperature=0.8, top_k=8, top_p=0.9, repetition_penalty=1.2)
INT8 = lj.Dynamic(lj.codecs.Int8())
DECODERS = {
    "generate": lambda model, **k: lj.generate(
        model, PROMPTS, max_new_tokens=7, sampling=SAMPLING, cache=INT8, **k
    ),
    "stream": lambda model, **k: list(
        lj.stream(model, PROMPTS, max_new_tokens=7, tokens_per_call=3, cache=lj.Sliding(6, 2), **k)
    ),
    "beams": lambda model, **k: lj.beam_search(
        model, PROMPTS, num_beams=4, max_new_tokens=5, history="reorder", **k
    ),
    "tree": lambda model, **k: lj.beam_search(model, PROMPTS, num_beams=4, max_new_tokens=5, **k),
    "copies": lambda model, **k: lj.speculate(
        model, PROMPTS, draft=lj.NGram(), max_new_tokens=7, **k
    ),
    "prompts": lambda model, **k: lj.generate(
        model,
        [[1, 2, 3, 4, *prompt] for prompt in PROMPTS],
        max_new_tokens=7,
        prompt_cache=lj.PromptCache(model, INT8, max_bytes=1 << 20, chunk=4),
        **k,
    ),
    "drafts": lambda model, **k: lj.speculate(
        model, PROMPTS, draft=model, max_new_tokens=7, sampling=SAMPLING, **k
    ),
    "trees": lambda model, **k: lj.speculate(
        model, PROMPTS, draft=lj.Tree(model, (2, 1)), max_new_tokens=7, **k
    ),
}
RARE = {"stream", "tree", "copies", "trees", "prompts"}


def _model():
    config = ModelConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return Transformer(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.exhaustive if n in RARE else ()) for n in DECODERS],
)
def test_decoders_on_a_mesh_choose_the_same_tokens(mesh, name):
    """With the cache divided by rows and heads, and the parameters of the model by their last axis."""
    model = _model()

    def put(x):
        return jax.device_put(x, NamedSharding(mesh, P(None, "tp") if x.ndim == 2 else P()))

    nnx.update(model, jax.tree.map(put, nnx.state(model)))
    expected = DECODERS[name](_model())
    with jax.set_mesh(mesh):
        got = DECODERS[name](model, sharding=TOKENS)
    if name == "stream":
        assert got == expected
        return
    what = "sequences" if name in ("beams", "tree") else "tokens"
    np.testing.assert_array_equal(getattr(got, what), getattr(expected, what))
    np.testing.assert_array_equal(got.lengths, expected.lengths)
    if name in ("generate", "prompts"):
        key = got.cache.layers[0].key["codes"]
        assert key.sharding.is_equivalent_to(NamedSharding(mesh, TOKENS), key.ndim)


@pytest.mark.exhaustive
def test_t5_on_a_mesh_chooses_the_same_tokens():
    """Its cache is divided as it was asked to be, whatever the encoder left in the model."""
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    model = T5(config, rngs=nnx.Rngs(0))

    def decoded(**k):
        given = model.given(PROMPTS)
        return lj.generate(given, given.prompts, max_new_tokens=5, **k)

    expected, mesh = decoded(), mesh_of("explicit")
    with jax.set_mesh(mesh):
        got = decoded(sharding=TOKENS)
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    key = got.cache.layers[0].key
    assert key.sharding.is_equivalent_to(NamedSharding(mesh, TOKENS), key.ndim)
