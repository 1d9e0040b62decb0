"""What a run tells: metrics on disk, and progress on the terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tqdm import tqdm

from ldm_jax.errors import UserError


class MetricWriter:
    """Appends scalars to `metrics.jsonl` and to TensorBoard event files; no TensorFlow needed.

    `clu.metric_writers` would serve, but its summary writer imports TensorFlow.
    """

    def __init__(self, directory: pathlib.Path, start_step: int = 0) -> None:
        """Opens both files; lines after `start_step` come from steps that will run again.

        Only the first of several processes writes.
        """
        self._writes = jax.process_index() == 0
        self._known: set[tuple[int, str]] = set()  # what was written of `start_step` before
        if not self._writes:
            return
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / "metrics.jsonl"
        self._drop_after(start_step)
        self._file = open(self._path, "a", encoding="utf-8")
        self._events = EventFileWriter(str(directory))

    def _drop_after(self, step: int) -> None:
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                if row["step"] <= step:
                    kept.append(line + "\n")
                if row["step"] == step:
                    self._known |= {(step, name) for name in row}
            except (ValueError, KeyError):
                continue  # a line that a crash cut short
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self._path)

    def has(self, step: int, name: str) -> bool:
        """Tells whether a scalar of the step from which the run goes on was written before."""
        return (step, name) in self._known

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Writes one line of scalars.

        Raises:
            UserError: the disk takes no more.
        """
        if not self._writes:
            return
        try:
            self._file.write(json.dumps({"step": step} | scalars) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"cannot write to {self._path} ({error.strerror}): make room or mend the disk, and "
                "start the same command again, which goes on from the last checkpoint"
            ) from error
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._events.add_event(
            Event(step=step, wall_time=time.time(), summary=Summary(value=values))
        )

    def write_image(self, step: int, tag: str, path: pathlib.Path) -> None:
        """Shows a PNG file in TensorBoard."""
        if not self._writes:
            return
        image = Summary.Image(encoded_image_string=path.read_bytes(), colorspace=3)
        value = Summary.Value(tag=tag, image=image)
        self._events.add_event(
            Event(step=step, wall_time=time.time(), summary=Summary(value=[value]))
        )

    def close(self) -> None:
        """Writes what is left."""
        if not self._writes:
            return
        self._file.close()
        self._events.close()


class Progress:
    """A bar on a terminal, a line per interval elsewhere; averages metrics between lines."""

    def __init__(self, stage: str, start: int, total: int, batch_size: int) -> None:
        self._stage, self._total, self._batch_size = stage, total, batch_size
        self._terminal = sys.stderr.isatty() and jax.process_index() == 0
        self._bar = tqdm(
            desc=stage, initial=start, total=total, disable=not self._terminal, unit="step"
        )
        self._pending: list[dict[str, jax.Array]] = []
        self._rows: list[dict[str, float]] = []
        self._start, self._start_step = time.perf_counter(), start
        self._mark = self._start
        self._wait_mark = 0.0

    def step(self, metrics: dict[str, jax.Array]) -> None:
        """Keeps one step's metrics on the device until the next line is due."""
        self._pending.append(metrics)
        self._bar.update()

    def fetch(self) -> list[dict[str, float]]:
        """Waits for the steps so far; returns the metrics of each that was not fetched before."""
        rows, self._pending = jax.device_get(self._pending), []
        rows = [{name: float(value) for name, value in row.items()} for row in rows]
        self._rows += rows
        return rows

    def report(self, step: int, wait_seconds: float) -> dict[str, float]:
        """Averages, shows and returns the metrics since the last report.

        What was skipped is counted as `skipped`, and is in no average; a metric of which nothing is
        left is absent.

        Args:
            step: steps done.
            wait_seconds: time spent waiting for data since the run began.
        """
        self.fetch()
        rows, self._rows = self._rows, []
        made = [row for row in rows if not row.get("skipped")]
        scalars = {}
        for key in rows[0]:
            column = np.array([row[key] for row in made])
            if key[-3:-1] == "_q":  # a noise quartile without an example is NaN in its row
                column = column[~np.isnan(column)]
            if column.size:
                scalars[key] = float(column.mean())
        scalars["skipped"] = len(rows) - len(made)
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        waited, self._wait_mark = wait_seconds - self._wait_mark, wait_seconds
        scalars["images_per_second"] = len(rows) * self._batch_size / seconds
        scalars["data_wait_share"] = waited / seconds
        left = (now - self._start) / (step - self._start_step) * (self._total - step)
        shown = {
            "loss": f"{scalars['loss']:.4f}" if made else "not finite",
            "images/s": f"{scalars['images_per_second']:.0f}",
            "waiting for data": f"{scalars['data_wait_share']:.0%}",
        }
        if scalars["skipped"]:
            shown["skipped"] = str(scalars["skipped"])
        self._bar.set_postfix(shown)
        if not self._terminal:
            text = ", ".join(f"{key} {value}" for key, value in shown.items())
            minutes, rest = divmod(round(left), 60)
            eta = f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
            self.say(f"{self._stage}: step {step}/{self._total}, {text}, ETA {eta}")
        return scalars

    def say(self, text: str) -> None:
        """Prints a line, above the bar."""
        self._bar.write(text)
        sys.stdout.flush()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What is done meanwhile does not count as time of the steps, except in the ETA."""
        jax.block_until_ready(self._pending)  # the steps so far, which may still be running
        start = time.perf_counter()
        try:
            yield
        finally:
            self._mark += time.perf_counter() - start

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()
