"""Codecs: what a token costs and how far it comes back changed; attention on packed data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lucid_jax as lj
from lucid_jax.attention.dense import dot_product
from lucid_jax.cache.forms import hadamard
from tests.helpers import make, stored, tokens

INT8, INT4, FP8, KIVI = (
    lj.codecs.Int8, lj.codecs.Int4, lj.codecs.Float8, lj.codecs.KIVI,
)  # fmt: skip
H, D = 2, 32
EVERY = {
    "int8": INT8(), "int8-rotated": INT8(rotate=True), "fp8": FP8(), "fp8-rotated": FP8(rotate=True),
    "int4": INT4(), "int4-8": INT4(group=8), "int4-rotated": INT4(rotate=True),
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
        return run.lower(state, query).compile().memory_analysis().temp_size_in_bytes

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
        [INT4(128), KIVI(group=64, residual=1), INT4(128, rotate=True)], outliers=True
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
    ],
    ids=range(8),
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


@pytest.mark.parametrize("codec", [INT4(), KIVI(group=4, residual=1)], ids=["int4", "kivi"])
def test_the_largest_float16_stays_finite(codec):
    """An offset rounded to bfloat16 may pass what float16 can say."""
    key = jnp.full((1, H, 12, D), -65504, jnp.float16)
    assert np.isfinite(np.asarray(lj.get(_fill(codec, key, key), 0)[0], np.float32)).all()
