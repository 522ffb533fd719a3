"""T5 against transformers, and the encoder's keys: computed once, never moved."""

import dataclasses
import functools
import importlib.util
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from flax import nnx

import lucid_jax as lj
from lucid_jax.decode import Sampling, generate_uncached
from lucid_jax.decode.language_model import split
from lucid_jax.decode.token_loop import LoopSetup, TokenLoop, decode_tokens
from lucid_jax.models import T5, CheckpointError, T5Config, load_model, load_pretrained
from lucid_jax.models.t5 import GivenT5
from lucid_jax.models.t5_distances import relative_buckets
from tests.helpers import USERS_XLA, check_beams, recorded_beams

FIXTURES = Path(__file__).parent / "fixtures"
VERSIONS = ("t5", "t5_v1_1")
SMALL = "t5_v1_1"
SIZES = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 2}


@functools.cache
def model_of(name):
    """A recorded checkpoint in float32; one object, so that programs are compiled once."""
    return load_pretrained(FIXTURES / name)[0]


@functools.cache
def recorded(name):
    """What transformers made of it."""
    return dict(np.load(FIXTURES / name / "recorded.npz"))


@functools.cache
def generated(name):
    """What transformers generated."""
    return json.loads((FIXTURES / name / "generated.json").read_text())


def sources_of(name):
    """The recorded sources without their padding."""
    record = recorded(name)
    return [row[:n].tolist() for row, n in zip(record["source"], record["lengths"], strict=True)]


def _pointers(state):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]


@jax.jit
def logits(given, tokens, cache, lengths=None, positions=None, mask=None):
    """One compiled step; recompiled for other shapes."""
    hidden, cache = given.hidden(tokens, cache, lengths=lengths, positions=positions, mask=mask)
    return given.logits(hidden), cache


@pytest.fixture(scope="module")
def given():
    """The smaller recorded model after its recorded sources; its buckets end within the texts."""
    return model_of(SMALL).given(sources_of(SMALL))


@pytest.fixture(scope="module")
def decoder():
    """Recorded decoder tokens, int32 (3, 38)."""
    return jnp.asarray(recorded(SMALL)["decoder"])


@pytest.fixture(scope="module")
def want():
    """Recorded logits, (3, 38, V)."""
    return recorded(SMALL)["logits"]


# --- agreement with transformers -----------------------------------------------------------------


@pytest.mark.parametrize("name", VERSIONS)
def test_encoder_agrees(name):
    """Right-padded sources of 9, 30 and 4 tokens."""
    record = recorded(name)
    encoded = jax.jit(T5.encode)(model_of(name), record["source"], record["lengths"])
    for row, want, length in zip(encoded, record["encoded"], record["lengths"], strict=True):
        np.testing.assert_allclose(row[:length], want[:length], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", VERSIONS)
def test_logits_agree_at_prefill_and_every_cached_step(name):
    """Six tokens at once, padded to twelve, then 32 one by one."""
    record = recorded(name)
    tokens = jnp.asarray(record["decoder"])
    given = model_of(name).given(sources_of(name))
    cache = given.init_cache(lj.Static(40), 3, ragged=True)
    prefill, cache = logits(given, tokens[:, :12], cache, np.full(3, 6, np.int32))
    steps = [prefill[:, :6]]
    for i in range(6, 38):
        step, cache = logits(given, tokens[:, i : i + 1], cache)
        steps.append(step)
    np.testing.assert_allclose(np.concatenate(steps, 1), record["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", VERSIONS)
def test_greedy_texts_are_those_of_transformers(name):
    """50 random sources in one batch."""
    want = generated(name)
    given = model_of(name).given(want["prompts"])
    before = _pointers(given.encoder.get_value())
    result = lj.generate(
        given, given.prompts, max_new_tokens=want["max_new_tokens"], stop_tokens=[1]
    )
    assert _pointers(given.encoder.get_value()) == before
    assert len(want["greedy"]) == 50
    assert result.rows() == want["greedy"]


def _check_beams(name, index, **options):
    recorded, expected = recorded_beams(FIXTURES / name)
    given = model_of(name).given(recorded["prompts"])
    before = _pointers(given.encoder.get_value())
    asked = recorded | {"prompts": given.prompts}
    result = check_beams(given, asked, expected, index, **options)
    assert _pointers(given.encoder.get_value()) == before
    return result


def test_beams_are_those_of_transformers():
    """50 sources, three settings of one program; the beams are branches in one row per source."""
    for index in (1, 2, 3):
        assert _check_beams(SMALL, index).history == "tree"


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", VERSIONS)
def test_beams_are_those_of_transformers_in_every_setting(name):
    """Widths, penalties, stop tokens and meanings of `early_stopping`."""
    assert len(recorded_beams(FIXTURES / name)[0]["cases"]) == 8
    for index in range(8):
        _check_beams(name, index)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize("history", ["reorder", "gather"])
def test_beams_are_those_of_transformers_however_the_past_is_kept(name, history):
    """In rows of their own, which share a source, to the end."""
    assert _check_beams(name, 5, history=history).history == history


@pytest.mark.exhaustive
@pytest.mark.parametrize("draft", ["n-grams", "model", "tree"])
def test_speculation_gives_the_greedy_texts(draft):
    """Drafts of another model, in a row and as a tree, are taken back in the decoder's cache alone."""
    want = generated(SMALL)
    given, other = (model_of(name).given(want["prompts"]) for name in (SMALL, "t5"))
    drafts = {"n-grams": lj.NGram(), "model": other, "tree": lj.Tree(other, (2, 2, 1))}
    result = lj.speculate(
        given, given.prompts, draft=drafts[draft], max_new_tokens=24, stop_tokens=[1]
    )
    assert result.rows() == want["greedy"]


def test_a_new_random_model_agrees_with_transformers(tmp_path):
    """Other sizes than the recorded: one head, few buckets, three decoder layers."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("record_t5", FIXTURES / "record_t5.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    config = script.SIZES | script.VERSIONS["t5_v1_1"]
    config |= {"num_heads": 1, "d_kv": 6, "num_decoder_layers": 3}
    config |= {"relative_attention_num_buckets": 6, "relative_attention_max_distance": 11}
    theirs = script.random_model(config, seed=3)
    script.save(theirs, config, tmp_path)
    ours = load_pretrained(tmp_path)[0]
    ids, mask = script.padded([[5, 6, 7], list(range(2, 22))])
    tokens = np.random.default_rng(0).integers(2, 64, (2, 17))
    want = theirs(input_ids=ids, attention_mask=mask, decoder_input_ids=script.torch.tensor(tokens))
    given = ours.given([[5, 6, 7], list(range(2, 22))])
    got, _ = logits(given, jnp.asarray(tokens, jnp.int32), None)
    np.testing.assert_allclose(got, want.logits.detach().numpy(), atol=1e-4, rtol=0)
    # As this version of transformers writes it: "tied", and a head of its own beside that.
    theirs.save_pretrained(tmp_path / "new")
    again = load_pretrained(tmp_path / "new")[0]
    assert again.config == ours.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(ours))


@pytest.mark.parametrize(
    ("sizes", "both_sides", "starts"),
    [
        ((32, 128), True, [*range(9), 12, 16, 23, 32, 46, 64, 91]),
        ((32, 128), False, [*range(17), 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]),
        ((8, 20), True, [0, 1, 2, 7]),
        ((8, 20), False, [0, 1, 2, 3, 4, 6, 9, 14]),
    ],
)  # fmt: skip
def test_buckets_begin_where_those_of_transformers_do(sizes, both_sides, starts):
    """Recorded for distances up to 400: 16, 32 and 64 lie on the edge of rounding."""
    distance = np.arange(400)
    before = relative_buckets(-distance, *sizes, both_sides=both_sides)
    assert np.flatnonzero(np.diff(before, prepend=-1)).tolist() == starts
    after = relative_buckets(distance, *sizes, both_sides=both_sides)
    shift = sizes[0] // 2 if both_sides else 0
    want = np.where(distance > 0, before + shift, 0) if both_sides else np.zeros(400)
    np.testing.assert_array_equal(after, want)


# --- the encoder's keys --------------------------------------------------------------------------


def test_what_the_encoder_left_is_computed_once_and_never_moved():
    """Without the encoder's and the key and value weights decoding goes on, in the same buffers."""
    model = load_pretrained(FIXTURES / SMALL)[0]
    given = model.given(sources_of(SMALL))
    beams = {"num_beams": 2, "max_new_tokens": 6, "history": "reorder"}
    found = lj.beam_search(given, given.prompts, **beams).rows()
    before = _pointers(given.encoder.get_value())
    layers = [block.cross_attn for block in model.decoder.block]
    for part in (model.encoder, *(x.k_proj for x in layers), *(x.v_proj for x in layers)):
        nnx.update(part, jax.tree.map(lambda x: np.full_like(x, np.nan), nnx.state(part)))
    assert np.isnan(lj.get(model.given(sources_of(SMALL)).encoder.get_value(), 0)[0]).any()
    assert lj.beam_search(given, given.prompts, **beams).rows() == found
    assert _pointers(given.encoder.get_value()) == before


def test_a_decode_step_has_no_room_for_the_encoders_keys():
    """Scratch memory of the compiled loop does not grow with the sources, nor do its results."""
    model = model_of(SMALL)

    def compiled(width, rows=6):
        encoder = model.init_cache(lj.Static(width), 2, ragged=True)
        given = GivenT5(model, encoder)
        zero = jnp.zeros(rows, jnp.int32)
        loop = TokenLoop(
            cache=given.init_cache(lj.Static(64), rows, ragged=True),
            token=zero,
            done=zero > 0,
            produced=zero,
            step=jnp.int32(1),
            out=jnp.zeros((rows, 64), jnp.int32),
            seen=None,
            key=jax.random.key(0),
        )
        structure, params = split(given)
        setup = LoopSetup(structure, Sampling(), (0,))
        lowered = decode_tokens.lower(setup, params, loop, np.int32(64))
        return lowered.compile(USERS_XLA).memory_analysis(), lj.nbytes(encoder)

    small, _ = compiled(512)
    large, kept = compiled(65536)
    assert kept > 2**23
    assert large.temp_size_in_bytes <= small.temp_size_in_bytes + 1024
    assert large.output_size_in_bytes == small.output_size_in_bytes < kept // 64


def test_rows_of_one_source_ask_the_same_keys(given, decoder):
    """Six rows over three sources are what six sources give; other numbers are refused."""
    tokens = jnp.concatenate([decoder[:, :12], decoder[:, 12:24]], 1).reshape(6, 12)
    twice = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), given.encoder.get_value())
    repeated = GivenT5(model_of(SMALL), twice)
    np.testing.assert_allclose(
        logits(given, tokens, None)[0], logits(repeated, tokens, None)[0], atol=1e-4, rtol=0
    )
    with pytest.raises(ValueError, match=r"multiple of 3 rows.*got 4"):
        jax.eval_shape(given.hidden, tokens[:4])


def test_sources_do_not_see_each_other(want, decoder):
    """Sources in another order, beside others and with more padding, give what they gave."""
    sources = [*sources_of(SMALL)[::-1], [7] * 33]
    given = model_of(SMALL).given(sources)
    got, _ = logits(given, decoder[jnp.array([2, 1, 0, 0])], None)
    np.testing.assert_allclose(got[:3], want[::-1], atol=1e-4, rtol=0)


# --- relative positions in a cache ---------------------------------------------------------------


def _steps(given, tokens, cache, sizes):
    """Logits of tokens fed in chunks, and the cache."""
    parts, start = [], 0
    for size in sizes:
        part, cache = logits(given, tokens[:, start : start + size], cache)
        parts.append(part)
        start += size
    return np.concatenate(parts, 1), cache


_LAYOUTS = [lj.Dynamic(), lj.Sliding(40), lj.Sliding(30, sinks=8)]
CHUNKS = (12, 1, 1, 12, 12)


@pytest.mark.parametrize(
    "spec",
    [lj.Dynamic(), *(pytest.param(x, marks=pytest.mark.exhaustive) for x in _LAYOUTS[1:])],
    ids=str,
)
def test_every_layout_that_keeps_all_agrees(spec, given, decoder, want):
    """One that grew, and rings that hardly or never wrap, in chunks."""
    cache = lj.ensure_capacity(given.init_cache(spec, 3), 38)
    got, _ = _steps(given, decoder, cache, CHUNKS)
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


@pytest.mark.exhaustive
def test_layers_that_count_keys_differently():
    """A static layer and a ring in one cache."""
    given, tokens = model_of("t5").given(sources_of("t5")), jnp.asarray(recorded("t5")["decoder"])
    cache = given.init_cache([lj.Static(64), lj.Sliding(40)], 3)
    got, _ = _steps(given, tokens, cache, CHUNKS)
    np.testing.assert_allclose(got, recorded("t5")["logits"], atol=1e-4, rtol=0)


def test_a_window_is_a_mask(given, decoder):
    """A ring that wraps: tokens out of the window are gone, distances of the others stay right."""
    window = 7
    got, _ = _steps(given, decoder, given.init_cache(lj.Sliding(window), 3), CHUNKS)
    back = np.arange(38)[:, None] - np.arange(38)
    want, _ = logits(given, decoder, None, mask=jnp.asarray(back < window)[None, None])
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


def test_ragged_rows_rolled_back_and_cropped(given, decoder, want):
    """Rows of 2, 12 and 4 tokens go on at their own positions, also after drafts and a crop."""
    counts = np.array([2, 12, 4], np.int32)
    cache = given.init_cache(lj.Static(40), 3, ragged=True)
    _, cache = logits(given, decoder[:, :12], cache, counts)
    _, drafted = logits(given, decoder[:, :12] + 1, cache, np.array([5, 0, 12], np.int32))
    cache = lj.rollback(drafted, np.array([5, 0, 12]))
    index = counts[:, None] + np.arange(13)
    texts = np.take_along_axis(np.asarray(decoder), index, axis=1)
    got, cache = logits(given, jnp.asarray(texts[:, :12]), cache, np.full(3, 12, np.int32))
    wanted = np.take_along_axis(want, index[:, :12, None], axis=1)
    np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=0)
    # The tokens that a crop left are as far away as they were.
    got, _ = logits(given, jnp.asarray(texts[:, 12:]), lj.crop(cache, 5))
    place, last = np.arange(38), index[:, 12]
    kept = (place[:, None] < last[:, None, None]) | (place >= last[:, None, None] - 5)
    masked, _ = logits(given, decoder, None, mask=jnp.asarray(kept)[:, None])
    wanted = np.take_along_axis(np.asarray(masked), last[:, None, None], axis=1)
    np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=0)


def test_a_tree_of_tokens_in_one_row(given, decoder):
    """Branches that share a row of the cache give what each gives alone.

    Row by row the prompt has 3, 12 and 4 tokens; two branches grow from it a token at a time, stored by
    turns, so that a token's slot is not its position.
    """
    prompt, steps, width, capacity = np.array([3, 12, 4]), 9, 2, 40
    cache = given.init_cache(lj.Static(capacity), 3, ragged=True)
    _, cache = logits(given, decoder[:, :12], cache, prompt.astype(np.int32))
    branches = np.random.default_rng(1).integers(2, 64, (3, width, steps)).astype(np.int32)
    path = np.broadcast_to(np.arange(capacity) < prompt[:, None, None], (3, width, capacity)).copy()
    got = np.zeros((3, width, steps, 64), np.float32)
    for step in range(steps):
        for row, branch in np.ndindex(3, width):
            path[row, branch, prompt[row] + step * width + branch] = True
        positions = np.repeat((prompt + step)[:, None], width, 1).astype(np.int32)
        tokens = jnp.asarray(branches[:, :, step])
        out, cache = logits(
            given, tokens, cache, positions=positions, mask=jnp.asarray(path[:, None])
        )
        got[:, :, step] = out
    alone = np.zeros((6, 21), np.int32)
    for at, (row, branch) in enumerate(np.ndindex(3, width)):
        text = np.concatenate([decoder[row, : prompt[row]], branches[row, branch]])
        alone[at, : len(text)] = text
    want, _ = logits(given, jnp.asarray(alone), None)
    for at, (row, branch) in enumerate(np.ndindex(3, width)):
        begin = prompt[row]
        np.testing.assert_allclose(
            got[row, branch], want[at, begin : begin + steps], atol=1e-4, rtol=0
        )


def test_positions_need_a_mask(given, decoder):
    """Without one nothing says which tokens make up a branch."""
    with pytest.raises(ValueError, match="positions= need mask="):
        given.hidden(decoder, None, positions=jnp.arange(38))


# --- decoding ------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_generate_agrees_with_generate_uncached_and_stream(given):
    """And a second run, on the same keys, with the first."""
    run = {"max_new_tokens": 9, "sampling": Sampling(temperature=0.8), "seed": 3}
    want = lj.generate(given, given.prompts, **run)
    assert want.rows() == generate_uncached(given, given.prompts, **run).rows()
    pieces = list(lj.stream(given, given.prompts, tokens_per_call=4, cache=lj.Dynamic(), **run))
    texts = [[token for piece in row for token in piece] for row in zip(*pieces, strict=True)]
    assert texts == want.rows()
    assert isinstance(want.cache, lj.CacheState)
    assert lj.seq_length(want.cache).tolist() == [9, 9, 9]  # with the start token


@pytest.mark.parametrize(
    ("codec", "error"),
    [
        (lj.codecs.Int8(), 0.05),
        pytest.param(lj.codecs.Int4(group=12), 0.6, marks=pytest.mark.exhaustive),
        pytest.param(lj.codecs.KIVI(group=4, residual=8), 0.6, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_quantized_caches_run(codec, error, want, decoder):
    """The decoder's and the encoder's tokens quantized: close to full precision, in less room."""
    given = model_of(SMALL).given(sources_of(SMALL), codec=codec)
    encoder = given.encoder.get_value()
    assert encoder.layers[0].spec.codec == codec
    cache = given.init_cache(lj.Static(16, codec=codec), 3)
    got, _ = logits(given, decoder[:, :12], cache)
    assert 0 < np.abs(got - want[:, :12]).max() < error * np.abs(want).max()
    if codec.tail:
        result = lj.generate(
            given, given.prompts, max_new_tokens=5, cache=lj.Sliding(16, codec=codec)
        )
        assert result.lengths.tolist() == [5, 5, 5]
    else:
        assert lj.nbytes(encoder) < 0.6 * lj.nbytes(model_of(SMALL).init_cache(lj.Static(32), 3))


@pytest.mark.exhaustive
def test_bfloat16_runs():
    """Parameters and both caches."""
    model = load_pretrained(FIXTURES / SMALL, jnp.bfloat16)[0]
    with jax.numpy_dtype_promotion("standard"):  # norms compute in float32
        given = model.given(sources_of(SMALL))
        result = lj.generate(given, given.prompts, max_new_tokens=4)
    assert result.cache.layers[0].dtype == given.encoder.get_value().layers[0].dtype == jnp.bfloat16


def test_the_state_underneath(decoder, want):
    """`hidden` on an `EncoderDecoderState`: the encoder's part comes back as it is."""
    model = model_of(SMALL)
    encoder = model.given(sources_of(SMALL)).encoder.get_value()
    state = lj.EncoderDecoderState(decoder=model.init_cache(lj.Static(8), 3), encoder=encoder)
    hidden, after = nnx.jit(T5.hidden)(model, decoder[:, :3], state)
    assert int(lj.seq_length(after.decoder)) == 3
    np.testing.assert_allclose(model.logits(hidden), want[:, :3], atol=1e-4, rtol=0)
    leaves, tree = jax.tree.flatten(after)
    assert jax.tree.unflatten(tree, leaves).rows_per_source(6) == 2
    for leaf, other in zip(jax.tree.leaves(after.encoder), jax.tree.leaves(encoder), strict=True):
        np.testing.assert_array_equal(leaf, other)


# --- what is refused -----------------------------------------------------------------------------


def test_the_model_itself_is_no_language_model(decoder):
    """The message says what to pass."""
    with pytest.raises(TypeError, match=r"EncoderDecoderState.*model\.given\(sources\)"):
        lj.generate(model_of(SMALL), [[0]], max_new_tokens=2)
    given = model_of(SMALL).given([[5]])
    with pytest.raises(ValueError, match=r"\(batch, seq\)"):
        given.hidden(decoder[0])
    with pytest.raises(TypeError, match="must be integers"):
        given.hidden(decoder.astype(jnp.float32))
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        model_of(SMALL).given([[5], []])


def _copy(tmp_path, **tensors):
    """The small checkpoint with some tensors replaced, added, or with None left out."""
    folder = tmp_path / "copy"
    shutil.copytree(FIXTURES / SMALL, folder)
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    changed = {name.replace("/", "."): value for name, value in tensors.items()}
    kept = {name: x for name, x in (stored | changed).items() if x is not None}
    safetensors.numpy.save_file(kept, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        (
            {"decoder/block/0/layer/1/EncDecAttention/k/weight": None},
            r"1 are missing \['decoder\.block\.0\.layer\.1\.EncDecAttention\.k\.weight'\]",
        ),
        ({"lm_head/weight": None}, r"missing \['lm_head\.weight'\]"),
        ({"decoder/block/7/layer/0/layer_norm/weight": np.ones(32)}, "1 are not known"),
        ({"shared/weight": np.ones((63, 32))}, r"should have shape \(64, 32\).*got \(63, 32\)"),
        ({"shared/weight": np.ones((64, 32), np.int8)}, "should be floating point"),
    ],
)
def test_folders_of_another_model(tensors, match, tmp_path):
    """Named as they are in the file, with what was expected."""
    with pytest.raises(CheckpointError, match=match):
        load_pretrained(_copy(tmp_path, **tensors))


def test_copies_of_the_embeddings_are_left_out(tmp_path):
    """Old writers stored them for the encoder and the decoder, too."""
    shared = safetensors.numpy.load_file(FIXTURES / SMALL / "model.safetensors")["shared.weight"]
    names = ("encoder/embed_tokens/weight", "decoder/embed_tokens/weight")
    again, tokenizer = load_pretrained(_copy(tmp_path, **dict.fromkeys(names, shared)))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model_of(SMALL)))
    assert tokenizer is None


def test_what_a_folder_says_beside_its_weights(tmp_path):
    """End and start tokens of generation_config.json; a tokenizer of pieces, with its end token."""
    folder = _copy(tmp_path)
    settings = {"eos_token_id": [1, 5], "decoder_start_token_id": 2, "bos_token_id": 9}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581a", -2.0), ("b", -3.0)]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    backend.add_special_tokens(["<pad>", "</s>", "<unk>"])
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    backend.save(str(folder / "tokenizer.json"))
    model, tokenizer = load_pretrained(folder)
    assert model.config.eos_token_ids == (1, 5)
    assert model.config.decoder_start_token_id == 2
    ids = tokenizer.encode_prompt("a ab")
    assert ids == [3, 3, 4, 1]
    assert tokenizer.decode(ids) == "a ab"
    with pytest.raises(CheckpointError, match=r"encoder-decoder.*load_pretrained"):
        load_model(folder)
    with pytest.raises(ValueError, match="T5 has none"):
        load_pretrained(folder, rope_by_place=True)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_layers": 0}, "num_layers must be a positive integer"),
        ({"d_kv": None}, "d_kv must be a positive integer"),
        ({"relative_attention_num_buckets": 3}, "at least 4"),
        ({"relative_attention_max_distance": 15}, "at most twice"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon must be positive"),
        ({"feed_forward_proj": "gated-swish"}, "'relu' or 'gated-gelu', got 'gated-swish'"),
        ({"eos_token_id": 32}, r"eos_token_id must be in \[0, 32\)"),
        ({"model_type": "bart"}, "'bart' model"),
    ],
)
def test_impossible_configurations(change, match):
    """Each named, with what would do."""
    with pytest.raises(ValueError, match=match):
        T5Config.from_json(json.dumps({"model_type": "t5", **SIZES, **change}))


def test_configurations_as_they_are_written():
    """Old and new ways to say whether the head is tied and its input scaled."""

    def read(**values):
        return T5Config.from_json(json.dumps({"model_type": "t5", **SIZES, **values}))

    old, flan = read(), read(tie_word_embeddings=False, feed_forward_proj="gated-gelu")
    assert (old.tie_word_embeddings, old.scale_decoder_outputs, old.gated) == (True, True, False)
    assert (flan.tie_word_embeddings, flan.scale_decoder_outputs, flan.gated) == (
        False,
        False,
        True,
    )
    new = read(tie_word_embeddings=True, scale_decoder_outputs=False)
    assert (new.tie_word_embeddings, new.scale_decoder_outputs) == (True, False)
    assert read(eos_token_id=[3, 4]).eos_token_ids == (3, 4)
    assert read(pad_token_id=7).decoder_start_token_id == 7
    assert dataclasses.replace(old, num_decoder_layers=5).decoder_layers == 5
    for text, match in (
        ("[]", "an object"),
        ("{", "not valid JSON"),
        ('{"model_type":"t5"}', "lacks"),
    ):
        with pytest.raises(ValueError, match=match):
            T5Config.from_json(text)
