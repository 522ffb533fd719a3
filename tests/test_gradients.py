"""Gradients through caches: right against dense attention, or raised; never silently wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import lucid_jax as lj
from lucid_jax.attention import backends
from lucid_jax.attention.dense import dot_product
from tests.helpers import DV, USERS_XLA, D, H, make, more_layouts, poison, queries, tokens, visible

pytestmark = pytest.mark.usefixtures("each_backend")
B = 2
LAYOUTS = {
    "static": lj.Static(24),
    "dynamic": lj.Dynamic(),
    "sliding": lj.Sliding(5, 2, 3),
    **{name: new() for name, new in more_layouts(5).items()},
}
ROWS = [False, True]
EVERYDAY = {("sliding", False), ("static", True)}
WAYS = [
    pytest.param(
        layout, ragged, id=f"{layout}-{'ragged' if ragged else 'aligned'}",
        marks=() if (layout, ragged) in EVERYDAY else pytest.mark.exhaustive,
    )
    for layout in LAYOUTS
    for ragged in ROWS
]  # fmt: skip
EVERY_WAY = pytest.mark.parametrize(("layout", "ragged"), WAYS)
RAGGED = pytest.mark.parametrize("ragged", ROWS, ids=["aligned", "ragged"])
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)


def _new(layout, ragged=False, **options):
    return make(LAYOUTS[layout], ragged=ragged, batch=B, **options)


def _arrays(count, groups=2, dtype=jnp.float32):
    """Queries, keys, values and weights of the outputs."""
    key, value = tokens(0, B, count)
    out = np.random.default_rng(5).standard_normal((B, H * groups, count, DV), np.float32)
    query = queries(0, B, count, heads=H * groups)
    return [jnp.asarray(x).astype(dtype) for x in (query, key, value, out)]


def _dense(query, key, value, spec, **options):
    """Attention of all tokens at once, by a formula."""
    if not spec.bounded:
        options["mask"] = jnp.asarray(visible(spec, key.shape[2]))
    return dot_product(query, key, value, **options)


def _loss(attention):
    """A scalar of what attention gives, and its gradients by queries, keys and values."""

    def loss(query, key, value, out):
        return jnp.sum(attention(query, key, value).astype(jnp.float32) * out.astype(jnp.float32))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))


def _chunked(new, splits, query, key, value, how):
    """Attention of tokens that come in chunks, by `extend` or by `update` and `attend`."""
    state, outs, begin = new, [], 0
    for size in splits:
        mine = [x[:, :, begin : begin + size] for x in (query, key, value)]
        if how == "extend":
            out, state = lj.extend(state, *mine, 0)
        else:
            state = lj.update(state, *mine[1:], 0)
            out = lj.attend(state, mine[0], 0)
        outs.append(out)
        begin += size
    return jnp.concatenate(outs, axis=2)


def _assert_close(got, expected, tolerance=2e-5):
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1, np.abs(b).max()))


@EVERY_WAY
@pytest.mark.parametrize(
    ("how", "splits"), [("extend", (9, 4)), ("update", (4, 1, 3))], ids=["extend", "update"]
)
def test_chunks_have_the_gradients_of_dense_attention(layout, ragged, how, splits):
    """Queries, keys and values, through what later chunks read of earlier ones."""
    arrays = _arrays(sum(splits))
    run = functools.partial(_chunked, _new(layout, ragged), splits, how=how)
    expected = _loss(functools.partial(_dense, spec=LAYOUTS[layout]))(*arrays)
    assert all(np.abs(x).max() > 0.1 for x in expected)
    _assert_close(_loss(run)(*arrays), expected)


@pytest.mark.exhaustive
def test_eager_gradients_are_those_of_compiled_ones():
    """Nothing of the caller's is compiled: JAX traces the verbs' own programs."""
    arrays = _arrays(5)
    run = functools.partial(_chunked, _new("sliding"), (5,), how="extend")
    got = _loss(run).__wrapped__(*arrays)
    _assert_close(got, _loss(run)(*arrays))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
@LAYOUT
def test_narrow_dtypes_get_gradients_of_their_own_dtype(layout, dtype):
    """Summed in float32 over a call's queries, rounded once; queries are float32 over float8."""
    dtype = jnp.dtype(dtype)
    arrays = _arrays(7, dtype=dtype)
    if dtype.itemsize == 1:
        arrays[0], arrays[3] = (x.astype(jnp.float32) for x in (arrays[0], arrays[3]))
    run = functools.partial(_chunked, _new(layout, dtype=dtype), (7,), how="extend")
    wide = [x.astype(jnp.float32) for x in arrays]
    expected = _loss(functools.partial(_dense, spec=LAYOUTS[layout]))(*wide)
    got = _loss(run)(*arrays)
    rounded = [x.astype(y.dtype) for x, y in zip(expected, arrays, strict=False)]
    _assert_close(got, rounded, tolerance=max(1e-2, float(jnp.finfo(dtype).eps)))


@EVERY_WAY
def test_gradients_of_float64_are_as_exact_as_it(layout, ragged):
    """Nothing on the way is float32, also where one chunk reads another's tokens."""
    with jax.enable_x64(True):
        arrays = _arrays(7, dtype=jnp.float64)
        new = lj.grow(_new(layout, ragged, dtype=jnp.float64), 8)

        def loss(attention):
            def of(query, key, value, out):
                return jnp.sum(attention(query, key, value) * out)

            return jax.jit(jax.grad(of, argnums=(0, 1, 2)))

        expected = loss(functools.partial(_dense, spec=LAYOUTS[layout]))(*arrays)
        got = loss(functools.partial(_chunked, new, (4, 3), how="update"))(*arrays)
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


@RAGGED
@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(lj.Static(700), id="static", marks=pytest.mark.exhaustive),
        pytest.param(lj.Sliding(300, 3, 5), id="sliding"),
    ],
)
def test_gradients_past_a_block(spec, ragged):
    """Several blocks of slots, the last overlapping, a ring that wraps."""
    arrays = _arrays(620, groups=1)
    run = functools.partial(_chunked, make(spec, ragged=ragged, batch=B), (600, 20), how="extend")
    expected = _loss(functools.partial(_dense, spec=spec))(*arrays)
    _assert_close(_loss(run)(*arrays), expected, tolerance=1e-4)


OPTIONS = {
    "plain": {},
    "window": {"window": 3},
    "softcap": {"softcap": 2.0, "scale": 0.7},
    "bias": {"bias": np.random.default_rng(3).standard_normal((1, 2 * H, 6, 24), np.float32)},
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("groups", [1, 4])
@RAGGED
@pytest.mark.parametrize("layout", ["static", "sliding"])
def test_gradients_are_those_of_finite_differences(layout, ragged, groups, option):
    """By queries, keys, values, bias and what was stored before, of `extend`."""
    options = dict(OPTIONS[option])
    query, key, value, _ = _arrays(6, groups)
    before = [jnp.asarray(x) for x in tokens(9, B, 4)]
    bias = options.pop("bias", None)
    if bias is not None:
        width = 24 if layout == "static" else 7 + 6
        bias = jnp.asarray(np.repeat(bias[..., :width], groups, axis=1)[:, : H * groups])

    def f(query, key, value, old_key, old_value, bias):
        state = lj.update(_new(layout, ragged), old_key, old_value, 0)
        return lj.extend(state, query, key, value, 0, bias=bias, return_lse=True, **options)[0]

    every = (query, key, value, *before, bias)
    given = every if bias is not None else every[:-1]
    run = f if bias is not None else (lambda *args: f(*args, None))
    check_grads(jax.jit(run), given, order=1, modes=["rev"], atol=5e-2, rtol=5e-2, eps=1e-2)


@LAYOUT
def test_gradients_by_the_stored_state(layout):
    """A state is a pytree: its leaves have gradients like any parameter."""
    query, key, value, out = _arrays(6)
    state = lj.update(_new(layout), key, value, 0)

    def loss(leaves):
        layer = state.layers[0].replace(leaves={"key": leaves[0], "value": leaves[1]})
        return jnp.sum(lj.attend(state.with_layers([layer]), query[:, :, -1:], 0) * out[:, :, -1:])

    got = jax.jit(jax.grad(loss))((state.layers[0].key, state.layers[0].value))

    def dense(key, value):
        whole = _dense(query, key, value, LAYOUTS[layout])
        return jnp.sum(whole[:, :, -1:] * out[:, :, -1:])

    expected = jax.grad(dense, argnums=(0, 1))(key, value)
    slots = state.layers[0].slot_of(jnp.arange(6, dtype=jnp.int32))
    lost = np.setdiff1d(np.arange(got[0].shape[2]), slots)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a[:, :, slots], b, rtol=2e-5, atol=2e-6)
        assert not np.any(np.asarray(a)[:, :, lost])


@EVERY_WAY
def test_gradients_under_vmap_scan_and_checkpoint(layout, ragged):
    """Transformations compose: a batch of losses, a token at a time, recomputed."""
    arrays = _arrays(8)
    expected = _loss(functools.partial(_dense, spec=LAYOUTS[layout]))(*arrays)
    new = lj.grow(_new(layout, ragged), 8)

    def scanned(query, key, value):
        def step(state, token):
            out, state = lj.extend(state, *(x[:, :, None] for x in token), 0)
            return state, out[:, :, 0]

        _, outs = jax.lax.scan(step, new, [jnp.moveaxis(x, 2, 0) for x in (query, key, value)])
        return jnp.moveaxis(outs, 0, 2)

    _assert_close(_loss(scanned)(*arrays), expected)
    whole = jax.checkpoint(functools.partial(_chunked, new, (5, 3), how="extend"))
    _assert_close(_loss(whole)(*arrays), expected)
    many = [jnp.stack([x, 2 * x]) for x in arrays]
    got = jax.jit(jax.vmap(_loss(functools.partial(_chunked, new, (5, 3), how="extend"))))(*many)
    _assert_close([x[0] for x in got], expected)
    twice = _loss(functools.partial(_dense, spec=LAYOUTS[layout]))(*(2 * x for x in arrays))
    _assert_close([x[1] for x in got], twice)


def _path(state):
    return lj.keep_path(state, [3, 3], [[0, 2], [1, 2]], [2, 1])


def _kept(state):
    return lj.compact(state, jnp.arange(24) % 2 == 0, 0)


def _inserted(state):
    other = lj.init_cache(
        lj.Static(24), num_layers=1, batch_size=3, num_kv_heads=H, head_dim=D, value_head_dim=DV,
        ragged=True,
    )  # fmt: skip
    return lj.insert(other, [2, 0], state)


VERBS = {
    "rollback": lambda s: lj.rollback(s, 2),
    "crop": lambda s: lj.crop(s, 3),
    "select": lambda s: lj.select(s, [1, 1]),
    "select fewer": lambda s: lj.select(s, [1]),
    "reorder": lambda s: lj.reorder(s, [1, 0], since=4),
    "repeat_interleave": lambda s: lj.repeat_interleave(s, 2),
    "extract": lambda s: lj.extract(s, 1),
    "reset": lj.reset,
    "insert": _inserted,
    "concat": lambda s: lj.concat([s, s]),
    "free": lambda s: lj.free(s, [0]),
    "compact": _kept,
    "keep_path": _path,
    "grow": lambda s: lj.grow(s, 100),
}
ONLY_STATIC = {"insert", "compact", "keep_path"}
ONLY_RAGGED = {"insert", "concat", "free", "keep_path"}
CASES = [
    pytest.param(
        verb, layout, ragged, id=f"{verb}-{layout}-{'ragged' if ragged else 'aligned'}",
        marks=() if layout == "static" or verb == "grow" else pytest.mark.exhaustive,
    )
    for verb in VERBS
    for layout in LAYOUTS
    for ragged in ROWS
    if not (verb in ONLY_STATIC and layout != "static")
    and not (verb in ONLY_RAGGED and not ragged)
    and not (verb == "grow" and layout != "dynamic")
]  # fmt: skip


def _assert_transposed(f, key, value):
    """Of a map linear in the tokens, the gradient is the transpose: <f(x), c> = <x, grad>."""
    out = f(key, value)
    pull = jax.jit(lambda weights: jax.vjp(f, key, value)[1](weights))
    rng = np.random.default_rng(7)
    weights = jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape).astype(np.float32)), out
    )
    grads = pull(weights)
    for other in range(2):
        x = [jnp.asarray(x) for x in tokens(20 + other, B, key.shape[2])]
        left = sum(np.vdot(a, b) for a, b in zip(f(*x), weights, strict=True))
        right = sum(np.vdot(a, b) for a, b in zip(x, grads, strict=True))
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4)
    return grads


@pytest.mark.parametrize(("verb", "layout", "ragged"), CASES)
def test_the_gradient_of_a_verb_is_its_transpose(verb, layout, ragged):
    """What `get` gives after a verb is linear in the tokens that went in."""
    key, value = (jnp.asarray(x) for x in tokens(0, B, 8))

    def f(key, value):
        state = lj.update(_new(layout, ragged), key, value, 0)
        return lj.get(VERBS[verb](state), 0)[:2]

    grads = _assert_transposed(f if verb == "grow" else jax.jit(f), key, value)  # grow: on the host
    assert np.any(grads[0]) == (verb != "reset")


@pytest.mark.parametrize("places", [[9, 2, 9], [[9, 2, 9], [0, 1, 8]]], ids=["all", "each"])
@EVERY_WAY
def test_the_gradient_of_writing_by_position_is_its_transpose(layout, ragged, places):
    """Skipped slots, overwritten tokens and duplicates get none."""
    key, value = (jnp.asarray(x) for x in tokens(0, B, 7))

    def f(key, value):
        state = lj.update(_new(layout, ragged), key[:, :, :4], value[:, :, :4], 0)
        state = lj.update(state, key[:, :, 4:], value[:, :, 4:], 0, cache_position=places)
        return lj.get(state, 0)[:2]

    grads = _assert_transposed(jax.jit(f), key, value)
    assert np.any(grads[0])


@EVERY_WAY
def test_gradients_after_every_kind_of_past(layout, ragged):
    """`attend` over a state that was cropped, rolled back and reordered, against `get`."""
    key, value = (jnp.asarray(x) for x in tokens(0, B, 9))
    query = jnp.asarray(queries(0, B, 1))

    def state_of(key, value):
        state = lj.update(_new(layout, ragged), key, value, 0)
        return lj.select(lj.crop(lj.rollback(state, 2), 5), [1, 0])

    def ours(query, key, value):
        return jnp.sum(jnp.sin(lj.attend(state_of(key, value), query, 0)))

    def dense(query, key, value):
        keys, values, valid = lj.get(state_of(key, value), 0)
        mask = valid.reshape(-1, 1, 1, valid.shape[-1])
        return jnp.sum(jnp.sin(dot_product(query, keys, values, causal=False, mask=mask)))

    got = jax.jit(jax.grad(ours, argnums=(0, 1, 2)))(query, key, value)
    _assert_close(got, jax.grad(dense, argnums=(0, 1, 2))(query, key, value))


@pytest.mark.exhaustive
@pytest.mark.parametrize("codec", ["Int8", "Float8", "Int4", "KIVI", "Bits"])
@RAGGED
def test_queries_and_bias_have_gradients_over_any_codec(codec, ragged):
    """The tokens are constants there: differentiate by what asks of them."""
    made = lj.codecs.KIVI(group=4, residual=3) if codec == "KIVI" else getattr(lj.codecs, codec)()
    dtype = jnp.bfloat16 if codec == "Bits" else jnp.float32
    key, value = (jnp.asarray(x).astype(dtype) for x in tokens(0, B, 11))
    state = lj.update(make(lj.Static(16, made), ragged=ragged, dtype=dtype), key, value, 0)
    query = jnp.asarray(queries(0, B, 1))
    bias = jnp.asarray(np.random.default_rng(1).standard_normal((1, 1, 1, 16), np.float32))

    def f(query, bias):
        return lj.attend(state, query, 0, bias=bias, return_lse=True)

    check_grads(jax.jit(f), (query, bias), order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-2)


@EVERY_WAY
def test_nan_in_dead_slots_reaches_no_gradient(layout, ragged):
    """What was rolled back, cropped or never written may hold anything."""
    arrays = [jnp.asarray(x) for x in (*tokens(0, B, 9), *tokens(1, B, 2))]
    query = jnp.asarray(queries(0, B, 2))

    def loss(key, value, new_key, new_value, query, spoil):
        state = lj.update(lj.grow(_new(layout, ragged), 16), key, value, 0)
        state = lj.crop(lj.rollback(state, 2), 4)
        state = poison(state) if spoil else state
        out, _ = lj.extend(state, query, new_key, new_value, 0)
        return jnp.sum(jnp.sin(out))

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4)), static_argnums=5)
    clean, spoilt = (grad(*arrays, query, spoil) for spoil in (False, True))
    for a, b in zip(clean, spoilt, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_broken_token_reaches_only_the_gradients_of_those_who_see_it():
    """Its own query is NaN; the others' queries, keys and values are as without it."""
    query, key, value, out = _arrays(4)
    out = out.at[:, :, 3].set(0)
    run = functools.partial(_chunked, _new("static"), (4,), how="extend")
    clean = _loss(run)(query, key, value, out)
    for broken in ("key", "value"):
        bad_key = key.at[:, :, 3].set(jnp.nan) if broken == "key" else key
        bad_value = value.at[:, :, 3].set(jnp.nan) if broken == "value" else value

        def loss(query, key, value):
            return jnp.sum((run(query, key, value) * out)[:, :, :3])

        got = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(query, bad_key, bad_value)
        for a, b in zip(got, clean, strict=True):
            np.testing.assert_allclose(a[:, :, :3], b[:, :, :3], rtol=1e-5, atol=1e-6)


def test_padding_of_a_ragged_chunk_reaches_no_gradient():
    """What stands past a row's real tokens may be NaN, queries included."""
    query, key, value, out = _arrays(5)
    counts = jnp.array([5, 2], jnp.int32)
    real = (jnp.arange(5)[None] < counts[:, None])[:, None, :, None]

    def loss(query, key, value):
        got, _ = lj.extend(_new("static", True), query, key, value, 0, lengths=counts)
        return jnp.sum(got * out)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    clean = grad(query, key, value)
    bad = [jnp.where(real, x, jnp.nan) for x in (query, key, value)]
    for a, b in zip(clean, grad(*bad), strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.any(np.asarray(a)[1, :, 2:])


def test_gradients_through_rope_by_place():
    """Keys are rotated block by block; a ring's sinks are read as a region of their own."""
    query, key, value, out = _arrays(7, groups=1)

    def f(query, key, value):
        run = lj.extend(_new("sliding"), query, key, value, 0, rope_theta=100.0)
        return run[0] * out

    check_grads(
        jax.jit(f), (query, key, value), order=1, modes=["rev"], atol=3e-2, rtol=3e-2, eps=1e-2
    )


def test_a_shared_prefix_gets_the_sum_of_its_readers_gradients():
    """G completions fork one prompt's cache, as in GRPO and prefix tuning."""
    prompt = [jnp.asarray(x) for x in tokens(0, 1, 6)]
    more = [jnp.asarray(x) for x in tokens(1, 3, 2)]
    query = jnp.asarray(queries(1, 3, 2))

    def loss(prompt, rows):
        state = lj.update(make(lj.Static(16), batch=1), *prompt, 0)
        state = lj.repeat_interleave(state, len(rows))
        out, _ = lj.extend(state, query[rows], *(x[rows] for x in more), 0)
        return jnp.sum(jnp.sin(out))

    grad = jax.jit(jax.grad(loss))
    together = grad(prompt, np.arange(3))
    apart = [grad(prompt, np.array([row])) for row in range(3)]
    _assert_close(together, [sum(xs) for xs in zip(*apart, strict=True)])


@pytest.mark.parametrize("call", ["extend", "update"])
def test_memory_of_a_gradient_is_linear_in_the_tokens(call, each_backend, monkeypatch):
    """Scores are never kept, as the platform chooses: twice the tokens take twice the temporaries."""
    if each_backend == "dense":
        monkeypatch.setitem(backends._TRIED, "cpu", backends._TRIED["gpu"])

    def temporaries(count):
        new = make(lj.Static(count), batch=1)
        how = functools.partial(_chunked, new, (count,), how=call)
        shapes = [
            jax.ShapeDtypeStruct((1, heads, count, width), jnp.float32)
            for heads, width in ((H, D), (H, D), (H, DV), (H, DV))
        ]
        return _loss(how).lower(*shapes).compile(USERS_XLA).memory_analysis().temp_size_in_bytes

    small, middle, large = (temporaries(n) for n in (1024, 2048, 4096))
    print(
        f"temporaries of the gradient at 1024, 2048, 4096 tokens: {small}, {middle}, {large} bytes"
    )
    assert middle < 2.3 * small
    assert large < 2.3 * middle


def test_an_eager_gradient_grows_a_dynamic_layer():
    """Only the tokens are traced there, so room is made as in any eager call."""
    key, value = (jnp.asarray(x) for x in tokens(0, B, 80))

    def loss(key, value):
        state = lj.update(_new("dynamic"), key, value, 0)
        assert lj.capacity(state) == 128
        return jnp.sum(lj.get(state, 0)[0])

    np.testing.assert_array_equal(jax.grad(loss)(key, value), np.ones(key.shape, np.float32))
    full = lj.update(make(lj.Static(4)), key[:, :, :4], value[:, :, :4], 0)
    with pytest.raises(ValueError, match="need 84 slots"):
        jax.grad(lambda k: jnp.sum(lj.get(lj.update(full, k, value, 0), 0)[0]))(key)


@pytest.mark.parametrize("verb", ["insert", "concat", "astype"])
def test_moving_tokens_into_bits_refuses_their_gradients(verb):
    """Bits have no tangent: what enters them by another way than `update` raises too."""
    key, value = (jnp.asarray(x).astype(jnp.bfloat16) for x in tokens(0, 1, 3))

    def loss(key):
        raw = lj.update(make(lj.Static(8), batch=1, ragged=True, dtype=jnp.bfloat16), key, value, 0)
        bits = make(lj.Static(8, lj.codecs.Bits()), batch=2, ragged=True, dtype=jnp.bfloat16)
        if verb == "astype":
            wide = make(lj.Static(8, lj.codecs.Bits()), batch=1)
            wide = lj.update(wide, *(x.astype(jnp.float32) for x in (key, value)), 0)
            state = lj.astype(wide, jnp.bfloat16)
        else:
            state = lj.insert(bits, [1], raw) if verb == "insert" else lj.concat([bits, raw])
        return jnp.sum(lj.get(state, 0)[0].astype(jnp.float32))

    with pytest.raises(TypeError, match=r"cannot be stored by Bits\(\)"):
        jax.grad(loss)(key)


@pytest.mark.parametrize("call", ["attend", "extend"])
def test_eager_gradients_compile_once(call, compilations):
    """A second gradient of the same shapes finds its programs compiled."""
    state = lj.update(make(lj.Static(600)), *tokens(0, B, 5), 0)
    query, (key, value) = jnp.asarray(queries(0, B, 2)), tokens(1, B, 2)

    def loss(query):
        if call == "attend":
            return jnp.sum(lj.attend(state, query, 0))
        return jnp.sum(lj.extend(state, query, key, value, 0)[0])

    again = query + 1
    jax.grad(loss)(query)
    before = compilations()
    jax.grad(loss)(again)
    assert compilations() == before


def test_an_eager_gradient_is_refused_where_the_call_is():
    """The query is traced there, but not the state, of which too much is asked."""
    state = lj.rollback(lj.update(make(lj.Sliding(9, 0, 4)), *tokens(0, B, 18), 0), 3)
    with pytest.raises(ValueError, match="at most 2 are left to ask"):
        jax.grad(lambda q: jnp.sum(lj.attend(state, q, 0)))(jnp.asarray(queries(0, B, 3)))


def test_the_gradient_of_a_narrow_bias_is_summed_in_float32():
    """One number for all slots, over many blocks: each query's shares add up to 1."""
    state = lj.update(make(lj.Static(2048), batch=1), *tokens(0, 1, 2000), 0)
    query = jnp.asarray(queries(0, 1, 1))

    def loss(bias):
        return jnp.sum(lj.attend(state, query, 0, bias=bias, return_lse=True)[1])

    got = jax.jit(jax.grad(loss))(jnp.zeros((1, 2 * H, 1, 1), jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(got, np.float32), 1)
