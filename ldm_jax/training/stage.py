"""What the training loop needs to know of a stage."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ldm_jax.training.state import Init, Step, TrainState


class Picture(NamedTuple):
    """What a state looks like.

    Attributes:
        path: of a PNG file.
        scalars: what was measured on the way; written and printed.
    """

    path: pathlib.Path
    scalars: Mapping[str, float] = {}


class Measure(NamedTuple):
    """A figure of a state that takes long, and so is taken now and then.

    Attributes:
        name: as written and printed.
        every: steps between two; it is also taken at the last step.
        take: (state, step) -> figure; all hosts call it, and it may raise Interrupted to give up.
    """

    name: str
    every: int
    take: Callable[[TrainState, int], float]


@dataclasses.dataclass(frozen=True)
class Stage:
    """What the loop needs to know of a stage.

    Attributes:
        name: as shown.
        directory: where its checkpoints and metrics go.
        block: the config of its optimisation, such as `train`.
        init: key -> state.
        step: (state, frozen, batch, key) -> (state, metrics).
        frozen: variables that the step reads and never changes.
        picture: shows a state; called with (state, step), and may raise Interrupted to give up;
            None where there is nothing to show.
        drawn: tells whether the picture of a step is there already; None where there are none.
        start: weights in place of the random ones, by part as in `TrainState.params`; or None.
        picture_at_end: whether the last step is shown too, wherever it falls.
        alarms: averaged metrics -> what is wrong, by name; see `Alarms`.
        watched: the metric whose spikes are told of, positive where it is not 0.
        snapshot: stores what else is kept of a state; called with (state, step).
        snapshot_every: steps between its calls; it is also called at the last step.
        forget: removes snapshots of later steps; called with the step that training starts from.
        counts: what is counted beside the steps, to be written with their metrics.
        measure: what is measured of states; or None.
    """

    name: str
    directory: pathlib.Path
    block: ConfigDict
    init: Init
    step: Step
    frozen: Any
    picture: Callable[[TrainState, int], Picture] | None
    start: Any = None
    drawn: Callable[[int], bool] | None = None
    picture_at_end: bool = False
    alarms: Callable[[Mapping[str, float]], dict[str, str]] | None = None
    watched: str = "loss"
    snapshot: Callable[[TrainState, int], None] | None = None
    snapshot_every: int = 1
    forget: Callable[[int], None] | None = None
    counts: Callable[[], Mapping[str, float]] = dict
    measure: Measure | None = None

    def shows(self, step: int) -> bool:
        """Tells whether a step is shown."""
        every = self.block.picture_every
        at_end = self.picture_at_end and step == self.block.steps
        return self.picture is not None and every > 0 and (step % every == 0 or at_end)

    def measures(self, step: int) -> bool:
        """Tells whether a step is measured."""
        return self.measure is not None and (
            step % self.measure.every == 0 or step == self.block.steps
        )

    def keeps(self, step: int) -> bool:
        """Tells whether a snapshot of a step is stored."""
        due = step % self.snapshot_every == 0 or step == self.block.steps
        return self.snapshot is not None and due
