"""Machines to compile for that need not be there: topologies, speeds, and the compilers' wheels."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import jax
from jax.experimental import topologies


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of a target.

    Attributes:
        platform: what JAX calls it: "tpu", "cuda" or "cpu".
        bandwidth: bytes that its memory gives in a second, at best; None if that is not known.
        clock: cycles a second, of the cycles that its compiler estimates; None if it gives none.
        sizes: how many devices, as the topology says, where a name does not.
    """

    platform: str
    bandwidth: float | None
    clock: float | None
    sizes: str


# Bandwidths are the makers'. A TPU's clock is its peak of bf16 operations over those of a cycle.
CHIPS = {
    "cpu": Chip("cpu", None, None, ""),
    "tpu:v5e": Chip("tpu", 819e9, 1.5e9, "2x2"),
    "tpu:v5p": Chip("tpu", 2765e9, 1.75e9, "2x2x1"),
    "tpu:v6e": Chip("tpu", 1640e9, 1.75e9, "2x2"),
    "gpu:h100": Chip("cuda", 3.35e12, None, "1"),
}

TARGETS = (
    "cpu, tpu:v5e, tpu:v5p or tpu:v6e with a topology such as tpu:v5e:2x2, or gpu:h100 with a number "
    "such as gpu:h100:8"
)


class MissingCompiler(RuntimeError):
    """The compiler of a target is not installed, or cannot be opened; says what to do."""


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
        name: as it was asked for.
        chip: what they are.
        devices: those of the topology; nothing can be run on them, but on a CPU's.
    """

    name: str
    chip: Chip
    devices: tuple[Any, ...]


def wheels(name: str) -> str | None:
    """What to install so that a target can be compiled for; None if everything is there.

    Args:
        name: one of `TARGETS`.

    Raises:
        ValueError: for a name that is no target.

    Example:
        >>> wheels("cpu") is None
        True
    """
    platform = _parsed(name)[0].platform
    version = jax.__version__
    if platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        return f"pip install 'jax[tpu]=={version}'"
    if platform == "cuda" and not (_has_gpu_plugin() and _has_gpu_tools()):
        plugins = " ".join(f"jax-cuda12-{part}=={version}" for part in ("plugin", "pjrt"))
        return f"pip install --no-deps {plugins} nvidia-cuda-nvcc-cu12"
    return None


def open_target(name: str) -> Target:
    """The devices of a target, in this process.

    Args:
        name: one of `TARGETS`.

    Raises:
        ValueError: for a name that is no target.
        MissingCompiler: if its compiler is not installed, which names the wheels, or cannot be opened.

    Example:
        >>> open_target("cpu").chip.platform
        'cpu'
    """
    chip, sizes = _parsed(name)
    install = wheels(name)
    if install is not None:
        raise MissingCompiler(f"the compiler for {name} is not installed; get it with: {install}")
    return Target(name, chip, tuple(_devices(name, chip, sizes)))


def _parsed(name: str) -> tuple[Chip, str]:
    """The chip that a target's name begins with, and the sizes of its topology."""
    for word, chip in CHIPS.items():
        rest = name.removeprefix(word)
        pattern = {"tpu": r"(:\d+(x\d+){1,2})?", "cuda": r"(:\d+)?", "cpu": ""}[chip.platform]
        if name.startswith(word) and re.fullmatch(pattern, rest):
            return chip, rest[1:] or chip.sizes
    raise ValueError(f"a target is {TARGETS}; got {name!r}")


def _has_gpu_plugin() -> bool:
    return any(_found(f"jax_plugins.xla_cuda{version}") for version in (12, 13))


def _has_gpu_tools() -> bool:
    """Whether `ptxas` comes with a wheel."""
    return any(_found(f"nvidia.{package}") for package in ("cuda_nvcc", "cu13"))


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@cache
def _devices(name: str, chip: Chip, sizes: str) -> Any:
    if chip.platform == "cpu":
        return jax.devices("cpu")
    word = name.split(":")[1]
    try:
        if chip.platform == "tpu":
            with _as_on_a_tpu():
                return topologies.get_topology_desc(
                    platform="tpu", topology_name=f"{word}:{sizes}"
                ).devices
        return topologies.get_topology_desc(
            platform="cuda", topology_name=word, topology=f"1x1x{sizes}", target_config=_H100
        ).devices
    except NotImplementedError:
        raise MissingCompiler(
            f"{name} cannot be opened: without a GPU's driver set JAX_PLATFORMS=cpu in the environment "
            "before jax is imported"
        ) from None


@contextlib.contextmanager
def _as_on_a_tpu() -> Iterator[None]:
    """What its library asks of the machine it is on, where that has not been said."""
    answers = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is used, so that other processes may have it
    }
    set_here = [key for key in answers if key not in os.environ]
    os.environ.update({key: answers[key] for key in set_here})
    try:
        yield
    finally:
        for key in set_here:
            del os.environ[key]


# An H100 with 80 GB (SXM), as XLA describes a device.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3350000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
"""
