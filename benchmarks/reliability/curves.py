"""Golden curves: what every stage measured in its first steps, when it was last looked at.

A change of the code that is not meant to change results leaves them as they are. On the kind of
machine that they were recorded on (`machine.kind`) they are equal to the last bit; elsewhere sums
are rounded in another order, which grows with the steps, and only the first steps agree.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np

from benchmarks.reliability import machine, resume, toys

FOLDER = pathlib.Path(__file__).parents[2] / "tests" / "reliability" / "curves"
STEPS = 100
# Run of `toys.toy` -> its curves -> the folder of the stage's metrics.
RUNS = {
    "kl": {"first_stage_kl": "first_stage"},
    "vq": {"first_stage_vq": "first_stage"},
    "unet": {"diffusion_unet": "."},
    "unet_classifier": {"diffusion_unet_deep": ".", "classifier": "classifier"},
    "dit": {"diffusion_dit": "."},
}
COLUMNS = ("loss", "grad_norm", "discriminator")  # of these, what a stage has
# On another kind of machine. With all of the compiler's optimisations, which the recorded runs do
# without, the first 20 steps were 8e-7 apart at most.
FIRST, TOLERANCE = 10, 1e-4

Curves = dict[str, list[float]]


def read(workdir: pathlib.Path, run: str) -> dict[str, Curves]:
    """Curve -> column -> a number for each step, of a run that `toys.toy` configured."""
    found = {}
    for name, folder in RUNS[run].items():
        rows = resume.metrics(workdir / folder)
        found[name] = {key: [row[key] for row in rows] for key in COLUMNS if key in rows[0]}
    return found


def record(run: str, out: pathlib.Path, steps: int = STEPS) -> dict[str, Curves]:
    """Trains a run in the folder `out`, on one device, and reads its curves."""
    resume.train(toys.toy(run, steps, checkpoint_every=steps), out, devices=1)
    return read(out, run)


def store(curves: dict[str, Curves]) -> None:
    """Makes these the golden curves."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, columns in curves.items():
        text = json.dumps({"machine": machine.kind(), **columns}, indent=1)
        # One line for each column.
        text = text.replace(",\n  ", ", ").replace("[\n  ", "[").replace("\n ]", "]")
        (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def stored(name: str) -> tuple[dict[str, Any], Curves]:
    """A golden curve: the kind of machine that it comes from, and its columns."""
    columns = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return columns.pop("machine"), columns


def compare(name: str, found: Curves) -> dict[str, Any]:
    """How a curve, of all steps or only the first ones, differs from the golden one.

    'apart' is the largest relative difference over all steps, 'apart_at_first' that over the first
    `FIRST`; 'first_unequal' is the first step whose bits differ, or 0.

    Raises:
        ValueError: something else is measured than when the curve was recorded.
    """
    kind, columns = stored(name)
    if set(columns) != set(found):
        raise ValueError(f"{name} has {sorted(found)}, the golden curve {sorted(columns)}")
    a = np.array([found[key] for key in columns])
    b = np.array([columns[key] for key in columns])[:, : a.shape[1]]
    apart = np.abs(a - b) / np.maximum(np.abs(b), 1e-6)
    unequal = np.flatnonzero((a != b).any(0))
    return {
        "same_machine": kind == machine.kind(),
        "steps": a.shape[1],
        "first_unequal": int(unequal[0]) + 1 if unequal.size else 0,
        "apart": float(apart.max()),
        "apart_at_first": float(apart[:, :FIRST].max()),
    }
