"""Codecs: what a token costs and how far it comes back changed; attention on packed data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lucid_jax as lj
from lucid_jax.attention.dense import dot_product
from lucid_jax.cache.codecs import default_codec
from lucid_jax.cache.codecs.rotation import hadamard
from tests.helpers import USERS_XLA, assert_same, make, queries, stored, tokens

INT8, INT4, FP8, KIVI, SIMULATED = (
    lj.codecs.Int8, lj.codecs.Int4, lj.codecs.Float8, lj.codecs.KIVI, lj.codecs.Simulated,
)  # fmt: skip
H, D = 2, 32
EVERY = {
    "bits": lj.codecs.Bits(),
    "int8": INT8(), "int8-rotated": INT8(rotate=True), "fp8": FP8(), "fp8-rotated": FP8(rotate=True),
    "int4": INT4(rotate=False), "int4-8": INT4(group=8, rotate=False), "int4-rotated": INT4(),
    "kivi": KIVI(group=8, residual=4), "kivi-rotated": KIVI(group=8, residual=4, rotate=True),
}  # fmt: skip


def _fill(codec, key, value, **options):
    batch, heads, count, dim = key.shape
    state = make(
        lj.Static(count, codec), batch=batch, heads=heads, dim=dim,
        value_dim=value.shape[3], dtype=key.dtype, **options,
    )  # fmt: skip
    return lj.update(state, key, value, 0)


def _per_token(codec, dtype=jnp.bfloat16, dim=128):
    """Bytes that one more token and head takes, keys and values, scales counted."""
    sizes = [
        sum(
            leaf.nbytes
            for leaf in jax.tree.leaves(
                (make(lj.Static(n, codec), batch=1, heads=1, dim=dim, value_dim=dim, dtype=dtype)
                 .layers[0].key,
                 make(lj.Static(n, codec), batch=1, heads=1, dim=dim, value_dim=dim, dtype=dtype)
                 .layers[0].value)
            )
        )
        for n in (640, 1280)
    ]  # fmt: skip
    return (sizes[1] - sizes[0]) / 640


@pytest.mark.parametrize(
    ("codec", "times"),
    [(INT8(), 1.88), (FP8(), 1.88), (INT4(), 3.5), (INT4(32), 3.1), (KIVI(), 3.5)],
)
def test_bytes_with_scales_counted(codec, times):
    """A token takes as many times fewer bytes than bfloat16 as is promised, at head_dim 128."""
    assert _per_token(lj.codecs.Identity()) == 2 * 2 * 128
    assert _per_token(lj.codecs.Identity()) / _per_token(codec) >= times


@pytest.mark.parametrize("codec", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zero_tokens_stay_zero_and_scales_are_not(codec, dtype):
    """A zero token, alone or between others, reads back as exactly zero, and never as NaN."""
    key, value = (jnp.asarray(x, dtype) for x in tokens(0, 1, 24, H, D, D))
    gone = jnp.arange(24) % 3 == 0
    # Rotation and groups of tokens share a scale with neighbours only where tokens do.
    whole = jnp.zeros_like(key)
    for k, v in ((whole, whole), *([(jnp.where(gone[:, None], 0, key).astype(dtype),
                                     jnp.where(gone[:, None], 0, value).astype(dtype))]
                                   if codec.unit == 1 else [])):  # fmt: skip
        got = stored(_fill(codec, k, v))
        for ours, sent in zip(got, (k[0], v[0]), strict=True):
            zero = (np.asarray(sent, np.float32) == 0).all(axis=-1)
            assert zero.any()
            assert (np.asarray(ours, np.float32)[zero] == 0).all()
            assert np.isfinite(np.asarray(ours, np.float32)).all()


@pytest.mark.parametrize("codec", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1.0, 121.0, 1e30])
def test_an_outlier_comes_back_whatever_came_before(codec, magnitude):
    """Each token (or group) has scales of its own: nothing is frozen at the first update."""
    key, value = tokens(1, 1, 24, H, D, D)
    small = _fill(codec, key[:, :, :12], value[:, :, :12])
    state = make(lj.Static(24, codec), batch=1, heads=H, dim=D, value_dim=D)
    for part in np.split(np.arange(24), [5, 12, 13]):
        scale = np.float32(magnitude if part[0] >= 12 else 1)
        state = lj.update(state, key[:, :, part] * scale, value[:, :, part] * scale, 0)
    got, before = stored(state), stored(small)
    for ours, sent, first in zip(got, (key[0], value[0]), before, strict=True):
        loud = np.float32(magnitude) * sent[:, 16:]
        assert np.abs(ours[:, 16:] - loud).max() <= 0.35 * np.abs(loud).max()
        if codec.unit == 1:
            np.testing.assert_array_equal(ours[:, :12], first)


@pytest.mark.parametrize("codec", EVERY.values(), ids=EVERY)
def test_attention_on_packed_data_is_attention_over_what_get_gives(codec):
    """Scales on scores and weights give what decoding first would."""
    key, value = tokens(2, 2, 30, H, D, D)
    query = np.random.default_rng(3).standard_normal((2, 2 * H, 1, D)).astype(np.float32)
    state = _fill(codec, key, value)
    keys, values, valid = lj.get(state, 0)
    expected = dot_product(jnp.asarray(query), keys, values, mask=valid)
    np.testing.assert_allclose(lj.attend(state, query, 0), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("codec", [INT8(), INT4(), FP8(), KIVI(group=32, residual=32)], ids=str)
def test_attend_never_materialises_a_decoded_cache(codec):
    """Temporaries of a decode step do not grow with the capacity."""

    def scratch(capacity):
        state = make(lj.Static(capacity, codec), batch=1, heads=2, dim=64, value_dim=64)
        query = jnp.ones((1, 2, 1, 64))
        run = jax.jit(lambda s, q: lj.attend(s, q, 0))
        return run.lower(state, query).compile(USERS_XLA).memory_analysis().temp_size_in_bytes

    assert scratch(16384) <= scratch(1024) + 4096


def _errors(codecs, outliers):
    """Mean attention error of codecs on keys whose few outlier channels are far from zero."""
    rng = np.random.default_rng(4)
    key = rng.standard_normal((1, 2, 512, 128)).astype(np.float32)
    if outliers:
        key[..., [3, 40, 77, 120]] += np.float32([30, -25, 40, -35])
    value = rng.standard_normal((1, 2, 512, 128)).astype(np.float32)
    query = rng.standard_normal((1, 2, 64, 128)).astype(np.float32)
    exact = dot_product(*map(jnp.asarray, (query, key, value)), causal=False)
    errors = []
    for codec in codecs:
        # Keys alone are quantized: values come back exact by taking the codec's keys only.
        keys = lj.get(_fill(codec, key, value), 0)[0]
        out = dot_product(jnp.asarray(query), keys, jnp.asarray(value), causal=False)
        errors.append(float(jnp.abs(out - exact).mean()))
    return errors


def test_outlier_channels_hurt_per_channel_and_rotated_keys_less():
    """Per-channel int4 has at most a third of per-token's attention error; rotation halves it."""
    per_token, per_channel, rotated = _errors(
        [INT4(128, rotate=False), KIVI(group=64, residual=1), INT4(128)], outliers=True
    )
    assert per_channel <= per_token / 3
    assert rotated <= per_token / 2


@pytest.mark.parametrize("dim", [1, 2, 3, 12, 64, 96])
def test_the_rotation_is_orthogonal_and_its_own_inverse(dim):
    """So scores do not change by it."""
    turn = hadamard(dim)
    np.testing.assert_allclose(turn @ turn, np.eye(dim), atol=1e-6)
    np.testing.assert_array_equal(turn, turn.T)


@pytest.mark.parametrize("dim", [1, 3, 7])
@pytest.mark.parametrize("codec", [INT8(), INT4(), KIVI(group=2, residual=1)], ids=str)
def test_odd_widths_pack_too(codec, dim):
    """Half a byte is left over, and nothing else changes."""
    key, value = tokens(5, 1, 6, H, dim, 5)
    state = _fill(codec, key, value)
    keys, values, _ = lj.get(state, 0)
    assert keys.shape == key.shape and values.shape == value.shape
    assert np.abs(keys - key).max() <= 0.3 * np.abs(key).max()
    query = np.ones((1, H, 1, dim), np.float32)
    expected = dot_product(jnp.asarray(query), keys, values)
    np.testing.assert_allclose(lj.attend(state, query, 0), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("make_codec", "error", "says"),
    [
        (lambda: INT4(0), ValueError, "at least 1"),
        (lambda: INT4(2.5), TypeError, "integer"),
        (lambda: KIVI(group=1), ValueError, "at least 2"),
        (lambda: KIVI(residual=0), ValueError, "at least 1"),
        (lambda: make(lj.Static(4, KIVI(), track=True)), ValueError, "groups"),
        (lambda: make(lj.Static(4, lj.Int8)), TypeError, "codecs.Int8"),
        (lambda: lj.Sliding(8, codec="int8"), TypeError, "codecs.Int8"),
        (lambda: make(lj.Static(4, INT8()), dtype=jnp.int32), TypeError, "floating"),
        (lambda: SIMULATED(INT8), TypeError, "codecs.Int8"),
        (lambda: SIMULATED(SIMULATED(INT8())), TypeError, "leave one out"),
    ],
    ids=range(10),
)
def test_bad_codecs_are_refused_with_the_fix(make_codec, error, says):
    """At the latest when a cache is made."""
    with pytest.raises(error, match=says):
        make_codec()


def test_kivi_takes_no_places():
    """A place would change a group that has been quantized: eager and traced alike refuse."""
    state = make(lj.Static(32, KIVI(group=4, residual=2)))
    key, value = tokens(0, 2, 1)
    for call in (lj.update, jax.jit(lj.update, static_argnames="layer_idx")):
        with pytest.raises(ValueError, match="cache_position"):
            call(state, key, value, layer_idx=0, cache_position=np.int32(0))


def test_crop_before_a_flush_leaves_no_trace_in_a_scale():
    """Cropped tokens have no say in the scale of the group they would have shared."""
    key, value = tokens(6, 1, 16, H, D, D)
    loud = key.copy()
    loud[:, :, :3] *= 1000
    kept = []
    for keys in (key, loud):
        state = make(lj.Static(16, KIVI(group=4, residual=2)), batch=1, heads=H, dim=D, value_dim=D)
        state = lj.crop(lj.update(state, keys[:, :, :5], value[:, :, :5], 0), 2)
        state = lj.update(state, keys[:, :, 5:], value[:, :, 5:], 0)
        kept.append(stored(state))
    np.testing.assert_array_equal(kept[0][0], kept[1][0])
    assert kept[0][0].shape[1] == 13


@pytest.mark.parametrize("codec", EVERY.values(), ids=EVERY)
def test_what_is_quantized_is_never_quantized_again(codec):
    """Later tokens, loud ones too, leave the stored bits of earlier ones alone."""
    key, value = tokens(7, 1, 40, H, D, D)
    state = make(lj.Static(40, codec), batch=1, heads=H, dim=D, value_dim=D)
    state = lj.update(state, key[:, :, :20], value[:, :, :20], 0)
    settled = int(state.layers[0].packing.flushed(jnp.int32(20)))
    assert settled >= 16

    def packed(state):
        layer = state.layers[0]
        cut = lambda leaf: np.asarray(leaf[:, :, : settled * leaf.shape[2] // layer.num_slots])  # noqa: E731
        return jax.tree.map(cut, (layer.key, layer.value))

    before = packed(state)
    for step in range(20, 40):
        new = (x[:, :, step : step + 1] * np.float32(1000) for x in (key, value))
        state = lj.update(state, *new, 0)
    jax.tree.map(np.testing.assert_array_equal, packed(state), before)


LOUD = {
    "all": np.ones((24, D)),
    "alternating": np.ones((24, D)) * np.where(np.arange(D) % 2, -1, 1),
    "alternating tokens": np.ones((24, D)) * np.where(np.arange(24) % 2, -1, 1)[:, None],
    "random": np.random.default_rng(0).uniform(-1, 1, (24, D)),
    "one": np.eye(24, D),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", EVERY)
def test_the_largest_numbers_saturate(name, dtype):
    """Finite tokens stay finite, and near: a rounded code times its scale may pass the largest."""
    codec, top = EVERY[name], np.asarray(jnp.finfo(dtype).max).astype(np.float64)
    query = np.random.default_rng(3).standard_normal((1, 2 * H, 1, D)) / top
    query = jnp.asarray(query, jnp.float32)
    for pattern, part in ((x, part) for x in LOUD.values() for part in (1, -1, 0.55)):
        sent = jnp.asarray((pattern * (part * top)).astype(dtype))
        key = jnp.broadcast_to(sent, (1, H, *sent.shape))
        state = _fill(codec, key, key)
        *got, valid = lj.get(state, 0)
        for ours in got:
            ours = np.asarray(ours, np.float64)
            assert np.isfinite(ours).all()
            # Rotated, a number may grow by the root of the width, and has to be cut.
            if "rotated" not in name or dtype == jnp.float16:
                assert np.abs(ours - np.asarray(sent, np.float64)).max() <= 0.2 * top
        # One token has all the weight: a sum of several may pass the largest number by itself.
        mask = np.arange(24) == 3
        out = lj.attend(state, query, 0, mask=mask)
        assert np.isfinite(out).all()
        keys, values = (x.astype(jnp.float32) for x in got)
        expected = dot_product(query, keys, values, mask=valid & mask)
        np.testing.assert_allclose(out, expected, rtol=1e-2, atol=1e-2 * top)


# --- tokens as they are ----------------------------------------------------------------------------

IDENTITY, BITS = lj.codecs.Identity(), lj.codecs.Bits()
NARROW = [jnp.bfloat16, jnp.float16]


def _leaf_dtypes(codec, dtype):
    return {leaf.dtype.name for leaf in jax.tree.leaves(make(
        lj.Static(4, codec), dtype=dtype).layers[0]) if leaf.ndim >= 3}  # fmt: skip


def test_a_leaf_has_its_tokens_dtype():
    """Unless the codec has codes and scales of its own, or `Bits` was asked for."""
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8, jnp.int32):
        assert _leaf_dtypes(IDENTITY, dtype) == {jnp.dtype(dtype).name}
    for dtype in (jnp.float32, jnp.int32):
        assert _leaf_dtypes(BITS, dtype) == {jnp.dtype(dtype).name}
    assert {name for dtype in NARROW for name in _leaf_dtypes(BITS, dtype)} == {"uint16"}
    assert _leaf_dtypes(INT8(), jnp.bfloat16) == {"int8", "float32"}
    assert _leaf_dtypes(FP8(), jnp.bfloat16) == {"uint8", "float32"}
    assert _leaf_dtypes(INT4(), jnp.bfloat16) == {"uint8", "uint16"}
    assert _leaf_dtypes(KIVI(), jnp.bfloat16) == {"uint8", "uint16"}


@pytest.mark.parametrize("dtype", [*NARROW, jnp.float32])
@pytest.mark.parametrize("layout", ["static", "sliding"])
def test_bits_are_identity_in_every_value_seen(layout, dtype):
    """Any bits at all: what `get` and `attend` give, and the bytes reserved. A NaN is a NaN."""
    bits = np.random.default_rng(0).bytes(2 * H * 9 * 4 * jnp.dtype(dtype).itemsize)
    new = jnp.asarray(np.frombuffer(bits, dtype).reshape(2, H, 9, 4))
    new = new.at[0, 0, :2, 0].set(jnp.array([jnp.nan, -0.0], dtype))
    tame = jnp.asarray(tokens(0, 2, 9, value_dim=4)[0], dtype)
    gets, outs = [], []
    for codec in (IDENTITY, BITS):
        spec = lj.Static(12, codec) if layout == "static" else lj.Sliding(5, 1, 3, codec)
        empty = make(spec, dtype=dtype, value_dim=4)
        state = lj.rollback(lj.update(empty, new, tame, 0), 1)
        got = [np.asarray(x, np.float32) for x in lj.get(state, 0)]
        gets.append([np.where(np.isnan(x), np.nan, x).view(np.uint32) for x in got])
        state = lj.update(empty, tame, tame, 0)
        outs.append([lj.attend(state, queries(0, 2, 2), 0), lj.nbytes(state)])
    for one, other in zip(*gets, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(outs[0][0], outs[1][0])
    assert outs[0][1] == outs[1][1]


def test_the_default_appends_in_place_and_init_cache_never_chooses_it():
    """On CPU narrow floats become bits, elsewhere and otherwise tokens stay as they are."""
    on_cpu = jax.default_backend() == "cpu"
    for dtype in NARROW:
        assert default_codec(dtype) == (BITS if on_cpu else IDENTITY)
        assert make(lj.Static(4), dtype=dtype).layers[0].packing.codec == IDENTITY
    assert default_codec(jnp.float32) == default_codec(jnp.int8) == IDENTITY


@pytest.mark.parametrize("one, other", [(IDENTITY, BITS), (BITS, IDENTITY)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_rows_go_from_bits_to_identity_and_back(one, other, dtype):
    """`insert` and `concat` take either, and keep the codec of the first."""
    key, value = (jnp.asarray(x, dtype) for x in tokens(0, 1, 5))
    states = [
        lj.update(make(lj.Static(8, codec), batch=1, dtype=dtype, ragged=True), key, value, 0)
        for codec in (one, other)
    ]
    joined = lj.concat(states)
    assert joined.layers[0].spec == lj.Static(8, one)
    assert jax.tree.structure(joined) == jax.tree.structure(states[0])
    assert_same(lj.extract(joined, 0), lj.extract(joined, 1))
    empty = make(lj.Static(9, one), batch=3, dtype=dtype, ragged=True)
    for call in (lj.insert, jax.jit(lj.insert, static_argnums=1)):
        inserted = call(empty, (2,), states[1])
        assert jax.tree.structure(inserted) == jax.tree.structure(empty)
        np.testing.assert_array_equal(lj.get(inserted, 0)[0][2, :, :5], key[0])


# --- gradients -------------------------------------------------------------------------------------

TRAINABLE = {name: codec for name, codec in EVERY.items() if name != "bits"}


@pytest.mark.parametrize("name", TRAINABLE)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_simulated_tokens_are_those_of_the_codec(name, dtype):
    """`get` gives the same numbers, rolled back and gone on too; attention agrees."""
    codec = TRAINABLE[name]
    key, value = (jnp.asarray(x, dtype) for x in tokens(2, 2, 30, H, D, D))
    query = np.random.default_rng(3).standard_normal((2, 2 * H, 1, D)).astype(np.float32)
    gets, outs = [], []
    for one in (codec, SIMULATED(codec)):
        state = lj.rollback(_fill(one, key, value), 3)
        state = lj.update(state, key[:, :, :2], value[:, :, :2], 0)
        gets.append([np.asarray(x, np.float32) for x in lj.get(state, 0)])
        outs.append(lj.attend(state, query, 0))
    for ours, simulated in zip(*gets, strict=True):
        # A product with a matrix rounds as its shape makes it.
        np.testing.assert_allclose(ours, simulated, rtol=0, atol=2e-6 if "rotated" in name else 0)
    close = 2e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(*outs, rtol=close, atol=close)


@pytest.mark.parametrize("codec", TRAINABLE.values(), ids=TRAINABLE)
def test_gradients_of_queries_through_packed_data(codec):
    """Tokens are constants there: gradients are those of attention over what `get` gives."""
    key, value = tokens(2, 2, 30, H, D, D)
    query = np.random.default_rng(3).standard_normal((2, 2 * H, 1, D)).astype(np.float32)
    state = _fill(codec, key, value)
    keys, values, valid = lj.get(state, 0)
    weight = jnp.asarray(np.random.default_rng(4).standard_normal(query.shape, np.float32))
    ours = jax.grad(lambda q: jnp.sum(weight * lj.attend(state, q, 0)))(jnp.asarray(query))
    dense = jax.grad(lambda q: jnp.sum(weight * dot_product(q, keys, values, mask=valid)))
    np.testing.assert_allclose(ours, dense(jnp.asarray(query)), rtol=2e-5, atol=2e-5)


def test_places_refuse_gradients_too():
    """A token that replaces another one goes through the same door."""
    key, value = tokens(2, 1, 2, H, D, D)
    state = make(lj.Static(4, INT8()), batch=1, heads=H, dim=D, value_dim=D)
    with pytest.raises(TypeError, match=r"codecs\.Simulated\(Int8"):
        jax.grad(lambda k: lj.get(lj.update(state, k, value, 0, [0, 1]), 0)[0].sum())(key)


@pytest.mark.parametrize("ragged", [False, True], ids=["aligned", "ragged"])
@pytest.mark.parametrize("spec", [lj.Static(24), lj.Sliding(9)], ids=["static", "sliding"])
def test_gradients_go_through_simulated_groups(spec, ragged):
    """Of a compiled step that completes several, which codes are stored for one after the other."""
    codec = SIMULATED(KIVI(group=4, residual=3))
    state = make(spec.but(codec=codec), batch=2, heads=H, dim=D, value_dim=D, ragged=ragged)

    def loss(key, value):
        got = lj.get(lj.update(state, key, value, 0), 0)
        return sum(jnp.sum(x[:, :, :9]) for x in got[:2])

    gradients = jax.jit(jax.grad(loss, (0, 1)))(*tokens(0, 2, 9, H, D, D))
    for gradient in gradients:
        np.testing.assert_allclose(gradient, jnp.ones_like(gradient), atol=1e-6)


# --- dtypes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["static", "sliding"])
@pytest.mark.parametrize(
    "codec", [IDENTITY, *EVERY.values(), SIMULATED(INT8())], ids=["identity", *EVERY, "simulated"]
)
def test_astype_converts_tokens_and_leaves_codes_alone(codec, layout):
    """What is read is what was read, rounded; and tokens of the new dtype go on from there."""
    spec = lj.Static(40, codec) if layout == "static" else lj.Sliding(20, 2, 3, codec)
    key, value = tokens(2, 2, 30, H, D, D)
    state = lj.update(make(spec, heads=H, dim=D, value_dim=D), key, value, 0)
    narrow = lj.astype(state, jnp.bfloat16)
    for ours, before in zip(lj.get(narrow, 0), lj.get(state, 0), strict=True):
        expected = before.astype(jnp.bfloat16) if before.dtype == jnp.float32 else before
        np.testing.assert_array_equal(ours.astype(jnp.float32), expected.astype(jnp.float32))
    like = make(spec, heads=H, dim=D, value_dim=D, dtype=jnp.bfloat16)
    assert jax.tree.structure(narrow) == jax.tree.structure(like)
    assert [x.dtype for x in jax.tree.leaves(narrow)] == [x.dtype for x in jax.tree.leaves(like)]
    assert_same(jax.jit(lambda s: lj.astype(s, "bfloat16"))(state), narrow)
    wide = lj.astype(narrow, jnp.float32)
    assert_same(lj.astype(wide, jnp.bfloat16), narrow)
    new = (jnp.asarray(x[:, :, :2], jnp.bfloat16) for x in (key, value))
    gone_on = lj.update(narrow, *new, 0)
    assert lj.seq_length(gone_on) == min(32, lj.capacity(gone_on))
    assert np.isfinite(lj.attend(gone_on, queries(0, 2, 2, 2 * H, D), 0)).all()


@pytest.mark.parametrize("codec", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("only_floats", [False, True])
def test_what_tree_map_has_converted_says_so(codec, only_floats):
    """At the next update, read or attention, eager or traced, naming the fix."""
    state = make(lj.Static(8, codec))
    new = [jnp.asarray(x, jnp.float32) for x in tokens(0, 2, 1)]

    def cast(leaf):
        keep = only_floats and not jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf if keep else leaf.astype(jnp.float16)

    cast_state = jax.tree.map(cast, state)
    if all(a is b for a, b in zip(*map(jax.tree.leaves, (state, cast_state)), strict=True)):
        assert only_floats  # codes and integers only: there was nothing to convert
        return
    for use in (
        lambda s: lj.update(s, *new, 0),
        jax.jit(lambda s: lj.update(s, *new, 0)),
        lambda s: lj.get(s, 0),
        lambda s: lj.attend(s, queries(0, 2, 1), 0),
        lambda s: lj.astype(s, jnp.float16),
    ):
        with pytest.raises(TypeError, match=r"float16.*lucid_jax\.astype\(state, dtype\)"):
            use(cast_state)


@pytest.mark.parametrize("codec", [IDENTITY, BITS], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8, jnp.uint4, bool])
def test_narrower_tokens_are_stored_too(codec, dtype, tmp_path):
    """Bit for bit, through a ring that wraps and, but for four bits, a file."""
    key, value = (jnp.asarray(3 * x).astype(dtype) for x in tokens(0, 2, 9))
    state = make(lj.Sliding(5, 1, 1, codec), dtype=dtype)
    for part in (slice(0, 4), slice(4, 5), slice(5, 9)):
        state = lj.update(state, key[:, :, part], value[:, :, part], 0)
    kept = np.array([0, 4, 5, 6, 7, 8])
    for ours, sent in zip(lj.get(state, 0), (key, value), strict=False):
        assert ours.dtype == dtype
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(sent)[:, :, kept])
    assert np.isfinite(lj.attend(state, queries(0, 2, 2), 0)).all()
    if jnp.dtype(dtype).name.startswith("float8"):
        lj.save(tmp_path / "state", state)
        assert_same(lj.load(tmp_path / "state"), state)


@pytest.mark.parametrize("convert", [False, True], ids=["init_cache", "astype"])
@pytest.mark.parametrize(
    ("dtype", "says"),
    [
        (jnp.complex64, "got complex64; store real and imaginary parts"),
        (jnp.float4_e2m1fn, r"one of float8_e4m3fn, .*got float4_e2m1fn; .*codecs\.Int4"),
        (jnp.float8_e8m0fnu, "got float8_e8m0fnu"),
        ("S3", "got"),
    ],
    ids=str,
)
def test_dtypes_that_caches_do_not_hold_are_refused(dtype, says, convert):
    """With what they hold; XLA would fail, abort, or cannot say zero in them."""
    with pytest.raises(TypeError, match=says):
        lj.astype(make(), dtype) if convert else make(dtype=dtype)
    if convert:
        with pytest.raises(TypeError, match="quantizes floating-point"):
            lj.astype(make(lj.Static(8, INT8())), jnp.int32)
        with pytest.raises(TypeError, match="takes a CacheState, got list"):
            lj.astype([make()], dtype)
