"""`MultiHeadAttention`: without a cache a plain softmax, with any cache the same numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lucid_jax as lj
import lucid_jax.nn as nn
from lucid_jax.attention.dense import dot_product
from lucid_jax.nn import rope
from tests.helpers import filled, make, queries, snapshot, tokens
from tests.test_wrapper import assert_contents, contents

B, T, WIDTH, HEAD = 2, 9, 16, 4
HEADS = {"MHA": (4, 4), "GQA": (4, 2), "MQA": (4, 1)}
SPLITS = [(1,) * 9, (5, 1, 3)]
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def hidden(count=T, seed=0, batch=B, width=WIDTH):
    """Random hidden states (B, T, width)."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((batch, count, width), np.float32))


def build(num_heads=4, num_kv_heads=2, seed=0, **options):
    """An attention module of width 16 with rotary positions."""
    options = {"rope_theta": 100.0, **options}
    return nn.MultiHeadAttention(WIDTH, num_heads, num_kv_heads, rngs=nnx.Rngs(seed), **options)


@nnx.jit
def whole(attention, x):
    """The module over all tokens at once, without a cache: one program instead of forty."""
    return attention(x)


def pure(attention, spec=None, **options):
    """An empty pure cache that fits the module."""
    return make(spec or lj.Static(16), batch=B, heads=attention.num_kv_heads,
                dim=attention.head_dim, value_dim=attention.head_dim, **options)  # fmt: skip


def chunks(split):
    """Slices of the sizes given, one after the other."""
    ends = np.cumsum(split).tolist()
    return [slice(end - size, end) for end, size in zip(ends, split, strict=True)]


def numpy_attention(attention, x, positions=None, source=None, window=None, softcap=None):
    """The textbook computation in float64, head by head; causal unless `source` is given."""

    def project(layer, y):
        out = y @ np.float64(layer.kernel[...])
        return out if layer.bias is None else out + np.float64(layer.bias[...])

    def rotate(y):  # [T, D]
        if attention.rope_theta is None or source is not None:
            return y
        half = attention.head_dim // 2
        angle = np.outer(places, attention.rope_theta ** (-np.arange(half) / half))
        z = (y[:, :half] + 1j * y[:, half:]) * np.exp(1j * angle)
        return np.concatenate([z.real, z.imag], axis=1)

    x = np.float64(x)
    other = x if source is None else np.float64(source)
    count, dim = x.shape[1], attention.head_dim
    places = np.arange(count) if positions is None else positions
    group = attention.num_heads // attention.num_kv_heads
    outs = []
    for row, other_row in zip(x, other, strict=True):
        query, key, value = (
            project(layer, y)
            for layer, y in ((attention.q_proj, row), (attention.k_proj, other_row),
                             (attention.v_proj, other_row))
        )  # fmt: skip
        heads = []
        for n in range(attention.num_heads):
            cut = slice(n // group * dim, (n // group + 1) * dim)
            scores = rotate(query[:, n * dim : (n + 1) * dim]) @ rotate(key[:, cut]).T / dim**0.5
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            if source is None:
                gap = np.arange(count)[:, None] - np.arange(count)
                scores[(gap < 0) | (gap >= (window or count))] = -np.inf
            weights = np.exp(scores - scores.max(1, keepdims=True))
            heads.append(weights / weights.sum(1, keepdims=True) @ value[:, cut])
        outs.append(project(attention.o_proj, np.concatenate(heads, axis=1)))
    return np.stack(outs)


# --- without a cache -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "options"),
    [(HEADS["GQA"], {}), (HEADS["MHA"], {"use_bias": True}), (HEADS["MQA"], {"head_dim": 6}),
     (HEADS["GQA"], {"rope_theta": None}), (HEADS["MQA"], {"window": 3, "softcap": 2.0})],
    ids=str,
)  # fmt: skip
def test_no_cache_is_the_textbook_computation(heads, options):
    """Causal softmax attention with grouped heads and rotary positions."""
    attention = build(*heads, **options)
    if options.get("use_bias"):
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            layer.bias[...] = jnp.linspace(-1, 1, layer.bias.shape[0])
    extra = {name: options[name] for name in ("window", "softcap") if name in options}
    close(whole(attention, hidden()), numpy_attention(attention, hidden(), **extra))


def test_scale_replaces_the_default():
    """1 / sqrt(head_dim) given by hand changes nothing, another scale does."""
    want = whole(build(), hidden())
    close(whole(build(scale=0.5), hidden()), want)
    assert not np.allclose(build(scale=1.0)(hidden()), want, atol=1e-3)


def test_positions_may_be_given():
    """They move the rotary positions, per row if 2-D; only differences matter."""
    attention = build()
    places = np.arange(T) * 2
    want = numpy_attention(attention, hidden(), positions=places)
    close(attention(hidden(), positions=jnp.asarray(places)), want)
    shifted = jnp.stack([jnp.asarray(places), jnp.asarray(places) + 5])
    close(attention(hidden(), positions=shifted), want)


def test_no_cache_cross_attention_sees_every_key():
    """Not causal, not rotated, from states of another width."""
    attention = build(kv_hidden_size=12)
    encoder = hidden(5, seed=1, width=12)
    out = attention(hidden(3), encoder_hidden=encoder, is_cross_attention=True)
    close(out, numpy_attention(attention, hidden(3), source=encoder))


def test_a_mask_and_a_bias_act_on_the_scores():
    """A hidden key has no influence; a bias of -1e9 hides as well."""
    attention = build()
    mask = jnp.ones((1, 1, T, T), bool).at[..., 2].set(False).at[:, :, 2, 2].set(True)
    changed = hidden().at[:, 2].set(7.0)
    rest = np.array([0, 1, 3, 4, 5, 6, 7, 8])
    out = attention(hidden(), mask=mask)
    close(attention(changed, mask=mask)[:, rest], out[:, rest])
    assert not np.allclose(attention(changed)[:, 3:], attention(hidden())[:, 3:], atol=1e-3)
    close(attention(hidden(), bias=jnp.where(mask, 0.0, -1e9)), out)


@pytest.mark.parametrize("options", [{}, {"window": 3, "softcap": 2.0}], ids=str)
def test_gradients_are_finite(options):
    """Also where a mask leaves a query nothing to see."""
    attention = build(**options)
    mask = jnp.ones((1, 1, T, T), bool).at[:, :, 0].set(False)

    @nnx.grad
    def gradients(attention):
        return jnp.sum(attention(hidden(), mask=mask) ** 2)

    leaves = jax.tree.leaves(gradients(attention))
    assert len(leaves) == 4
    for leaf in leaves:
        assert bool(jnp.all(jnp.isfinite(leaf)))
        assert bool(jnp.any(leaf != 0))


def test_dtypes():
    """Parameters in one dtype, the computation in another."""
    attention = build(dtype=jnp.bfloat16)
    assert attention.q_proj.kernel[...].dtype == jnp.float32
    out = attention(hidden())
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), build()(hidden()), atol=0.1)


# --- with a cache --------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize(
    ("kind", "heads"),
    [("pure", "MHA"), ("ragged", "GQA"), ("dynamic", "MQA"), ("static", "GQA")],
)
def test_cached_equals_uncached(kind, heads, split):
    """For any chunking of the same tokens, whichever cache keeps them."""
    attention = build(*HEADS[heads])
    want = whole(attention, hidden())
    cache = {
        "pure": lambda: pure(attention),
        "ragged": lambda: pure(attention, ragged=True),
        "dynamic": nn.DynamicKVCache,
        "static": lambda: nn.StaticKVCache(T, 1),
    }[kind]()
    for chunk in chunks(split):
        out = attention(hidden()[:, chunk], cache=cache)
        if kind in ("pure", "ragged"):
            out, cache = out
        close(out, want[:, chunk])


@pytest.mark.parametrize(
    "options", [{"window": 3}, {"softcap": 2.0}, {"use_bias": True}, {"rope_theta": None},
                {"scale": 0.3}], ids=str
)  # fmt: skip
def test_cached_equals_uncached_with_options(options):
    """The module's own options reach the cache's attention too."""
    attention = build(**options)
    want = whole(attention, hidden())
    state, cache = pure(attention), nn.StaticKVCache(16, 1)
    for chunk in chunks((5, 1, 3)):
        out, state = attention(hidden()[:, chunk], cache=state)
        close(out, want[:, chunk])
        close(attention(hidden()[:, chunk], cache=cache), want[:, chunk])


def test_ragged_rows_equal_each_row_alone():
    """Right-padded chunks with `lengths`: padding leaves no trace, and rows may sit out."""
    attention = build()
    state = pure(attention, ragged=True)
    step = nnx.jit(lambda attention, x, **options: attention(x, **options))
    plan = [(4, [4, 2]), (4, [1, 3]), (2, [2, 0]), (2, [2, 2])]
    done, outs, sources = np.zeros(B, int), [[], []], [hidden(seed=1)[0], hidden(seed=2)[1]]
    for count, lengths in plan:
        chunk = np.full((B, count, WIDTH), 9.0, np.float32)
        for b, n in enumerate(lengths):
            chunk[b, :n] = sources[b][done[b] : done[b] + n]
        out, state = step(attention, jnp.asarray(chunk), cache=state, lengths=jnp.array(lengths))
        for b, n in enumerate(lengths):
            outs[b].append(out[b, :n])
        done += lengths
    assert lj.seq_length(state).tolist() == done.tolist() == [9, 7]
    for b in range(B):
        close(np.concatenate(outs[b]), whole(attention, sources[b][None, : done[b]])[0])


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_cached_equals_uncached_inside_jit(split):
    """The module and a stateful cache in one compiled step."""
    attention, cache = build(), nn.StaticKVCache(T, 1)
    want = whole(attention, hidden())

    @nnx.jit
    def step(attention, cache, x):
        return attention(x, cache=cache)

    for chunk in chunks(split):
        close(step(attention, cache, hidden()[:, chunk]), want[:, chunk])
    assert cache.get_seq_length() == T


def test_a_scan_over_a_pure_cache():
    """The state is a loop carry; the module is closed over."""
    attention = build()

    @jax.jit
    def decode(state, x):
        def body(state, one):
            out, state = attention(one[:, None], cache=state)
            return state, out[:, 0]

        return jax.lax.scan(body, state, x.swapaxes(0, 1))[1].swapaxes(0, 1)

    close(decode(pure(attention), hidden()), attention(hidden()))


def test_a_pure_cache_is_not_changed():
    """What comes back is new; the old state can go another way."""
    attention = build()
    state = pure(attention)
    first, left = attention(hidden(3), cache=state)
    again, _ = attention(hidden(3), cache=state)
    np.testing.assert_array_equal(first, again)
    assert int(lj.seq_length(state)) == 0
    assert int(lj.seq_length(left)) == 3


def test_layers_are_separate():
    """Layer 1 holds its own tokens."""
    attention, cache = build(), nn.DynamicKVCache()
    attention(hidden(4), cache=cache, layer_idx=0)
    close(attention(hidden(), cache=cache, layer_idx=1), attention(hidden()))
    assert [cache.get_seq_length(i) for i in range(2)] == [4, T]


@pytest.mark.parametrize("kind", ["pure", "stateful"])
def test_rotary_positions_survive_rollback(kind):
    """Drafts rolled back: as if they had never been."""
    attention = build()
    want = whole(attention, hidden())
    cache = pure(attention) if kind == "pure" else nn.DynamicKVCache()

    def step(x):
        nonlocal cache
        out = attention(x, cache=cache)
        if kind == "pure":
            out, cache = out
        return out

    step(hidden()[:, :4])
    step(hidden(3, seed=8))
    if kind == "pure":
        cache = lj.rollback(cache, 3)
    else:
        cache.rollback(3)
    close(step(hidden()[:, 4:]), want[:, 4:])


@pytest.mark.parametrize("kind", ["pure", "stateful"])
def test_rotary_positions_continue_after_a_crop(kind):
    """A cache cropped to the last `w - 1` before each token is a window of w over the whole."""
    window = 4
    want = whole(build(window=window), hidden())
    attention = build()
    cache = pure(attention) if kind == "pure" else nn.StaticKVCache(window, 1)
    for i in range(T):
        if kind == "pure":
            out, cache = attention(hidden()[:, i : i + 1], cache=lj.crop(cache, window - 1))
        else:
            cache.crop(window - 1)
            out = attention(hidden()[:, i : i + 1], cache=cache)
        close(out, want[:, i : i + 1])


@pytest.mark.parametrize("kind", ["pure", "stateful"])
def test_tokens_written_by_place(kind):
    """`cache_position` rewrites a token: as if it had been that one from the start."""
    attention = build()
    wrong = hidden().at[:, 2:4].set(5.0)
    places = jnp.array([2, 3])
    cache = pure(attention) if kind == "pure" else nn.DynamicKVCache()
    out = attention(wrong[:, :5], cache=cache)
    cache = out[1] if kind == "pure" else cache
    out = attention(hidden()[:, 2:4], cache=cache, cache_position=places)
    out, cache = out if kind == "pure" else (out, cache)
    close(out, attention(hidden())[:, 2:4])
    out = attention(hidden()[:, 5:], cache=cache)
    out = out[0] if kind == "pure" else out
    close(out, attention(hidden())[:, 5:])


def test_the_first_tokens_may_be_written_by_place():
    """Into a stateful cache that has no layer yet."""
    attention, cache = build(), nn.DynamicKVCache()
    out = attention(hidden(3), cache=cache, cache_position=[0, 1, 2])
    close(out, attention(hidden(3)))
    cache = nn.DynamicKVCache()
    close(attention(hidden(1), cache=cache, cache_position=0), attention(hidden(1)))


def test_mask_and_bias_with_a_cache():
    """Their last axis counts the capacity, oldest token first."""
    attention = build()
    mask = jnp.ones((1, 1, 3, 16), bool).at[..., 1].set(False)
    want = attention(hidden(6), mask=jnp.ones((1, 1, 6, 6), bool).at[:, :, 3:, 1].set(False))[:, 3:]
    for name, x in (("mask", mask), ("bias", jnp.where(mask, 0.0, -1e9))):
        _, state = attention(hidden(6)[:, :3], cache=pure(attention))
        out, _ = attention(hidden(6)[:, 3:], cache=state, **{name: x})
        close(out, want)
        cache = nn.StaticKVCache(16, 1)
        attention(hidden(6)[:, :3], cache=cache)
        close(attention(hidden(6)[:, 3:], cache=cache, **{name: x}), want)


# --- cross-attention -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pure", "ragged", "dynamic", "static"])
def test_cross_attention_with_any_cache(kind):
    """Stored on the first call, left out afterwards; neither causal nor windowed nor rotated."""
    attention = build(kv_hidden_size=12, window=2)
    encoder = hidden(5, seed=1, width=12)
    want = attention(hidden(4), encoder_hidden=encoder, is_cross_attention=True)
    close(want, numpy_attention(attention, hidden(4), source=encoder))
    cache = {
        "pure": lambda: pure(attention),
        "ragged": lambda: pure(attention, ragged=True),
        "dynamic": nn.DynamicKVCache,
        "static": lambda: nn.StaticKVCache(8, 1),
    }[kind]()
    for i in range(4):
        out = attention(hidden(4)[:, i : i + 1], cache=cache, is_cross_attention=True,
                        encoder_hidden=encoder if i == 0 else None)  # fmt: skip
        if kind in ("pure", "ragged"):
            out, cache = out
        close(out, want[:, i : i + 1])


def test_cross_attention_to_encoders_of_unequal_length():
    """A ragged pure cache, filled with `lengths`, hides the padding from every query."""
    attention = build()
    encoder = hidden(5, seed=1)
    out, state = attention(hidden(3), cache=pure(attention, ragged=True), encoder_hidden=encoder,
                           is_cross_attention=True, lengths=jnp.array([5, 2]))  # fmt: skip
    for b, count in enumerate((5, 2)):
        want = attention(hidden(3)[b : b + 1], encoder_hidden=encoder[b : b + 1, :count],
                         is_cross_attention=True)  # fmt: skip
        close(out[b : b + 1], want)
    assert lj.seq_length(state).tolist() == [5, 2]


# --- errors --------------------------------------------------------------------------------------


def test_normalized_queries_and_keys_and_biases_of_their_own():
    """q_norm and k_norm act per head before rotation; out_bias is apart from use_bias."""

    def norm(width):
        made = nn.Norm(width, kind="rms", epsilon=1e-6)
        made.scale.set_value(1 + 0.5 * jnp.sin(jnp.arange(width, dtype=jnp.float32)))
        return made

    attention = build(use_bias=True, out_bias=False, qk_norm=norm)
    assert attention.q_proj.bias is not None and attention.o_proj.bias is None
    assert build(use_bias=True).o_proj.bias is not None
    # The same by hand: normalizing what a module without norms projects.
    plain = build(use_bias=True, out_bias=False)
    x = hidden()
    scale = np.asarray(attention.q_norm.scale[...])

    def normalized(layer):
        y = np.asarray(layer(x)).reshape(B, T, -1, attention.head_dim)
        return (y / np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + 1e-6) * scale).swapaxes(1, 2)

    positions = jnp.arange(T, dtype=jnp.int32)
    query, key = (
        rope(jnp.asarray(normalized(layer)), positions, 100.0)
        for layer in (plain.q_proj, plain.k_proj)
    )
    value = plain.v_proj(x).reshape(B, T, -1, attention.head_dim).swapaxes(1, 2)
    out = dot_product(query, key, value).swapaxes(1, 2).reshape(B, T, -1)
    close(whole(attention, x), plain.o_proj(out))


@pytest.mark.parametrize("kind", ["rms", "rms+1", "layer"])
def test_norms(kind):
    """Against the textbook, and in the input's dtype."""
    norm = nn.Norm(6, kind=kind, epsilon=1e-3)
    norm.scale.set_value(jnp.linspace(-1, 2, 6, dtype=jnp.float32))
    x = hidden(width=6) + 2
    wide = np.float64(x)
    if kind == "layer":
        norm.bias.set_value(jnp.linspace(3, 4, 6, dtype=jnp.float32))
        wide = wide - wide.mean(-1, keepdims=True)
    wide = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-3)
    wide = wide * (np.linspace(-1, 2, 6) + (kind == "rms+1"))
    wide = wide + (np.linspace(3, 4, 6) if kind == "layer" else 0)
    close(norm(x), wide)
    assert norm(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_rope_is_taken_wherever_a_theta_is():
    """Scaled frequencies: in the module, at attention by place, and the same for Rope(theta)."""
    scaled = nn.Rope(100.0, nn.LinearScaling(4.0))
    x = hidden()
    attention = build(rope_theta=scaled)
    plain = whole(build(rope_theta=nn.Rope(100.0)), x)
    np.testing.assert_array_equal(plain, whole(build(rope_theta=100.0), x))
    assert np.abs(whole(attention, x) - plain).max() > 1e-3
    by_place = build(rope_theta=scaled, rope_by_place=True)
    out, _ = by_place(x, cache=pure(attention))
    close(out, whole(attention, x))  # nothing was dropped: places are positions


def test_scaled_frequencies():
    """Against values worked out by hand."""
    plain = nn.Rope(10000.0).frequencies(8)
    close(plain, [1, 0.1, 0.01, 0.001])
    close(nn.Rope(10000.0, nn.LinearScaling(8.0)).frequencies(8), plain / 8)
    # 64 positions turn 10.2, 1.02, 0.1 and 0.01 times: the first is kept, the second nearly divided.
    llama = nn.Rope(10000.0, nn.Llama3Scaling(4.0, 1.0, 4.0, 64)).frequencies(8)
    kept = (64 * 0.1 / (2 * np.pi) - 1) / 3
    close(llama, [1, 0.1 * (kept + (1 - kept) / 4), 0.01 / 4, 0.001 / 4])
    # Turns of 32 and 1 lie at dimensions -0.5 and 1.01: a ramp from 0 to 2.
    yarn = nn.Rope(10000.0, nn.YarnScaling(4.0, 64))
    close(yarn.frequencies(8), [1, 0.1 * (0.5 + 0.5 / 4), 0.01 / 4, 0.001 / 4])
    assert yarn.attention_scale == pytest.approx(1 + 0.1 * np.log(4))
    assert nn.Rope(1.5, nn.YarnScaling(4.0, 64, attention_factor=0.5)).attention_scale == 0.5
    assert hash(yarn) == hash(nn.Rope(10000.0, nn.YarnScaling(4.0, 64)))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: nn.Rope(0.0), "theta of Rope must be a positive number, got 0.0"),
        (lambda: nn.LinearScaling(-1.0), "factor of LinearScaling"),
        (lambda: nn.YarnScaling(2.0, 0), "original_max_position_embeddings of YarnScaling"),
        (lambda: nn.Llama3Scaling(2.0, 4.0, 4.0, 64), "must be below high_freq_factor"),
    ],
)
def test_frequencies_that_cannot_be(make, match):
    """Said when made."""
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ({"num_heads": 3}, "num_heads"),
        ({"num_heads": 4, "num_kv_heads": 3}, "multiple"),
        ({"num_heads": 0}, "num_heads"),
        ({"num_heads": 4, "num_kv_heads": 0}, "num_kv_heads"),
        ({"num_heads": 4, "head_dim": 0}, "head_dim"),
        ({"num_heads": 4, "head_dim": 3, "rope_theta": 10.0}, "even"),
    ],
)
def test_sizes_that_do_not_divide(sizes, match):
    """Said when the module is made."""
    with pytest.raises(ValueError, match=match):
        nn.MultiHeadAttention(WIDTH, rngs=nnx.Rngs(0), **sizes)


def test_a_cache_of_another_type():
    """A list of arrays is not a cache."""
    with pytest.raises(TypeError, match="cache must be"):
        build()(hidden(), cache=[jnp.ones(1)])


def test_encoder_states_without_cross_attention():
    """Half a request: refused before anything is stored."""
    cache = nn.DynamicKVCache()
    with pytest.raises(ValueError, match="is_cross_attention"):
        build()(hidden(), cache=cache, encoder_hidden=hidden())
    assert cache.get(0) is None


def test_cross_attention_needs_something_to_attend_to():
    """Neither a cache nor encoder states."""
    with pytest.raises(ValueError, match="encoder_hidden"):
        build()(hidden(), is_cross_attention=True)


@pytest.mark.parametrize("name", ["lengths", "cache_position"])
def test_options_of_a_cache_need_one(name):
    """Without a cache they would be ignored in silence."""
    with pytest.raises(ValueError, match=name):
        build()(hidden(), **{name: jnp.arange(B if name == "lengths" else T)})


BAD_OPTIONS = {
    "lengths": (ValueError, {"lengths": jnp.array([1, 1])}),
    "position": (TypeError, {"cache_position": 0.5}),
    "layer": (ValueError, {"layer_idx": -1}),
    "rope positions": (ValueError, {"positions": jnp.arange(3)}),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
@pytest.mark.parametrize("written", [False, True], ids=["empty", "written"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_an_error_leaves_a_stateful_cache_as_it_was(kind, written, name):
    """Nothing is stored by a call that then refuses to attend."""
    error, options = BAD_OPTIONS[name]
    attention = build()
    cache = nn.DynamicKVCache() if kind == "dynamic" else nn.StaticKVCache(16, 1)
    if written:
        attention(hidden(3), cache=cache)
    before = contents(cache)
    with pytest.raises(error):
        attention(hidden(1), cache=cache, **options)
    assert_contents(cache, before)


def test_an_error_leaves_a_pure_cache_as_it_was():
    """It is immutable and stays usable."""
    attention = build()
    _, state = attention(hidden(3), cache=pure(attention))
    before = snapshot(state)
    with pytest.raises(ValueError, match="mask"):
        attention(hidden(1), cache=state, mask=jnp.ones((1, 1, 1, 5), bool))
    for x, y in zip(before[0], snapshot(state)[0], strict=True):
        np.testing.assert_array_equal(x, y)


# --- dot_product ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": False}, {"window": 2}, {"scale": 0.3}, {"softcap": 1.5},
     {"window": 3, "softcap": 0.7, "scale": 2.0}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("count", [1, 3, 7])
def test_dot_product_agrees_with_attend(options, count):
    """Over plain arrays as over a cache that holds them, values of another width included."""
    state, key, value = filled(7)
    query = queries(0, B, count)
    got = dot_product(jnp.asarray(query), jnp.asarray(key), jnp.asarray(value), **options)
    close(got, lj.attend(state, query, 0, **options))


def test_dot_product_mask_and_bias():
    """Per head and per row; a query that sees nothing gives zeros in both."""
    state, key, value = filled(8)
    query = jnp.asarray(queries(0, B, 3))
    rng = np.random.default_rng(3)
    mask = jnp.asarray(rng.random((B, 4, 3, 8)) < 0.5).at[0, 0, 0].set(False)
    bias = jnp.asarray(rng.standard_normal((1, 4, 1, 8)).astype(np.float32))
    got = dot_product(query, jnp.asarray(key), jnp.asarray(value), mask=mask, bias=bias)
    close(got, lj.attend(state, query, 0, mask=mask, bias=bias))
    np.testing.assert_array_equal(got[0, 0, 0], 0)


def test_dot_product_takes_positions():
    """Causality is by position, not by index, per row if 2-D."""
    key, value = (jnp.asarray(x) for x in tokens(0, B, 4))
    query = jnp.asarray(queries(0, B, 2))
    got = dot_product(
        query, key, value,
        query_positions=jnp.array([[3, 1], [0, 3]]), key_positions=jnp.array([3, 2, 1, 0]),
    )  # fmt: skip
    for b, places in enumerate([[3, 1], [0, 3]]):
        for t, place in enumerate(places):
            want = dot_product(
                query[b : b + 1, :, t : t + 1], key[b : b + 1, :, 3 - place :],
                value[b : b + 1, :, 3 - place :], causal=False,
            )  # fmt: skip
            close(got[b, :, t], want[0, :, 0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dot_product_accumulates_in_float32(dtype):
    """The result is the rounded float32 one, in the query's dtype."""
    key, value = tokens(0, B, 64, value_dim=4)
    arrays = [jnp.asarray(x).astype(dtype) for x in (queries(0, B, 2), key, value)]
    got = dot_product(*arrays)
    want = dot_product(*(x.astype(jnp.float32) for x in arrays))
    assert got.dtype == dtype
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.02)


# --- windows and places ----------------------------------------------------------------------------


@pytest.mark.parametrize("split", [*SPLITS, (9,)], ids=str)
@pytest.mark.parametrize("ragged", [False, True], ids=["aligned", "ragged"])
def test_a_sliding_cache_is_the_window_of_the_module(split, ragged):
    """A ring of 3 gives, in any chunking, what `window=3` gives without a cache."""
    attention, windowed = build(), build(window=3)
    x, cache = hidden(), pure(attention, lj.Sliding(3), ragged=ragged)
    outs = []
    for chunk in chunks(split):
        out, cache = attention(x[:, chunk], cache=cache)
        outs.append(out)
    close(jnp.concatenate(outs, axis=1), whole(windowed, x))


@pytest.mark.parametrize("kind", [nn.DynamicKVCache, lambda: nn.StaticKVCache(16, 1), None])
def test_places_are_positions_while_nothing_is_gone(kind):
    """Until crop or a window drops something, both kinds of rotary position agree."""
    absolute, by_place = build(), build(rope_by_place=True)
    x = hidden()
    cache = pure(by_place) if kind is None else kind()
    outs = []
    for chunk in chunks((5, 1, 3)):
        out = by_place(x[:, chunk], cache=cache)
        if kind is None:
            out, cache = out
        outs.append(out)
    close(jnp.concatenate(outs, axis=1), whole(absolute, x))
    close(whole(by_place, x), whole(absolute, x))


def test_by_place_far_text_is_as_near_text():
    """What leaves the window leaves no trace: the same last tokens give the same output."""
    attention = build(rope_by_place=True)
    x = hidden(40)
    outs = []
    for begin in (0, 20):
        cache = pure(attention, lj.Sliding(4))
        outs.append(attention(x[:, begin:], cache=cache)[0][:, -1])
    close(*outs)
    with pytest.raises(ValueError, match="rope_by_place"):
        attention(x, cache=pure(attention, lj.Sliding(4)), positions=jnp.arange(40))
    with pytest.raises(ValueError, match="rope_theta"):
        build(rope_theta=None, rope_by_place=True)


def test_cross_attention_refuses_a_window():
    """Encoder tokens must not slide away."""
    attention = build(rope_theta=None)
    with pytest.raises(ValueError, match="every token of the encoder"):
        attention(hidden(2), cache=pure(attention, lj.Sliding(4)), encoder_hidden=hidden(9),
                  is_cross_attention=True)  # fmt: skip


@pytest.mark.parametrize("by_place", [False, True], ids=["absolute", "by-place"])
@pytest.mark.parametrize(
    "first", [lj.Static(16), lj.Sliding(5, slack=4)], ids=["static", "sliding"]
)
def test_a_sharing_layer_attends_to_what_the_other_stored(first, by_place):
    """It makes no keys of its own, and its queries stand where the stored tokens do."""
    attention = build(rope_by_place=by_place)
    twin = nn.MultiHeadAttention(WIDTH, 4, 2, rope_theta=100.0, rope_by_place=by_place,
                                 rngs=nnx.Rngs(0))  # fmt: skip
    x, cache = hidden(), pure(attention, [first, lj.Shared(0)], ragged=True)
    alone = pure(attention, first, ragged=True)
    for chunk in chunks((5, 1, 3)):
        lengths = [chunk.stop - chunk.start] * B
        out, cache = attention(x[:, chunk], cache=cache, layer_idx=0, lengths=lengths)
        expected, alone = attention(x[:, chunk], cache=alone, lengths=lengths)
        shared, cache = twin(x[:, chunk], cache=cache, layer_idx=1, lengths=lengths)
        close(out, expected)
        close(shared, expected)  # the same weights and input: the same queries and keys
        assert lj.seq_length(cache, 1).tolist() == lj.seq_length(alone).tolist()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"mask": jnp.ones((1, 1, 1, 3), bool)}, ValueError),
        ({"mask": jnp.ones((1, 1, 1, 1))}, TypeError),
        ({"bias": jnp.ones((7,))}, ValueError),
    ],
)
@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("kind", [nn.DynamicKVCache, lambda: nn.SlidingKVCache(4)])
def test_a_bad_mask_is_refused_before_anything_is_stored(kind, written, options, error):
    """A stateful cache is as it was."""
    attention, cache = build(), kind()
    if written:
        attention(hidden(2), cache=cache)
    before = contents(cache)
    with pytest.raises(error, match=r"mask|bias"):
        attention(hidden(1), cache=cache, **options)
    assert_contents(cache, before)


@pytest.mark.parametrize("cache", [None, "stateful", "pure"])
def test_hidden_states_have_three_axes(cache):
    """One sequence needs its batch axis, and so does the encoder's."""
    attention = build()
    caches = {None: None, "stateful": nn.DynamicKVCache(), "pure": pure(attention)}
    with pytest.raises(ValueError, match=r"hidden must be \(batch, seq, width\).*hidden\[None\]"):
        attention(hidden(3)[0], cache=caches[cache])
    with pytest.raises(ValueError, match="encoder_hidden must be"):
        attention(hidden(3), encoder_hidden=hidden(3)[0], is_cross_attention=True)
