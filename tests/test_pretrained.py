"""`load_pretrained`: what transformers recorded of a tiny model of each family, and bad checkpoints.

`fixtures/record.py`, and `record_family_beams.py` beside it, say what was recorded and how; these tests
need neither torch nor transformers.
"""

import functools
import json
import shutil
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import lucid_jax as lj
from lucid_jax.decode import generate, generate_uncached, unpad
from lucid_jax.models import CheckpointError, ModelConfig, load_pretrained
from lucid_jax.models import weights as weights_module
from lucid_jax.models.checkpoint import save_model
from lucid_jax.models.families import FAMILIES
from tests.helpers import check_beams, recorded_beams

FIXTURES = Path(__file__).parent / "fixtures" / "pretrained"
NAMES = sorted(path.name for path in FIXTURES.iterdir())
STEPS = 32


@functools.cache
def loaded(name):
    """A recorded model, its parts, and what transformers says of it."""
    model, tokenizer = load_pretrained(FIXTURES / name)
    assert tokenizer is None
    return (
        model,
        nnx.split(model),
        safetensors.numpy.load_file(FIXTURES / name / "expected.safetensors"),
    )


@functools.partial(jax.jit, static_argnums=0)
def prefill_and_steps(graph, params, cache, tokens, lengths, forced):
    """Logits of a padded batch of prompts, then of each forced token, one step of a scan each."""
    model = nnx.merge(graph, params)
    prefill, cache = model(tokens, cache, lengths=lengths)

    def step(cache, token):
        logits, cache = model(token[:, None], cache, lengths=jnp.ones_like(lengths))
        return cache, logits[:, 0]

    cache, steps = jax.lax.scan(step, cache, forced.T)
    return prefill, steps.swapaxes(0, 1), cache


def check_logits(name, spec):
    """Prefill and 32 cached steps of a ragged batch agree with transformers' padded one."""
    model, (graph, params), expected = loaded(name)
    tokens, lengths = expected["tokens"], expected["lengths"]
    cache = model.init_cache(spec, len(tokens), ragged=True)
    prefill, steps, cache = prefill_and_steps(
        graph, params, cache, tokens, lengths, expected["forced"]
    )
    assert not bool(jnp.any(lj.overflowed(cache)))
    real = np.arange(tokens.shape[1]) < lengths[:, None]
    assert steps.shape[1] == STEPS
    np.testing.assert_allclose(
        np.asarray(prefill)[real], expected["prefill"][real], atol=1e-4, rtol=0
    )
    np.testing.assert_allclose(steps, expected["steps"], atol=1e-4, rtol=0)


EVERYDAY = (
    "gemma3",
    "gpt2",
    "llama3",
    "qwen2",
    "qwen3",
)  # whatever makes a family differ is in these


@pytest.mark.whole
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in EVERYDAY else [pytest.mark.exhaustive]) for n in NAMES],
)
def test_logits_are_transformers(name):
    """In the caches that the model asks for: rings of 8 where it has windows."""
    model = loaded(name)[0]
    spec = model.cache_spec(12 + STEPS)
    assert [isinstance(x, lj.Sliding) for x in spec] == [w == 8 for w in model.windows]
    check_logits(name, spec)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_transformers_in_static_caches(name):
    """The window is the model's, not the cache's."""
    check_logits(name, lj.Static(12 + STEPS))


def recorded_prompts(expected):
    """The 50 prompts as rows, and the tokens that transformers adds to them."""
    rows = [
        [row[:n].tolist() for row, n in zip(expected[a], expected[b], strict=True)]
        for a, b in (("prompts", "prompt_lengths"), ("greedy", "greedy_lengths"))
    ]
    assert len(rows[0]) == 50
    return rows


def check_greedy(name, run=generate, **options):
    model, _, expected = loaded(name)
    prompts, added = recorded_prompts(expected)
    new = expected["greedy"].shape[1]
    result = run(
        model, prompts, max_new_tokens=new, stop_tokens=model.config.eos_token_ids, **options
    )
    assert result.rows() == added
    return result


def test_greedy_is_transformers_on_rings():
    """50 prompts of unequal length, on rings for the layers with a window, which is the default."""
    cache = check_greedy("gemma3").cache
    assert [lj.capacity(cache, i) for i in range(3)] == [8, 256, 8]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
def test_greedy_is_transformers(name):
    """50 prompts: on the default caches, on static ones, and without a cache."""
    check_greedy(name)
    check_greedy(name, cache=lj.Static(37))
    check_greedy(name, generate_uncached)


THREE_BEAMS, NEVER = (1, 2, 3), 5  # settings: those that compile one program; 4 beams to the end


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_beams_are_transformers_by_row_and_in_a_tree(name):
    """All hypotheses of 50 prompts: on reordered rings, and in one row at learned positions."""
    model = loaded(name)[0]
    results = [check_beams(model, *recorded_beams(FIXTURES / name), index) for index in THREE_BEAMS]
    assert {result.history for result in results} == {"reorder" if name == "gemma3" else "tree"}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
def test_beams_are_transformers(name):
    """Every setting, in the caches that the model asks for; beams move after windows of 8 are full."""
    model = loaded(name)[0]
    recorded, expected = recorded_beams(FIXTURES / name)
    assert len({json.dumps(case) for case in recorded["cases"]}) == 8
    lengths = np.array([len(prompt) for prompt in recorded["prompts"]])
    for index, case in enumerate(recorded["cases"]):
        result = check_beams(model, recorded, expected, index)
        assert result.history == ("reorder" if any(model.windows) else "tree")
        moved = result.parents != np.arange(case["num_beams"])  # (S, B, W)
        stored = lengths[None] + np.arange(len(moved))[:, None]
        assert moved[(stored > 8) & (stored > lengths)].sum() > 100


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
def test_beams_are_transformers_however_the_past_is_kept(name):
    """As a tree where there can be one, by moving what parted, or all; windows also without rings."""
    model = loaded(name)[0]
    recorded = recorded_beams(FIXTURES / name)
    histories = ("reorder", "gather") if any(model.windows) else ("tree", "reorder", "gather")
    for history in histories:
        assert check_beams(model, *recorded, NEVER, history=history).history == history
    if any(model.windows):
        check_beams(model, *recorded, NEVER, cache=lj.Static(14 + 16))


def test_the_fixtures_cover_every_family():
    """And small: what is recorded ships with the source."""
    assert {loaded(name)[0].config.model_type for name in NAMES} == set(FAMILIES)
    assert sum(path.stat().st_size for path in FIXTURES.rglob("*") if path.is_file()) < 1_550_000


@pytest.mark.parametrize("name", NAMES)
def test_a_config_survives_writing(name):
    """What `to_json` writes is read as the same config."""
    config = loaded(name)[0].config
    assert ModelConfig.from_json(config.to_json()) == config


# --- learned positions ------------------------------------------------------------------------------


def test_positions_that_were_not_learned():
    """GPT-2: refused where lengths are known, NaN where not."""
    model = loaded("gpt2")[0]
    with pytest.raises(ValueError, match="learned 64 positions, and 65 tokens are asked for"):
        generate(model, [[5] * 40], max_new_tokens=26)
    with pytest.raises(ValueError, match="learned 64 positions"):
        generate(model, [[5] * 40], max_new_tokens=26, cache=lj.Static(80))
    logits = dense("gpt2", np.full((1, 66), 7))
    assert not np.isnan(logits[:, :64]).any() and np.isnan(logits[:, 64:]).all()


def dense(name, tokens):
    """Logits without a cache."""
    _, (graph, params), _ = loaded(name)
    return jax.jit(lambda p, t: nnx.merge(graph, p)(t))(params, np.asarray(tokens, np.int32))


def test_given_positions_and_masks_reach_learned_positions():
    """A branch stored after another, at the positions of a text of its own, is that text."""
    model, (graph, params), _ = loaded("gpt2")
    cache = model.init_cache(lj.Static(6), 1, ragged=True)
    prompt, left, right = [9, 8], [7, 6], [5, 4]
    positions = np.array([0, 1, 2, 3, 2, 3], np.int32)
    query, slot = np.ogrid[:6, :6]
    seen = (query >= slot) & ~((query >= 4) & (slot >= 2) & (slot < 4))

    @jax.jit
    def branches(params, cache, tokens):
        options = {"positions": jnp.asarray(positions), "mask": jnp.asarray(seen)}
        return nnx.merge(graph, params)(tokens, cache, lengths=jnp.array([6]), **options)[0]

    logits = branches(params, cache, np.array([prompt + left + right], np.int32))
    alone = dense("gpt2", [prompt + right])
    np.testing.assert_allclose(logits[:, 4:], alone[:, 2:], atol=1e-5)


# --- reading ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A copy of the recorded Llama, without what transformers said."""
    return copy_of("llama", tmp_path)


def copy_of(name, path):
    folder = path / name
    shutil.copytree(FIXTURES / name, folder)
    for file in ("expected.safetensors", "beams.json", "beams.npz"):
        (folder / file).unlink()
    return folder


def change_config(folder, file="config.json", **changes):
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder, change):
    """Rewrites the tensors as `change` returns them."""
    path = folder / "model.safetensors"
    safetensors.numpy.save_file(change(safetensors.numpy.load_file(path)), path)


def shard(folder, parts=3):
    """Cuts model.safetensors into parts with an index, as large checkpoints come."""
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    path.unlink()
    table = {}
    for part in range(parts):
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        names = sorted(tensors)[part::parts]
        safetensors.numpy.save_file({name: tensors[name] for name in names}, folder / file)
        table |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


def assert_same_weights(model, other):
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(other))


def test_parts_with_an_index(folder):
    """Several files are read as one."""
    shard(folder)
    assert_same_weights(load_pretrained(folder)[0], loaded("llama")[0])


def test_tensors_are_read_one_at_a_time(folder, monkeypatch):
    """Each once, and the host never holds more than a few of the largest beside the model."""
    change_config(folder, vocab_size=20_000, bos_token_id=None)
    wide = np.random.default_rng(0).standard_normal((20_000, 32), np.float32)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    change_tensors(
        folder, lambda t: {n: wide if n in names else np.resize(x, x.shape) for n, x in t.items()}
    )
    shard(folder)
    reads, real = [], weights_module.safe_open

    class Counting:
        def __init__(self, path, framework):
            self.file = real(path, framework=framework)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            reads.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(weights_module, "safe_open", Counting)
    tracemalloc.start()
    try:
        model, _ = load_pretrained(folder, jnp.bfloat16)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sorted(reads) == sorted(
        safetensors.numpy.load_file(FIXTURES / "llama" / "model.safetensors")
    )
    assert model.embed_tokens.embedding.dtype == jnp.bfloat16
    # JAX on CPU may use the converted arrays as they are, so the model counts; of what was read, one.
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))
    assert peak < held + 1.3 * wide.nbytes < 2 * wide.nbytes + held


def test_stored_in_bfloat16(folder):
    """Weights are what the file holds, in the dtype asked for."""
    change_tensors(folder, lambda t: {n: x.astype(jnp.bfloat16) for n, x in t.items()})
    rounded = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), nnx.state(loaded("llama")[0])
    )
    model, _ = load_pretrained(folder)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), rounded)
    narrow, _ = load_pretrained(folder, jnp.bfloat16)
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x.astype(jnp.float32), y),
        nnx.state(narrow),
        rounded,
    )


@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_computing_in_bfloat16(name):
    """Norms, scaled embeddings and learned positions keep to the compute dtype."""
    model, _ = load_pretrained(FIXTURES / name, jnp.bfloat16)
    graph, params = nnx.split(model)
    tokens, expected = (loaded(name)[2][key][:1] for key in ("tokens", "prefill"))
    hidden = jax.jit(lambda p, t: nnx.merge(graph, p).hidden(t)[0])(params, tokens)
    assert hidden.dtype == jnp.bfloat16
    logits = jax.jit(model.logits)(hidden)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=0.1 * np.abs(expected).max(), rtol=0)


def test_arguments_that_make_no_model(folder):
    """A dtype to compute in, and a length to keep."""
    with pytest.raises(
        ValueError, match="dtype must be floating point, such as bfloat16, got int8"
    ):
        load_pretrained(folder, jnp.int8)
    model = loaded("mistral")[0]
    for length, error in ((None, TypeError), ("8", TypeError), (0, ValueError)):
        with pytest.raises(error, match="max_length"):
            model.cache_spec(length)


def test_tied_heads(folder):
    """A head stored beside tied embeddings is ignored; an untied one is needed."""
    change_config(folder, tie_word_embeddings=True)
    model, _ = load_pretrained(folder)
    assert model.lm_head is None
    change_tensors(folder, lambda t: {n: x for n, x in t.items() if n != "lm_head.weight"})
    assert_same_weights(load_pretrained(folder)[0], model)
    change_config(folder, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"1 are missing \['lm_head.weight'\]"):
        load_pretrained(folder)


def test_gpt2_as_it_is_on_the_hub(tmp_path):
    """Without the wrapper's name, and with the causal masks that old writers stored."""
    folder = copy_of("gpt2", tmp_path)

    def change(tensors):
        tensors = {name.removeprefix("transformer."): x for name, x in tensors.items()}
        return {**tensors, "h.0.attn.bias": np.tri(64, dtype=np.float32)[None, None]}

    change_tensors(folder, change)
    assert_same_weights(load_pretrained(folder)[0], loaded("gpt2")[0])


def test_the_text_model_of_a_multimodal_gemma(tmp_path):
    """As gemma-3-4b comes: old keys, sparse, and weights that see images beside."""
    folder = copy_of("gemma3", tmp_path)
    text = json.loads((folder / "config.json").read_text())
    dropped = ("rope_parameters", "layer_types", "tie_word_embeddings", "eos_token_id")
    text = {key: value for key, value in text.items() if key not in dropped}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window_pattern": 2}
    outer = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1}}
    (folder / "config.json").write_text(json.dumps({**outer, "eos_token_id": [2, 3]}))

    def change(tensors):
        tensors = {f"language_model.{name}": x for name, x in tensors.items()}
        return {**tensors, "vision_tower.patch.weight": np.ones(3, np.float32)}

    change_tensors(folder, change)
    model, _ = load_pretrained(folder)
    assert model.config == loaded("gemma3")[0].config
    assert_same_weights(model, loaded("gemma3")[0])


def test_end_tokens_come_from_generation_config(folder):
    """It has the last word, as in `transformers.generate`; without it config.json has."""
    change_config(folder, "generation_config.json", eos_token_id=[7, 8, 9], bos_token_id=4)
    config = load_pretrained(folder)[0].config
    assert (config.eos_token_ids, config.bos_token_id) == ((7, 8, 9), 4)
    (folder / "generation_config.json").unlink()
    assert load_pretrained(folder)[0].config.eos_token_ids == (2, 3)


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_other_families_survive_saving(tmp_path, name):
    """Fused and differently named tensors are written as they were read."""
    tokenizers = pytest.importorskip("lucid_jax.models.tokenizer")
    model = loaded(name)[0]
    tokenizer = tokenizers.Tokenizer(small_tokenizer("byte-level", vocab_size=90))
    save_model(tmp_path, model, tokenizer)
    again, _ = load_pretrained(tmp_path)
    assert again.config == model.config
    assert_same_weights(again, model)
    ours = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    theirs = safetensors.numpy.load_file(FIXTURES / name / "model.safetensors")
    assert {n: x.shape for n, x in ours.items()} == {n: x.shape for n, x in theirs.items()}


# --- configs ----------------------------------------------------------------------------------------


def test_windows_in_old_configs():
    """Switches and patterns that stood for `layer_types` before."""
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4,
    }  # fmt: skip

    def windows(kind, **values):
        return ModelConfig.from_json(json.dumps({**sizes, "model_type": kind, **values})).windows

    assert windows("mistral", sliding_window=None) == (None,) * 4
    assert windows("mistral") == (4096,) * 4  # transformers' default
    qwen = {"sliding_window": 6, "max_window_layers": 3}
    assert windows("qwen2", **qwen) == (None,) * 4
    assert windows("qwen2", **qwen, use_sliding_window=False) == (None,) * 4
    assert windows("qwen2", **qwen, use_sliding_window=None) == (None,) * 4
    assert windows("qwen2", sliding_window=6) == (None,) * 4  # off by default
    assert windows("qwen3", **qwen, use_sliding_window=True) == (None, None, None, 6)
    on = {"use_sliding_window": True}  # from layer 28, of 4096 tokens, by default
    assert windows("qwen2", **on, num_hidden_layers=30) == (None,) * 28 + (4096,) * 2
    assert (
        windows("mistral", sliding_window=6, use_sliding_window=False) == (6,) * 4
    )  # unknown to it
    assert windows("gemma2", sliding_window=6) == (6, None, 6, None)
    gemma = {"num_hidden_layers": 7, "sliding_window": 6}
    assert windows("gemma3_text", **gemma) == (6,) * 5 + (None, 6)
    assert windows("gemma3_text", **gemma, sliding_window_pattern=3) == (6, 6, None) * 2 + (6,)
    assert windows("llama", sliding_window=6) == (None,) * 4  # Llama has none


def test_old_and_new_keys_of_scaled_positions():
    """`rope_scaling` beside `rope_theta` and `rope_parameters` say the same; YaRN's two scales too."""
    text = (FIXTURES / "llama3" / "config.json").read_text()
    values = json.loads(text)
    table = values.pop("rope_parameters")
    theta = table.pop("rope_theta")
    old = {**values, "rope_theta": theta, "rope_scaling": table}
    assert ModelConfig.from_json(json.dumps(old)) == ModelConfig.from_json(text)
    scales = {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5}
    rope = ModelConfig.from_json(json.dumps({**old, "rope_scaling": scales})).rope(0)
    assert rope.attention_scale == pytest.approx((1 + 0.1 * np.log(4)) / (1 + 0.05 * np.log(4)))
    assert rope.scaling.original_max_position_embeddings == values["max_position_embeddings"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"model_type": "mamba"}, "'mamba' model; supported are gemma2"),
        (
            "llama",
            {"hidden_act": "relu2"},
            "hidden_act='relu2' is not supported; supported are silu",
        ),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"kv_lora_rank": 64}, "kv_lora_rank=64"),
        ("llama", {"num_local_experts": 8}, "num_local_experts=8"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "supported are default, linear"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, r"it needs \['factor'\]"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "bend": 1}},
            "has bend for rope_type='linear'",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 0}},
            "factor of LinearScaling",
        ),
        ("llama", {"vocab_size": None}, "vocab_size must be a positive integer"),
        (
            "qwen2",
            {"layer_types": ["full_attention", "chunked_attention"]},
            "layer_types must name",
        ),
        ("qwen2", {"layer_types": ["full_attention"]}, "for each of 2 layers"),
        ("qwen2", {"sliding_window": None}, "there is no sliding_window"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping must be a positive"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False; only True"),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "stretches the rotary positions of layers with a window",
        ),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, name, change, message):
    """Nothing that would change the result is silently ignored."""
    folder = copy_of(name, tmp_path)
    change_config(folder, **change)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(folder)


# --- bad checkpoints --------------------------------------------------------------------------------


def test_an_empty_folder(tmp_path):
    """The first file that is missing is named."""
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_pretrained(tmp_path)


def test_no_weights(folder):
    """Pickles are pointed out, and not read."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"no model\.safetensors.*pytorch_model\.bin holds pick"
    ):
        load_pretrained(folder)


def test_missing_and_truncated_parts(folder):
    """A part that is not there, or cut short, is named."""
    shard(folder)
    path = folder / "model-00002-of-00003.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-7])
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.safetensors is not a complete"):
        load_pretrained(folder)
    path.unlink()
    with pytest.raises(
        CheckpointError, match=r"lacks 1 of the 3 files .* model-00002-of-00003\.safetensors"
    ):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold an object"),
        ('{"weight_map": {}}', "must hold a weight_map"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "name of a file in the same folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "name of a file in the same folder"),
        ('{"weight_map": {"a": ".."}}', "name of a file in the same folder"),
        ('{"weight_map": {"a": 3}}', "name of a file in the same folder"),
        ('{"weight_map": {"a": "part.safetensors"}}', "places 1 tensors in files that do not hold"),
    ],
)
def test_a_bad_index(folder, index, message):
    """An index cannot name files elsewhere, nor tensors that are not there."""
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.astype(np.int8), "should be floating point .* got I8; quantized"),
        (lambda x: x.astype(jnp.float8_e4m3fn), "should be floating point .* got F8_E4M3"),
        (lambda x: x[:-1], r"should have shape \(32,\) by config.json, got \(31,\)"),
        (lambda x: None, r"1 are missing \['model.norm.weight'\]"),
    ],
)
def test_tensors_that_are_not_the_configs(folder, change, message):
    """Type, shape and presence are checked before anything is read."""
    name = "model.norm.weight"

    def replace(tensors):
        tensors[name] = change(tensors[name])
        return {name: x for name, x in tensors.items() if x is not None}

    change_tensors(folder, replace)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(folder)


def test_a_tensor_under_two_names(folder):
    """Which one is meant cannot be known."""
    change_tensors(folder, lambda t: {**t, "norm.weight": 5 * t["model.norm.weight"]})
    with pytest.raises(CheckpointError, match=r"both 'model.norm.weight' and 'norm.weight'"):
        load_pretrained(folder)


def test_tensors_of_another_family(tmp_path):
    """Biases that a config does not ask for are not dropped silently."""
    folder = copy_of("qwen2", tmp_path)
    change_config(folder, model_type="llama")
    with pytest.raises(
        CheckpointError, match=r"6 are not known \['model.layers.0.self_attn.k_proj"
    ):
        load_pretrained(folder)


@pytest.mark.parametrize("content", ['{"eos_token_id": ', "null", "[" * 100_000])
@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "model.safetensors.index.json"]
)
def test_broken_json(folder, file, content):
    """The file is named."""
    if "index" in file:
        (folder / "model.safetensors").unlink()
    (folder / file).write_text(content)
    with pytest.raises(CheckpointError, match=file):
        load_pretrained(folder)


# What a field may hold by mistake.
ODD = ["x", "8", "", -1, 0, True, None, [], [1], [{}], {}, {"a": 1}, 1.5, 10**400, float("inf")]


@pytest.mark.parametrize("name", ["llama", "yarn", "qwen2", "gemma3", "gpt2"])
def test_odd_values_in_a_config(name):
    """Each is accepted or a ValueError of one line, never another exception; so in nested objects."""
    values = json.loads((FIXTURES / name / "config.json").read_text())
    extra = ("rope_scaling", "rope_theta", "sliding_window_pattern", "max_window_layers")
    nested = values.get("rope_parameters", {})
    changes = [{key: odd} for key in {*values, *extra} for odd in ODD]
    changes += [{"rope_parameters": {**nested, key: odd}} for key in nested for odd in ODD]
    changes += [{"rope_parameters": None, "layer_types": None, **change} for change in changes]
    refused = 0
    for change in changes:
        try:
            config = ModelConfig.from_json(json.dumps({**values, **change}))
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
            continue
        for index in (0, config.num_hidden_layers - 1):
            if (rope := config.rope(index)) is not None:
                assert np.isfinite(rope.frequencies(8)).all(), change
                assert np.isfinite(np.float32(rope.attention_scale)), change
    assert refused > len(changes) / 4


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"tie_word_embeddings": "false"}, "must be true or false, got 'false'"),
        ("llama", {"eos_token_id": True}, "eos_token_id must be an integer"),
        ("llama", {"rope_scaling": "linear"}, "an object as rope_scaling, got 'linear'"),
        ("llama", {"hidden_act": ["silu"]}, "hidden_act=.* is not supported"),
        ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps must be a positive number"),
        ("yarn", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0}},
         "theta of Rope must be above 1 for YaRN"),
        ("yarn", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": "x"}},
         "attention_factor of YarnScaling must be a positive number"),
        ("yarn", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": "x"}},
         "mscale and mscale_all_dim must be positive"),
        ("qwen2", {"layer_types": [{}, {}]}, "layer_types must name"),
        ("qwen2", {"layer_types": None, "max_window_layers": "a"}, "max_window_layers must be an"),
        ("gemma3", {"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern must"),
        ("gpt2", {"n_embd": None, "n_inner": None}, "hidden_size must be a positive integer"),
    ],
)  # fmt: skip
def test_wrong_types_are_named(tmp_path, name, change, message):
    """By the key that holds them."""
    folder = copy_of(name, tmp_path)
    change_config(folder, **change)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(folder)


@pytest.mark.parametrize("settings", ["[]", '{"add_bos_token": true, "bos_token": 5}', "{"])
def test_odd_tokenizer_settings(folder, settings):
    """tokenizer_config.json is named, as any other file."""
    small_tokenizer("byte-level", vocab_size=90).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(settings)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        load_pretrained(folder)


# --- tokenizers and the command line -----------------------------------------------------------------


def small_tokenizer(kind, vocab_size=300):
    """A tokenizer of each kind, trained here."""
    tokenizers = pytest.importorskip("tokenizers")
    texts = ["some text about naïve cats, and a list of numbers 1 2 3"] * 3
    if kind == "byte-level":  # GPT-2, Llama 3, Qwen
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        special = ["<|endoftext|>", "<s>", "<|turn|>"]
        if vocab_size < 257:
            alphabet = list(alphabet)[:60]
    else:  # SentencePiece's: Llama 2 adds a space before the text, Gemma does not
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
        spaces = [tokenizers.normalizers.Replace(" ", "▁")]
        if kind == "llama":
            spaces.insert(0, tokenizers.normalizers.Prepend("▁"))
        backend.normalizer = tokenizers.normalizers.Sequence(spaces)
        strip = [tokenizers.decoders.Strip(" ", 1, 0)] if kind == "llama" else []
        backend.decoder = tokenizers.decoders.Sequence(
            [
                tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(),
                tokenizers.decoders.Fuse(), *strip,
            ]
        )  # fmt: skip
        alphabet = []
        special = ["<unk>", "<s>", "<|turn|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special[:3], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(texts, trainer)
    if len(special) > 3:  # the library cannot train single bytes in: write them into the file
        content = json.loads(backend.to_str())
        vocab = content["model"]["vocab"]
        for piece in special[3:]:
            vocab[piece] = len(vocab)
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return backend


TEXTS = ["some text", " two  spaces", "naïve cats", "日本語 🙂 text", "<|turn|> some", "", " "]


@pytest.mark.parametrize("kind", ["byte-level", "llama", "gemma"])
@pytest.mark.parametrize("text", TEXTS)
def test_tokenizers_of_both_kinds(kind, text):
    """Encoding is the library's; text comes back, whole and piece by piece; prompts start with BOS."""
    module = pytest.importorskip("lucid_jax.models.tokenizer")
    backend, plain = small_tokenizer(kind), small_tokenizer(kind)
    tokenizer = module.Tokenizer(backend)
    ids = tokenizer.encode(text)
    assert not {0, 1, 2} & set(ids)  # special tokens in the text are text
    assert tokenizer.decode(ids) == text
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    assert "�" not in "".join(pieces)
    assert "".join(pieces) + stream.flush() == text
    assert tokenizer.encode_prompt(text) == plain.encode(text).ids
    assert tokenizer.encode_prompt(text)[0] == 1 and tokenizer.start == [1]
    if text:
        assert tokenizer.decode(tokenizer.encode_prompt(text)) == plain.decode(
            plain.encode(text).ids, skip_special_tokens=True
        )


def test_what_a_model_adds_keeps_its_first_space():
    """Llama 2's decoder drops the first space of a text, but not that of a continuation."""
    module = pytest.importorskip("lucid_jax.models.tokenizer")
    tokenizer = module.Tokenizer(small_tokenizer("llama"))
    prompt, added = tokenizer.encode_prompt("some"), tokenizer.encode("text")
    assert tokenizer.decode(prompt) == "some" and tokenizer.decode(added) == "text"
    stream = tokenizer.stream(after=prompt)
    assert "".join(map(stream.push, added)) == " text"
    assert tokenizer.decode(prompt + added) == "some text"


def test_added_tokens_of_visible_spaces():
    """Gemma adds tokens for runs of spaces: indented code must not come back as `▁▁▁▁`."""
    module = pytest.importorskip("lucid_jax.models.tokenizer")
    backend = small_tokenizer("gemma")
    backend.add_tokens(["▁▁▁▁", "\n\n"])
    tokenizer = module.Tokenizer(backend)
    ids = [backend.token_to_id("\n\n"), backend.token_to_id("▁▁▁▁"), *tokenizer.encode("some")]
    assert tokenizer.decode(ids) == backend.decode(ids) == "\n\n    some"


def test_bos_as_tokenizer_config_says():
    """`add_bos_token` counts where the post-processor adds nothing, and only there."""
    tokenizers = pytest.importorskip("tokenizers")
    module = pytest.importorskip("lucid_jax.models.tokenizer")
    backend = small_tokenizer("byte-level")
    asked = json.dumps({"add_bos_token": True, "bos_token": {"content": "<s>"}})
    ids = module.Tokenizer(backend).encode("some")
    assert module.Tokenizer.from_json(backend.to_str(), asked).encode_prompt("some") == [1, *ids]
    backend.post_processor = tokenizers.processors.Sequence([])
    assert module.Tokenizer.from_json(backend.to_str(), asked).encode_prompt("some") == [1, *ids]
    assert module.Tokenizer.from_json(backend.to_str()).encode_prompt("some") == ids
    unasked = json.dumps({"add_bos_token": False, "bos_token": "<s>"})
    assert module.Tokenizer.from_json(backend.to_str(), unasked).encode_prompt("some") == ids


def test_a_decoder_that_is_not_known():
    """WordPiece is refused by name."""
    tokenizers = pytest.importorskip("tokenizers")
    module = pytest.importorskip("lucid_jax.models.tokenizer")
    backend = small_tokenizer("byte-level")
    backend.decoder = tokenizers.decoders.WordPiece()
    with pytest.raises(ValueError, match=r"not known \(WordPiece\); known are ByteLevel"):
        module.Tokenizer(backend)


def test_a_tokenizer_with_more_ids_than_the_model(folder):
    """A vocabulary of another model is refused; special tokens added beyond are not."""
    backend = small_tokenizer("byte-level", vocab_size=80)
    backend.add_special_tokens(["<image>"] + [f"<extra{i}>" for i in range(30)])
    backend.save(str(folder / "tokenizer.json"))
    _, tokenizer = load_pretrained(folder)
    assert tokenizer.vocab_size <= 96
    small_tokenizer("byte-level").save(str(folder / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"ids but config\.json says vocab_size=96"):
        load_pretrained(folder)


def test_the_command_line_takes_such_a_folder(tmp_path, capsys):
    """Rings by default where the model has windows; the text is what `generate` gives."""
    from lucid_jax.tools import cli

    folder = copy_of("gemma2", tmp_path)
    small_tokenizer("byte-level", vocab_size=90).save(str(folder / "tokenizer.json"))

    flags = [
        "--max-new-tokens",
        "16",
        "--temperature",
        "0",
        "--repetition-penalty",
        "1",
        "--top-p",
        "1",
    ]
    assert cli.main(["generate", "some text", "--checkpoint", str(folder), *flags]) == 0
    text, figures = capsys.readouterr().out.split("\n\nprefill: ")
    assert "cache:   static and sliding:8," in figures
    model, tokenizer = load_pretrained(folder)
    prompt = tokenizer.encode_prompt("some text")
    stops = model.config.eos_token_ids
    (new,) = generate(model, [prompt], max_new_tokens=16, stop_tokens=stops).rows()
    assert text == tokenizer.decode(prompt + new)


@pytest.mark.exhaustive
def test_commands_that_compare_and_draft_take_such_a_folder(tmp_path, capsys):
    """A tokenizer without `<|endoftext|>`, and windows from which drafts are taken back."""
    from lucid_jax.tools import cli

    folder = copy_of("mistral", tmp_path)
    small_tokenizer("llama").save(str(folder / "tokenizer.json"))
    change_config(folder, vocab_size=600)
    table = np.random.default_rng(0).standard_normal((600, 32), np.float32)
    wide = ("model.embed_tokens.weight", "lm_head.weight")
    change_tensors(folder, lambda t: {n: table if n in wide else x for n, x in t.items()})
    common = ["some text", "--checkpoint", str(folder), "--max-new-tokens", "14"]
    greedy = [*common, "--temperature", "0"]
    plain = ["--repetition-penalty", "1", "--top-p", "1"]
    assert cli.main(["generate", *greedy, *plain, "--draft", "ngram"]) == 0
    drafted = capsys.readouterr().out.split("\n\ndecode: ")[0]
    model, tokenizer = load_pretrained(folder)
    prompt = tokenizer.encode_prompt("some text")
    stops = model.config.eos_token_ids
    (new,) = generate(model, [prompt], max_new_tokens=14, stop_tokens=stops).rows()
    assert drafted == tokenizer.decode(prompt + new)
    assert cli.main(["compare", *greedy, "--caches", "static,sliding:8"]) == 0
    assert "all caches gave the same tokens" in capsys.readouterr().out


# --- padded batches ---------------------------------------------------------------------------------


def test_rows_of_a_padded_batch():
    """Left, right or both; holes are refused."""
    tokens = np.array([[0, 0, 7], [5, 6, 0], [0, 9, 0], [0, 0, 0]])
    assert unpad(tokens, tokens > 0) == [[7], [5, 6], [9], []]
    with pytest.raises(ValueError, match="row 1 of attention_mask has padding between"):
        unpad([[1, 1, 1], [1, 1, 1]], [[1, 1, 1], [1, 0, 1]])
    with pytest.raises(ValueError, match=r"\(batch, seq\), got \(3,\)"):
        unpad([1, 2, 3], [1, 1, 1])


# --- against transformers itself --------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_live_against_transformers(tmp_path, name):
    """New random weights, written in parts by `save_pretrained`, where torch is installed."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(7)
    config = transformers.AutoConfig.from_pretrained(FIXTURES / name)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    theirs = theirs.eval().float()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        theirs.save_pretrained(tmp_path, max_shard_size="40KB")
        tokens = torch.randint(4, 96, (2, 20))
        expected = theirs(tokens).logits.numpy()
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    graph, params = nnx.split(load_pretrained(tmp_path)[0])
    run = jax.jit(lambda p, t: nnx.merge(graph, p)(t))
    logits = run(params, tokens.numpy().astype(np.int32))
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
