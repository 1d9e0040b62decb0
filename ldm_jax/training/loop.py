"""The training loop, the same for both stages."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from ldm_jax.data.device import to_device
from ldm_jax.data.pipeline import Batches
from ldm_jax.training.checkpoint import Checkpoints, abstract_like
from ldm_jax.training.interrupt import Interrupted, Interrupts
from ldm_jax.training.logging import MetricWriter, Progress
from ldm_jax.training.sharding import batch_sharding, replicated
from ldm_jax.training.state import Init, Step, TrainState


@dataclasses.dataclass(frozen=True)
class Stage:
    """What the loop needs to know of a stage.

    Attributes:
        name: as shown.
        directory: where its checkpoints and metrics go.
        block: the config of its optimisation, `first_stage.train` or `train`.
        init: key -> state.
        step: (state, frozen, batch, key) -> (state, metrics).
        frozen: variables that the step reads and never changes.
        picture: writes a picture of a state and returns its path; called with (state, step).
        start: weights in place of the random ones, by part as in `TrainState.params`; or None.
    """

    name: str
    directory: pathlib.Path
    block: ConfigDict
    init: Init
    step: Step
    frozen: Any
    picture: Callable[[TrainState, int], pathlib.Path]
    start: Any = None


def fit(
    stage: Stage,
    batches_from: Callable[[int], Batches],
    key: jax.Array,
    mesh: jax.sharding.Mesh,
    interrupts: Interrupts,
) -> TrainState:
    """Trains a stage to its last step, from its newest checkpoint if there is one.

    The state of the data is the step alone: `batches_from(step)` yields the batches from there.

    Raises:
        Interrupted: a signal came; the state is saved.
    """
    block, everywhere = stage.block, replicated(mesh)
    checkpoints = Checkpoints(stage.directory / "checkpoints", block.keep_checkpoints)
    state = restore_or_init(stage, checkpoints, key, everywhere)
    start = int(state.step)
    writer = MetricWriter(stage.directory, start)
    progress = Progress(stage.name, start, block.steps, block.batch_size)
    step_key = jax.device_put(jax.random.fold_in(key, 1), everywhere)
    frozen = jax.device_put(stage.frozen, everywhere)
    step_fn = jax.jit(
        stage.step,
        donate_argnums=0,
        in_shardings=(everywhere, everywhere, batch_sharding(mesh), everywhere),
        out_shardings=everywhere,
    )
    batches = to_device(batches_from(start), batch_sharding(mesh))
    try:
        for step in range(start + 1, block.steps + 1):
            state, metrics = step_fn(state, frozen, next(batches), step_key)
            progress.step(metrics)
            # Read once: a signal that comes while this step is written stops after the next one.
            stop = interrupts.requested
            last = stop or step == block.steps
            if last or step % block.log_every == 0:
                writer.write(step, progress.report(step, batches.wait_seconds))
            if last or step % block.checkpoint_every == 0:
                checkpoints.save(state)
            if stop:
                checkpoints.wait()
                raise Interrupted(
                    f"saved {stage.name} at step {step} of {block.steps}; "
                    "the same command goes on from here"
                )
            if block.picture_every and step % block.picture_every == 0:
                writer.write_image(step, stage.name, stage.picture(state, step))
    finally:
        batches.close()
        progress.close()
        writer.close()
        checkpoints.close()
    return state


def restore_or_init(
    stage: Stage, checkpoints: Checkpoints, key: jax.Array, sharding: jax.sharding.Sharding
) -> TrainState:
    """Returns the newest checkpoint's state, or a fresh one."""
    init = functools.partial(stage.init, jax.random.fold_in(key, 0))
    if checkpoints.latest_step() is None:
        # It runs once: on a CPU, optimising its code takes longer than running it.
        on_cpu = jax.default_backend() == "cpu"
        options = {"xla_backend_optimization_level": 0} if on_cpu else None
        init = jax.jit(init, out_shardings=sharding).lower().compile(compiler_options=options)
        return _start_from(init(), stage.start, sharding)
    state = checkpoints.restore(abstract_like(jax.eval_shape(init), sharding))
    print(f"{stage.name}: resuming at step {int(state.step)} from {checkpoints.directory}")
    return jax.device_put(state, sharding)


def _start_from(state: TrainState, start: Any, sharding: jax.sharding.Sharding) -> TrainState:
    """Puts given parts, if any, in place of the random ones, and of their moving average."""
    if start is None:
        return state
    start = state.params | start
    ema = {part: start[part] for part in state.ema_params}
    # Each is its own copy: the state is donated, and one buffer cannot be donated twice.
    params, ema = jax.device_put((start, ema), sharding, may_alias=False)
    return state.replace(params=params, ema_params=ema)
