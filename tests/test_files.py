"""Cache states on disk: everything comes back bit for bit, and nothing else comes back at all."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import lucid_jax as lj
from lucid_jax.cache.codecs import Form, Raw
from lucid_jax.decode import prompt_files
from lucid_jax.io import checked_file, files
from lucid_jax.io.files import CacheFileError, load, save

from .fixtures.record_files import prompt_model
from .helpers import (
    assert_same,
    make,
    more_layouts,
    queries,
    tokens,
    with_slots_of_older_versions,
)

CODECS = {
    "identity": lj.codecs.Identity(),
    "bits": lj.codecs.Bits(),
    "int8": lj.codecs.Int8(rotate=True),
    "float8": lj.codecs.Float8(),
    "int4": lj.codecs.Int4(group=np.int64(1)),
    "kivi": lj.codecs.KIVI(group=4, residual=4, rotate=True),
    "simulated": lj.codecs.Simulated(lj.codecs.Int8(rotate=True)),
}
LAYOUTS = {
    "static": lambda codec: lj.Static(20, codec=codec),
    "dynamic": lambda codec: lj.Dynamic(codec=codec),
    "grown": lambda codec: lj.Dynamic(codec=codec),
    "sliding": lambda codec: lj.Sliding(9, sinks=3, slack=2, codec=codec),
    **more_layouts(20),
}


def scribbled(state, seed=0):
    """The state with any bits at all in its slots, and counters that can be."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        if leaf.ndim < 3:
            return jnp.array(rng.integers(0, 2, leaf.shape).astype(leaf.dtype))
        bits = rng.bytes(leaf.size * leaf.dtype.itemsize)
        return jnp.array(np.frombuffer(bits, leaf.dtype).reshape(leaf.shape))

    state = jax.tree.map(fill, state)
    return state.with_layers(
        layer.replace(position=layer.start + 3, reach=layer.start + 7) for layer in state.layers
    )


def lived(spec, count, *, ragged=False):
    """A state that was written, rolled back, cropped, and asked for too much."""
    state = make(spec, ragged=ragged)
    for seed, chunk in enumerate((count - 6, 6)):
        state = lj.update(state, *tokens(seed, 2, chunk), 0)
    state = lj.crop(lj.rollback(state, jnp.array([0, 2]) if ragged else 2), 8)
    return jax.jit(lj.rollback)(state, jnp.array([0, 1000]) if ragged else 1000)


def assert_equal(a, b):
    """Equal leaf by leaf: bits, dtypes and structure, dead slots included."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert isinstance(x, jax.Array) and isinstance(y, jax.Array)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def assert_goes_on(a, b):
    """The same update, attention, rollback and crop."""
    outs, ends = [], []
    for state in (a, b):
        state = lj.update(state, *tokens(5, a.batch_size, 3), 0)
        outs.append(np.asarray(lj.attend(state, queries(1, a.batch_size, 1), 0)))
        ends.append(lj.crop(lj.rollback(state, 1), 3))
    np.testing.assert_array_equal(*outs)
    assert_same(*ends)


# --- there and back --------------------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [False, True], ids=["aligned", "ragged"])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_bits_come_back(tmp_path, layout, codec, ragged):
    state = make(LAYOUTS[layout](CODECS[codec]), ragged=ragged, dtype=jnp.bfloat16)
    state = scribbled(lj.grow(state, 70) if layout == "grown" else state)
    save(tmp_path / "state", state)
    assert_equal(load(str(tmp_path / "state")), state)


@pytest.mark.parametrize("ragged", [False, True], ids=["aligned", "ragged"])
@pytest.mark.parametrize(
    "layout, count, codec",
    [("static", 14, "kivi"), ("grown", 70, "int8"), ("sliding", 47, "identity")],
)
def test_life_goes_on(tmp_path, layout, count, codec, ragged):
    state = lived(LAYOUTS[layout](CODECS[codec]), count, ragged=ragged)
    save(tmp_path / "state", state)
    loaded = load(tmp_path / "state")
    assert_equal(loaded, state)
    assert np.asarray(lj.overflowed(loaded)).any()
    assert_goes_on(loaded, state)


@pytest.mark.parametrize("group, count", [(3, 65), (23, 10), (100, 65), (127, 129), (128, 100)])
def test_layers_grown_by_large_or_odd_groups_come_back(tmp_path, group, count):
    """Of one capacity and another they may have as many slots, rounded up to groups and to tiles."""
    state = make(lj.Dynamic(codec=lj.codecs.KIVI(group=group, residual=4)))
    state = lj.update(state, *tokens(0, 2, count), 0)
    save(tmp_path / "state", state)
    assert_equal(load(tmp_path / "state"), state)


V1 = Path(__file__).parent / "fixtures" / "files_v1"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_files_of_version_1_still_load(tmp_path, dtype):
    """Then narrow floats were stored as integers; see fixtures/record_files.py."""
    state = load(V1 / f"{dtype}.safetensors")
    expected = np.load(V1 / f"{dtype}.npz")
    for index, layer in enumerate(state.layers):
        for name, got in zip(("key", "value"), lj.get(state, index), strict=False):
            assert got.dtype == layer.dtype == dtype
            np.testing.assert_array_equal(
                np.asarray(got).view(np.uint8), expected[f"{name}{index}"]
            )
    assert state.layers[0].key.dtype == dtype
    save(tmp_path / "state", state)
    assert_equal(load(tmp_path / "state"), state)
    key = safetensors.numpy.load_file(tmp_path / "state")["layers.0.key"]
    assert key.dtype == dtype


@pytest.mark.parametrize("codec", ["identity", "int4", "kivi"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_of_slots_in_no_whole_tiles_still_load(tmp_path, layout, codec):
    """As older versions wrote them: with the slots that the layout asks for, and no others."""
    state = make(LAYOUTS[layout](CODECS[codec]), ragged=True)
    state = lj.update(state, *tokens(0, 2, 6), 0)
    older = with_slots_of_older_versions(state)
    save(tmp_path / "state", older)
    loaded = load(tmp_path / "state")
    assert_equal(loaded, state)
    assert_goes_on(loaded, older)


def test_prompts_of_version_1_still_load(monkeypatch):
    """Also where decoders now store bits."""
    monkeypatch.setattr(prompt_files, "_model_digest", lambda model: about["model"])
    about = json.loads((V1 / "prompts" / "index.json").read_text())["about"]
    prompts = lj.PromptCache.load(V1 / "prompts", prompt_model(), lj.Static(16), max_bytes=1 << 20)
    assert prompts.lookup([*range(1, 10)]) == 8
    with jax.numpy_dtype_promotion("standard"):  # flax's RMSNorm mixes bfloat16 and float32
        assert prompts.prefill([[*range(1, 10)]]).reused == (8,)


def test_layers_that_differ_and_share(tmp_path):
    specs = [lj.Sliding(4), lj.Shared(0), lj.Static(8, codec=lj.codecs.Int8()), lj.Shared(2)]
    sizes = {"heads": [2, 2, 1, 1], "dim": [4, 4, 8, 8], "value_dim": [3, 3, 8, 8]}
    state = scribbled(make([*specs, lj.Dynamic()], **{k: [*v, 3] for k, v in sizes.items()}))
    save(tmp_path / "state", state)
    loaded = load(tmp_path / "state")
    assert_equal(loaded, state)
    assert (loaded.reads, loaded.owners) == ((0, 0, 1, 1, 2), (0, 2, 4))


@pytest.mark.parametrize("ragged", [False, True], ids=["aligned", "ragged"])
@pytest.mark.parametrize("track", [False, True])
def test_places_come_back(tmp_path, track, ragged):
    state = lj.update(make(lj.Static(8, track=track), ragged=ragged), *tokens(0, 2, 6), 0)
    state = lj.compact(state, jnp.arange(8) % 2 == 0, 0)
    save(tmp_path / "state", state)
    assert_equal(load(tmp_path / "state"), state)
    assert_goes_on(lj.rollback(load(tmp_path / "state"), 0), state)


def aligned(leaf):
    """A copy of a NumPy array that JAX would alias rather than copy."""
    memory = np.zeros(leaf.nbytes + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    copy = memory[begin : begin + leaf.nbytes].view(leaf.dtype).reshape(leaf.shape)
    copy[...] = leaf
    return copy


def test_buffers_stay_free_to_donate(tmp_path, monkeypatch):
    read = files._read
    monkeypatch.setattr(files, "_read", lambda path: jax.tree.map(aligned, read(path)))

    def pointers(tree):
        return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]

    state = make(layers=2)
    save(tmp_path / "state", state)
    loaded = load(tmp_path / "state")
    assert len(set(pointers((state, loaded)))) == 2 * len(jax.tree.leaves(state))
    for one in (state, loaded):
        before = pointers(one.layers[0])
        assert pointers(lj.update(one, *tokens(0, 2, 1), 0, donate=True).layers[0]) == before


def test_sharded_states_are_gathered(tmp_path):
    program = """
import sys, jax, numpy as np, lucid_jax as lj
from lucid_jax.io import checked_file, files
from lucid_jax.cache.codecs import Form, Raw
from lucid_jax.decode import prompt_files
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
state = lj.init_cache(lj.Static(4), num_layers=1, batch_size=4, num_kv_heads=1, head_dim=2)
tokens = np.arange(16, dtype=np.float32).reshape(4, 1, 2, 2)
state = lj.update(state, tokens, tokens, 0)
mesh = Mesh(np.array(jax.devices()), "x")
spread = lambda a: jax.device_put(a, NamedSharding(mesh, P("x") if a.ndim else P()))
sharded = jax.tree.map(spread, state)
assert len(sharded.layers[0].key.sharding.device_set) == 4
files.save(sys.argv[1], sharded)
np.testing.assert_array_equal(files.load(sys.argv[1]).layers[0].key, state.layers[0].key)
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program, str(tmp_path / "state")]
    subprocess.run(command, env={**os.environ, **flags}, check=True)


def test_orbax_takes_a_state_as_any_pytree(tmp_path):
    state = lived(lj.Sliding(9, sinks=3, slack=2, codec=CODECS["kivi"]), 47)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "orbax", jax.eval_shape(lambda: state))
    assert_equal(restored, state)
    assert_goes_on(restored, state)


# --- saving ----------------------------------------------------------------------------------------


def test_the_file_is_plain_safetensors(tmp_path):
    state = make(lj.Static(8, codec=lj.codecs.Int8()))
    previous = os.umask(0o022)
    save(tmp_path / "state", state)
    os.umask(previous)
    assert set(safetensors.numpy.load_file(tmp_path / "state")) == {
        f"layers.0.{name}"
        for name in ("key.codes", "key.scale", "value.codes", "value.scale", "start", "position",
                     "reach", "overflowed")
    }  # fmt: skip
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o644


class Foreign(lj.codecs.Identity):
    """A codec that files do not know."""


def test_what_cannot_be_saved_or_found(tmp_path):
    target = tmp_path / "state"
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda state: save(target, state))(make())
    with pytest.raises(TypeError, match="takes a CacheState, got list"):
        save(target, [make()])
    gone = make()
    lj.update(gone, *tokens(0, 2, 1), 0, donate=True)
    with pytest.raises(RuntimeError, match="donated"):
        save(target, gone)
    with pytest.raises(CacheFileError, match=r"Identity, .*got Foreign\(\).*codecs.register"):
        save(target, make(lj.Static(8, codec=Foreign())))
    for state in (
        jax.eval_shape(lambda: make()),
        jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), make()),
        jax.tree.map(lambda leaf: leaf.astype(jnp.int16), make()),
        make().with_layers(layer.replace(reach=layer.reach - 1) for layer in make().layers),
    ):
        with pytest.raises(CacheFileError, match=r"cannot save to .*state: .*; save states as"):
            save(target, state)
    with pytest.raises(FileNotFoundError):
        save(tmp_path / "none" / "state", make())
    with pytest.raises(FileNotFoundError, match="none"):
        load(tmp_path / "none")
    with pytest.raises(CacheFileError, match="expected a file"):
        load(tmp_path)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch, step, error):
    state = make()
    save(tmp_path / "state", state)

    def fail(*args, **_):
        if step == "write":
            args[1].write_bytes(b"half")
        raise error("no space left")

    module, name = (safetensors.numpy, "save_file") if step == "write" else (os, step)
    monkeypatch.setattr(module, name, fail)
    with pytest.raises(error, match="no space left"):
        save(tmp_path / "state", scribbled(state))
    assert os.listdir(tmp_path) == ["state"]
    assert_equal(load(tmp_path / "state"), state)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o400, 0o666])
def test_a_file_keeps_its_mode(tmp_path, mode):
    """A private file stays private, while it is written too."""
    state, target = make(), tmp_path / "state"
    save(target, state)
    target.chmod(mode)
    modes = []
    with checked_file.replacing(target) as temporary:
        modes.append(temporary.stat().st_mode & 0o777)
        temporary.write_bytes(target.read_bytes())
    save(target, scribbled(state))
    modes.append(target.stat().st_mode & 0o777)
    assert modes == [0o600, mode]
    assert_equal(load(target), scribbled(state))


@pytest.mark.parametrize("there", [True, False], ids=["named file exists", "dangling"])
def test_a_symbolic_link_is_followed(tmp_path, there):
    """The link stays, through a second link and another folder too; its target is replaced."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    if there:
        save(folder / "state", make())
        (folder / "state").chmod(0o600)
    (tmp_path / "link").symlink_to("elsewhere/state")
    (tmp_path / "again").symlink_to("link")
    state = scribbled(make())
    save(tmp_path / "again", state)
    assert (tmp_path / "again").is_symlink() and (tmp_path / "link").is_symlink()
    assert os.listdir(folder) == ["state"] and not (folder / "state").is_symlink()
    assert_equal(load(folder / "state"), state)
    if there:
        assert (folder / "state").stat().st_mode & 0o777 == 0o600


# --- what is no file of ours -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A state, the file it was saved to, and a place to write others."""
    path = tmp_path_factory.mktemp("files") / "state"
    state = lived(lj.Static(8, codec=lj.codecs.Int8(), track=True), 8, ragged=True)
    save(path, state)
    return state, path.read_bytes(), path


def refused(path, content, match="cannot load .*: "):
    path.write_bytes(content)
    with pytest.raises(CacheFileError, match=match):
        load(path)


def resealed(content, *, config=None, text=None, tensors=None, seal=True, **metadata):
    """The file with its parts changed by functions, and a checksum that fits."""
    parts = safetensors.numpy.load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    if config is not None:
        text = lambda old: json.dumps(config(json.loads(old)))  # noqa: E731
    header["config"] = header["config"] if text is None else text(header["config"])
    parts = parts if tensors is None else tensors(parts)
    if seal:
        header["sha256"] = checked_file.digest(header["config"], parts)
    changed = {**header, **metadata}
    return safetensors.numpy.save(parts, {k: v for k, v in changed.items() if v is not None})


@given(st.binary(max_size=200), st.booleans())
def test_random_bytes(saved, content, framed):
    refused(saved[2], (len(content).to_bytes(8, "little") if framed else b"") + content)


@settings(max_examples=100)
@given(st.data())
def test_truncation(saved, data):
    content = saved[1]
    refused(saved[2], content[: data.draw(st.integers(0, len(content) - 1))])
    refused(saved[2], content + b"\0")


@settings(max_examples=400)
@given(st.data())
def test_flipped_bits(saved, data):
    state, content, path = saved
    # As many in the header as in the tensors.
    end = 8 + int.from_bytes(content[:8], "little")
    at = data.draw(st.one_of(st.integers(0, end - 1), st.integers(end, len(content) - 1)))
    flipped = bytearray(content)
    flipped[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(flipped)
    try:
        loaded = load(path)
    except CacheFileError:
        return
    assert at < end
    assert_equal(loaded, state)


NUMBERS = [-1, 1, 2, 9, 2**31 - 1, 2**31, 2**63, -(2**70), 10**100, 1.0, float("nan"), True, False]
WORDS = ["Static", "Sliding", "KIVI", "Int4", "float64", "uint8", "os.system", "\ud800", "", None]
VALUES = st.sampled_from([*NUMBERS, *WORDS, [], {"class": "Int8", "rotate": True}])


def edited(config, data):
    """The description with one thing in it replaced, removed or added."""
    parent, key = [config], 0
    while isinstance(inner := parent[key], (dict, list)) and inner and data.draw(st.integers(0, 5)):
        keys = list(inner) if isinstance(inner, dict) else range(len(inner))
        parent, key = inner, data.draw(st.sampled_from(keys))
    edit = data.draw(st.sampled_from(["replace", "remove", "add"]))
    if edit == "replace" or not isinstance(parent, dict):
        new = data.draw(VALUES)
        if isinstance(parent, list) and parent[0] is config:
            return new
        parent[key] = new
    elif edit == "remove":
        del parent[key]
    else:
        parent["more"] = 1
    return config


@settings(max_examples=400)
@given(st.data(), st.booleans())
def test_edited_descriptions(saved, data, sealed):
    """No edit ends in another error, and none goes through if it did not forge the checksum."""
    state, content, path = saved
    path.write_bytes(resealed(content, config=lambda config: edited(config, data), seal=sealed))
    try:
        loaded = load(path)
    except CacheFileError:
        return
    assert sealed or jax.tree.structure(loaded) == jax.tree.structure(state)
    # What goes through is a state all the same: of the same tensors, understood otherwise.
    assert_equal(jax.tree.leaves(loaded), jax.tree.leaves(state))
    lj.get(loaded, 0)


def layer(**changes):
    return lambda config: {**config, "layers": [{**config["layers"][0], **changes}]}


def spec(**changes):
    return lambda config: layer(spec={**config["layers"][0]["spec"], **changes})(config)


def top(**changes):
    return lambda config: {**config, **changes}


NONE = {"class": "Identity"}
KIVI = {"class": "KIVI", "group": 2, "residual": 2, "channels": 4, "rotate": False}
DYNAMIC = {"class": "Dynamic", "track": True, "codec": NONE}
EDITS = [
    (spec(capacity=9), "expected 16 slots"),
    (lambda config: layer(slots=9)(spec(capacity=9)(config)), r"be I8 \(2, 2, 9, 4\)"),
    (spec(codec=NONE), "tensors are not those"),
    (spec(codec={"class": "Float8", "rotate": False}), "key.codes to be U8"),
    (spec(codec={"class": "Simulated", "inner": {"class": "Simulated"}}), "inner to be one of"),
    (spec(codec={"class": "os.system"}), "one of Identity, Bits"),
    (spec(codec=KIVI), "track=True, and so compact, needs"),
    (layer(spec={"class": "Chunk"}), "one of Static, Dynamic, Sliding"),
    (layer(spec=DYNAMIC, slots=96), "expected 64 slots"),
    (spec(capacity=-8), r"capacity to be an integer in \[0"),
    (spec(capacity=0), "capacity of Static"),
    (spec(capacity=True), "capacity to be an integer"),
    (layer(slots=8.0), "slots to be an integer"),
    (layer(head_dim=2**64), "head_dim to be an integer"),
    (layer(head_dim=2**31 - 1), "more than a file of"),
    (spec(capacity=2**31 - 1), "slots"),
    (layer(dtype="object"), "token dtype"),
    (layer(dtype="float64"), "jax_enable_x64"),
    (spec(track=1), "track to be true or false"),
    (layer(tracked=False), "tracked=False does not go with"),
    (top(ragged=False), r"start to be I32 \(\)"),
    (top(batch_size=1), r"\(1, 2, 8, 4\)"),
    (top(layers=[]), "layers to be a list"),
    (top(reads=[1]), "reads no layer"),
    (top(owners=[0, 0]), "owned by one that reads it"),
    (top(more=1), "described by"),
]


@pytest.mark.parametrize("config, match", EDITS, ids=[match for _, match in EDITS])
def test_forged_descriptions(saved, config, match):
    refused(saved[2], resealed(saved[1], config=config), match)


def tensor(name, value, dtype=np.int32):
    return lambda parts: {**parts, f"layers.0.{name}": np.asarray(value).astype(dtype)}


def test_forged_parts(saved):
    _, content, path = saved
    for metadata, match in [
        ({"format": None}, "not a lucid_jax cache file: .* got None; name a file"),
        ({"version": "3"}, "expected format version 2, got '3'; .*update the package"),
        ({"sha256": None}, "expected metadata"),
    ]:
        refused(path, resealed(content, **metadata), match)
    refused(path, safetensors.numpy.save({"a": np.zeros(2)}), "not a lucid_jax cache file")
    rotated = spec(codec={"class": "Int8", "rotate": True})
    refused(path, resealed(content, config=rotated, seal=False), "expected contents of checksum")
    for text in ("{", "[" * 100_000, "9" * 5000):
        refused(path, resealed(content, text=lambda _, text=text: text), "JSON")
    for tensors, match in [
        (lambda parts: {**parts, "more": np.zeros(1)}, r"0 missing \[\], 1 unknown \['more'\]"),
        (lambda parts: dict(list(parts.items())[1:]), "1 missing"),
        (tensor("reach", [8, 8], np.uint32), "layers.0.reach to be I32"),
        (tensor("reach", [8, 8, 8]), r"reach to be I32 \(2,\)"),
        (tensor("reach", [8, 5]), "layer 0 cannot be"),
        (tensor("start", [0, -1]), "layer 0 cannot be"),
        (tensor("start", [0, 7]), "layer 0 cannot be"),
        (tensor("start", [-(2**31), 0]), "layer 0 cannot be"),
        (tensor("position", [9, 6]), "layer 0 cannot be"),
        (lambda parts: tensor("reach", [9, 9])(tensor("position", [9, 6])(parts)), "cannot be"),
        (tensor("places.floor", [0, 7]), "layer 0 cannot be"),
        (tensor("places.position", np.full((2, 2, 8), 6)), "layer 0 cannot be"),
        (tensor("places.position", np.full((2, 2, 8), -1)), "layer 0 cannot be"),
    ]:
        refused(path, resealed(content, tensors=tensors), match)
    parts = safetensors.numpy.load(content)
    parts["layers.0.overflowed"] = np.array([0, 2], np.uint8).view(bool)
    refused(path, resealed(content, tensors=lambda _: parts), "0 or 1")


def test_no_rotation_is_built_for_a_file(tmp_path, monkeypatch):
    """A head as wide as a small file is long would have a matrix of its square."""
    path = tmp_path / "state"
    save(path, make(lj.Static(1, codec=lj.codecs.Int8()), dim=96))
    rotated = spec(codec={"class": "Int8", "rotate": True})
    path.write_bytes(resealed(path.read_bytes(), config=rotated))
    monkeypatch.setattr("lucid_jax.cache.codecs.rotation.hadamard", None)
    assert load(path).layers[0].spec.codec.rotate


# --- codecs and layouts of one's own -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TopHalf(Form):
    """The upper 16 bits of float32 tokens."""

    def encode(self, tokens):
        bits = jax.lax.bitcast_convert_type(tokens.astype(jnp.float32), jnp.uint32)
        return (bits >> 16).astype(jnp.uint16)

    def decode(self, stored):
        bits = stored.astype(jnp.uint32) << 16
        return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class Truncated(lj.codecs.Codec):
    """Keys whole or by their upper halves, values by these."""

    keys: bool = True

    def forms(self, dtype, head_dim, value_head_dim):
        key = TopHalf(dtype, head_dim) if self.keys else Raw(dtype, head_dim)
        return key, TopHalf(dtype, value_head_dim)


@pytest.fixture
def truncated(monkeypatch):
    """The codec above, registered for one test."""
    monkeypatch.setitem(lj.codecs.CODECS, "Truncated", Truncated)


@pytest.mark.parametrize("layout", ["static", "sliding"])
def test_a_codec_from_outside(tmp_path, truncated, layout):
    """A form for keys, one for values: verbs, attention, files and exported functions take it."""
    spec = LAYOUTS[layout](Truncated())
    state, exact = lived(spec, 14), lived(LAYOUTS[layout](lj.codecs.Identity()), 14)
    assert state.layers[0].key.dtype == jnp.uint16
    for x, y in zip(lj.get(state, 0)[:2], lj.get(exact, 0)[:2], strict=True):
        np.testing.assert_allclose(x, y, rtol=2**-7)
    query = queries(0, 2, 1)
    out = lj.attend(state, query, 0)
    assert 0 < np.abs(out - lj.attend(exact, query, 0)).max() < 0.05
    save(tmp_path / "state", state)
    assert_equal(load(tmp_path / "state"), state)
    exported = jax.export.export(jax.jit(lambda state: lj.attend(state, query, 0)))(state)
    read = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(read.call(state), out)


def test_a_file_of_a_codec_that_is_not_there_says_to_import_it(tmp_path, truncated, monkeypatch):
    save(tmp_path / "state", make(lj.Static(4, Truncated())))
    monkeypatch.delitem(lj.codecs.CODECS, "Truncated")
    with pytest.raises(CacheFileError, match=r"'Truncated'.*import its module first"):
        load(tmp_path / "state")


def test_what_files_cannot_name_says_how(tmp_path, truncated):
    """Another class of a name that is taken, one that is not registered, fields that are not counts."""

    @dataclasses.dataclass(frozen=True)
    class Scaled(Truncated):
        by: float = 1.0

    with pytest.raises(ValueError, match="there is a codec 'Int8' already"):
        lj.codecs.register(type("Int8", (Truncated,), {}))
    assert lj.codecs.register(Truncated) is Truncated  # again, as a notebook's cell does
    state = make(lj.Static(4, Scaled()))
    with pytest.raises(CacheFileError, match=r"codecs\.register"):
        save(tmp_path / "state", state)
    lj.codecs.register(Scaled)
    try:
        with pytest.raises(CacheFileError, match=r"annotated int, bool or Codec, got by: .*float"):
            save(tmp_path / "state", state)
    finally:
        del lj.codecs.CODECS["Scaled"]
