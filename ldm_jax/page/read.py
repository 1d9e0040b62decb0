"""What the files of a workdir tell of its run, as far as they are there and readable."""

from __future__ import annotations

import json
import pathlib
import re
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event

from ldm_jax.errors import UserError
from ldm_jax.machine import STARTS

# Stages in the order of training: their name, folder, and block of the config.
STAGES = (
    ("first stage", "first_stage", "first_stage.train"),
    ("diffusion", ".", "train"),
    ("classifier", "classifier", "classifier.train"),
)
_STEP = re.compile(r"step_(\d+)\.png")
_TOTAL = re.compile(r"^Total: ([\d,]+)", re.MULTILINE)


class Stage(NamedTuple):
    """The training of one stage.

    Attributes:
        name: as shown.
        rows: of metrics.jsonl, each with its 'step'.
        parameters: how many it trains and keeps; None if unknown.
        planned: steps in all.
        batch_size: images per step.
        seconds: that its training took, over all starts; 0 if unknown.
        starts: how often it was started.
        rollbacks: how often it went back to an older checkpoint.
    """

    name: str
    rows: list[dict[str, Any]]
    parameters: int | None
    planned: int
    batch_size: int
    seconds: float
    starts: int
    rollbacks: int

    @property
    def steps(self) -> int:
        """The last step that is known of."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def step_seconds(self) -> float:
        """Seconds of the steps alone, without compiling, pictures and checkpoints."""
        total, before = 0.0, 0
        for row in self.rows:
            speed = row.get("images_per_second")
            if speed:
                total, before = (
                    total + (row["step"] - before) * self.batch_size / speed,
                    row["step"],
                )
        return total


class Picture(NamedTuple):
    """A PNG file, of the state after a step; step None is the last."""

    path: pathlib.Path
    step: int | None


class Run(NamedTuple):
    """All that a report tells of.

    Attributes:
        workdir: where it was read.
        config: by flat key, as it is stored.
        stages: those that were trained.
        samples: grids, in the order of the steps, the final one last.
        reconstructions: likewise.
        nearest: final samples beside their nearest training images; or None.
        pictures: of evaluations, by name.
        record: of evaluations (metrics.json); {} if there is none.
        starts: of training: times and machines.
        bad_images: how many could not be read.
        notes: what could not be read of all this.
    """

    workdir: pathlib.Path
    config: dict[str, Any]
    stages: list[Stage]
    samples: list[Picture]
    reconstructions: list[Picture]
    nearest: pathlib.Path | None
    pictures: dict[str, pathlib.Path]
    record: dict[str, Any]
    starts: list[dict[str, Any]]
    bad_images: int
    notes: list[str]


def read_run(workdir: pathlib.Path) -> Run:
    """Reads a workdir; what is missing or damaged of it is left out, and the latter noted.

    Raises:
        UserError: it is no workdir.
    """
    notes: list[str] = []
    config = _config(workdir)
    evaluation = workdir / "evaluation"
    stages = [_stage(name, workdir / at, config, block, notes) for name, at, block in STAGES]
    samples = _steps(workdir / "samples")
    if (workdir / "samples" / "final.png").is_file():
        samples.append(Picture(workdir / "samples" / "final.png", None))
    nearest = workdir / "samples" / "final_nearest.png"
    return Run(
        workdir=workdir,
        config=config,
        stages=[stage for stage in stages if stage.rows],
        samples=samples,
        reconstructions=_steps(workdir / "first_stage" / "reconstructions"),
        nearest=nearest if nearest.is_file() else None,
        pictures={path.stem: path for path in sorted(evaluation.glob("*.png"))},
        record=_record(evaluation / "metrics.json", notes),
        starts=_lines(workdir / STARTS, notes),
        bad_images=len(_text(workdir / "bad_images.txt").splitlines()),
        notes=notes,
    )


def _config(workdir: pathlib.Path) -> dict[str, Any]:
    path = workdir / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{workdir} is no workdir: it has no config.json; train first, or check --workdir"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is no config")
    return _flat(found)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def _stage(
    name: str, folder: pathlib.Path, config: dict[str, Any], block: str, notes: list[str]
) -> Stage:
    rows = [
        {key: value for key, value in row.items() if isinstance(value, (int, float))}
        for row in _lines(folder / "metrics.jsonl", notes)
        if isinstance(row.get("step"), int)
    ]
    total = _TOTAL.search(_text(folder / "parameters.txt"))
    times = [_seconds(path) for path in sorted(folder.glob("events.out.tfevents.*"))]
    try:
        rollbacks = len(json.loads(_text(folder / "rollbacks.json") or "[]"))
    except (ValueError, TypeError):
        rollbacks = 0
    return Stage(
        name,
        sorted(rows, key=lambda row: row["step"]),
        int(total[1].replace(",", "")) if total else None,
        config.get(f"{block}.steps", 0),
        config.get(f"{block}.batch_size", 0),
        sum(times),
        sum(1 for seconds in times if seconds > 0),
        rollbacks,
    )


def _lines(path: pathlib.Path, notes: list[str]) -> list[dict[str, Any]]:
    """The JSON objects of a file, a line each; [] for a missing one."""
    found, bad = [], 0
    for line in _text(path).splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            bad += 1
            continue
        found += [row] if isinstance(row, dict) else []
    if bad:
        notes.append(f"{path}: {bad} lines could not be read and are left out")
    return found


def _record(path: pathlib.Path, notes: list[str]) -> dict[str, Any]:
    text = _text(path)
    if not text:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        notes.append(f"{path} is damaged, and is left out")
        return {}
    return found


def _steps(folder: pathlib.Path) -> list[Picture]:
    named = ((path, _STEP.fullmatch(path.name)) for path in folder.glob("step_*.png"))
    found = [Picture(path, int(match[1])) for path, match in named if match]
    return sorted(found, key=lambda picture: picture.step)


def _text(path: pathlib.Path) -> str:
    """The text of a file; '' for a missing one."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _seconds(path: pathlib.Path) -> float:
    """From the first to the last event of a file of TensorBoard's."""
    times = [event.wall_time for event in _events(path)]
    return max(times) - min(times) if times else 0.0


def _events(path: pathlib.Path) -> Iterator[Event]:
    """The events of a file, up to where it is cut off.

    A record is its length (8 bytes), a checksum (4), the event and a checksum (4).
    """
    try:
        with open(path, "rb") as file:
            while len(head := file.read(12)) == 12:
                (length,) = struct.unpack("<Q", head[:8])
                if length > 2**30:
                    return
                data = file.read(length)
                if len(data) < length or len(file.read(4)) < 4:
                    return
                yield Event.FromString(data)
    except (OSError, DecodeError):
        return
