"""Decode steps for the compilers of TPUs and GPUs: verbs on caches of every kind, and decoders' loops.

All of them are of shapes: nothing is allocated. Which are not in place, and why, says `KNOWN`.
"""

import dataclasses
import itertools
import random
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lucid_jax as lj
from lucid_jax.decode.beam import as_rules
from lucid_jax.decode.beam_loop import PrefilledPrompts, SearchSetup, search_from
from lucid_jax.decode.drafts import ModelDrafter, Text
from lucid_jax.decode.language_model import split
from lucid_jax.decode.options import DecodeOptions
from lucid_jax.decode.sampling import Sampling
from lucid_jax.decode.speculation_loop import SpeculationSetup, decode_rounds, start_rounds
from lucid_jax.decode.token_loop import LoopSetup, decode_tokens, start_loop
from lucid_jax.models import ModelConfig, Transformer
from lucid_jax.tools import inspect

ROWS, HEADS, GROUP, DIM = 8, 8, 4, 128
STACK = 2  # layers of a stacked state
CODECS = {
    "plain": lj.codecs.Identity(),
    "int8": lj.codecs.Int8(),
    "fp8": lj.codecs.Float8(),
    "int4": lj.codecs.Int4(),
    "kivi": lj.codecs.KIVI(),
}


# Whole leaves are then larger than a TPU's fast memory, where a smaller one may be kept for a while.
SLOTS = {"plain": 16384, "int8": 16384, "fp8": 16384, "int4": 32768, "kivi": 32768}


LAYOUTS = {
    "static": lj.Static,
    "sliding": lambda slots, codec: lj.Sliding(slots - 64, sinks=4, slack=60, codec=codec),
    "chunked": lambda slots, codec: lj.Chunked(slots - 64, slack=64, codec=codec),
}


def _update(state, count, layer, *, at=None, **tokens):
    return lj.update(state, tokens["key"], tokens["value"], layer, at, **_counts(state, count))


def _counts(state, count):
    return {"lengths": jnp.full(ROWS, count, jnp.int32)} if state.ragged else {}


def _extend(state, count, layer, *, query, key, value):
    out, state = lj.extend(state, query, key, value, layer, **_counts(state, count))
    return state, out


# Per layer: state, count, layer, tokens of that count -> state, or state and something.
BY_LAYER = {
    "update": (1, _update),
    "update of 8": (8, _update),
    "write at": (2, lambda state, n, layer, **x: _update(state, n, layer, at=_newest(state), **x)),
    "decode": (1, _extend),
    "extend of 8": (8, _extend),
}
OF_ALL = {
    "crop": lambda state: lj.crop(state, 1000),
    "rollback": lambda state: lj.rollback(state, 3),
    "reset": lj.reset,
    "select": lambda state: lj.select(state, jnp.arange(ROWS)[::-1] // 2),
    "reorder since": lambda state: lj.reorder(
        state, jnp.arange(ROWS)[::-1] // 2, since=lj.seq_length(state).max() // 2
    ),
}


def _newest(state):
    return lj.seq_length(state).max() - jnp.arange(1, 3, dtype=jnp.int32)[::-1]


class Case(NamedTuple):
    """One step: what is done, to what, alone or in a loop over tokens, for which target."""

    verb: str
    layout: str
    codec: str
    rows: str
    dtype: str
    head_dim: str
    times: str
    target: str

    def __str__(self):
        return "-".join(self).replace(" ", "_").replace(":", "_")


FACTORS = Case(
    (*BY_LAYER, *OF_ALL),
    tuple(LAYOUTS),
    tuple(CODECS),
    ("aligned", "ragged", "stacked", "stacked ragged"),
    ("bfloat16", "float32"),
    (str(DIM), "64"),
    ("once", "in a loop"),
    ("tpu:v5e", "tpu:v6e", "tpu:v5p", "gpu:h100"),
)
# KIVI's tokens are quantized in groups, so none can be written over.
CASES = [
    case
    for case in itertools.starmap(Case, itertools.product(*FACTORS))
    if (case.verb, case.codec) != ("write at", "kivi")
]


def inspected(case, large=None):
    """What the case's compiler makes of it; `large` is half of the largest leaf if not said."""
    stacked, ragged = "stacked" in case.rows, "ragged" in case.rows
    dtype, dim = jnp.dtype(case.dtype), int(case.head_dim)
    state = jax.eval_shape(
        lambda: lj.init_cache(
            LAYOUTS[case.layout](SLOTS[case.codec], codec=CODECS[case.codec]),
            num_layers=STACK if stacked else 1,
            batch_size=ROWS,
            num_kv_heads=HEADS,
            head_dim=dim,
            dtype=dtype,
            ragged=ragged,
            stacked=stacked,
        )
    )
    options = {"donate": 0, "target": case.target, "large": large or _large(state)}
    repeated = _looped if case.times == "in a loop" else lambda step: step
    if case.verb in OF_ALL:
        return inspect(repeated(OF_ALL[case.verb]), state, **options)
    count, run = BY_LAYER[case.verb]
    tokens = {
        name: jax.ShapeDtypeStruct((ROWS, heads, count, dim), dtype)
        for name, heads in (("query", HEADS * GROUP), ("key", HEADS), ("value", HEADS))
        if name != "query" or run is _extend
    }

    def step(state, tokens):
        def of_layer(state, layer):
            done = run(state, count, layer, **tokens)
            return done if isinstance(done, tuple) else (done, None)

        return jax.lax.scan(of_layer, state, jnp.arange(STACK)) if stacked else of_layer(state, 0)

    return inspect(repeated(step), state, tokens, **options)


def _looped(step):
    """A step time and again, in a loop as over tokens: there the compiler may lay leaves out anew."""

    def steps(state, *args):
        def of_pair(state):
            done = step(state, *args)
            return done if isinstance(done, tuple) else (done, None)

        _, out = jax.eval_shape(of_pair, state)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out)
        turns = jnp.max(lj.seq_length(state))
        return jax.lax.fori_loop(0, turns, lambda _, carry: of_pair(carry[0]), (state, zeros))

    return steps


def faults(report):
    """Why a step is not in place; here whatever is rewritten counts, not the cache alone."""
    found = [fault for fault in report.faults() if "temporaries" in fault or "donated" in fault]
    return found + [f"{event.kind} of {event.shape}" for event in report.rewritten]


def cover(seed=0):
    """Few cases in which every value of a factor meets every one of each other factor."""
    rng = random.Random(seed)

    def pairs(case):
        return tuple(itertools.combinations(enumerate(case), 2))

    possible = set(CASES)
    missing = dict.fromkeys(pair for case in CASES for pair in pairs(case))
    cases = []
    while missing:
        wanted = dict(next(iter(missing)))
        found = []
        for _ in range(60):
            values = (wanted.get(i, rng.choice(values)) for i, values in enumerate(FACTORS))
            found.append(Case(*values))
        found = [case for case in found if case in possible]
        best = max(found, key=lambda case: sum(pair in missing for pair in pairs(case)))
        cases.append(best)
        for pair in pairs(best):
            missing.pop(pair, None)
    return cases


@dataclasses.dataclass(frozen=True)
class Known:
    """Steps that are not in place, and why."""

    reason: str
    verbs: tuple[str, ...] = FACTORS.verb
    layouts: tuple[str, ...] = FACTORS.layout
    codecs: tuple[str, ...] = FACTORS.codec
    rows: tuple[str, ...] = FACTORS.rows
    dtypes: tuple[str, ...] = FACTORS.dtype
    head_dims: tuple[str, ...] = FACTORS.head_dim
    times: tuple[str, ...] = FACTORS.times
    targets: tuple[str, ...] = FACTORS.target

    def holds(self, case):
        """Whether a case is one of them."""
        fields = dataclasses.astuple(self)[1:]
        return all(value in field for value, field in zip(case, fields, strict=True))


TPUS = FACTORS.target[:3]
GPU = FACTORS.target[3:]
KNOWN = (
    Known(
        "groups of tokens are scattered into a stacked ring, which XLA transposes whole; to be mended",
        verbs=("update", "update of 8"),
        layouts=("sliding", "chunked"),
        codecs=("kivi",),
        rows=("stacked",),
        targets=GPU,
    ),
    Known(
        "what lies around the kernel, KIVI's scales and scores of a tail, is more than a sixteenth",
        verbs=("decode", "extend of 8"),
        codecs=("kivi",),
        targets=("tpu:v5p",),
    ),
    Known(
        "float32 scores of all slots are more than a sixteenth of a narrow cache",
        verbs=("decode",),
        codecs=("int8", "fp8", "int4", "kivi"),
        targets=GPU,
    ),
    Known(
        "float32 scores of all slots and eight tokens are more than a sixteenth of a cache",
        verbs=("extend of 8",),
        targets=GPU,
    ),
)


def known(case):
    """Why a case is not in place, as far as is known."""
    return next((one.reason for one in KNOWN if one.holds(case)), None)


# Loops of the decoders, of a model of two layers.
_PROMPTS = 4


def _model(scan_layers=False, dim=DIM):
    config = ModelConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=HEADS * GROUP,
        num_key_value_heads=HEADS,
        head_dim=dim,
    )
    return nnx.eval_shape(
        lambda: Transformer(config, dtype=jnp.bfloat16, scan_layers=scan_layers, rngs=nnx.Rngs(0))
    )


def _loop(sampling, target, codec, mesh=None, rows=_PROMPTS, **of_model):
    model = _model(**of_model)
    structure, params = split(model)
    setup = LoopSetup(structure, sampling, (2,))
    cache = _cache(model, codec, rows)
    hidden = jax.ShapeDtypeStruct((rows, 256), jnp.bfloat16)
    limit = jax.ShapeDtypeStruct((), jnp.int32)
    if mesh is not None:
        cache = placed(cache, lj.shardings(cache, mesh, batch="dp", heads="tp"))
        hidden = placed(hidden, NamedSharding(mesh, P("dp")))
        params, limit = placed((params, limit), NamedSharding(mesh, P()))
    loop = jax.eval_shape(
        lambda params, cache, hidden: start_loop(
            setup, params, cache, hidden, None, jax.random.key(0), 64
        ),
        params,
        cache,
        hidden,
    )
    return inspect(
        lambda params, loop, limit: decode_tokens(setup, params, loop, limit),
        params, loop, limit, donate=1, target=target, mesh=mesh,
        large=_large(loop.cache) // (1 if mesh is None else mesh.size),
    )  # fmt: skip


def loop_on_mesh(mesh, target):
    """The greedy loop with rows and heads divided over `dp` and `tp`; every device has the model."""
    return _loop(Sampling(), target, "plain", mesh, rows=8)


def placed(tree, where):
    """Shapes that lie on a mesh: as one sharding says, or one for each."""
    if isinstance(where, NamedSharding):
        where = jax.tree.map(lambda _: where, tree)
    put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    return jax.tree.map(put, tree, where)


def _cache(model, codec, rows=_PROMPTS):
    """Of narrow heads more slots: leaves are as large."""
    slots = SLOTS[codec] * -(-DIM // model.config.head_dim)
    spec = lj.Static(slots, CODECS[codec])
    return jax.eval_shape(lambda: model.init_cache(spec, rows, ragged=True))


def _large(cache):
    """Half of what one layer has of the largest leaf, in bytes."""
    layer = cache.layers[0]
    leaves = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layer.leaves)]
    return max(leaves) // (2 * (len(layer.position) if layer.stacked else 1))


def _beams(history, target, codec, **of_model):
    model, width = _model(**of_model), 4
    structure, params = split(model)
    setup = SearchSetup(structure, width, history)
    cache = _cache(model, codec, _PROMPTS if history == "tree" else _PROMPTS * width)
    prompts = PrefilledPrompts(
        jax.ShapeDtypeStruct((_PROMPTS, 256), jnp.bfloat16),
        jax.ShapeDtypeStruct((_PROMPTS,), jnp.int32),
        None,
    )
    rules = as_rules(DecodeOptions.of(max_new_tokens=64), 1.0, False, 512)
    return inspect(
        lambda params, cache, prompts, rules: search_from(setup, params, cache, prompts, rules),
        params, cache, prompts, rules, donate=1, target=target, large=_large(cache),
    )  # fmt: skip


def _drafts(target, codec, **of_model):
    model = _model(**of_model)
    structure, params = split(model)
    setup = SpeculationSetup(structure, ModelDrafter(structure, 4), Sampling(), (2,))
    caches = (_cache(model, codec), _cache(model, codec))
    rows = jax.ShapeDtypeStruct((_PROMPTS,), jnp.int32)
    text = Text(jax.ShapeDtypeStruct((_PROMPTS, 512), jnp.int32), rows, rows, None)
    loop = jax.eval_shape(
        lambda params, caches, text, hidden: start_rounds(
            setup, params, caches, text, hidden, jax.random.key(0)
        ),
        params,
        caches,
        text,
        jax.ShapeDtypeStruct((_PROMPTS, 256), jnp.bfloat16),
    )
    return inspect(
        lambda params, loop, stop: decode_rounds(setup, (params, params), loop, stop),
        params, loop, np.int32(100), donate=1, target=target, large=_large(loop.cache),
    )  # fmt: skip


LOOPS = {
    "greedy": lambda *to: _loop(Sampling(), *to),
    "sampled": lambda *to: _loop(Sampling(temperature=0.7, top_k=40, top_p=0.9), *to),
    "heads of 64": lambda *to: _loop(Sampling(), *to, dim=64),
    "heads of 80": lambda *to: _loop(Sampling(), *to, dim=80),
    "scan over layers": lambda *to: _loop(Sampling(), *to, scan_layers=True),
    "tree of beams": lambda *to: _beams("tree", *to),
    "reordered beams": lambda *to: _beams("reorder", *to),
    "drafts": _drafts,
    "tree of beams, heads of 64": lambda *to: _beams("tree", *to, dim=64),
    "drafts, heads of 64": lambda *to: _drafts(*to, dim=64),
}
KNOWN_LOOPS = {
    ("tree of beams", "gpu:h100"): "float32 scores of all slots, of four beams to a row",
    (
        "tree of beams, heads of 64",
        "gpu:h100",
    ): "float32 scores of all slots, of four beams to a row",
    ("drafts, heads of 64", "gpu:h100"): "float32 scores of all slots, of five tokens to a row",
}
