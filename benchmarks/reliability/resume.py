"""Runs that are broken off and taken up again, against those that nobody disturbed."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax import run as run_lib
from ldm_jax.training.interrupt import Interrupted
from ldm_jax.training.sharding import gather, make_mesh
from ldm_jax.training.stage import Stage

WEIGHTS = ("first_stage/weights.safetensors", "classifier/weights.safetensors")
TIMES = ("images_per_second", "data_wait_share", "seconds")  # of metrics, which no run repeats


class Killed(BaseException):
    """The process is gone, as far as the run can tell: nobody catches this."""


class Stop(NamedTuple):
    """Where a run is broken off.

    Attributes:
        stage: 'first stage', 'diffusion' or 'classifier'.
        step: after which it happens.
        how: 'signal' is a SIGTERM, which the run answers by saving the next step; 'crash' ends it
            on the spot, so that it goes on from the last checkpoint.
    """

    stage: str
    step: int
    how: str


@dataclasses.dataclass
class Trace:
    """What a run did, over all its parts.

    Attributes:
        states: stage -> its whole state after the last step, on the host.
        examples: stage -> step (from 0) -> (B,) places in the data of its batch.
        resumed: the steps at which parts began, in order.
    """

    states: dict[str, Any] = dataclasses.field(default_factory=dict)
    examples: dict[str, dict[int, np.ndarray]] = dataclasses.field(default_factory=dict)
    resumed: list[tuple[str, int]] = dataclasses.field(default_factory=list)


def train(
    config: ConfigDict,
    workdir: pathlib.Path,
    stops: Sequence[Stop] = (),
    trace: Trace | None = None,
    devices: int | None = None,
) -> Trace:
    """Runs a config to its end, breaking it off at each of `stops` and calling it again.

    Args:
        config: of the run.
        workdir: of the run.
        stops: in the order in which they come.
        trace: of earlier parts, which is continued.
        devices: how many take part; by default all.

    Raises:
        RuntimeError: a stop was never reached, or the run ended in another way than it should.
    """
    trace = trace or Trace()
    for stop in [*stops, None]:
        part(config, workdir, trace, stop, devices)
    return trace


def part(
    config: ConfigDict,
    workdir: pathlib.Path,
    trace: Trace,
    stop: Stop | None = None,
    devices: int | None = None,
) -> None:
    """Runs a config up to a stop, or to its end; see `train`."""
    mesh_of = lambda block: make_mesh(block, jax.devices()[:devices])  # noqa: E731
    watched = _watched(run_lib.fit, trace, stop)
    with mock.patch.multiple(run_lib, fit=watched, make_mesh=mesh_of):
        try:
            run_lib.run(config, workdir)
            ended = "done"
        except Interrupted:
            ended = "signal"
        except Killed:
            ended = "crash"
    if ended != (stop.how if stop else "done"):
        raise RuntimeError(f"the run ended by {ended}, but was to meet {stop}")


def _watched(fit: Callable[..., Any], trace: Trace, stop: Stop | None) -> Callable[..., Any]:
    """`training.loop.fit`, which tells the trace what it does and stops where it is to."""

    def watched(stage: Stage, batches_from: Callable[[int], Any], *rest: Any) -> Any:
        seen = trace.examples.setdefault(stage.name, {})

        def recorded(step: int) -> _Recorded:
            trace.resumed.append((stage.name, step))
            return _Recorded(batches_from(step), seen, step)

        if stop is not None and stop.stage == stage.name:
            stage = _stopping(stage, stop)
        state = fit(stage, recorded, *rest)
        trace.states[stage.name] = gather(state)
        return state

    return watched


class _Recorded:
    """Batches that note which examples they hold; other attributes are those of the batches."""

    def __init__(self, batches: Any, seen: dict[int, np.ndarray], start: int) -> None:
        self._batches, self._seen, self._start = batches, seen, start

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for step, batch in enumerate(self._batches, self._start):
            self._seen[step] = np.array(batch["index"])
            yield batch


def _stopping(stage: Stage, stop: Stop) -> Stage:
    """The stage with a snapshot, which is taken after each step, that breaks it off."""

    def snapshot(state: Any, step: int) -> None:
        if stage.keeps(step):
            stage.snapshot(state, step)
        if step == stop.step and stop.how == "crash":
            raise Killed
        if step == stop.step:
            signal.raise_signal(signal.SIGTERM)

    return dataclasses.replace(stage, snapshot=snapshot, snapshot_every=1)


# -- comparisons ------------------------------------------------------------------------------


def differences(ours: Any, theirs: Any) -> dict[str, float]:
    """The leaves of two trees that are not the same bits -> their largest difference.

    Raises:
        ValueError: the trees have other parts, or leaves of other shapes or types.
    """
    found = {}
    a, b = (jax.tree_util.tree_leaves_with_path(tree) for tree in (ours, theirs))
    if [path for path, _ in a] != [path for path, _ in b]:
        raise ValueError("the states have different parts")
    for (path, x), (_, y) in zip(a, b, strict=True):
        x, y, name = np.asarray(x), np.asarray(y), jax.tree_util.keystr(path)
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            raise ValueError(f"{name}: {x.shape} {x.dtype} against {y.shape} {y.dtype}")
        if x.tobytes() != y.tobytes():
            found[name] = float(np.abs(x.astype(np.float64) - y.astype(np.float64)).max())
    return found


def metrics(folder: pathlib.Path) -> list[dict[str, float]]:
    """The rows of a stage's metrics, without what is a time."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{name: v for name, v in row.items() if name not in TIMES} for row in rows]


def folders(workdir: pathlib.Path) -> list[pathlib.Path]:
    """The folders of the stages that a run has trained."""
    return sorted(path.parent for path in workdir.rglob("metrics.jsonl"))


def same_files(ours: pathlib.Path, theirs: pathlib.Path) -> dict[str, bool]:
    """Which of the files that two runs leave behind have the same contents."""
    names = ["samples/final.png", *WEIGHTS]
    names += [str(path.relative_to(ours)) for path in sorted((ours / "ema").glob("*"))]
    found = {
        name: (theirs / name).is_file()
        and (ours / name).read_bytes() == (theirs / name).read_bytes()
        for name in names
        if (ours / name).is_file()
    }
    for folder in folders(ours):
        name = str((folder / "metrics.jsonl").relative_to(ours))
        found[name] = metrics(folder) == metrics(theirs / folder.relative_to(ours))
    return found


def compare(
    config: ConfigDict, out: pathlib.Path, stops: Sequence[Stop], devices: int | None = None
) -> dict[str, Any]:
    """Trains a config with and without `stops`, in folders of `out`; returns what differs.

    'leaves' and 'elements' count what is compared of the whole states of all stages; of these,
    'unequal' -> largest difference, which is {} where all bits are the same. 'examples_equal' says
    the same of the examples seen in each step, 'epochs' how often the set was gone through,
    and 'files' of what lies in the workdirs.
    """
    straight = train(config, out / "straight", devices=devices)
    broken = train(config, out / "broken", stops, devices=devices)
    steps = {name: int(state.step) for name, state in straight.states.items()}
    examples = all(
        np.array_equal(straight.examples[name][step], broken.examples[name][step])
        for name, count in steps.items()
        for step in range(count)
    )
    leaves = jax.tree.leaves(straight.states)
    size = max(len(rows) for by_step in straight.examples.values() for rows in by_step.values())
    return {
        "stages": steps,
        "stops": [tuple(stop) for stop in stops],
        "resumed": [(name, step) for name, step in broken.resumed if 0 < step < steps[name]],
        "leaves": len(leaves),
        "elements": int(sum(np.size(leaf) for leaf in leaves)),
        "unequal": differences(straight.states, broken.states),
        "examples_equal": examples,
        "images_seen": min(steps.values()) * size,
        "files": same_files(out / "straight", out / "broken"),
    }


def stops_of(config: ConfigDict, step: int, hows: Sequence[str]) -> list[Stop]:
    """Stops in every stage that a config trains, one of each kind, from `step` on."""
    stages = {
        "first stage": config.first_stage.train.steps * (config.first_stage.kind != "identity"),
        "diffusion": config.train.steps,
        "classifier": config.classifier.train.steps,
    }
    given = bool(config.first_stage.weights)
    return [
        Stop(stage, step + place, how)
        for stage, count in stages.items()
        if count > 0 and not (given and stage == "first stage")
        for place, how in enumerate(hows)
    ]
