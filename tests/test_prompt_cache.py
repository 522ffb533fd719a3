"""`PromptCache`: reuse is recomputing, bit for bit; it keeps to its bytes; it comes back from disk."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lucid_jax as lj
from lucid_jax.cache.cut_and_join import cut, join
from lucid_jax.decode import generate, prompt_cache
from lucid_jax.decode.language_model import ModelStructure
from lucid_jax.models import ModelConfig, Transformer

from .helpers import filled, make, more_layouts, tokens

TEXT = np.random.default_rng(0).integers(0, 64, 40).tolist()
CHUNK = 8
CODECS = {
    "none": lj.codecs.Identity(),
    "int8": lj.codecs.Int8(rotate=True),
    "float8": lj.codecs.Float8(),
    "int4": lj.codecs.Int4(),
    "kivi": lj.codecs.KIVI(group=2, residual=1),  # a residual shorter than a chunk
    "kivi-odd": lj.codecs.KIVI(group=6, residual=11, rotate=True),  # groups and chunks cross
}
LAYOUTS = {
    "static": lambda codec: lj.Static(60, codec),
    "dynamic": lambda codec: lj.Dynamic(codec),
    "sliding": lambda codec: lj.Sliding(19, sinks=3, slack=2, codec=codec),
    **more_layouts(40),
}
SPECS = {
    f"{name}-{word}": layout(codec)
    for name, layout in LAYOUTS.items()
    for word, codec in CODECS.items()
}
SPECS |= {
    "tight": lj.Sliding(5, sinks=1, codec=CODECS["kivi"]),  # a ring shorter than a chunk
    "tracked": lj.Static(60, track=True),
    "mixed": [lj.Sliding(5, sinks=1), lj.Dynamic(lj.codecs.Int4())],
}


def specs(*everyday):
    """All of them; those not named here run where there is time for it."""
    return [
        pytest.param(spec, id=name, marks=() if name in everyday else pytest.mark.exhaustive)
        for name, spec in SPECS.items()
    ]


def tiny(seed=3, layers=2, **options):
    config = ModelConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return Transformer(config, rngs=nnx.Rngs(seed), **options)


@pytest.fixture(scope="module")
def model():
    return tiny()


def caching(model, spec=None, max_bytes=1 << 24, chunk=CHUNK):
    spec = lj.Static(60) if spec is None else spec
    return lj.PromptCache(model, spec, max_bytes=max_bytes, chunk=chunk)


def assert_equal(a, b):
    """Two results of prefill agree in every bit, dead slots included."""
    a, b = (jax.tree.leaves((x.cache, x.hidden)) for x in (a, b))
    for x, y in zip(a, b, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


# --- segments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("spec", specs("static-kivi"))
def test_segments_of_a_text_give_its_cache(spec, ragged):
    """Cut after each chunk and joined in order; and one append later, too."""
    layers = 2 if isinstance(spec, list) else 1
    empty = lj.ensure_capacity(make(spec, ragged=ragged, layers=layers), 50)
    state, joined = empty, jax.tree.map(jnp.copy, empty)
    for seed in range(5):
        for layer in range(layers):
            state = lj.update(state, *tokens(seed, 2, 8), layer)
        joined = join(joined, cut(state, 8))
    for turn in range(2):
        for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(joined), strict=True):
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
        if not turn:
            state, joined = (lj.update(s, *tokens(9, 2, 3), 0) for s in (state, joined))


def test_a_segment_that_does_not_fit_is_refused():
    state, _, _ = filled(6)
    piece = cut(state, 3)
    refused = join(state, piece)
    assert bool(lj.overflowed(refused))
    assert int(lj.seq_length(refused)) == 6


# --- reuse -----------------------------------------------------------------------------------------


def test_generate_hashes_the_model_once(model, monkeypatch):
    """For its own programs, and to see that the prompt cache is of this model."""
    warm, hashed, plain = caching(model), [], ModelStructure.__init__
    monkeypatch.setattr(
        ModelStructure, "__init__", lambda self, given: hashed.append(given) or plain(self, given)
    )
    generate(model, [TEXT[:12]], max_new_tokens=2, prompt_cache=warm)
    assert len(hashed) == 1


@pytest.mark.parametrize("spec", specs("mixed", "sliding-kivi-odd"))
def test_reuse_is_recomputing_bit_for_bit(model, spec):
    """A state, and the last hidden state, whether all, some or nothing of a prompt was stored."""
    warm = caching(model, spec)
    warm.prefill([TEXT[:37]])
    for length, found in ((40, 32), (37, 32), (32, 32), (8, 8), (5, 0)):
        start = warm.prefill([TEXT[:length]])
        assert start.reused == (found,)
        assert_equal(start, caching(model, spec).prefill([TEXT[:length]]))
    branch = TEXT[:20] + TEXT[:9]
    start = warm.prefill([branch])
    assert start.reused == (16,)
    assert_equal(start, caching(model, spec).prefill([branch]))


@pytest.mark.parametrize("spec", specs("mixed"))
def test_generate_gives_the_same_text(model, spec):
    """With a prompt cache, cold and warm, and without one; a batch of unequal prompts."""
    prompts = [TEXT[:21], TEXT[:3], [*TEXT[:17], 5, 6]]
    expected = generate(model, prompts, max_new_tokens=12, cache=spec)
    warm = caching(model, spec)
    for reused in ((0, 0, 16), (16, 0, 16)):
        before = warm.stats
        result = generate(model, prompts, max_new_tokens=12, prompt_cache=warm)
        assert result.rows() == expected.rows()
        assert warm.stats.reused - before.reused == sum(reused)
        np.testing.assert_array_equal(lj.seq_length(result.cache), lj.seq_length(expected.cache))
    calls = lj.stream(model, prompts, max_new_tokens=12, prompt_cache=warm)
    new = [token for rows in calls for token in rows[0]]
    assert new == expected.rows()[0]


def test_what_is_stored_does_not_go_through_the_model(model, monkeypatch):
    """Tokens are counted where they enter it; and the last ones' logits are those of the model."""
    fed = []
    prefill = prompt_cache.prefill

    def counting(graph, params, state, part, lengths, largest):
        fed.append(int(lengths.sum()))
        return prefill(graph, params, state, part, lengths, largest)

    monkeypatch.setattr(prompt_cache, "prefill", counting)
    warm, whole = caching(model), nnx.jit(model)(jnp.array([TEXT]))
    for prompt, computed in ((TEXT[:20], 20), (TEXT[:20], 4), (TEXT[:16], 0), (TEXT, 24)):
        fed.clear()
        start = warm.prefill([prompt])
        assert sum(fed) == computed
        logits = model.logits(start.hidden[:, None])[0, 0]
        np.testing.assert_allclose(logits, whole[0, len(prompt) - 1], atol=1e-5)
    assert warm.stats == prompt_cache.Stats(prompts=4, hits=3, reused=48, computed=48)
    assert [warm.lookup(TEXT[:n]) for n in (40, 39, 8, 7)] == [40, 32, 8, 0]
    assert warm.lookup([1, *TEXT]) == 0


def test_reuse_compiles_nothing_new(model, compilations):
    """However much is found: programs depend on the chunk alone."""
    warm = caching(model)
    warm.prefill([TEXT[:32]])
    warm.prefill([TEXT[:32]])
    before = compilations()
    for length in (40, 24, 32, 16):
        warm.prefill([TEXT[:length]])
    assert compilations() == before


def test_bfloat16(tmp_path):
    """A narrow hidden state is stored, saved and found as it was."""
    half = tiny(layers=1, param_dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):  # flax's RMSNorm mixes bfloat16 and float32
        warm = caching(half)
        start = warm.prefill([TEXT[:16]])
        assert start.hidden.dtype == jnp.bfloat16
        assert_equal(warm.prefill([TEXT[:16]]), start)
        warm.save(tmp_path)
        loaded = lj.PromptCache.load(tmp_path, half, warm.spec, max_bytes=1 << 20)
        assert_equal(loaded.prefill([TEXT[:16]]), start)
        assert loaded.stats.computed == 0


# --- bytes -----------------------------------------------------------------------------------------


def node_bytes(model):
    one = caching(model)
    one.prefill([TEXT[:CHUNK]])
    return one.nbytes


def held(cache):
    """The bytes of all arrays, counted by hand."""
    return sum(
        leaf.nbytes for node in cache._nodes.values() for leaf in jax.tree.leaves(node.content)
    )


def test_bytes_are_those_of_the_arrays(model):
    """Tokens, hidden state, keys and values of 2 layers, 1 head of 8, float32; shared parts once."""
    warm = caching(model)
    warm.prefill([TEXT[:35], TEXT[:16] + TEXT[:16]])
    assert len(warm) == 4 + 2
    assert warm.nbytes == held(warm) == 6 * 4 * (CHUNK + 16 + 2 * 2 * CHUNK * 8)
    assert f"6 chunks, {warm.nbytes} of" in repr(warm)
    warm.clear()
    assert (len(warm), warm.nbytes, warm.lookup(TEXT)) == (0, 0, 0)


@pytest.mark.parametrize("room", [0, 1, 3])
def test_a_prompt_larger_than_the_budget(model, room):
    """It works, and as much of its beginning as fits is kept, in place of all else."""
    cache = caching(model, max_bytes=room * node_bytes(model))
    cache.prefill([TEXT[20:]])
    for _ in range(2):
        assert_equal(cache.prefill([TEXT]), caching(model).prefill([TEXT]))
        assert len(cache) == room
        assert cache.lookup(TEXT) == room * CHUNK


class PlainLRU:
    """What should be stored: prompts' beginnings as tuples, least recently used first."""

    def __init__(self, room):
        self.room, self.order, self.evicted = room, [], 0

    def prefill(self, prompt):
        starts = [tuple(prompt[: n + CHUNK]) for n in range(0, len(prompt) - CHUNK + 1, CHUNK)]
        found = sum(1 for start in starts if start in self.order)
        starts = starts[: max(self.room, found)]
        self.order = [s for s in self.order if s not in starts] + starts[::-1]
        while len(self.order) > self.room:
            del self.order[0]
            self.evicted += 1
        return found * CHUNK


@pytest.fixture(scope="module")
def plain(model):
    """Prefill of a prompt with nothing stored, computed once for each."""
    known = {}

    def prefill(prompt):
        key = tuple(prompt)
        if key not in known:
            known[key] = caching(model, max_bytes=0).prefill([prompt])
        return known[key]

    return prefill


PIECES = [TEXT[:8], TEXT[8:16], [*TEXT[:7], 1]]


@settings(max_examples=30)
@given(
    st.integers(1, 5),
    st.lists(
        st.tuples(st.lists(st.sampled_from(range(3)), max_size=3), st.integers(0, 2)).filter(
            lambda prompt: prompt != ([], 0)
        ),
        min_size=3,
        max_size=9,
    ),
)
def test_any_prompts_under_any_budget(model, plain, room, prompts):
    """Every state is exact, and what is kept is what a plain list of the latest would keep."""
    size = node_bytes(model)
    cache, expected = caching(model, max_bytes=room * size + size - 1), PlainLRU(room)
    for pieces, rest in prompts:
        prompt = [*(token for i in pieces for token in PIECES[i]), *TEXT[:rest]]
        start = cache.prefill([prompt])
        assert start.reused == (expected.prefill(prompt),)
        assert_equal(start, plain(prompt))
        assert cache.nbytes == held(cache) == len(cache) * size <= cache.max_bytes
        kept = [node.content.tokens.tolist() for node in cache._nodes.values()]
        assert kept == [list(start[-CHUNK:]) for start in expected.order]
        names = ["", *reversed(cache._nodes)]
        for name, node in cache._nodes.items():
            assert node.before in names[: names.index(name)], "a parent is used after its children"
    assert cache.stats.evicted == expected.evicted


# --- on disk ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(model, tmp_path):
    """A saved cache of 5 chunks."""
    cache = caching(model)
    cache.prefill([TEXT[:32], TEXT[:8] + TEXT[:9]])
    cache.save(tmp_path / "prompts")
    return tmp_path / "prompts"


def loaded(folder, model, spec=None, max_bytes=1 << 24):
    spec = lj.Static(60) if spec is None else spec
    return lj.PromptCache.load(folder, model, spec, max_bytes=max_bytes)


@pytest.mark.parametrize("spec", specs("mixed"))
def test_it_comes_back_from_disk(model, tmp_path, spec):
    cache = caching(model, spec)
    cache.prefill([TEXT[:32], TEXT[:8] + TEXT[:9]])
    cache.save(tmp_path / "prompts")
    again = loaded(tmp_path / "prompts", model, spec)
    assert (len(again), again.nbytes, again.chunk) == (5, cache.nbytes, CHUNK)
    assert list(again._nodes) == list(cache._nodes)
    start = again.prefill([TEXT])
    assert start.reused == (32,)
    assert_equal(start, caching(model, spec).prefill([TEXT]))


def test_a_smaller_budget_loads_what_was_used_latest(model, folder):
    small = loaded(folder, model, max_bytes=2 * node_bytes(model))
    assert len(small) == 2
    assert small.lookup(TEXT[:8] + TEXT[:8]) == 16


def test_saving_again_writes_and_removes_only_what_changed(model, folder):
    files = set(os.listdir(folder))
    times = {name: os.stat(folder / name).st_mtime_ns for name in files}
    cache = loaded(folder, model, max_bytes=3 * node_bytes(model))
    cache.prefill([TEXT[30:38]])
    (folder / "notes.txt").write_text("mine")
    cache.save(folder)
    now = set(os.listdir(folder))
    assert len(now - files) == 2 and "notes.txt" in now
    assert len(files - now) == 3
    for name in now & files - {"index.json"}:
        assert os.stat(folder / name).st_mtime_ns == times[name]
    assert list(loaded(folder, model)._nodes) == list(cache._nodes)


def test_a_save_that_fails_leaves_the_old_one(model, folder, monkeypatch):
    cache = loaded(folder, model)
    old = list(cache._nodes)
    cache.clear()
    cache.prefill([TEXT[30:38]])

    def fail(*_):
        raise OSError("no space left")

    for step, chunks in (("replace", 1), ("fsync", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, fail)
            with pytest.raises(OSError, match="no space left"):
                cache.save(folder)
        assert list(loaded(folder, model)._nodes) == old
        assert not [name for name in os.listdir(folder) if name.endswith(".tmp")], chunks


def test_other_models_and_specs_are_refused(model, folder):
    """Other weights, even one; other settings; another spec. In one folder both may be saved."""
    other = tiny(seed=4)
    one, two = tiny(), tiny()  # as the model, but for one number, and two that changed places
    table = one.embed_tokens.embedding[...]
    one.embed_tokens.embedding.set_value(table.at[41, 7].add(1))
    two.embed_tokens.embedding.set_value(
        table.at[jnp.array([41, 42])].set(table[jnp.array([42, 41])])
    )
    for stranger in (other, one, two, tiny(layers=1), tiny(rope_by_place=True)):
        with pytest.raises(
            lj.CacheFileError, match=r"another model .* with the model it was saved"
        ):
            loaded(folder, stranger)
    for spec in (lj.Static(61), lj.Static(60, lj.codecs.Int8()), lj.Sliding(60), lj.Dynamic()):
        with pytest.raises(lj.CacheFileError, match=r"expected chunks of the cache .* the spec it"):
            loaded(folder, model, spec)
    cache = caching(other)
    cache.prefill([TEXT[:32]])
    cache.save(folder)
    assert_equal(loaded(folder, other).prefill([TEXT]), caching(other).prefill([TEXT]))


def _chunk_file(folder):
    return sorted(folder.glob("*.safetensors"))[0]


def _cut_short(folder):
    file = _chunk_file(folder)
    file.write_bytes(file.read_bytes()[:-5])


def _flip(folder):
    file = _chunk_file(folder)
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


def _swap(folder):
    one, two = sorted(folder.glob("*.safetensors"))[:2]
    one.write_bytes(two.read_bytes())


def _edit_index(change):
    def edit(folder):
        index = json.loads((folder / "index.json").read_text())
        change(index)
        (folder / "index.json").write_text(json.dumps(index))

    return edit


DAMAGES = {
    "cut short": (_cut_short, "complete safetensors file"),
    "flipped": (_flip, "checksum"),
    "swapped": (_swap, "described as"),
    "missing": (lambda folder: _chunk_file(folder).unlink(), "got none; it is damaged"),
    "no index": (lambda folder: (folder / "index.json").write_text("{"), "JSON"),
    "other index": (lambda folder: (folder / "index.json").write_text("[]"), "format"),
    "newer": (_edit_index(lambda index: index.update(version=2)), "update the package"),
    "no chunks": (_edit_index(lambda index: index.update(chunks=[["a"]])), "pairs of names"),
    "no about": (_edit_index(lambda index: index.update(about={})), "what the chunks are of"),
    "chunk size": (_edit_index(lambda index: index["about"].update(chunk=4)), "got none"),
    "huge chunks": (
        _edit_index(lambda index: index["about"].update(chunk=10**18)),
        "what the chunks are of",
    ),
    "orphans": (_edit_index(lambda index: index["chunks"].pop()), "after the one it follows"),
    "twice": (
        _edit_index(lambda index: index["chunks"].append(index["chunks"][-1])),
        "once, after the one",
    ),
    "name": (_edit_index(lambda index: index["chunks"][-1].__setitem__(0, "x")), "got none"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_clear_error(model, folder, damage):
    harm, match = DAMAGES[damage]
    harm(folder)
    with pytest.raises(lj.CacheFileError, match=f"cannot load .*{match}"):
        loaded(folder, model)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_index_is_refused_or_means_the_same(model, folder, data):
    path = folder / "index.json"
    good = path.read_bytes()
    place = data.draw(st.integers(0, len(good) - 1))
    path.write_bytes(good[:place] + bytes([data.draw(st.integers(0, 255))]) + good[place + 1 :])
    try:
        assert list(loaded(folder, model)._nodes) == [
            name for name, _ in json.loads(good)["chunks"]
        ]
    except lj.CacheFileError as error:
        assert str(error).startswith("cannot load ")
    finally:
        path.write_bytes(good)


def test_no_folder(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        loaded(tmp_path / "none", model)


# --- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"max_bytes": -1}, "max_bytes must be at least 0"),
    ],
)
def test_bad_sizes(model, options, match):
    with pytest.raises(ValueError, match=match):
        caching(model, **options)


def test_bad_prompts(model):
    """Refused before anything is computed or counted."""
    cache = caching(model, lj.Static(20))
    for prompts, match in (([], "at least one row"), ([[]], "empty"), ([[64]], r"\[0, 64\)")):
        with pytest.raises(ValueError, match=match):
            cache.prefill(prompts)
    with pytest.raises(ValueError, match="do not fit"):
        cache.prefill([TEXT[:21]])
    with pytest.raises(ValueError, match="21 slots, but the capacity is 20"):
        generate(model, [TEXT[:12]], max_new_tokens=10, prompt_cache=cache)
    assert cache.stats == prompt_cache.Stats()
    assert len(cache) == 0


def test_a_list_of_specs_that_changes_later(model):
    """The prompt cache goes on as it was made."""
    listed = [lj.Static(60), lj.Static(60)]
    cache = caching(model, listed)
    listed[0] = lj.Sliding(5)
    assert cache.prefill([TEXT]).cache.layers[0].spec == lj.Static(60)


def test_another_cache_beside_it(model):
    with pytest.raises(ValueError, match="leave out cache="):
        generate(model, [[1]], max_new_tokens=2, cache=lj.Static(9), prompt_cache=caching(model))


def test_another_model_and_new_weights():
    """A state of other weights would be silently wrong."""
    own = tiny(layers=1)
    cache = caching(own)
    with pytest.raises(ValueError, match="another model computed"):
        generate(tiny(seed=5, layers=1), [[1]], max_new_tokens=2, prompt_cache=cache)
    own.norm.scale[...] = own.norm.scale[...] * 2
    with pytest.raises(ValueError, match="weights have changed"):
        cache.prefill([[1]])
