"""Checkpoints of a run: asynchronous, complete, and readable in parts."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ldm_jax.errors import UserError
from ldm_jax.training.state import TrainState


class Checkpoints:
    """The checkpoints of one stage, in `directory/<step>/`.

    The parts of a state are separate items of a checkpoint, so that sampling reads the averaged
    denoiser without the raw one and without the optimiser.
    """

    def __init__(self, directory: pathlib.Path, keep: int | None = None) -> None:
        """Opens a directory; `keep` newest checkpoints stay, None keeps all."""
        self.directory = pathlib.Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, step_prefix=None)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest_step(self) -> int | None:
        """Returns the newest finished step, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Starts to write a state; returns as soon as its arrays are copied from the device."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = {
            name: ocp.args.StandardSave(tree)
            for name, tree in state_items(state).items()
            if jax.tree.leaves(tree)
        }
        try:
            self._manager.save(step, args=ocp.args.Composite(**items))
        except OSError as error:
            raise UserError(f"cannot write a checkpoint to {self.directory}: {error}") from error

    def restore(self, abstract: TrainState, step: int | None = None) -> TrainState:
        """Reads a whole state, laid out over devices as the leaves of `abstract` say."""
        step = self._step(step)
        read = self._read(step, state_items(abstract))
        joined = {"params": {}, "ema_params": {}, "averages": {}}
        for name, tree in read.items():
            field, _, part = name.partition(".")
            if part:
                joined[field][part] = tree
            else:
                joined[field] = tree
        return TrainState(step=np.int32(step), **joined)

    def restore_items(self, items: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Reads some items of the newest checkpoint, e.g. 'ema_params.denoiser': (step, items)."""
        step = self._step(None)
        return step, self._read(step, items)

    def _step(self, step: int | None) -> int:
        step = self.latest_step() if step is None else step
        if step is None:
            raise UserError(f"no checkpoint in {self.directory}: train first")
        return step

    def _read(self, step: int, items: dict[str, Any]) -> dict[str, Any]:
        # Orbax stores no empty trees; they stay as they are.
        wanted = {k: ocp.args.StandardRestore(v) for k, v in items.items() if jax.tree.leaves(v)}
        try:
            read = self._manager.restore(step, args=ocp.args.Composite(**wanted))
        except (ValueError, KeyError, FileNotFoundError) as error:
            reason = str(error).strip().split("\n")[0][:300]
            raise UserError(
                f"checkpoint {self.directory / str(step)} does not fit this config: {reason}"
            ) from error
        return {name: read[name] if name in wanted else tree for name, tree in items.items()}

    def wait(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then frees the writer's threads."""
        self._manager.close()


def abstract_like(tree: Any, shardings: Any) -> Any:
    """Returns the shapes and types of a tree, to be laid out as a sharding or a tree of them says.

    What was saved on one mesh can be restored on any other.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        everywhere = shardings
        shardings = jax.tree.map(lambda leaf: everywhere, tree)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )


def state_items(state: TrainState) -> dict[str, Any]:
    """Names what is stored: every part of the weights on its own, and the optimiser."""
    items = {f"params.{part}": tree for part, tree in state.params.items()}
    items |= {f"ema_params.{part}": tree for part, tree in state.ema_params.items()}
    items |= {f"averages.{name}": tree for name, tree in state.averages.items()}
    return items | {"opt_state": state.opt_state, "stats": state.stats}
