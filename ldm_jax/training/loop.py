"""The training loop, the same for all stages."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax import distributed, watchdog
from ldm_jax.data.device import DeviceBatches, to_device
from ldm_jax.data.pipeline import Batches
from ldm_jax.errors import Diverged
from ldm_jax.training.alarms import Alarms
from ldm_jax.training.checkpoint import Checkpoints, abstract_like
from ldm_jax.training.ema import subtree
from ldm_jax.training.guard import Broken, Skips
from ldm_jax.training.interrupt import Interrupted, Interrupts
from ldm_jax.training.logging import MetricWriter, Progress
from ldm_jax.training.rollbacks import Rollbacks, choose_step
from ldm_jax.training.sharding import batch_sharding, on_mesh, put, replicated, state_shardings
from ldm_jax.training.spikes import Spikes
from ldm_jax.training.stage import Picture, Stage
from ldm_jax.training.state import Batch, Metrics, TrainState
from ldm_jax.training.votes import Votes


def fit(
    stage: Stage,
    batches_from: Callable[[int], Batches],
    key: jax.Array,
    mesh: jax.sharding.Mesh,
    interrupts: Interrupts,
) -> TrainState:
    """Trains a stage to its last step, from its newest checkpoint if there is one.

    The state of the data is the step alone, with what `rollbacks.json` says of it:
    `batches_from(n)` yields the batches from the n-th on. The state and the frozen variables are
    split over the mesh as `state_shardings` says.

    Raises:
        Interrupted: a signal came; the state is saved.
        Diverged: the training is broken; the checkpoints from before that stay.
    """
    checkpoints = Checkpoints(stage.directory / "checkpoints", stage.block.keep_checkpoints)
    rollbacks = Rollbacks(stage.directory)
    votes = Votes(interrupts, mesh)
    try:
        state = restore_or_init(stage, checkpoints, key, mesh)
        update = _update(stage, state, key, mesh)
        while True:
            batches = rollbacks.batches(batches_from, int(state.step))
            batches = to_device(batches, batch_sharding(mesh))
            try:
                return _train(stage, state, update, batches, checkpoints, votes)
            except Broken as broken:
                _go_back(stage, broken, checkpoints, rollbacks)
            finally:
                batches.close()
            del state  # before there is memory for another
            state = restore_or_init(stage, checkpoints, key, mesh)
    finally:
        with watchdog.phase("save"):
            checkpoints.close()
        interrupts.unsaved = False


def _update(
    stage: Stage, state: TrainState, key: jax.Array, mesh: jax.sharding.Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The compiled step of a stage; the state is donated."""
    split, everywhere = state_shardings(state, mesh), replicated(mesh)
    step_key = jax.jit(functools.partial(jax.random.fold_in, key, 1), out_shardings=everywhere)()
    frozen = put(stage.frozen, state_shardings(stage.frozen, mesh))
    step_fn = jax.jit(stage.step, donate_argnums=0, out_shardings=(split, everywhere))
    step_fn = on_mesh(mesh, step_fn)
    return watchdog.compiling(lambda state, batch: step_fn(state, frozen, batch, step_key))


def _train(
    stage: Stage,
    state: TrainState,
    update: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    batches: DeviceBatches,
    checkpoints: Checkpoints,
    votes: Votes,
) -> TrainState:
    """Trains from a state to the last step.

    Raises:
        Broken: the training is; all checkpoints are from before that was seen.
    """
    block, start = stage.block, int(state.step)
    if stage.forget:
        stage.forget(start)
    writer = MetricWriter(stage.directory, start)
    progress = Progress(stage.name, start, block.steps, block.batch_size)
    alarms = Alarms(stage.name, stage.alarms, progress.say) if stage.alarms else None
    watch = _Watch(stage, start, progress.say)
    try:
        if 0 < start < block.steps:  # where the run was stopped, perhaps before it was looked at
            with contextlib.suppress(Interrupted), votes.interrupts.saved():
                _look(stage, state, start, writer, progress, again=True)
        for step in watchdog.steps(range(start + 1, block.steps + 1)):
            state, metrics = update(state, next(batches))
            progress.step(metrics)
            stop = votes()
            last = stop or step == block.steps
            # A signal need not wait for the end of a picture, which may take long.
            looked_at = stage.shows(step) or stage.measures(step)
            saved = last or step % block.checkpoint_every == 0 or looked_at
            logged = last or step % block.log_every == 0
            if saved or logged or stage.keeps(step):
                # Before anything of this step is stored.
                watch.check(step, progress.fetch())
            if logged:
                scalars = progress.report(step, batches.wait_seconds) | stage.counts()
                if alarms:
                    scalars["alarms"] = alarms.check(step, scalars)
                writer.write(step, scalars)
            if stage.keeps(step):
                # Before the checkpoint, after which nobody would come back to write it.
                with _storing(step):
                    stage.snapshot(state, step)
            if saved:
                with _storing(step):
                    watch.store(step)
                    checkpoints.save(state)
            if stop:
                checkpoints.wait()
                raise Interrupted(
                    f"saved {stage.name} at step {step} of {block.steps}; "
                    "the same command goes on from here"
                )
            if looked_at and step < block.steps:
                # Given up for a signal, which the next step sees too, and then saves.
                with contextlib.suppress(Interrupted), progress.pause():
                    checkpoints.wait()
                    with votes.interrupts.saved():
                        _look(stage, state, step, writer, progress)
        # Not in the loop: a run that was stopped here resumes after its last step.
        if stage.shows(block.steps) or stage.measures(block.steps):
            checkpoints.wait()
            with votes.interrupts.saved():
                _look(stage, state, block.steps, writer, progress)
    finally:
        progress.close()
        writer.close()
    return state


@contextlib.contextmanager
def _storing(step: int) -> Iterator[None]:
    """Takes a state that cannot be stored, as it is not finite, for a broken training."""
    try:
        with watchdog.phase("save"):
            yield
    except Diverged as error:
        raise Broken(str(error), step, step) from error


class _Watch:
    """Looks at the metrics of every step for what breaks a training."""

    def __init__(self, stage: Stage, start: int, say: Callable[[str], None]) -> None:
        block, path = stage.block, stage.directory / "spikes.json"
        self._skips = Skips(stage.name, block.max_skipped, say)
        self._spikes = Spikes(
            stage.name, stage.watched, block.spike_factor, block.spike_window, path, start, say
        )
        self._rollback, self._keep = block.rollback, block.keep_checkpoints + 1

    def check(self, step: int, rows: list[dict[str, float]]) -> None:
        """Looks at the steps up to `step`; raises Broken if the run cannot go on from here."""
        self._skips.check(step, rows)
        found = self._spikes.check(step, rows)
        if found and self._rollback:
            begin, end = found[0]
            raise Broken(f"the loss rose at steps {begin} to {end}", begin, end)

    def store(self, step: int) -> None:
        """Stores what is needed to go on from a step."""
        self._spikes.store(step, self._keep)


def _go_back(stage: Stage, broken: Broken, checkpoints: Checkpoints, rollbacks: Rollbacks) -> None:
    """Sets a stage back to before it broke, with other data from there on, if its config says so.

    Raises:
        Diverged: it does not, or has done so as often as it may.
    """
    block = stage.block
    advice = (
        f"no broken state is in {checkpoints.directory}: lower this stage's train.lr or set its "
        "train.grad_clip, and start again with --allow_config_change"
    )
    if not block.rollback:
        raise Diverged(
            f"{stage.name}: {broken}; {advice}; or set its train.rollback=True, to go on from an "
            "older checkpoint without the data that led there"
        ) from broken
    if rollbacks.count >= block.max_rollbacks:
        raise Diverged(
            f"{stage.name}: {broken}, after it went back {rollbacks.count} times; {advice}"
        ) from broken
    checkpoints.wait()
    with watchdog.phase("save"):
        to_step = _good_step(stage, checkpoints, broken.begin)
    # Until the file is written, the run would go on from there with the same data, and break again.
    checkpoints.remove_after(to_step)
    first, last = rollbacks.add(broken.step, to_step)
    print(
        f"{stage.name}: {broken}; going back to step {to_step}, and on without batches {first} to "
        f"{last} ({rollbacks.count} of at most {block.max_rollbacks} times)",
        flush=True,
    )


def _good_step(stage: Stage, checkpoints: Checkpoints, begin: int) -> int:
    """The step to go back to; 0, the start, where nothing was saved yet.

    It is read before newer ones are removed, one of which may be the last good one.

    Raises:
        Diverged: all checkpoints are damaged.
    """
    steps = checkpoints.all_steps()
    while steps:
        step = choose_step(steps, begin)
        if checkpoints.is_good(step):
            return step
        steps.remove(step)
        if not steps:
            raise Diverged(
                f"{stage.name}: the loss broke at step {begin}, and all checkpoints in "
                f"{checkpoints.directory} are damaged: put back a copy of one"
            )
    return 0


def _look(
    stage: Stage,
    state: TrainState,
    step: int,
    writer: MetricWriter,
    progress: Progress,
    again: bool = False,
) -> None:
    """Shows and measures a state, where that is due and was not done before.

    A picture that is there is only kept where a run goes on (`again`): it may be of a history that
    the run has gone back on.
    """
    kept = again and (stage.drawn is None or not distributed.any_host(not stage.drawn(step)))
    if stage.shows(step) and not kept:
        with watchdog.phase("picture"):
            show(stage.name, step, stage.picture(state, step), writer, progress)
    measure = stage.measure
    if stage.measures(step) and not distributed.any_host(writer.has(step, measure.name)):
        with watchdog.phase("evaluate"):
            scalars = {measure.name: measure.take(state, step)}
        _tell(stage.name, step, scalars, writer, progress)


def show(name: str, step: int, picture: Picture, writer: MetricWriter, progress: Progress) -> None:
    """Writes a picture and what was measured with it, and prints the latter."""
    writer.write_image(step, name, picture.path)
    if picture.scalars:
        _tell(name, step, picture.scalars, writer, progress)


def _tell(
    name: str, step: int, scalars: Mapping[str, float], writer: MetricWriter, progress: Progress
) -> None:
    """Writes and prints what was measured of a step."""
    writer.write(step, dict(scalars))
    values = ", ".join(f"{key} {value:.4g}" for key, value in scalars.items())
    progress.say(f"{name}: step {step}, {values}")


def restore_or_init(
    stage: Stage, checkpoints: Checkpoints, key: jax.Array, mesh: jax.sharding.Mesh
) -> TrainState:
    """Returns the newest checkpoint's state, or a fresh one, split over the mesh."""
    init = functools.partial(stage.init, jax.random.fold_in(key, 0))
    abstract = jax.eval_shape(init)
    split = state_shardings(abstract, mesh)
    newest = checkpoints.latest_step()
    if newest != stage.block.steps:  # else there is nothing to save any more
        checkpoints.check_room(abstract)
    if newest is None:
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
