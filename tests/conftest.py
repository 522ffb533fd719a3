"""Strict JAX settings, hypothesis profiles, and the fixtures every test file shares."""

import os
from pathlib import Path

# Most of the suite's time is compiling; what LLVM makes of a program is not what is tested here.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

_COMMON = {
    "deadline": None,  # the first example of a shape pays for its compilation
    "suppress_health_check": [hypothesis.HealthCheck.too_slow],
}
# Shrinking compiles new shapes for minutes: the everyday profile fails fast, the other explains.
_FAST = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
hypothesis.settings.register_profile(
    "default", max_examples=20, derandomize=True, phases=_FAST, **_COMMON
)
hypothesis.settings.register_profile("thorough", max_examples=200, derandomize=True, **_COMMON)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

_compilations = 0


def _count_compilation(event: str, _seconds: float, **_: object) -> None:
    global _compilations
    _compilations += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_count_compilation)


@pytest.fixture
def compilations():
    """A function that returns how many programs XLA has compiled so far in this process."""
    return lambda: _compilations


_MAPS_KEPT = 20_000
_looked = 0


def _memory_maps():
    """How many this process has; 0 where the system does not tell."""
    try:
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return 0


@pytest.fixture(autouse=True)
def _forget_programs():
    """Drops compiled programs now and then.

    Each takes a dozen memory maps or many more, of which Linux grants a process 65,530; past that XLA
    crashes.
    """
    global _looked
    yield
    if _compilations - _looked > 50:
        _looked = _compilations
        if _memory_maps() > _MAPS_KEPT:
            jax.clear_caches()
