"""How far a run has come, and its files: the state it resumes from, the metrics, the loss curve."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from lucid_jax.models.checkpoint import write_atomically
from lucid_jax.training.recipe import Recipe

_LOSS_EVERY = 10  # steps per point of the loss curve


@dataclass
class Progress:
    """What a run remembers besides arrays; stored with them as JSON."""

    step: int = 0
    best_bits: float = math.inf
    pending: list[float] = field(default_factory=list)  # losses not yet in a mean
    losses: list[tuple[int, float]] = field(default_factory=list)
    bits: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0

    def add_loss(self, loss: float, last: bool) -> None:
        """Counts a step; every tenth, and the last, closes a mean."""
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss} at step {self.step + 1}")
        self.step += 1
        self.pending.append(loss)
        if last or self.step % _LOSS_EVERY == 0:
            self.losses.append((self.step, float(np.mean(self.pending))))
            self.pending.clear()


def plot_curve(path: Path | str, progress: Progress, recipe: Recipe) -> None:
    """Draws training loss and held-out bits per byte over the steps as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="training loss (nats per token)")
    axes.plot(*zip(*progress.losses, strict=True), color="tab:blue", alpha=0.6, linewidth=0.8)
    axes.axvline(recipe.long_from, color="gray", linestyle=":", linewidth=0.8)
    if progress.bits:
        scores = axes.twinx()
        scores.set_ylabel("held-out bits per byte")
        scores.plot(*zip(*progress.bits, strict=True), color="tab:red", marker=".")
    figure.savefig(str(path), dpi=120)


def save_state(path: Path, tree: Any, progress: Progress, identity: dict) -> None:
    """Writes what a run goes on from; `identity` says which run."""
    leaves = jax.tree.leaves(tree)
    arrays = {f"{index:05d}": np.asarray(leaf) for index, leaf in enumerate(leaves)}
    metadata = {
        "progress": json.dumps(dataclasses.asdict(progress)),
        "identity": json.dumps(identity),
    }
    write_atomically(path, safetensors.numpy.save(arrays, metadata))


def load_state(path: Path, like: Any, identity: dict) -> tuple[Any, Progress]:
    """Reads what `save_state` wrote of the same run."""
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata()
        stored = json.loads(metadata["identity"])
        for key, value in json.loads(json.dumps(identity)).items():
            if stored[key] != value:
                raise ValueError(
                    f"{path} belongs to another run: its {key} is {stored[key]}, this run's "
                    f"{value}; repeat the options of that run, or choose another folder"
                )
        leaves, structure = jax.tree.flatten(like)
        leaves = [
            jnp.asarray(file.get_tensor(f"{index:05d}"), leaf.dtype)
            for index, leaf in enumerate(leaves)
        ]
    progress = Progress(**json.loads(metadata["progress"]))
    progress.losses = [(step, loss) for step, loss in progress.losses]
    progress.bits = [(step, bits) for step, bits in progress.bits]
    return jax.tree.unflatten(structure, leaves), progress


def write_metrics(folder: Path, summary: dict, progress: Progress, recipe: Recipe) -> None:
    """Writes the metrics, and draws the curve once there is one."""
    values = {**summary, **dataclasses.asdict(progress)}
    write_atomically(folder / "metrics.json", json.dumps(values, indent=1).encode())
    if progress.losses:
        plot_curve(folder / "curve.png", progress, recipe)
