"""The stateful caches of every layout and codec: sliding, quantized, from specs, to and from states."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lucid_jax as lj
import lucid_jax.nn as nn
from lucid_jax.cache.tokens import TokenLayer
from lucid_jax.cache.update import _append_fitting, update_layer
from lucid_jax.nn.stored_tokens import _decoded, _enough
from tests.helpers import USERS_XLA
from tests.test_wrapper import assert_contents, contents, kv, refused

B, H, D = 2, 2, 8
CODECS = {
    "int8": lj.codecs.Int8(),
    "fp8": lj.codecs.Float8(rotate=True),
    "int4": lj.codecs.Int4(group=4),
    "kivi": lj.codecs.KIVI(group=4, residual=3, channels=4),
}
LAYOUTS = {
    "static": (lambda codec: nn.StaticKVCache(40, 2, codec=codec), lj.Static(40)),
    "dynamic": (lambda codec: nn.DynamicKVCache(codec=codec), lj.Dynamic()),
    "sliding": (lambda codec: nn.SlidingKVCache(8, 2, 2, codec=codec), lj.Sliding(8, 2, 2)),
}


def tokens(count, seed=0, batch=B):
    """Keys and values (B, H, count, D)."""
    return tuple(jnp.asarray(x) for x in kv(count, seed, batch=batch, heads=H, dim=D))


def pure(spec, codec, batch=B):
    """A pure state of one layer."""
    spec = spec if codec is None else dataclasses.replace(spec, codec=codec)
    return lj.init_cache(spec, num_layers=1, batch_size=batch, num_kv_heads=H, head_dim=D)


def assert_stores(pair, state):
    """A pair is exactly what `get` of a pure state marks as valid."""
    keys, values, valid = lj.get(state, 0)
    for have, want in zip(pair, (keys, values), strict=True):
        assert isinstance(have, jax.Array)
        np.testing.assert_array_equal(have, np.asarray(want)[:, :, np.asarray(valid)])


# --- every layout and codec ----------------------------------------------------------------------


@pytest.mark.parametrize("codec", [None, *CODECS])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_update_returns_what_the_pure_cache_stores(layout, codec):
    """Oldest first and decoded, chunk by chunk, after crop, rollback and beams too."""
    make, spec = LAYOUTS[layout]
    cache, state = make(CODECS.get(codec)), pure(spec, CODECS.get(codec))
    for seed, count in enumerate((1, 5, 2, 9, 1, 1)):
        new = tokens(count, seed)
        state = lj.update(state, *new, 0)
        assert_stores(cache.update(*new, 0), state)
        assert cache.get_seq_length(0) == int(lj.seq_length(state))
        assert cache.positions(2).tolist() == lj.positions(state, 2).tolist()
        np.testing.assert_array_equal(cache.valid(0), lj.valid(state))
    np.testing.assert_array_equal(cache.attend(new[0], 0), lj.attend(state, new[0], 0))
    cache.rollback(1)
    cache.crop(5)
    cache.reorder_cache([1, 0])
    cache.batch_repeat_interleave(2)
    state = lj.repeat_interleave(lj.reorder(lj.crop(lj.rollback(state, 1), 5), [1, 0]), 2)
    assert_stores(cache.get(0), state)
    new = tokens(3, 9, batch=2 * B)
    query = tokens(3, 10, batch=2 * B)[0]
    out, state = lj.extend(state, query, *new, 0)
    np.testing.assert_array_equal(cache.extend(query, *new, 0), out)
    assert_stores(cache.get(0), state)
    assert cache.get(1) is None
    cache.reset()
    assert cache.get(0) is None
    assert_stores(
        cache.update(*tokens(2), 0), lj.update(pure(spec, CODECS.get(codec)), *tokens(2), 0)
    )


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_step_compiles(layout, codec, compilations):
    """Decoding what is stored is one program for each power of two."""
    cache = LAYOUTS[layout][0](CODECS[codec])
    new = [np.asarray(x) for x in tokens(1)]
    cache.update(*new, 0)
    before = compilations()
    for _ in range(30):
        cache.update(*new, 0)
    assert compilations() == before


def test_only_the_tokens_stored_are_decoded():
    """A large static cache is not decoded whole at each step."""
    cache = nn.StaticKVCache(4096, 1, codec=CODECS["int8"])
    new = tokens(3)
    cache.update(*new, 0)
    layer = cache._layer(0)
    assert _enough(layer, 3).slots == 64
    assert _decoded(layer, _enough(layer, 3))[0].shape == (B, H, 64, D)
    assert _enough(layer, 65).slots == 128
    assert _enough(layer, 4000) == layer.layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_narrow_floats_are_stored_as_bits_unless_a_codec_is_named(layout):
    """On CPU, so that appends are in place; what comes back is the tokens' dtype."""
    make, _ = LAYOUTS[layout]
    new = tuple(x.astype(jnp.bfloat16) for x in tokens(3))
    for codec, dtype in ((None, jnp.uint16), (lj.codecs.Identity(), jnp.bfloat16)):
        cache = make(codec)
        keys, _ = cache.update(*new, 0)
        assert cache._layer(0).key.dtype == dtype
        assert keys.dtype == jnp.bfloat16
        np.testing.assert_array_equal(keys, new[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_no_codec_is_refused(layout):
    """When the cache is made, not when it is used."""
    with pytest.raises(TypeError, match=r"codecs\.Int8\(\)"):
        LAYOUTS[layout][0](lj.Int8)


def test_a_codec_refuses_integers_and_leaves_the_cache_as_it_was():
    """They cannot be quantized."""
    cache = nn.DynamicKVCache(codec=CODECS["int8"])
    with refused(cache, TypeError, match="quantizes floating-point"):
        cache.update(np.ones((B, H, 1, D), np.int32), np.ones((B, H, 1, D), np.int32), 0)


# --- the sliding cache ---------------------------------------------------------------------------


def test_a_sliding_cache_keeps_sinks_and_window():
    """`get_max_cache_shape` is what it holds at most."""
    cache = nn.SlidingKVCache(4, sinks=1)
    assert cache.get_max_cache_shape() == 5
    assert nn.SlidingKVCache(window=3).get_max_cache_shape() == 3
    key, value = tokens(9)
    for end in range(1, 10):
        keys, values = cache.update(key[:, :, end - 1 : end], value[:, :, end - 1 : end], 0)
        kept = [0, *range(max(1, end - 4), end)]
        np.testing.assert_array_equal(keys, np.asarray(key)[:, :, kept])
        np.testing.assert_array_equal(values, np.asarray(value)[:, :, kept])
    assert cache.positions(1).tolist() == [9]


@pytest.mark.parametrize(("window", "sinks", "slack"), [(0, 0, 0), (2, -1, 0), (2, 0, -1)])
def test_a_sliding_cache_needs_sensible_sizes(window, sinks, slack):
    """As `lucid_jax.Sliding`."""
    with pytest.raises(ValueError, match="Sliding"):
        nn.SlidingKVCache(window, sinks, slack)


def test_a_sliding_cache_rolls_back_its_slack():
    """And no more, once it has wrapped; the cache is then as it was."""
    cache = nn.SlidingKVCache(4, sinks=1, slack=2)
    key, value = tokens(12)
    cache.update(key[:, :, :10], value[:, :, :10], 0)
    want = contents(cache)
    cache.update(key[:, :, 10:], value[:, :, 10:], 0)
    with refused(cache, ValueError, match="slack"):
        cache.rollback(3)
    cache.rollback(2)
    assert_contents(cache, want)


def test_long_chunks_extend_a_ring_as_one_by_one():
    """A chunk longer than the window, where store and attend refuse."""
    key, value = tokens(20)
    query = tokens(20, 1)[0]
    one, whole = nn.SlidingKVCache(4, sinks=1), nn.SlidingKVCache(4, sinks=1)
    outs = [one.extend(*(x[:, :, i : i + 1] for x in (query, key, value)), 0) for i in range(20)]
    out = whole.extend(query, key, value, 0)
    np.testing.assert_allclose(out, np.concatenate(outs, axis=2), rtol=1e-5, atol=1e-5)
    assert_contents(whole, contents(one))
    with pytest.raises(ValueError, match="call extend"):
        whole.attend(query, 0)


@pytest.mark.parametrize("split", [(20,), (7, 1, 12), (1,) * 20], ids=str)
def test_attention_with_a_sliding_cache_is_that_with_a_pure_one(split):
    """`MultiHeadAttention` takes chunks of any length."""
    attention = nn.MultiHeadAttention(16, 4, 2, rope_theta=100.0, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 20, 16), np.float32))
    cache = nn.SlidingKVCache(4, sinks=1)
    state = lj.init_cache(
        lj.Sliding(4, sinks=1), num_layers=1, batch_size=1, num_kv_heads=2, head_dim=4
    )
    want, _ = attention(x, cache=state)
    outs, begin = [], 0
    for count in split:
        outs.append(attention(x[:, begin : begin + count], cache=cache))
        begin += count
    np.testing.assert_allclose(np.concatenate(outs, axis=1), want, rtol=1e-5, atol=1e-5)


def test_cross_attention_needs_every_token():
    """A sliding cache for the encoder's keys is refused, and nothing stored."""
    attention = nn.MultiHeadAttention(16, 4, 2, rngs=nnx.Rngs(0))
    x = jnp.ones((1, 3, 16))
    cache = nn.EncoderDecoderCache(None, nn.SlidingKVCache(4))
    with pytest.raises(ValueError, match="every token of the encoder"):
        attention(x, cache=cache, encoder_hidden=x, is_cross_attention=True)
    assert cache.get(0, is_cross_attention=True) is None
    assert cache.is_updated == {}


# --- from specs ----------------------------------------------------------------------------------

SPECS = {
    "static": lj.Static(16),
    "dynamic": lj.Dynamic(),
    "sliding": lj.Sliding(4, sinks=1),
    "int8": lj.Static(16, codec=CODECS["int8"]),
    "mixed": [lj.Sliding(4), lj.Static(16, codec=CODECS["int4"])],
    "shared": [lj.Static(16), lj.Shared(0)],
}


def from_spec(spec, **changes):
    """A cache of two layers."""
    sizes = {"num_layers": 2, "batch_size": B, "num_kv_heads": H, "head_dim": D, **changes}
    return nn.KVCache.from_spec(spec, **sizes)


@pytest.mark.parametrize("spec", SPECS)
def test_from_spec_allocates_at_once(spec):
    """Every layer is there and empty; updates change no structure and do what a pure cache does."""
    cache = from_spec(SPECS[spec])
    assert isinstance(cache, nn.KVCache)
    before = jax.tree.structure(cache)
    state = lj.init_cache(SPECS[spec], num_layers=2, batch_size=B, num_kv_heads=H, head_dim=D)
    for layer in range(2):
        assert cache.get_seq_length(layer) == 0
        assert cache.get(layer)[0].shape == (B, H, 0, D)
    for layer in range(2):
        if cache.owns(layer):
            new = tokens(7, layer)
            cache.store(*new, layer)
            state = lj.update(state, *new, layer)
    for layer in range(2):
        keys, _, valid = lj.get(state, layer)
        np.testing.assert_array_equal(
            cache.get(layer)[0], np.asarray(keys)[:, :, np.asarray(valid)]
        )
    assert jax.tree.structure(cache) == before
    cache.reset()
    assert jax.tree.structure(cache) == before
    assert [cache.get_seq_length(layer) for layer in range(2)] == [0, 0]
    assert cache.positions(1).tolist() == [0]


@pytest.mark.parametrize(
    ("spec", "shape"),
    [("static", 16), ("dynamic", None), ("sliding", 5), ("mixed", 16), ("shared", 16)],
)
def test_max_cache_shape_of_specs(spec, shape):
    """The most any layer holds, None if one grows."""
    assert from_spec(SPECS[spec]).get_max_cache_shape() == shape


def test_sizes_may_differ_by_layer_and_for_values():
    """As `init_cache` takes them."""
    cache = nn.KVCache.from_spec(
        [lj.Static(8)] * 2, batch_size=1, num_kv_heads=[1, 2], head_dim=[4, 8],
        value_head_dim=[2, 8], dtype=jnp.float16,
    )  # fmt: skip
    key, value = np.ones((1, 1, 3, 4), np.float16), np.ones((1, 1, 3, 2), np.float16)
    keys, values = cache.update(key, value, 0)
    assert (keys.shape, values.shape, keys.dtype) == ((1, 1, 3, 4), (1, 1, 3, 2), jnp.float16)
    with refused(cache, ValueError, match="equal shapes"):
        cache.update(np.ones((1, 2, 3, 8), np.float16), np.ones((1, 2, 3, 4), np.float16), 1)
    with refused(cache, ValueError, match="head_dim=2"):
        cache.update(key, key, 0)


def test_from_spec_refuses_what_init_cache_refuses():
    """With its messages."""
    with pytest.raises(ValueError, match="num_layers is needed"):
        from_spec(lj.Static(8), num_layers=None)
    with pytest.raises(ValueError, match="2 specs"):
        from_spec([lj.Static(8)] * 2, num_layers=3)
    with pytest.raises(ValueError, match="batch_size"):
        from_spec(lj.Static(8), batch_size=0)


def test_a_shared_layer_reads_and_does_not_store():
    """Its writes are refused, naming the layer to update."""
    cache = from_spec(SPECS["shared"])
    new = tokens(3)
    with refused(cache, ValueError, match="update layer 0 only"):
        cache.update(*new, 1)
    cache.update(*new, 0)
    np.testing.assert_array_equal(cache.get(1)[0], new[0])
    np.testing.assert_array_equal(cache.attend(new[0], 1), cache.attend(new[0], 0))
    assert (cache.owns(0), cache.owns(1)) == (True, False)
    with pytest.raises(ValueError, match="num_layers=2"):
        cache.get(2)


@pytest.mark.parametrize("stateful", [True, False])
def test_attention_of_a_shared_layer(stateful):
    """The module asks only, at the positions that the other layer stored."""
    first, second = (
        nn.MultiHeadAttention(16, 4, 2, rope_theta=100.0, rngs=nnx.Rngs(seed)) for seed in (0, 1)
    )
    sizes = {"batch_size": 1, "num_kv_heads": 2, "head_dim": 4}
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 6, 16), np.float32))
    state = lj.init_cache(SPECS["shared"], **sizes)
    want, state = first(x, cache=state)
    want, state = second(want, cache=state, layer_idx=1)
    cache = nn.KVCache.from_spec(SPECS["shared"], **sizes) if stateful else None
    if cache is None:
        cache = nn.KVCache.from_state(lj.init_cache(SPECS["shared"], **sizes))
    outs = [
        second(first(x[:, i : i + 2], cache=cache), cache=cache, layer_idx=1) for i in (0, 2, 4)
    ]
    np.testing.assert_allclose(np.concatenate(outs, axis=1), want, rtol=1e-5, atol=1e-5)


# --- in flax's transforms ------------------------------------------------------------------------

STEPS = 5


def _appended(cache, new):
    cache.store(*(x[:, :, None] for x in new), 0)
    return cache.attend(new[0][:, :, None], 0)[:, :, 0]


def _by_fori_loop(cache, xs):
    def body(i, carry):
        cache, xs, out = carry
        new = tuple(x[i] for x in xs)
        return cache, xs, out.at[i].set(_appended(cache, new))

    return nnx.fori_loop(0, STEPS, body, (cache, xs, jnp.zeros((STEPS, B, H, D))))[2]


def _by_while_loop(cache, xs):
    def body(carry):
        i, cache, xs, out = carry
        new = tuple(jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for x in xs)
        return i + 1, cache, xs, out.at[i].set(_appended(cache, new))

    start = (jnp.int32(0), cache, xs, jnp.zeros((STEPS, B, H, D)))
    return nnx.while_loop(lambda carry: carry[0] < STEPS, body, start)[3]


def _by_scan(cache, xs):
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def steps(cache, new):
        return cache, _appended(cache, new)

    return steps(cache, xs)[1]


def _by_jit(cache, xs):
    step = nnx.jit(_appended)
    return jnp.stack([step(cache, tuple(x[i] for x in xs)) for i in range(STEPS)])


LOOPS = {"fori": _by_fori_loop, "while": _by_while_loop, "scan": _by_scan, "jit": _by_jit}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("spec", ["static", "sliding", "int8"])
def test_a_fresh_cache_is_carried_by_flax_loops(spec, loop):
    """The caller sees the tokens afterwards, and eager updates go on."""
    xs = tuple(jnp.moveaxis(x, 2, 0) for x in tokens(STEPS))
    eager = from_spec(SPECS[spec])
    want = jnp.stack([_appended(eager, tuple(x[i] for x in xs)) for i in range(STEPS)])
    cache = from_spec(SPECS[spec])
    out = LOOPS[loop](cache, xs)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    assert_contents(cache, contents(eager))
    for _ in range(2):
        cache.update(*tokens(1), 0)
        eager.update(*tokens(1), 0)
    assert_contents(cache, contents(eager))


# --- to and from pure states ---------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_states_go_to_and_fro(spec):
    """What is stored, the specs, what is shared; and neither is touched by the other's updates."""
    state = lj.init_cache(SPECS[spec], num_layers=2, batch_size=B, num_kv_heads=H, head_dim=D)
    state = lj.update(state, *tokens(6), 0)
    kept = [np.asarray(x) for x in jax.tree.leaves(state)]
    cache = nn.KVCache.from_state(state)
    back = cache.to_state()
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for x, y in zip(jax.tree.leaves(back), kept, strict=True):
        np.testing.assert_array_equal(x, y)
    cache.update(*tokens(2, 1), 0)
    cache.update(*tokens(2, 1), 0)
    want = lj.update(lj.update(state, *tokens(2, 1), 0), *tokens(2, 1), 0)
    assert_contents(cache, contents(nn.KVCache.from_state(want)))
    for unchanged in (state, back):
        for x, y in zip(jax.tree.leaves(unchanged), kept, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_documented_caches_become_states(layout):
    """Where every layer was written; otherwise its sizes are not known."""
    make, spec = LAYOUTS[layout]
    cache = make(None)
    with pytest.raises(ValueError, match=r"from_spec"):
        cache.to_state()
    cache.update(*tokens(4), 1)
    with pytest.raises(ValueError, match=r"layers \[0\] of 2"):
        cache.to_state()
    cache.update(*tokens(4), 0)
    state = cache.to_state()
    assert state.num_layers == 2
    assert state.layers[0].spec == spec
    assert_stores(cache.get(0), state)


def test_a_ragged_state_is_refused():
    """`update` returns tokens of one length."""
    state = lj.init_cache(
        lj.Static(8), num_layers=1, batch_size=B, num_kv_heads=H, head_dim=D, ragged=True
    )
    with pytest.raises(ValueError, match="ragged"):
        nn.KVCache.from_state(state)
    with pytest.raises(TypeError, match="CacheState"):
        nn.KVCache.from_state(state.layers[0])


def test_encoder_decoder_states_go_to_and_fro():
    """Both parts, and which of the encoder's layers are there."""
    sizes = {"num_layers": 2, "batch_size": B, "num_kv_heads": H, "head_dim": D}
    encoder = lj.update(lj.init_cache(lj.Static(8), **sizes), *tokens(5), 0)
    decoder = lj.update(lj.init_cache(lj.Sliding(4), **sizes), *tokens(3, 1), 1)
    state = lj.EncoderDecoderState(decoder, encoder)
    cache = nn.EncoderDecoderCache.from_state(state)
    assert cache.is_updated == {0: True}
    assert cache.get_seq_length(1) == 3
    back = cache.to_state()
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(x, y)
    alone = nn.EncoderDecoderCache.from_state(state.replace(decoder=None))
    assert isinstance(alone.self_attention_cache, nn.DynamicKVCache)
    assert alone.to_state().decoder is None
    with pytest.raises(TypeError, match="EncoderDecoderState"):
        nn.EncoderDecoderCache.from_state(encoder)


# --- copies that share buffers -------------------------------------------------------------------


def _flattened(cache):
    leaves, treedef = jax.tree.flatten(cache)
    return jax.tree.unflatten(treedef, leaves)


SHARING = {
    "clone": nnx.clone,
    "tree.map": lambda cache: jax.tree.map(lambda x: x, cache),
    "merge": lambda cache: nnx.merge(*nnx.split(cache), copy=True),
    "flatten": _flattened,
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "state": lambda cache: nn.KVCache.from_state(cache.to_state()),
    "jax.jit": jax.jit(lambda cache: cache),
}

CHANGES = {
    "update": lambda cache: cache.update(*tokens(1, 5), 0),
    "store by place": lambda cache: cache.store(*tokens(1, 5), 0, 1),
    "grow": lambda cache: cache.update(*tokens(70, 5), 0),
    "extend": lambda cache: cache.extend(tokens(1, 6)[0], *tokens(1, 5), 0),
    "crop": lambda cache: cache.crop(2),
    "rollback": lambda cache: cache.rollback(1),
    "reorder": lambda cache: cache.reorder_cache([1, 0]),
    "fewer rows": lambda cache: cache.batch_select_indices([1]),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "reset": lambda cache: cache.reset(),
    "ensure_capacity": lambda cache: cache.ensure_capacity(100),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("share", SHARING)
def test_a_copy_and_its_original_go_their_own_ways(share, change):
    """Whatever either does, in whichever order, the other is as it was, and can go on."""
    for first in (0, 1):
        cache = nn.DynamicKVCache()
        cache.update(*tokens(3), 0)
        cache.update(*tokens(1, 1), 0)
        both = [cache, SHARING[share](cache)]
        both = both if first == 0 else both[::-1]
        before = contents(both[1])
        CHANGES[change](both[0])
        if change in ("update", "grow"):  # and once more, now in place
            both[0].update(*tokens(1, 7), 0)
        after = contents(both[0])
        assert_contents(both[1], before)
        for _ in range(2):
            both[1].update(*tokens(1, 8), 0)
        assert both[1].get_seq_length(0) == 6
        assert_contents(both[0], after)
        if both[0].get(0) is not None:
            both[0].update(*tokens(1, 9, batch=both[0].get(0)[0].shape[0]), 0)
        np.testing.assert_array_equal(both[1].get(0)[0][:, :, :3], tokens(3)[0])


def test_merge_without_copy_is_the_same_variable():
    """Flax merges the very variables that it split: both caches see every update, and none is lost."""
    cache = nn.DynamicKVCache()
    cache.update(*tokens(3), 0)
    twin = nnx.merge(*nnx.split(cache))
    for one in (cache, twin, cache):
        one.update(*tokens(1), 0)
        assert_contents(twin, contents(cache))
    assert twin.get_seq_length(0) == 6


def _pointers(cache):
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache._layer(0)) if x.ndim]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("share", ["clone", "tree.map", "to_state", "nnx.jit"])
def test_a_sole_owner_updates_in_place(layout, share):
    """Buffers stay where they are; where they may be shared one update copies, and the next do not."""
    cache = nn.StaticKVCache(40, 1) if layout == "static" else LAYOUTS[layout][0](None)
    cache.update(*tokens(3), 0)
    at = _pointers(cache)
    for _ in range(3):
        cache.update(*tokens(1), 0)
        cache.crop(8)
        cache.extend(tokens(1)[0], *tokens(1), 0)
    assert _pointers(cache) == at
    if share == "nnx.jit":
        nnx.jit(lambda cache, new: cache.store(*new, 0))(cache, tokens(1))
    elif share == "to_state":
        held = cache.to_state()
    else:
        held = SHARING[share](cache)
    at = _pointers(cache)
    cache.update(*tokens(1), 0)
    if share != "nnx.jit":
        assert not set(_pointers(cache)) & set(at)
        assert all(not x.is_deleted() for x in jax.tree.leaves(held))
    at = _pointers(cache)
    for _ in range(3):
        cache.update(*tokens(1), 0)
    assert _pointers(cache) == at


# --- many layers ---------------------------------------------------------------------------------


def test_a_layer_far_up_costs_what_one_costs():
    """Nothing is made for the layers below; past `MAX_LAYERS` an index is a mistake."""
    cache = nn.DynamicKVCache()
    cache.update(*tokens(1), 4000)
    assert len(jax.tree.leaves(cache)) == len(jax.tree.leaves(cache._layer(4000)))
    assert [i for i, x in enumerate(cache.key_cache) if x is not None] == [4000]
    assert len(cache.key_cache) == 4001
    for kind in (cache, nn.SlidingKVCache(4)):
        with refused(kind, ValueError, match="less than 4096"):
            kind.update(*tokens(1), 60_000)
    cache.update(*tokens(1), 2)
    cache.update(*tokens(1), 10)
    assert [i for i, x in enumerate(cache.value_cache) if x is not None] == [2, 10, 4000]
    twin = nnx.clone(cache)
    assert_contents(twin, contents(cache))
    cache.reset()
    assert cache.key_cache == []


# --- the host's part -----------------------------------------------------------------------------


def test_appends_do_not_ask_the_device(monkeypatch):
    """The host knows how much is stored; it asks once after others had the cache."""
    asked = []
    length_on_host = TokenLayer.length_on_host

    def ask(layer):
        asked.append(layer)
        return length_on_host(layer)

    monkeypatch.setattr(TokenLayer, "length_on_host", ask)
    cache = nn.DynamicKVCache()
    new = tokens(1)
    cache.store(*new, 0)
    cache.store(*new, 0)
    asked.clear()
    for _ in range(5):
        cache.store(*new, 0)
        cache.update(*new, 0)
    assert asked == []
    assert cache.get_seq_length(0) == 12
    nnx.jit(lambda cache, new: cache.store(*new, 0))(cache, new)
    assert cache.update(*new, 0)[0].shape[2] == 14
    assert asked != []
    with refused(cache, ValueError, match="equal shapes"):
        cache.update(new[0], new[0][:, :, :0], 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_append_is_cheap_enough_to_run_at_once(dtype):
    """XLA on CPU hands a program of 1,000 operations and more to another thread, and waits for it."""
    cache = nn.StaticKVCache(512, 1)
    new = [jnp.zeros((1, 8, 1, 64), dtype)] * 2
    cache.update(*new, 0)
    tokens = {"key": new[0], "value": new[1]}
    compiled = _append_fitting.lower(cache._layer(0), tokens).compile(USERS_XLA)
    if dtype == jnp.float32:  # a bitcast counts
        assert compiled.cost_analysis().get("flops", 0) < 1000
    assert compiled.memory_analysis().temp_size_in_bytes < 64_000  # and in place


def test_an_append_that_fits_is_what_any_append_is():
    """Bit for bit, counters too."""
    for codec in (None, *CODECS.values()):
        state = pure(lj.Static(40), codec)
        layer = state.layers[0]
        for seed, count in enumerate((3, 1, 4)):
            new = dict(zip(("key", "value"), tokens(count, seed), strict=True))
            want = update_layer(layer, new)
            length = int(layer.length)
            layer = update_layer(layer, new, donate=True, stored=length)
            for x, y in zip(jax.tree.leaves(layer), jax.tree.leaves(want), strict=True):
                np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("call", ["attend", "extend", "cross_attend"])
def test_the_log_sum_exp_comes_with_the_output(call):
    """`return_lse=True` as of the pure verbs, and tokens are stored once."""
    cache = nn.StaticKVCache(8, 1)
    key = jnp.ones((1, 2, 3, 4))
    if call == "attend":
        cache.update(key, key, 0)
    query = jnp.ones((1, 2, 3, 4))
    given = {"attend": (query, 0), "extend": (query, key, key, 0)}
    given["cross_attend"] = (query, (key, key), 0)
    out, lse = getattr(cache, call)(*given[call], return_lse=True)
    assert out.shape == query.shape and lse.shape == query.shape[:3]
    assert cache.get_seq_length(0) == 3
