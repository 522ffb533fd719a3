"""Strict JAX settings, hypothesis profiles, and the fixtures every test file shares."""

import collections
import gc
import importlib.metadata
import os
import random
import secrets
import tempfile

# Eight devices, for the tests of meshes, cost the others nothing.
_flags = "--xla_force_host_platform_device_count=8"
# Most of the suite's time is compiling; what LLVM makes of a program is not what is tested here. CI
# runs some tests again with XLA as users have it: LUCID_JAX_TEST_XLA=default.
if os.environ.get("LUCID_JAX_TEST_XLA") != "default":
    _flags += " --xla_backend_optimization_level=0"
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones have no such option
        _flags += " --xla_cpu_use_fusion_emitters=false"  # compiles in less than half the time
    _flags += " --xla_cpu_parallel_codegen_split_count=1"  # small programs gain nothing by more
os.environ["XLA_FLAGS"] = f"{_flags} {os.environ.get('XLA_FLAGS', '')}"
# What one process compiles, the others read: xdist's workers and the commands under test inherit this.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="lucid_jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# All that is drawn at random comes from one seed, new in each run and known to every worker.
SEED = int(os.environ.setdefault("LUCID_JAX_TEST_SEED", str(secrets.randbelow(10**6))))

import hypothesis
import jax
import pytest

from lucid_jax.attention import blocks

# The caches of tests are small; those of some hundred slots are to take several turns of a walk.
blocks.SIZES["cpu"] = blocks.SIZES["cpu"]._replace(most=256)

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

_COMMON = {
    "deadline": None,  # the first example of a shape pays for its compilation
    "suppress_health_check": [hypothesis.HealthCheck.too_slow],
    "database": None,  # the seed alone says what is tried
}
# Shrinking compiles new shapes for minutes: the everyday profile fails fast, the other explains.
_FAST = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
hypothesis.settings.register_profile("default", max_examples=20, phases=_FAST, **_COMMON)
hypothesis.settings.register_profile("thorough", max_examples=100, **_COMMON)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Hands the seed to hypothesis, as its own option would."""
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = SEED


# Of a test's cases one in so many runs everyday, at least one. Of those left out CI runs about one in
# so many, and of the exhaustive ones; of these always one that is a test's only case.
EVERYDAY_ONE_IN = 7
CI_ONE_IN, CI_EXHAUSTIVE_ONE_IN = 6, 20


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks what everyday runs leave out as exhaustive, and as drawn what of all that CI runs.

    The seed draws; a test that is marked `whole` always runs with all its cases. What is exhaustive by
    itself, such as most pairs of layouts and codecs, everyday runs leave out entirely.
    """
    tests = collections.defaultdict(list)
    for item in items:
        if not any(map(item.get_closest_marker, ("notebooks", "real_weights"))):
            tests[item.nodeid.partition("[")[0]].append(item)
    for test, cases in tests.items():
        rng = random.Random(f"{SEED} {test}")
        ordinary = [item for item in cases if not item.get_closest_marker("exhaustive")]
        exhaustive = [item for item in cases if item.get_closest_marker("exhaustive")]
        one_in = 1 if len(cases) == 1 else CI_EXHAUSTIVE_ONE_IN
        drawn = [item for item in exhaustive if rng.randrange(one_in) == 0]
        if ordinary and not ordinary[0].get_closest_marker("whole"):
            rng.shuffle(ordinary)
            left_out = ordinary[max(1, len(ordinary) // EVERYDAY_ONE_IN) :]
            for item in left_out:
                item.add_marker(pytest.mark.exhaustive)
            drawn += [item for item in left_out if rng.randrange(CI_ONE_IN) == 0]
        for item in drawn:
            item.add_marker(pytest.mark.drawn)


def pytest_collection_finish():
    """Spares the garbage collector what lives as long as the process: it took a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_terminal_summary(terminalreporter):
    """Says, quiet or not, how to try again what this run has drawn."""
    terminalreporter.write_line(f"drawn with LUCID_JAX_TEST_SEED={SEED}")


@pytest.fixture
def pallas_kernel(monkeypatch):
    """`implementation="kernel"` is that for TPUs, interpreted, with blocks as small as they come."""
    from lucid_jax.attention import backends
    from lucid_jax.attention.tpu.backend import PallasTPU

    named = {**backends._BY_NAME, "kernel": PallasTPU(interpret=True, block_bytes=1)}
    monkeypatch.setattr(backends, "_BY_NAME", named)


@pytest.fixture(params=["walk", pytest.param("dense", marks=pytest.mark.exhaustive)])
def each_backend(request, monkeypatch):
    """Runs a test with each backend as what this platform tries first, and gives its name.

    What a test compiles by `jax.jit` of a module's function is kept whatever is tried: it wants the
    name as `implementation=`, or a function of its own.
    """
    from lucid_jax.attention import backends

    monkeypatch.setitem(backends._TRIED, "cpu", backends.to_try(request.param))
    return request.param


_compilations = 0


def _count_compilation(event: str, _seconds: float, **_: object) -> None:
    global _compilations
    _compilations += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_count_compilation)


@pytest.fixture
def compilations():
    """A function that returns how many programs XLA has compiled so far in this process."""
    return lambda: _compilations


_PROGRAMS_KEPT = 300
_dropped = 0


@pytest.fixture(autouse=True)
def _forget_programs():
    """Drops compiled programs now and then.

    A few hundred take a gigabyte, and each a dozen memory maps or many more, of which Linux grants a
    process 65,530; past that XLA crashes.
    """
    global _dropped
    yield
    if _compilations - _dropped > _PROGRAMS_KEPT:
        _dropped = _compilations
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def uncached():
    """What is compiled is not kept: it is for other machines."""
    kept = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", kept)
