"""Finds steps from which on the loss is far above what it was.

Losses are compared in logarithms: errors and cross-entropies are positive, vary by ratios, and
have long tails upwards, which logarithms take away. At each step the mean over the last three is
compared with the median of a window before them. It is a spike where the loss is both `factor`
times that median, and further from it than SPREADS standard deviations of a single step (estimated
by the median absolute deviation, so that single outliers do not widen it). So three steps with a
somewhat higher loss are found, and one step if it is very far off; noise of small batches is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

LAST = 3  # steps that are averaged
SPREADS = 4.0
# Of a normal distribution: standard deviations in one median absolute deviation.
MAD_TO_STD = 1.4826
LEAST = 1e-30  # in place of a loss of 0, which has no logarithm
QUARTERS = ("loss_q0", "loss_q1", "loss_q2", "loss_q3")
MEANING = ("the least noise", "little noise", "much noise", "the most noise")


def heights(losses: np.ndarray, factor: float, window: int) -> np.ndarray:
    """How high the loss is, of the last steps as a share of what makes a spike: above 1 is one.

    Args:
        losses: (n,) of steps in a row, not negative.
        factor: least ratio to the median of a spike, above 1.
        window: steps of which the median is taken.

    Returns:
        (n - window - LAST + 1,), the first of them for step window + LAST - 1 of `losses`.
    """
    logs = np.log(np.maximum(losses, LEAST))
    before = np.lib.stride_tricks.sliding_window_view(logs[:-LAST], window)
    median = np.median(before, axis=1)
    deviation = np.median(np.abs(before - median[:, None]), axis=1)
    recent = np.lib.stride_tricks.sliding_window_view(logs[window:], LAST).mean(axis=1)
    return (recent - median) / np.maximum(np.log(factor), SPREADS * MAD_TO_STD * deviation)


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

        Skipped steps do not count. Returns the first and last of the averaged steps of each new
        spike.
        """
        if not self._factor:
            return []
        first, names = step - len(rows) + 1, (self._name, *QUARTERS)
        new = [
            [number, *(row.get(name, np.nan) for name in names)]
            for number, row in enumerate(rows, first)
            if not row["skipped"]
        ]
        seen = np.array([*self._rows, *new]).reshape(-1, 2 + len(QUARTERS))
        self._rows = seen[-(self._window + LAST - 1) :]
        if len(seen) < self._window + LAST:
            return []
        found = []
        for i, height in enumerate(heights(seen[:, 1], self._factor, self._window)):
            part = seen[i : i + self._window + LAST]
            if height >= 1 and not self._on:
                found.append((int(part[-LAST, 0]), int(part[-1, 0])))
                self._say(self._message(part))
            # One that hovers about the limit is still the same.
            self._on = height >= (0.5 if self._on else 1.0)
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
