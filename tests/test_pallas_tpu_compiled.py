"""The kernel as the TPU's own compiler takes it, for chips that need not be there.

Wants libtpu (`pip install "jax[tpu]"`); nothing is executed.
"""

import pytest

import lucid_jax as lj
from lucid_jax.tools import targets
from lucid_jax.tools.program_text import read_program
from tests.kernels import CALLS, compiled, moved, some_of

WHEELS = targets.wheels("tpu:v5e")
pytestmark = [
    pytest.mark.skipif(WHEELS is not None, reason=f"the TPU's compiler comes by: {WHEELS}"),
    pytest.mark.usefixtures("uncached"),
]
CODECS = {
    "bf16": lj.codecs.Identity(),
    "f32": lj.codecs.Identity(),
    "bits": lj.codecs.Bits(),
    "int8": lj.codecs.Int8(),
    "fp8": lj.codecs.Float8(),
    "int4": lj.codecs.Int4(),
    "kivi": lj.codecs.KIVI(),
}


def not_renamed(text):
    """The computations but those whose bytes stay where they are, read as tiles of another size."""
    computations = read_program(text).computations
    renamed = {
        name
        for computation in computations.values()
        for instruction in computation.instructions.values()
        if "output_to_operand_aliasing={{}: (0, {})}" in instruction.attributes
        for name in instruction.called
        if "copy_fusion" in name
    }
    return [computation for name, computation in computations.items() if name not in renamed]


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
    assert not moved(not_renamed(text), leaf // 2)


TARGETS = ("tpu:v5e", "tpu:v6e", "tpu:v5p")


@pytest.mark.parametrize(
    "target, codec, dim, group", some_of(TARGETS, CODECS, (64, 80, 96, 128, 256), (1, 4, 8, 16))
)
def test_widths_and_groups(target, codec, dim, group, request):
    """Every width that models have, and every group."""
    if (target, codec) == ("tpu:v5p", "kivi") and (dim == 64 or (dim in (80, 96) and group == 16)):
        reason = "KIVI's scales are copied, with which 4,096 slots hold more than a sixteenth"
        request.applymarker(pytest.mark.xfail(reason=reason, raises=AssertionError, strict=True))
    if (target, codec, dim, group) == ("tpu:v5p", "int4", 64, 16):
        reason = "what lies around the kernel is more than a sixteenth of a narrow cache"
        request.applymarker(pytest.mark.xfail(reason=reason, raises=AssertionError, strict=True))
    check(codec, target, dim=dim, group=group)


@pytest.mark.parametrize(
    "target, stored, how",
    some_of(
        TARGETS,
        [("bf16", 64), ("bf16", 128), ("int8", 128), ("int4", 128), ("kivi", 128), ("f32", 256)],
        CALLS,
    ),
    ids=str,
)
def test_shapes_and_options(target, stored, how, request):
    """Rows of different lengths, rings, stacks, several queries, many heads and few."""
    codec, dim = stored
    if (target, codec) == ("tpu:v5p", "kivi") and how in ({"stacked": True}, {"count": 4}):
        reason = "with KIVI's scales what lies around the kernel is 1/15 of 4,096 slots"
        request.applymarker(pytest.mark.xfail(reason=reason, raises=AssertionError, strict=True))
    if target == "tpu:v5p" and how == {"count": 4, "group": 16}:
        reason = (
            "of 64 queries what lies around the kernel is more than a sixteenth of a narrow cache"
        )
        request.applymarker(pytest.mark.xfail(reason=reason, raises=AssertionError, strict=False))
    check(codec, target, **{"dim": dim, "group": 4, **how})


# How a prompt's queries come, of eight rows and heads.
PROMPTS = [
    {"count": 512, "group": 4}, {"count": 512, "group": 1}, {"count": 64, "group": 8},
    {"count": 64, "group": 16, "heads": 2}, {"count": 512, "group": 4, "ragged": True},
    {"count": 512, "group": 4, "stacked": True, "window": 1000, "softcap": 30.0},
    {"count": 512, "group": 4, "sinks": 4},
]  # fmt: skip


@pytest.mark.parametrize(
    "stored, how",
    some_of(
        [("bf16", 64), ("bf16", 128), ("bf16", 256), ("int8", 128), ("fp8", 128), ("f32", 128)],
        PROMPTS,
        few=2,
    ),
    ids=str,
)
def test_prompts(stored, how):
    """Many queries: no scores are kept, and no leaf is copied; some of results' size may be."""
    codec, dim = stored
    target = TARGETS[(dim // 64 + PROMPTS.index(how)) % 3]
    options, slots = dict(how), 16384
    sinks = options.pop("sinks", None)
    layout = lj.Sliding(slots - 516, sinks=sinks, slack=512) if sinks else lj.Static(slots)
    dtype = "float32" if codec == "f32" else "bfloat16"
    program, cache, leaf = compiled(
        target, layout.but(codec=CODECS[codec]), dim=dim, dtype=dtype, **options
    )
    text = program.as_text()
    assert "lucid_jax_prefill" in text and "tpu_custom_call" in text
    results = 8 * 8 * how["group"] * how["count"] * max(dim, 128) * 4
    assert program.memory_analysis().temp_size_in_bytes < 3 * results + cache / 16
    assert not moved(not_renamed(text), leaf * 9 // 10)
