"""Leaves of other names: multi-head latent attention, absorbed, and the keys of an indexer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lucid_jax as lj
from lucid_jax.attention.dense import dot_product
from tests.helpers import LAYOUTS, visible
from tests.test_laws import CODECS

B, N, COUNT, SCALE = 2, 4, 14, 0.3
DIMS = {"latent": 8, "rope": 4, "index": 6}  # of which attention scores two, and mixes the first
SCORED = ("latent", "rope")


def _make(spec, ragged=False, dtype=jnp.float32, **options):
    return lj.init_cache(
        spec, num_layers=1, batch_size=B, num_kv_heads=1, head_dim=DIMS, dtype=dtype,
        ragged=ragged, **options,
    )  # fmt: skip


def _arrays(count=COUNT, seed=0, dtype=jnp.float32):
    """Queries (B, N, T, D) of what is scored, tokens (B, 1, T, D) of all leaves."""
    draw = np.random.default_rng(seed).standard_normal
    tokens = {n: jnp.asarray(draw((B, 1, count, d), np.float32), dtype) for n, d in DIMS.items()}
    queries = {n: jnp.asarray(draw((B, N, count, DIMS[n]), np.float32)) for n in SCORED}
    return queries, tokens


def _part(tree, begin, stop):
    return {name: x[:, :, begin:stop] for name, x in tree.items()}


def _dense(queries, tokens, seen):
    """The same by concatenated widths, the latent copied to be the values."""
    query, key = (jnp.concatenate([tree[n] for n in SCORED], axis=-1) for tree in (queries, tokens))
    mask = jnp.asarray(seen)
    return dot_product(query, key, tokens["latent"], causal=False, mask=mask, scale=SCALE)


def _extended(state, queries, tokens, splits):
    outs, begin = [], 0
    for size in splits:
        one, new = (_part(tree, begin, begin + size) for tree in (queries, tokens))
        out, state = lj.extend_leaves(state, one, new, 0, scale=SCALE)
        outs.append(out)
        begin += size
    return jnp.concatenate(outs, axis=2), state


def _pairs():
    for layout in LAYOUTS:
        for codec in CODECS:
            everyday = codec in ("identity", "int8") or (layout, codec) == ("sliding", "kivi")
            marks = () if everyday else pytest.mark.exhaustive
            yield pytest.param(layout, codec, id=f"{layout}-{codec}", marks=marks)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("layout", "codec"), list(_pairs()))
def test_absorbed_attention_is_dense_attention(layout, codec, ragged):
    """Any chunks, any layout and codec; what a codec rounds is rounded in the dense oracle too."""
    stored_as, dtype, error = CODECS[codec]
    spec = LAYOUTS[layout](18, stored_as)
    queries, tokens = _arrays(dtype=dtype)
    seen = visible(spec, COUNT)
    out, state = _extended(_make(spec, ragged, dtype), queries, tokens, (5, 1, 8))
    wide = {n: x.astype(jnp.float32) for n, x in tokens.items()}
    expected = _dense(queries, wide, seen)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=max(1e-5, 2 * error))
    # Against what comes back, as closely as any.
    got, valid = lj.get_leaves(state, 0)
    live = np.atleast_2d(valid)[0]
    newest = _part(queries, COUNT - 1, COUNT)
    back = {n: x[:, :, live].astype(jnp.float32) for n, x in got.items()}
    exact = _dense(newest, back, np.ones((1, int(live.sum())), bool))
    last = lj.attend(state, newest, 0, scale=SCALE)
    # What comes back in bfloat16 is rounded to it, what attention reads is not.
    rounding = 1e-4 if dtype == jnp.float32 else 1e-2
    np.testing.assert_allclose(last, exact, rtol=1e-4, atol=rounding)
    for name, x in got.items():
        assert x.shape == (B, 1, lj.capacity(state), DIMS[name]) and x.dtype == dtype
    kept = np.flatnonzero(seen[-1])
    index = np.asarray(wide["index"])[:, :, kept]
    assert np.abs(np.asarray(back["index"]) - index).max() <= error * np.abs(index).max()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_verbs_move_every_leaf(layout):
    """Rollback, crop, rows, growth, eager, traced or donated, both orders of axes."""
    _, tokens = _arrays()
    state = lj.update_leaves(_make(LAYOUTS[layout](20), True), _part(tokens, 0, 9), 0)
    jitted = jax.jit(lj.update_leaves, static_argnames="layer_idx")
    for new in (
        lj.update_leaves(state, _part(tokens, 9, 12), 0),
        jitted(state, _part(tokens, 9, 12), layer_idx=0),
        lj.update_leaves(jax.tree.map(jnp.copy, state), _part(tokens, 9, 12), 0, donate=True),
    ):
        new = lj.crop(lj.rollback(new, 2), 4)
        new = lj.select(lj.insert(new, [0], lj.extract(new, 1)), [1, 0])
        got, valid = lj.get_leaves(new, 0)
        for name, x in got.items():
            expected = np.asarray(tokens[name])[[1, 1], :, 6:10]
            np.testing.assert_array_equal(np.asarray(x)[:, :, np.asarray(valid)[0]], expected)
    swapped = _make(LAYOUTS[layout](20), True, axes="BTHD")
    other = {name: jnp.swapaxes(x[:, :, :9], 1, 2) for name, x in tokens.items()}
    swapped = lj.update_leaves(swapped, other, 0)
    for x, y in zip(jax.tree.leaves(swapped), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_queries_and_leaves_are_those_of_dense_attention(layout):
    """The latent's comes from its scores and from its values."""
    spec = LAYOUTS[layout](18)
    queries, tokens = _arrays()
    seen = visible(spec, COUNT)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((B, N, COUNT, 8), np.float32))

    def loss(attention):
        return jax.grad(lambda q, t: jnp.sum(attention(q, t) * weights), argnums=(0, 1))

    def cached(queries, tokens):
        return _extended(_make(spec), queries, tokens, (9, 5))[0]

    got = jax.jit(loss(cached))(queries, tokens)
    expected = loss(functools.partial(_dense, seen=seen))(queries, tokens)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert np.abs(got[1]["latent"]).max() > 0.1 and not np.any(got[1]["index"])


def test_evicted_tokens_and_files_keep_their_leaves(tmp_path):
    """`compact` moves every leaf, positions too; what is saved comes back under the same names."""
    _, tokens = _arrays()
    state = lj.update_leaves(_make(lj.Static(16)), tokens, 0)
    state = lj.compact(state, np.arange(16) % 3 == 0, 0)
    lj.save(tmp_path / "state", state)
    loaded = lj.load(tmp_path / "state")
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    got, valid = lj.get_leaves(loaded, 0)
    assert lj.stored_positions(loaded)[0, 0, :5].tolist() == [0, 3, 6, 9, 12]
    for name, x in got.items():
        np.testing.assert_array_equal(x[:, :, np.asarray(valid)], tokens[name][:, :, ::3])


@pytest.mark.parametrize("codec", [lj.codecs.Identity(), lj.codecs.Int8()], ids=["plain", "int8"])
def test_files_tell_leaves_from_counters_of_the_same_name(tmp_path, codec):
    dims = {"start": 2, "recent": 3, "tail": 2, "floor": 4, "leaves": 5, "a.b": 2}
    state = lj.init_cache(
        lj.Static(4, codec), num_layers=1, batch_size=1, num_kv_heads=1, head_dim=dims
    )
    new = {name: jnp.full((1, 1, 3, dim), dim, jnp.float32) for name, dim in dims.items()}
    state = lj.update_leaves(state, new, 0)
    lj.save(tmp_path / "state", state)
    jax.tree.map(np.testing.assert_array_equal, lj.load(tmp_path / "state"), state)


def test_the_latent_is_stored_once_and_updated_in_place():
    """No second copy of it as values, neither in the state nor in a compiled step."""
    sizes = dict(num_layers=1, batch_size=1, num_kv_heads=1)
    # So many that no block has them all, of which what is dead is masked in a copy.
    state = lj.init_cache(lj.Static(16384), head_dim={"latent": 64, "rope": 16}, **sizes)
    leaf = 16384 * 4
    assert lj.nbytes(state) == leaf * 80 + 13
    new = {"latent": jnp.ones((1, 1, 1, 64)), "rope": jnp.ones((1, 1, 1, 16))}
    query = {name: jnp.ones((1, 8, 1, x.shape[-1])) for name, x in new.items()}

    def step(state):
        state = lj.update_leaves(state, new, 0)
        return lj.attend(state, query, 0, scale=0.1), state

    memory = jax.jit(step, donate_argnums=0).lower(state).compile().memory_analysis()
    assert memory.temp_size_in_bytes < leaf * 16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, q, t: lj.update(s, t["latent"], t["latent"], 0),
         "stores latent and rope and index, got key and value; update_leaves"),
        (lambda s, q, t: lj.update_leaves(s, {"latent": t["latent"]}, 0), "got latent; update_leaves"),
        (lambda s, q, t: lj.update_leaves(s, t | {"rope": t["index"]}, 0), "^rope must be"),
        (lambda s, q, t: lj.update_leaves(s, t | {"rope": t["rope"][:, :, :1]}, 0),
         "latent and rope and index must hold the same number of tokens"),
        (lambda s, q, t: lj.get(s, 0), "not keys and values; get_leaves"),
        (lambda s, q, t: lj.attend(s, q["rope"], 0, scale=1.0), "pass queries for some"),
        (lambda s, q, t: lj.attend(s, q, 0), "queries by name need scale="),
        (lambda s, q, t: lj.attend(s, q, 0, scale=1.0, rope_theta=100.0), "rotate the leaf"),
        (lambda s, q, t: lj.extend_leaves(s, q, t, 0, scale=1.0, rope_theta=100.0), "rotate the leaf"),
        (lambda s, q, t: lj.attend(s, q | {"rope": q["latent"]}, 0, scale=1.0), "^query of rope"),
        (lambda s, q, t: lj.attend(s, q | {"rope": q["rope"][:, :2]}, 0, scale=1.0), "the same dtype"),
        (lambda s, q, t: lj.init_cache(lj.Static(4), num_layers=1, batch_size=1, num_kv_heads=1,
                                       head_dim={}), "at least one leaf"),
        (lambda s, q, t: lj.init_cache(lj.Static(4), num_layers=1, batch_size=1, num_kv_heads=1,
                                       head_dim={"positions": 4}), "other than 'positions'"),
        (lambda s, q, t: lj.init_cache(lj.Static(4), num_layers=1, batch_size=1, num_kv_heads=1,
                                       head_dim={"a": 4}, value_head_dim=3), "leave value_head_dim="),
        (lambda s, q, t: lj.init_cache([lj.Static(4)] * 2, batch_size=1, num_kv_heads=1,
                                       head_dim=[{"a": 4}]), "1 entries for 2 layers"),
    ],
)  # fmt: skip
def test_errors_name_the_leaves(call, message):
    queries, tokens = _arrays()
    state = lj.update_leaves(_make(lj.Static(40)), tokens, 0)
    with pytest.raises(ValueError, match=message):
        call(state, queries, tokens)


def test_layers_may_differ_in_their_leaves():
    state = lj.init_cache(
        [lj.Static(4), lj.Shared(0), lj.Sliding(2)], batch_size=1, num_kv_heads=1,
        head_dim=[DIMS, DIMS, 5],
    )  # fmt: skip
    new = {name: jnp.ones((1, 1, 2, d)) for name, d in DIMS.items()}
    state = lj.update_leaves(state, new, 0)
    kv = jnp.ones((1, 1, 2, 5))
    state = lj.update(state, kv, kv, 2)
    assert list(lj.get_leaves(state, 1)[0]) == list(lj.get_leaves(state, 0)[0])
    assert int(lj.seq_length(state, 1)) == 2


def test_keys_and_values_with_another_leaf_beside_them_are_still_keys_and_values():
    """An indexer's keys: `get`, plain queries and RoPE by index go by the key and the value."""
    dims = {"key": 4, "value": 3, "index": 2}
    state = lj.init_cache(lj.Static(8), num_layers=1, batch_size=1, num_kv_heads=2, head_dim=dims)
    rng = np.random.default_rng(0)
    new = {n: rng.standard_normal((1, 2, 5, dim), np.float32) for n, dim in dims.items()}
    state = lj.update_leaves(state, new, 0)
    keys, values, valid = lj.get(state, 0)
    np.testing.assert_array_equal(keys[:, :, valid], new["key"])
    np.testing.assert_array_equal(values[:, :, valid], new["value"])
    plain = lj.init_cache(
        lj.Static(8), num_layers=1, batch_size=1, num_kv_heads=2, head_dim=4, value_head_dim=3
    )
    plain = lj.update(plain, new["key"], new["value"], 0)
    query = rng.standard_normal((1, 4, 5, 4), np.float32)
    for given in (query, {"key": query}):
        got = lj.attend(state, given, 0, scale=0.5, rope_theta=100.0)
        expected = lj.attend(plain, query, 0, scale=0.5, rope_theta=100.0)
        np.testing.assert_array_equal(got, expected)


def test_tokens_that_are_no_dict_are_refused():
    state = lj.init_cache(
        lj.Static(4), num_layers=1, batch_size=1, num_kv_heads=1, head_dim={"latent": 4, "rope": 2}
    )
    for tokens in (None, [jnp.ones((1, 1, 1, 4))]):
        with pytest.raises(TypeError, match="as a dict by leaf"):
            lj.update_leaves(state, tokens, 0)
