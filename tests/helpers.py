"""Shared by the tests: small builders of tokens and states, poison, recorded beams."""

import dataclasses
import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np

import lucid_jax as lj
from lucid_jax.cache import layouts
from lucid_jax.cache.reading import slot_runs
from lucid_jax.decode import beam_search
from lucid_jax.models.config import ModelConfig

SEED = int(os.environ["LUCID_JAX_TEST_SEED"])  # conftest.py sets it
# For `lowered.compile`, where what XLA makes of a program is the question: undoes conftest.py.
_older_emitters = "fusion_emitters" in os.environ.get("XLA_FLAGS", "")
USERS_XLA = {"xla_cpu_use_fusion_emitters": True} if _older_emitters else {}
H, D, DV = 2, 4, 3  # heads and widths of the tests that do not care
# A model of a few thousand parameters.
TINY_CONFIG = ModelConfig(
    vocab_size=280,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
)


def example(spec, capacity, codec=None):
    """A spec of any layout, for texts of `capacity` tokens or, in a window, half; rolls back 3."""
    given = {"window": max(9, capacity // 2), "sinks": 2, "slack": 3, "track": False}
    fields = [field.name for field in dataclasses.fields(spec) if field.name != "codec"]
    numbers = {name: given.get(name, capacity) for name in fields}
    return spec(**numbers, codec=lj.codecs.Identity() if codec is None else codec)


# Of every layout in the registry, a spec from a number of tokens and a codec.
LAYOUTS = {name.lower(): functools.partial(example, spec) for name, spec in layouts.LAYOUTS.items()}


def more_layouts(capacity, *named):
    """Of the layouts that a test does not name, a spec from a codec."""
    named = named or ("static", "dynamic", "sliding")
    return {
        name: functools.partial(make_spec, capacity)
        for name, make_spec in LAYOUTS.items()
        if name not in named
    }


def with_slots_of_older_versions(state):
    """The state with the slots that its layouts ask for and no others, not rounded up to tiles."""

    def older(layer):
        def cut(leaf):
            slots = layer.layout.slots // layer.stride(leaf)
            return jax.lax.slice_in_dim(leaf, 0, slots, axis=layer.buffer.lead + 2)

        shorter = layer.replace(leaves=jax.tree.map(cut, layer.leaves))
        assert shorter.num_slots == layer.layout.slots
        return shorter

    return state.with_layers(map(older, state.layers))


def visible(spec, count):
    """Which of `count` tokens each of them sees, bool [query, key], by what its layout keeps."""
    seen = np.zeros((count, count), bool)
    for query in range(count):
        with jax.ensure_compile_time_eval():
            runs = spec.layout().kept(0, query + 1)
        for first, stop in runs:
            seen[query, int(first) : int(stop)] = True
    return seen


def tokens(seed, batch, count, heads=H, dim=D, value_dim=DV, dtype=np.float32):
    """Random keys (B, H, T, D) and values (B, H, T, Dv) as NumPy arrays."""
    rng = np.random.default_rng(seed)
    key = rng.standard_normal((batch, heads, count, dim)).astype(dtype)
    value = rng.standard_normal((batch, heads, count, value_dim)).astype(dtype)
    return key, value


def queries(seed, batch, count, heads=2 * H, dim=D):
    """Random queries (B, N, T, D)."""
    return np.random.default_rng(seed + 10_000).standard_normal(
        (batch, heads, count, dim), np.float32
    )


def make(spec=None, *, batch=2, layers=1, ragged=False, heads=H, dim=D, value_dim=DV, **options):
    """An empty cache, `Static(8)` unless told otherwise."""
    return lj.init_cache(
        lj.Static(8) if spec is None else spec,
        num_layers=None if isinstance(spec, (list, tuple)) else layers,
        batch_size=batch,
        num_kv_heads=heads,
        head_dim=dim,
        value_head_dim=value_dim,
        ragged=ragged,
        **options,
    )


def filled(count, *args, seed=0, batch=2, dtype=np.float32, **options):
    """A cache whose layer 0 holds `count` random tokens, and those tokens."""
    key, value = tokens(seed, batch, count, dtype=dtype)
    return lj.update(make(*args, batch=batch, **options), key, value, 0), key, value


def snapshot(state):
    """Everything a user can observe of a state, as NumPy arrays, layer by layer.

    Copies: a view into a buffer would keep JAX from donating it, and so hide a donation too many.
    """
    return [
        [np.array(x) for x in (*lj.get(state, i), lj.seq_length(state, i), layer.position,
                                 layer.overflowed)]
        for i, layer in enumerate(state.layers)
    ]  # fmt: skip


def assert_same(a, b):
    """Two states are indistinguishable, bit for bit."""
    for one, other in zip(snapshot(a), snapshot(b), strict=True):
        for x, y in zip(one, other, strict=True):
            np.testing.assert_array_equal(x, y)


def stored(state, layer_idx=0, row=0):
    """Keys (H, length, D) and values (H, length, Dv) of one row."""
    keys, values, valid = (np.asarray(x) for x in lj.get(state, layer_idx))
    live = valid if valid.ndim == 1 else valid[row]
    return keys[row][:, live], values[row][:, live]


@jax.jit
def poison(state):
    """The state with every slot that is not live filled with NaN (all bits set, if bits)."""

    def spoil(tree, part):
        dead = part.positions(jnp.int32(0), part.size) < 0

        def fill(leaf):
            bad = jnp.array(
                jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.iinfo(leaf.dtype).max,
                leaf.dtype,
            )
            # What several tokens share is dead when all of them are.
            entries = leaf.shape[2]
            dead_ = dead.reshape(*dead.shape[:-1], entries, -1).all(axis=-1)
            heads = dead.shape[1] if dead.ndim == 3 else 1
            shape = (-1, heads, entries, *(1,) * (leaf.ndim - 3))
            return jnp.where(dead_.reshape(shape), bad, leaf)

        return jax.tree.map(fill, tree)

    def spoil_layer(layer):
        packed, *raw = slot_runs(layer)
        last = spoil(layer.tail, raw[0]) if raw else None
        return layer.replace(leaves=layer.leaves | spoil(layer.stored, packed), tail=last)

    return state.with_layers(spoil_layer(layer) for layer in state.layers)


@functools.cache
def recorded_beams(folder):
    """Prompts and settings, and the hypotheses of each, as `record_family_beams.py` left them."""
    recorded = json.loads((folder / "beams.json").read_text())
    return recorded, dict(np.load(folder / "beams.npz"))


def check_beams(model, recorded, expected, index, **options):
    """All hypotheses in setting `index` are the recorded ones; returns the search.

    `recorded` are prompts and cases, `expected` the arrays, as `fixtures/record_*beam*.py` write them.
    """
    case = recorded["cases"][index]
    result = beam_search(
        model,
        recorded["prompts"],
        max_new_tokens=recorded["max_new_tokens"],
        num_return_sequences=case["num_beams"],
        **case,
        **options,
    )
    assert len(result.sequences) == 50
    np.testing.assert_array_equal(result.sequences, expected[f"sequences_{index}"])
    np.testing.assert_array_equal(result.lengths, expected[f"lengths_{index}"])
    np.testing.assert_allclose(result.scores, expected[f"scores_{index}"], atol=1e-4, rtol=1e-5)
    return result
