"""Checkpoints of a run: asynchronous, complete, checked, and readable in parts."""

from __future__ import annotations

import contextlib
import functools
import logging
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ldm_jax import distributed, watchdog
from ldm_jax.errors import Diverged, UserError
from ldm_jax.training import checkpoint_files as files
from ldm_jax.training.digests import digests
from ldm_jax.training.state import TrainState

ITEM_BYTES = 2**16  # of an item's files, besides its arrays
# What the writer of arrays says of the disk, in errors of its own.
_DISK = re.compile(r"no space left|disk quota|input/output error|read-only file system", re.I)


class Checkpoints:
    """The checkpoints that a stage writes, in `directory/<step>/`.

    The parts of a state are separate items of a checkpoint, so that sampling reads the averaged
    denoiser without the raw one and without the optimiser. Each array has a digest: see
    `checkpoint_files`. Only one run at a time may have this open; `checkpoint_files.restore_newest`
    reads besides it. All hosts call the same methods.
    """

    def __init__(self, directory: pathlib.Path, keep: int | None = None) -> None:
        """Opens a directory; `keep` newest checkpoints stay, None keeps all.

        What a killed run has left unfinished is removed.
        """
        _log_no_tracebacks()
        self.directory, self._keep = pathlib.Path(directory).absolute(), keep
        self._need = 0  # bytes of a checkpoint, once that is known
        self._failed = False
        if distributed.is_main():
            for path in files.leftovers(self.directory):
                shutil.rmtree(path, ignore_errors=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            step_prefix=None,
            single_host_load_and_broadcast=True,  # a network's file system may show others less
            lightweight_initialize=True,  # reads nothing of steps, which may be damaged
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest_step(self) -> int | None:
        """Returns the newest finished step, damaged or not; None if there is none."""
        return files.newest_step(self.directory)

    def all_steps(self) -> list[int]:
        """Returns all finished steps, damaged or not, in order."""
        return files.stored_steps(self.directory)

    def is_good(self, step: int) -> bool:
        """Whether nothing of a finished step is damaged, by reading all of it."""
        damaged = distributed.is_main() and bool(files.verify(self.directory, step)[1])
        return not distributed.any_host(damaged)

    def remove_after(self, step: int) -> None:
        """Removes the checkpoints of later steps, from which no run shall go on."""
        for later in self.all_steps():
            if later > step:
                self._manager.delete(later)

    def check_room(self, state: TrainState) -> None:
        """Checks, before any work, that checkpoints of a state, which may be abstract, have room.

        Prints a warning where there is room for one, but not for as many as are kept.

        Raises:
            UserError: not even one fits.
        """
        free = self._check_free(state)
        more = 0 if self._keep is None else self._keep + 1 - len(self.all_steps())
        if more * self._need > free:
            print(
                f"warning: {self._keep + 1} checkpoints, one of which is being written, will need "
                f"{more * self._need:,} bytes more in {self.directory}, but {free:,} are free: "
                "free some, or lower keep_checkpoints",
                flush=True,
            )

    def save(self, state: TrainState) -> None:
        """Starts to write a state; returns as soon as its arrays are copied from the device.

        Raises:
            Diverged: it holds elements that are not finite; nothing is written.
            UserError: the disk has no room, or an earlier state could not be written.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = {name: tree for name, tree in state_items(state).items() if jax.tree.leaves(tree)}
        found = digests(items)
        bad = [f"{name} ({digest.bad})" for name, digest in found.items() if digest.bad]
        if bad:
            shown = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
            raise Diverged(
                f"the state at step {step} holds elements that are not finite, in {shown}: nothing "
                f"of it was saved in {self.directory}"
            )
        self.wait()  # an earlier one makes room for this
        self._check_free(state)
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        args[files.INDEX] = ocp.args.JsonSave(files.make_index(step, items, found))
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**args))

    def restore(self, abstract: TrainState, step: int | None = None) -> TrainState:
        """Reads a whole state, laid out over devices as the leaves of `abstract` say.

        That of the newest step which is not damaged, unless a step is given. Newer ones are moved
        aside, so that they can be saved again.

        Raises:
            UserError: there is none, the given step is damaged, or it is of another config.
        """
        self.wait()
        items = state_items(abstract)
        if step is None:
            step, read, damaged = files.restore_newest(self.directory, items)
            self._set_aside(damaged)
        else:
            try:
                read = files.read(self.directory, step, items)
            except files.Damaged as error:
                raise UserError(
                    f"checkpoint {self.directory / str(step)} is damaged: {error}; name another "
                    "step, or none for the newest good one"
                ) from error
        joined = {"params": {}, "ema_params": {}, "averages": {}}
        for name, tree in read.items():
            field, _, part = name.partition(".")
            if part:
                joined[field][part] = tree
            else:
                joined[field] = tree
        return TrainState(step=np.int32(step), **joined)

    def wait(self) -> None:
        """Waits until everything is on disk; raises UserError if it cannot be written."""
        with self._writing(), watchdog.phase("save"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then frees the writer's threads; raises UserError as `wait`, unless that did."""
        told = self._failed
        try:
            with self._writing():
                self._manager.close()
        except UserError:
            if not told:
                raise

    def _set_aside(self, damaged: list[int]) -> None:
        if not damaged:
            return
        with distributed.agreed():
            for step in damaged if distributed.is_main() else []:
                with self._writing():
                    place = files.set_aside(self.directory, step)
                print(f"moved the damaged checkpoint to {place}; nothing reads it", flush=True)
        self._manager.reload()

    def _check_free(self, state: TrainState) -> int:
        """Returns the free bytes; raises UserError if they are less than a state needs."""
        self._need = stored_bytes(state)
        free = shutil.disk_usage(self.directory).free
        with distributed.agreed():
            if free < self._need:
                raise self._cannot_write("too little space left", free)
        return free

    def _cannot_write(self, reason: str, free: int) -> UserError:
        needed = f"{self._need:,} bytes are needed, " if self._need else ""
        return UserError(
            f"cannot write a checkpoint to {self.directory}: {reason}; {needed}{free:,} bytes are "
            "free: free some and start the same command again, which goes on from the checkpoint "
            "before"
        )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns what the system says of the disk into a UserError."""
        try:
            yield
        except Exception as error:
            said = _DISK.search(str(error))
            if not said and not isinstance(error, OSError):
                raise
            reason = said.group().lower() if said else f"{error.strerror or error}"
            self._failed, free = True, shutil.disk_usage(self.directory).free
            raise self._cannot_write(reason, free) from error


@functools.cache
def _log_no_tracebacks() -> None:
    """Keeps orbax's threads from logging errors, each of which is raised as well."""

    def keep(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR or "orbax" not in record.pathname

    logging.getLogger("absl").addFilter(keep)


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


def stored_bytes(state: TrainState) -> int:
    """Bytes that a state, which may be abstract, takes on disk at most: it is compressed there."""
    items = [jax.tree.leaves(tree) for tree in state_items(state).values()]
    arrays = sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaves in items for leaf in leaves)
    return arrays + ITEM_BYTES * (1 + sum(1 for leaves in items if leaves))
