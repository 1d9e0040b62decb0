"""Updates that are not made: those of a step whose loss or gradient is not finite."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from ldm_jax.nn.attend import current_target
from ldm_jax.training.state import Metrics, TrainState

# Of each network that a stage trains, as far as the stage measures them. A gradient with one
# element that is not finite has no finite norm.
CHECKED = ("loss", "grad_norm", "discriminator", "discriminator_grad_norm")


class Broken(Exception):
    """A training that its own numbers show to be broken; the message says how.

    Attributes:
        begin: the first step at which it shows.
        step: the last step that belongs to it.
    """

    def __init__(self, message: str, begin: int, step: int) -> None:
        super().__init__(message)
        self.begin, self.step = begin, step


def checked_update(
    update: Callable[[], TrainState], state: TrainState, metrics: Metrics
) -> tuple[TrainState, Metrics]:
    """The state after a step, and its metrics: as `update` makes it if the loss and all gradients
    in `metrics` are finite, else as it was, bit for bit, but for the number of the step.

    The metrics have `skipped` besides: 1 where it stayed, else 0.
    """
    checked = [metrics[name] for name in CHECKED if name in metrics]
    finite = functools.reduce(jnp.logical_and, map(jnp.isfinite, checked))
    kept = state.replace(step=state.step + 1)
    if current_target().platform == "cpu":
        # Which fuses nothing into two arrays: to select in each would compute and read much twice.
        new = jax.lax.cond(finite, update, lambda: kept)
    else:
        # A selection is fused with what writes the state anyway. A branch would make a GPU's host
        # wait for the gradients.
        select = lambda after, before: jnp.where(finite, after, before)  # noqa: E731
        new = jax.tree.map(select, update(), kept)
    return new, {**metrics, "skipped": 1.0 - finite.astype(jnp.float32)}


class Skips:
    """Tells of skipped updates, and ends a run in which nothing else is left.

    Args:
        stage: whose steps these are, as shown.
        most: so many in a row break the run.
        say: shows a line.
    """

    def __init__(self, stage: str, most: int, say: Callable[[str], None]) -> None:
        self._stage, self._most, self._say = stage, most, say
        self._in_row = 0

    def check(self, step: int, rows: Sequence[Mapping[str, float]]) -> None:
        """Looks at the metrics of the steps up to `step`, each of which is seen once, in order.

        Raises:
            Broken: too many steps in a row were skipped.
        """
        first = step - len(rows) + 1
        skipped = [first + i for i, row in enumerate(rows) if row.get("skipped")]
        if skipped:
            row = rows[skipped[0] - first]
            self._say(
                f"warning: {self._stage}: {_count(len(skipped))} of the last {len(rows)} skipped, "
                f"the first of them step {skipped[0]} ({_what(row)})"
            )
        for number, row in enumerate(rows, first):
            self._in_row = self._in_row + 1 if row.get("skipped") else 0
            if self._in_row >= self._most:
                begin = number - self._in_row + 1
                raise Broken(
                    f"{self._in_row} steps in a row had no finite loss or gradient, from step "
                    f"{begin} on ({_what(row)})",
                    begin,
                    number,
                )


def _count(steps: int) -> str:
    return "1 step" if steps == 1 else f"{steps} steps"


def _what(row: Mapping[str, float]) -> str:
    """What of a skipped step was not finite, e.g. 'loss nan, grad_norm inf'."""
    values = {name: row[name] for name in CHECKED if name in row}
    return ", ".join(f"{k} {v:g}" for k, v in values.items() if not abs(v) < float("inf"))
