"""`EncoderDecoderCache`: two caches behind one interface, the encoder's keys computed once."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lucid_jax as lj
import lucid_jax.nn as nn
from tests.test_wrapper import assert_contents, contents, kv

B, H, D = 2, 2, 4


def parts(cache):
    """What both caches show."""
    return (
        contents(cache.self_attention_cache),
        contents(cache.cross_attention_cache),
        cache.is_updated,
    )


@pytest.fixture
def cache():
    """Two layers; 3 self-attention tokens, 5 encoder tokens."""
    cache = nn.EncoderDecoderCache()
    for layer in range(2):
        cache.update(*kv(3, seed=layer), layer)
        cache.update(*kv(5, seed=layer + 10), layer, is_cross_attention=True)
    return cache


# --- the two caches ------------------------------------------------------------------------------


def test_both_caches_default_to_dynamic():
    """Two of them, not one twice."""
    cache = nn.EncoderDecoderCache()
    assert type(cache.self_attention_cache) is nn.DynamicKVCache
    assert type(cache.cross_attention_cache) is nn.DynamicKVCache
    assert cache.self_attention_cache is not cache.cross_attention_cache
    assert cache.is_updated == {}
    assert cache.get(0) is None
    assert cache.get(0, is_cross_attention=True) is None
    assert cache.get_seq_length() == cache.get_seq_length(3, is_cross_attention=True) == 0


def test_given_caches_are_used():
    """Either may be given, by position or by name."""
    mine, other = nn.StaticKVCache(8, 1), nn.StaticKVCache(4, 1)
    cache = nn.EncoderDecoderCache(mine, other)
    assert cache.self_attention_cache is mine
    assert cache.cross_attention_cache is other
    cache = nn.EncoderDecoderCache(cross_attention_cache=other)
    assert type(cache.self_attention_cache) is nn.DynamicKVCache
    assert cache.cross_attention_cache is other


@pytest.mark.parametrize("name", ["self_attention_cache", "cross_attention_cache"])
@pytest.mark.parametrize("wrong", [nn.DynamicKVCache, "dynamic", nn.EncoderDecoderCache(), 8])
def test_other_types_are_refused(name, wrong):
    """A class, a name, a pair: the message says which argument."""
    with pytest.raises(TypeError, match=f"{name} must be a KVCache"):
        nn.EncoderDecoderCache(**{name: wrong})


def test_one_cache_cannot_be_both():
    """Encoder keys among the decoder's would be nonsense."""
    one = nn.DynamicKVCache()
    with pytest.raises(ValueError, match="two different caches"):
        nn.EncoderDecoderCache(one, one)


@pytest.mark.parametrize("bound", [None, 8])
def test_max_cache_shape_is_that_of_self_attention(bound):
    """The encoder's length says nothing about how far decoding may go."""
    own = None if bound is None else nn.StaticKVCache(bound, 1)
    cache = nn.EncoderDecoderCache(own, nn.StaticKVCache(4, 1))
    assert cache.get_max_cache_shape() == bound


def test_update_reaches_the_part_it_names(cache):
    """And returns, gets and measures that part."""
    key, value = kv(1, seed=7)
    keys, values = cache.update(key, value, 0)
    assert keys.shape == (B, H, 4, D)
    np.testing.assert_array_equal(values[:, :, 3:], value)
    keys, values = cache.update(key, value, 1, cache_position=2, is_cross_attention=True)
    assert keys.shape == (B, H, 5, D)
    np.testing.assert_array_equal(keys[:, :, 2:3], key)
    assert [cache.get_seq_length(i) for i in range(2)] == [4, 3]
    assert [cache.get_seq_length(i, is_cross_attention=True) for i in range(2)] == [5, 5]
    np.testing.assert_array_equal(cache.get(1, is_cross_attention=True)[1], values)
    assert cache.get(0)[0].shape == (B, H, 4, D)


def test_is_updated_is_set_by_a_cross_update_and_cleared_by_reset():
    """Layer by layer; self-attention does not count."""
    cache = nn.EncoderDecoderCache()
    cache.update(*kv(2), 0)
    assert cache.is_updated == {}
    assert not cache.is_updated.get(1, False)
    cache.update(*kv(2), 1, is_cross_attention=True)
    assert cache.is_updated == {1: True}
    assert isinstance(cache.is_updated, dict)
    cache.crop(1)
    assert cache.is_updated == {1: True}
    cache.reset()
    assert cache.is_updated == {}
    assert cache.get(0) is None
    assert cache.get(1, is_cross_attention=True) is None


def test_batch_operations_reach_both(cache):
    """Rows of the decoder and of its encoder stay together."""
    before = [np.asarray(cache.get(1, part)[0]) for part in (False, True)]
    cache.batch_repeat_interleave(2)
    cache.reorder_cache([3, 0, 0])
    cache.batch_select_indices([2, 1, 0])
    for part, old in zip((False, True), before, strict=True):
        np.testing.assert_array_equal(cache.get(1, part)[0], old[[0, 0, 1]])


def test_crop_reaches_both(cache):
    """As documented, the encoder's keys included."""
    before = [np.asarray(cache.get(0, part)[1]) for part in (False, True)]
    cache.crop(4)
    np.testing.assert_array_equal(cache.get(0)[1], before[0])
    np.testing.assert_array_equal(cache.get(0, True)[1], before[1][:, :, 1:])


def test_rollback_reaches_self_attention_only(cache):
    """Drafted tokens never entered the encoder's keys."""
    own, encoder, updated = parts(cache)
    cache.update(*kv(2, seed=9), 0)
    cache.update(*kv(2, seed=9), 1)
    cache.rollback(2)
    assert_contents(cache.self_attention_cache, own)
    assert_contents(cache.cross_attention_cache, encoder)
    assert cache.is_updated == updated


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (IndexError, lambda c: c.batch_select_indices([0, 2])),
        (IndexError, lambda c: c.reorder_cache([-1])),
        (TypeError, lambda c: c.reorder_cache([0.0])),
        (ValueError, lambda c: c.batch_select_indices([[0]])),
        (ValueError, lambda c: c.batch_repeat_interleave(0)),
        (ValueError, lambda c: c.crop(-1)),
        (TypeError, lambda c: c.crop(0.5)),
        (ValueError, lambda c: c.rollback(4)),
        (ValueError, lambda c: c.rollback(-1)),
        (ValueError, lambda c: c.update(*kv(1, heads=3), 0)),
        (ValueError, lambda c: c.update(*kv(1, batch=3), 1, is_cross_attention=True)),
        (ValueError, lambda c: c.update(*kv(1), -1, is_cross_attention=True)),
        (TypeError, lambda c: c.update(*kv(1), 0, 0.5, True)),
        (ValueError, lambda c: c.get(-1, is_cross_attention=True)),
        (ValueError, lambda c: c.get_seq_length(-1)),
    ],
)
def test_an_error_leaves_both_unchanged(cache, error, call):
    """What one part would refuse is done in neither."""
    own, encoder, updated = parts(cache)
    with pytest.raises(error):
        call(cache)
    assert_contents(cache.self_attention_cache, own)
    assert_contents(cache.cross_attention_cache, encoder)
    assert cache.is_updated == updated


def test_a_row_that_only_one_part_has_changes_neither():
    """Three decoder rows, two encoder rows."""
    cache = nn.EncoderDecoderCache()
    cache.update(*kv(2, batch=3), 0)
    cache.update(*kv(2), 0, is_cross_attention=True)
    own, encoder, _ = parts(cache)
    with pytest.raises(IndexError):
        cache.batch_select_indices([2])
    assert_contents(cache.self_attention_cache, own)
    assert_contents(cache.cross_attention_cache, encoder)


def test_encoder_keys_without_a_batch_axis_stop_both():
    """The part with rows is not touched either."""
    cache = nn.EncoderDecoderCache()
    cache.update(*kv(2), 0)
    cache.update(np.ones((3, D)), np.ones((3, D)), 0, is_cross_attention=True)
    own, encoder, _ = parts(cache)
    for call in (lambda: cache.reorder_cache([1, 0]), lambda: cache.batch_repeat_interleave(2)):
        with pytest.raises(ValueError, match="batch axis"):
            call()
        assert_contents(cache.self_attention_cache, own)
        assert_contents(cache.cross_attention_cache, encoder)


def test_inside_jit():
    """A cross update inside `nnx.jit` sets `is_updated` for the caller."""

    @nnx.jit
    def step(cache, own, encoder):
        cache.update(own, own, 0)
        if not cache.is_updated.get(0, False):
            cache.update(encoder, encoder, 0, is_cross_attention=True)

    cache = nn.EncoderDecoderCache()
    own, encoder = jnp.asarray(kv(1)[0]), jnp.asarray(kv(5)[0])
    for _ in range(3):
        step(cache, own, encoder)
    assert cache.is_updated == {0: True}
    assert cache.get_seq_length(0) == 3
    np.testing.assert_array_equal(cache.get(0, is_cross_attention=True)[0], encoder)


# --- through MultiHeadAttention ------------------------------------------------------------------


class Counted(nnx.Module):
    """A projection that counts its calls."""

    def __init__(self, inner):
        self.inner, self.calls = inner, 0

    def __call__(self, x):
        self.calls += 1
        return self.inner(x)


@pytest.fixture
def attention():
    """Cross-attention of width 16 to encoder states of width 12, its key projection counted."""
    attention = nn.MultiHeadAttention(
        16, 4, 2, kv_hidden_size=12, rope_theta=100.0, rngs=nnx.Rngs(0)
    )
    attention.k_proj = Counted(attention.k_proj)
    return attention


def _hidden(count, width=16, seed=0, batch=B):
    return jnp.asarray(
        np.random.default_rng(seed).standard_normal((batch, count, width), np.float32)
    )


def test_encoder_keys_are_computed_once(attention):
    """The second call uses what is stored, whatever encoder states it is given."""
    cache = nn.EncoderDecoderCache()
    encoder = _hidden(5, 12, seed=1)
    options = {"cache": cache, "is_cross_attention": True}
    want = attention(_hidden(3), encoder_hidden=encoder, is_cross_attention=True)
    assert attention.k_proj.calls == 1
    out = attention(_hidden(3), encoder_hidden=encoder, **options)
    assert attention.k_proj.calls == 2
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    for ignored in (encoder, encoder + 1, None):
        again = attention(_hidden(3), encoder_hidden=ignored, **options)
        np.testing.assert_array_equal(again, out)
    assert attention.k_proj.calls == 2
    cache.reset()
    other = attention(_hidden(3), encoder_hidden=encoder + 1, **options)
    assert attention.k_proj.calls == 3
    assert not np.allclose(other, out, atol=1e-3)


def test_each_layer_has_its_own_encoder_keys(attention):
    """Layer 1's are computed although layer 0's are there."""
    cache = nn.EncoderDecoderCache()
    for layer in range(2):
        for _ in range(2):
            attention(_hidden(1), encoder_hidden=_hidden(5, 12), cache=cache, layer_idx=layer,
                      is_cross_attention=True)  # fmt: skip
    assert attention.k_proj.calls == 2
    assert cache.is_updated == {0: True, 1: True}
    assert cache.get_seq_length(0) == 0


def test_a_decoder_with_both_attentions():
    """Token by token with one cache equals all at once with none."""
    own = nn.MultiHeadAttention(16, 4, 2, rope_theta=100.0, rngs=nnx.Rngs(1))
    cross = nn.MultiHeadAttention(16, 4, 2, kv_hidden_size=12, rngs=nnx.Rngs(2))
    hidden, encoder = _hidden(4), _hidden(5, 12, seed=1)
    middle = own(hidden)
    want = cross(middle, encoder_hidden=encoder, is_cross_attention=True)
    cache = nn.EncoderDecoderCache(nn.StaticKVCache(4, 1))
    for i in range(4):
        x = own(hidden[:, i : i + 1], cache=cache)
        x = cross(x, cache=cache, encoder_hidden=encoder, is_cross_attention=True)
        np.testing.assert_allclose(x, want[:, i : i + 1], rtol=1e-5, atol=1e-5)
    assert cache.get_seq_length(0) == 4
    assert cache.get_seq_length(0, is_cross_attention=True) == 5


def test_cross_attention_with_nothing_to_attend_to(attention):
    """No encoder states and none stored: said, not guessed."""
    cache = nn.EncoderDecoderCache()
    with pytest.raises(ValueError, match=r"encoder_hidden|holds nothing"):
        attention(_hidden(1), cache=cache, is_cross_attention=True)
    assert cache.is_updated == {}


# --- is_updated is an attribute to set -----------------------------------------------------------


def test_is_updated_is_a_dict_to_write_to():
    """Every way of changing a dict reaches the cache; a cross update sets it again."""
    cache = nn.EncoderDecoderCache()
    cache.update(*kv(2), 0, is_cross_attention=True)
    flags = cache.is_updated
    cache.is_updated[0] = False
    assert cache.is_updated == {0: False}
    flags[1] = True  # an older view keeps what came since
    assert cache.is_updated == flags == {0: False, 1: True}
    del cache.is_updated[1]
    cache.is_updated.update({2: True})
    assert cache.is_updated.pop(2) is True
    assert cache.is_updated.setdefault(3, True) is True
    assert cache.is_updated == {0: False, 3: True}
    cache.is_updated.clear()
    assert cache.is_updated == {}
    cache.is_updated = {1: True}
    assert nnx.clone(cache).is_updated == {1: True}
    cache.update(*kv(2), 0, is_cross_attention=True)
    assert cache.is_updated == {0: True, 1: True}
    assert cache.get_seq_length(0, is_cross_attention=True) == 4
    with pytest.raises(ValueError, match="layer_idx"):
        cache.is_updated[-1] = True
    assert cache.is_updated == {0: True, 1: True}


@pytest.mark.parametrize("kind", ["dynamic", "static", "spec"])
@pytest.mark.parametrize("compiled", [False, True])
def test_encoder_keys_are_replaced_where_is_updated_is_false(attention, kind, compiled):
    """Another source, of another length: its keys take the place of the old ones, in that layer."""
    make = {
        "dynamic": nn.DynamicKVCache,
        "static": lambda: nn.StaticKVCache(8, 2),
        "spec": lambda: nn.KVCache.from_spec(
            lj.Static(8), num_layers=2, batch_size=B, num_kv_heads=2, head_dim=4
        ),
    }
    cache = nn.EncoderDecoderCache(None, make[kind]())

    def call(attention, cache, encoder, layer):
        return attention(_hidden(3), encoder_hidden=encoder, cache=cache, layer_idx=layer,
                         is_cross_attention=True)  # fmt: skip

    run = nnx.jit(call, static_argnums=3) if compiled else call
    first, second = _hidden(5, 12, seed=1), _hidden(4, 12, seed=2)
    for layer in range(2):
        run(attention, cache, first, layer)
    old = np.asarray(cache.get(1, is_cross_attention=True)[0])
    cache.is_updated[0] = False
    out = run(attention, cache, second, 0)
    want = attention(_hidden(3), encoder_hidden=second, is_cross_attention=True)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    assert cache.is_updated == {0: True, 1: True}
    assert cache.get_seq_length(0, is_cross_attention=True) == 4
    np.testing.assert_array_equal(cache.get(1, is_cross_attention=True)[0], old)
    np.testing.assert_array_equal(run(attention, cache, first, 0), out)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_refused_cross_attention_stores_nothing(attention, replaced):
    """Neither where nothing was, nor where other keys are to be replaced."""
    cache = nn.EncoderDecoderCache()
    if replaced:
        attention(_hidden(3), encoder_hidden=_hidden(5, 12), cache=cache, is_cross_attention=True)
        cache.is_updated[0] = False
    before = contents(cache.cross_attention_cache)
    for options, error in (
        ({"mask": jnp.ones((B, 4, 3, 3), bool)}, ValueError),
        ({"mask": jnp.ones((1, 1, 1, 1))}, TypeError),
    ):
        with pytest.raises(error, match="mask"):
            attention(_hidden(3), encoder_hidden=_hidden(4, 12), cache=cache,
                      is_cross_attention=True, **options)  # fmt: skip
        assert_contents(cache.cross_attention_cache, before)
        assert not cache.is_updated.get(0, False)
