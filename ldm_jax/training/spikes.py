"""Finds steps from which on the loss is far above what it was.

Losses are compared in logarithms: errors and cross-entropies are positive, vary by ratios, and have
long tails upwards, which logarithms shorten. It is a spike where each of three steps in a row has a
loss that is

- `factor` times the median of a window of steps before them,
- further from it than SPREADS standard deviations of a single step, estimated by the median
  absolute deviation: so the noise of small batches is none;
- sqrt(`factor`) times all of the window but its highest value: so is none what recurs by itself,
  such as batches with a rare class, and a single outlier before a spike hides nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

LAST = 3  # steps that make a spike
SPREADS = 4.0
# Of a normal distribution: standard deviations in one median absolute deviation.
MAD_TO_STD = 1.4826
LEAST = 1e-30  # in place of a loss of 0, which has no logarithm
QUARTERS = ("loss_q0", "loss_q1", "loss_q2", "loss_q3")
MEANING = ("the least noise", "little noise", "much noise", "the most noise")


def heights(losses: np.ndarray, factor: float, window: int) -> tuple[np.ndarray, np.ndarray]:
    """How high the last steps are, as a share of what makes a spike.

    Args:
        losses: (n,) of steps in a row, not negative.
        factor: least ratio to the median of a spike, above 1.
        window: steps that are compared with.

    Returns:
        The lowest and the highest of LAST steps, (n - window - LAST + 1,) each, the first of them
        for steps window to window + LAST - 1 of `losses`. It is a spike where the lowest is 1.
    """
    logs = np.log(np.maximum(losses, LEAST))
    before = np.lib.stride_tricks.sliding_window_view(logs[:-LAST], window)
    recent = np.lib.stride_tricks.sliding_window_view(logs[window:], LAST)
    median = np.median(before, axis=1)
    spread = MAD_TO_STD * np.median(np.abs(before - median[:, None]), axis=1)
    high = np.partition(before, -2, axis=1)[:, -2] - median
    limit = np.maximum(SPREADS * spread, high + np.log(factor) / 2)
    limit = np.maximum(limit, np.log(factor))
    return (recent.min(axis=1) - median) / limit, (recent.max(axis=1) - median) / limit


class Spikes:
    """Tells of spikes of a stage's loss, each once: when it begins.

    The window is stored with each checkpoint, so that a resumed run finds the same spikes.

    Args:
        stage: whose loss it is, as shown.
        name: of the metric; `loss_q0` to `loss_q3`, where there are any, say where it rose.
        factor: see `heights`; 0 finds nothing.
        window: steps that are compared with.
        path: of the stored windows, one for each of the last checkpoints.
        step: from which on the run goes on.
        say: shows a line.
    """

    def __init__(
        self,
        stage: str,
        name: str,
        factor: float,
        window: int,
        path: pathlib.Path,
        step: int,
        say: Callable[[str], None],
    ) -> None:
        self._stage, self._name, self._factor, self._window = stage, name, factor, window
        self._path, self._say = path, say
        self._stored = _read(path, step)
        # (n, 2 + quarters): the step, its loss, and that of each quarter or NaN.
        self._rows = np.array(self._stored.get(str(step), [])).reshape(-1, 2 + len(QUARTERS))
        self._on = False

    def check(self, step: int, rows: Sequence[Mapping[str, float]]) -> list[tuple[int, int]]:
        """Looks at the metrics of the steps up to `step`, each of which is seen once, in order.

        Skipped steps do not count. Returns the first and the last of the steps by which each new
        spike was found.
        """
        if not self._factor:
            return []
        first, names = step - len(rows) + 1, (self._name, *QUARTERS)
        new = [
            [number, *(row.get(name, np.nan) for name in names)]
            for number, row in enumerate(rows, first)
            if not row.get("skipped")
        ]
        seen = np.array([*self._rows, *new]).reshape(-1, 2 + len(QUARTERS))
        self._rows = seen[-(self._window + LAST - 1) :]
        if len(seen) < self._window + LAST:
            return []
        found = []
        lows, highs = heights(seen[:, 1], self._factor, self._window)
        for i, (lowest, highest) in enumerate(zip(lows, highs, strict=True)):
            part = seen[i : i + self._window + LAST]
            if lowest >= 1 and not self._on:
                found.append((int(part[-LAST, 0]), int(part[-1, 0])))
                self._say(self._message(part))
            # One that falls for a step or hovers about the limit is still the same.
            self._on = highest >= 0.5 if self._on else lowest >= 1
        return found

    def _message(self, rows: np.ndarray) -> str:
        loss, *quarters = (_rise(column) for column in rows[:, 1:].T)
        text = (
            f"warning: {self._stage}, step {int(rows[-1, 0])}: {self._name} has risen to "
            f"{np.exp(loss):.3g} times what it was in the {self._window} steps before"
        )
        if np.isnan(quarters).all():
            return text
        most = int(np.nanargmax(quarters))
        return f"{text}, most in {QUARTERS[most]}, the quarter with {MEANING[most]}"

    def store(self, step: int, keep: int) -> None:
        """Stores the window, before the checkpoint of a step; those of `keep` steps stay."""
        if not self._factor or jax.process_index() != 0:
            return
        self._stored[str(step)] = self._rows.tolist()
        self._stored = dict(list(self._stored.items())[-keep:])
        temporary = self._path.with_suffix(".tmp")
        # Without it a resumed run finds spikes a window later. The checkpoint, which comes next,
        # says better what is wrong with the disk.
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(self._stored), encoding="utf-8")
            os.replace(temporary, self._path)


def _rise(column: np.ndarray) -> float:
    """The logarithm of the ratio of a loss's last values to those before; NaN where none is known.

    A quarter of the noise without an example in a step is NaN in its row.
    """
    logs = np.log(np.maximum(column, LEAST))
    recent, before = (part[~np.isnan(part)] for part in (logs[-LAST:], logs[:-LAST]))
    return float(recent.mean() - np.median(before)) if recent.size and before.size else np.nan


def _read(path: pathlib.Path, step: int) -> dict[str, list]:
    """The stored windows up to a step, by their steps."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}  # what is lost is the comparison with the steps before
    return {key: rows for key, rows in stored.items() if int(key) <= step}
