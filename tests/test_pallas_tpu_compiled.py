"""The kernel as the TPU's own compiler takes it, for chips that need not be there.

Wants libtpu (`pip install "jax[tpu]"`); nothing is executed.
"""

import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

import lucid_jax as lj
from lucid_jax.tools import targets
from lucid_jax.tools.program_text import read_program

WHEELS = targets.wheels("tpu:v5e")
pytestmark = pytest.mark.skipif(WHEELS is not None, reason=f"the TPU's compiler comes by: {WHEELS}")
CODECS = {
    "bf16": lj.codecs.Identity(),
    "f32": lj.codecs.Identity(),
    "bits": lj.codecs.Bits(),
    "int8": lj.codecs.Int8(),
    "fp8": lj.codecs.Float8(),
    "int4": lj.codecs.Int4(),
    "kivi": lj.codecs.KIVI(),
}


# What copies, converts or re-tiles an array.
MOVES = {"copy", "convert", "transpose", "dynamic-slice", "reshape", "pad"}


@pytest.fixture(autouse=True)
def _looked_at():
    """What is compiled is not kept: it is for other machines."""
    kept = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", kept)


def compiled(target, spec, *, dim, group, count=1, batch=8, heads=8, dtype="bfloat16", stacked=False,
             ragged=False, **options):  # fmt: skip
    """`attend` of a layer, compiled, and the bytes of its cache and of its largest leaf."""
    device = targets.open_target(target).devices[0]

    def there(tree):
        where = SingleDeviceSharding(device)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    def make():
        return lj.init_cache(
            spec, num_layers=2, batch_size=batch, num_kv_heads=heads, head_dim=dim, dtype=dtype,
            stacked=stacked, ragged=ragged,
        )  # fmt: skip

    state = there(jax.eval_shape(make))
    query = there(jax.ShapeDtypeStruct((batch, heads * group, count, dim), jnp.dtype(dtype)))
    with jax.default_device(device):
        run = jax.jit(lambda s, q: lj.attend(s, q, 1, return_lse=True, **options))
        program = run.lower(state, query).compile()
    leaves = [x.size * x.dtype.itemsize for x in jax.tree.leaves(state)]
    return program, sum(leaves), max(leaves) // (2 if stacked else 1)


def moved(text, least):
    """The instructions that copy, convert or re-tile an array of at least so many bytes."""
    computations = read_program(text).computations
    # Bytes that stay where they are, read as tiles of another size.
    renamed = {
        name
        for computation in computations.values()
        for instruction in computation.instructions.values()
        if "output_to_operand_aliasing={{}: (0, {})}" in instruction.attributes
        for name in instruction.called
        if "copy_fusion" in name
    }
    return [
        instruction
        for name, computation in computations.items()
        if name not in renamed
        for instruction in computation.instructions.values()
        if instruction.opcode in MOVES
        and any(shape.nbytes >= least for shape in instruction.shapes)
    ]


def check(codec, target, *, static=True, **how):
    """A call runs in the kernel, holds next to nothing and copies nothing of a leaf's size."""
    # The walk, entered where something is not finite, holds blocks of float32 for several queries.
    slots = 16384 if "count" in how else 4096
    layout = lj.Static(slots) if static else lj.Sliding(slots - 96, sinks=4, slack=92)
    how["dtype"] = "float32" if codec == "f32" else "bfloat16"
    program, cache, leaf = compiled(target, layout.but(codec=CODECS[codec]), **how)
    text = program.as_text()
    assert text.count("lucid_jax_decode") and "tpu_custom_call" in text
    assert program.memory_analysis().temp_size_in_bytes < max(cache / 16, 1 << 20)
    assert not moved(text, leaf // 2)


TARGETS = ("tpu:v5e", "tpu:v6e", "tpu:v5p")
OPTIONS = [
    {"ragged": True}, {"stacked": True}, {"static": False, "ragged": True}, {"count": 4},
    {"count": 4, "group": 16}, {"batch": 1, "heads": 1}, {"batch": 1, "heads": 1, "group": 16},
    {"heads": 32, "group": 1}, {"heads": 12, "group": 1}, {"heads": 2, "ragged": True},
    {"window": 1000, "softcap": 30.0}, {"batch": 64, "heads": 2},
]  # fmt: skip


def _cases(*axes):
    """All combinations, of which everyday runs try one or two."""
    every = list(itertools.product(TARGETS, *axes))
    few = every[:: len(every) // 10]
    return [
        pytest.param(*case, marks=() if case in few else pytest.mark.exhaustive) for case in every
    ]


@pytest.mark.parametrize(
    "target, codec, dim, group", _cases(CODECS, (64, 80, 96, 128, 256), (1, 4, 8, 16))
)
def test_widths_and_groups(target, codec, dim, group):
    """Every width that models have, and every group."""
    check(codec, target, dim=dim, group=group)


@pytest.mark.parametrize(
    "target, stored, how",
    _cases(
        [("bf16", 64), ("bf16", 128), ("int8", 128), ("int4", 128), ("kivi", 128), ("f32", 256)],
        OPTIONS,
    ),
    ids=str,
)
def test_shapes_and_options(target, stored, how, request):
    """Rows of different lengths, rings, stacks, several queries, many heads and few."""
    codec, dim = stored
    if target == "tpu:v5p" and how == {"count": 4, "group": 16}:
        reason = (
            "of 64 queries what lies around the kernel is more than a sixteenth of a narrow cache"
        )
        request.applymarker(pytest.mark.xfail(reason=reason, raises=AssertionError, strict=False))
    check(codec, target, **{"dim": dim, "group": 4, **how})
