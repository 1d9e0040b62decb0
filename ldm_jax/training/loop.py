"""The training loop, the same for all stages."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ldm_jax.data.device import to_device
from ldm_jax.data.pipeline import Batches
from ldm_jax.errors import UserError
from ldm_jax.training.alarms import Alarms
from ldm_jax.training.checkpoint import Checkpoints, abstract_like
from ldm_jax.training.ema import subtree
from ldm_jax.training.interrupt import Interrupted, Interrupts
from ldm_jax.training.logging import MetricWriter, Progress
from ldm_jax.training.sharding import batch_sharding, on_mesh, put, replicated, state_shardings
from ldm_jax.training.state import Init, Step, TrainState
from ldm_jax.training.votes import Votes


class Picture(NamedTuple):
    """What a state looks like.

    Attributes:
        path: of a PNG file.
        scalars: what was measured on the way; written and printed.
    """

    path: pathlib.Path
    scalars: Mapping[str, float] = {}


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
        start: weights in place of the random ones, by part as in `TrainState.params`; or None.
        picture_at_end: whether the last step is shown too, wherever it falls.
        alarms: averaged metrics -> what is wrong, by name; see `Alarms`.
        snapshot: stores what else is kept of a state; called with (state, step).
        snapshot_every: steps between its calls; it is also called at the last step.
        forget: removes snapshots of later steps; called with the step that training starts from.
    """

    name: str
    directory: pathlib.Path
    block: ConfigDict
    init: Init
    step: Step
    frozen: Any
    picture: Callable[[TrainState, int], Picture] | None
    start: Any = None
    picture_at_end: bool = False
    alarms: Callable[[Mapping[str, float]], dict[str, str]] | None = None
    snapshot: Callable[[TrainState, int], None] | None = None
    snapshot_every: int = 1
    forget: Callable[[int], None] | None = None

    def shows(self, step: int) -> bool:
        """Tells whether a step is shown."""
        every = self.block.picture_every
        at_end = self.picture_at_end and step == self.block.steps
        return self.picture is not None and every > 0 and (step % every == 0 or at_end)

    def keeps(self, step: int) -> bool:
        """Tells whether a snapshot of a step is stored."""
        due = step % self.snapshot_every == 0 or step == self.block.steps
        return self.snapshot is not None and due


def fit(
    stage: Stage,
    batches_from: Callable[[int], Batches],
    key: jax.Array,
    mesh: jax.sharding.Mesh,
    interrupts: Interrupts,
) -> TrainState:
    """Trains a stage to its last step, from its newest checkpoint if there is one.

    The state of the data is the step alone: `batches_from(step)` yields the batches from there. The
    state and the frozen variables are split over the mesh as `state_shardings` says.

    Raises:
        Interrupted: a signal came; the state is saved.
    """
    block, everywhere = stage.block, replicated(mesh)
    checkpoints = Checkpoints(stage.directory / "checkpoints", block.keep_checkpoints)
    state = restore_or_init(stage, checkpoints, key, mesh)
    start = int(state.step)
    if stage.forget:
        stage.forget(start)
    writer = MetricWriter(stage.directory, start)
    progress = Progress(stage.name, start, block.steps, block.batch_size)
    votes = Votes(interrupts, mesh)
    alarms = Alarms(stage.name, stage.alarms, progress.say) if stage.alarms else None
    step_key = jax.jit(functools.partial(jax.random.fold_in, key, 1), out_shardings=everywhere)()
    frozen = put(stage.frozen, state_shardings(stage.frozen, mesh))
    split = state_shardings(state, mesh)
    step_fn = jax.jit(stage.step, donate_argnums=0, out_shardings=(split, everywhere))
    step_fn = on_mesh(mesh, step_fn)
    batches = to_device(batches_from(start), batch_sharding(mesh))
    try:
        for step in range(start + 1, block.steps + 1):
            state, metrics = step_fn(state, frozen, next(batches), step_key)
            progress.step(metrics)
            stop = votes()
            last = stop or step == block.steps
            saved = last or step % block.checkpoint_every == 0
            if saved or step % block.log_every == 0 or stage.keeps(step):
                check_finite(stage, step, metrics)
            if last or step % block.log_every == 0:
                scalars = progress.report(step, batches.wait_seconds)
                if alarms:
                    scalars["alarms"] = alarms.check(step, scalars)
                writer.write(step, scalars)
            if stage.keeps(step):
                # Before the checkpoint, after which nobody would come back to write it.
                stage.snapshot(state, step)
            if saved:
                checkpoints.save(state)
            if stop:
                checkpoints.wait()
                raise Interrupted(
                    f"saved {stage.name} at step {step} of {block.steps}; "
                    "the same command goes on from here"
                )
            if stage.shows(step) and step < block.steps:
                # Given up for a signal, which the next step sees too, and then saves.
                with contextlib.suppress(Interrupted), progress.pause():
                    show(stage.name, step, stage.picture(state, step), writer, progress)
        # Not in the loop: a run that was stopped here resumes after its last step.
        if stage.shows(block.steps):
            show(stage.name, block.steps, stage.picture(state, block.steps), writer, progress)
    finally:
        batches.close()
        progress.close()
        writer.close()
        checkpoints.close()
    return state


def check_finite(stage: Stage, step: int, metrics: Mapping[str, jax.Array]) -> None:
    """Ends a run whose loss or gradient is no number any more, before it is saved.

    Raises:
        UserError: one of them is not finite.
    """
    for name in ("loss", "grad_norm"):
        value = float(metrics[name]) if name in metrics else 0.0
        if not math.isfinite(value):
            raise UserError(
                f"{stage.name}: {name} is {value} at step {step}; nothing of it was saved: lower "
                "the learning rate (train.lr) or set train.grad_clip, and start the command again, "
                "which goes on from the last checkpoint"
            )


def show(name: str, step: int, picture: Picture, writer: MetricWriter, progress: Progress) -> None:
    """Writes a picture and what was measured with it, and prints the latter."""
    writer.write_image(step, name, picture.path)
    if picture.scalars:
        writer.write(step, dict(picture.scalars))
        values = ", ".join(f"{key} {value:.4g}" for key, value in picture.scalars.items())
        progress.say(f"{name}: step {step}, {values}")


def restore_or_init(
    stage: Stage, checkpoints: Checkpoints, key: jax.Array, mesh: jax.sharding.Mesh
) -> TrainState:
    """Returns the newest checkpoint's state, or a fresh one, split over the mesh."""
    init = functools.partial(stage.init, jax.random.fold_in(key, 0))
    abstract = jax.eval_shape(init)
    split = state_shardings(abstract, mesh)
    if checkpoints.latest_step() is None:
        # It runs once: on a CPU, optimising its code takes longer than running it.
        on_cpu = jax.default_backend() == "cpu"
        options = {"xla_backend_optimization_level": 0} if on_cpu else None
        init = jax.jit(init, out_shardings=split).lower().compile(compiler_options=options)
        return _start_from(init(), stage.start, split)
    state = put(checkpoints.restore(abstract_like(abstract, split)), split)
    print(f"{stage.name}: resuming at step {int(state.step)} from {checkpoints.directory}")
    return state


def _start_from(state: TrainState, start: Any, split: TrainState) -> TrainState:
    """Puts given parts, if any, in place of the random ones, and of their moving averages.

    split: the shardings of the state.
    """
    if start is None:
        return state
    start = put(state.params | start, split.params)
    ema = subtree(start, state.ema_params)
    averages = {name: subtree(start, tree) for name, tree in state.averages.items()}
    # Each is its own copy: the state is donated, and one buffer cannot be donated twice.
    copy = functools.partial(jax.tree.map, jnp.copy)
    copied = jax.jit(copy, out_shardings=(split.ema_params, split.averages))((ema, averages))
    return state.replace(params=start, ema_params=copied[0], averages=copied[1])
