"""Runs that go on with another number of devices than they began with."""

from __future__ import annotations

import copy
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any
from unittest import mock

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks.reliability import resume, toys
from ldm_jax.training import sharding
from ldm_jax.training.checkpoint import Checkpoints, abstract_like
from ldm_jax.training.sharding import gather, make_mesh, state_shardings
from ldm_jax.training.steps import diffusion_functions

BEGUN, MORE = 5, 20  # steps before and after the move
# Of devices, how many split the batch and how many the state.
MESHES = {"batch": {"mesh.data": -1}, "state": {"mesh.data": 1, "mesh.fsdp": -1}}


def moved_state(
    config: ConfigDict, workdir: pathlib.Path, before: int, after: int, out: pathlib.Path
) -> tuple[Any, Any]:
    """The newest state of a run as `before` devices read it, and after a detour: read by `after`
    devices, stored by them in the folder `out`, and read by `before` again."""
    abstract = jax.eval_shape(diffusion_functions(config)[0], jax.random.key(0))

    def on(count: int) -> Any:
        mesh = make_mesh(config.mesh, jax.devices()[:count])
        return abstract_like(abstract, state_shardings(abstract, mesh))

    source, other = Checkpoints(workdir / "checkpoints"), Checkpoints(out)
    here = source.restore(on(before))
    there = source.restore(on(after))
    other.save(there)
    other.wait()
    back = gather(other.restore(on(before)))
    found = gather(here), back
    source.close()
    other.close()
    return found


def measure(
    name: str,
    out: pathlib.Path,
    before: int = 8,
    after: Sequence[int] = (1, 2, 4),
    split: str = "state",
) -> dict[str, Any]:
    """Trains on some devices, and goes on with others for `MORE` steps.

    Args:
        name: of `toys.toy`; of it, only the diffusion model is trained.
        out: a folder for the runs.
        before: devices that the run begins with.
        after: numbers of devices that it goes on with.
        split: of `MESHES`: what devices share.

    Returns:
        By the number of devices: the 'unequal' leaves of the state when it has been there and back,
        'examples_equal', and the losses' largest relative difference, 'apart', from the
        run that stays.
    """
    changes = MESHES[split] | {"first_stage.kind": "identity", "classifier.train.steps": 0}
    steps = BEGUN + MORE
    config, found = toys.toy(name, steps, checkpoint_every=steps, **changes), {}
    # The toy's arrays are all small, and would lie on every device.
    with mock.patch.object(sharding, "SMALL", 32):
        begun, trace = out / "begun", resume.Trace()
        resume.part(config, begun, trace, resume.Stop("diffusion", BEGUN - 1, "signal"), before)

        def go_on(count: int) -> tuple[list[float], dict[int, np.ndarray]]:
            workdir, own = out / str(count), copy.deepcopy(trace)
            shutil.copytree(begun, workdir)
            resume.part(config, workdir, own, devices=count)
            losses = [row["loss"] for row in resume.metrics(workdir)]
            return losses, own.examples["diffusion"]

        want, examples = go_on(before)
        for count in after:
            losses, seen = go_on(count)
            here, back = moved_state(config, begun, before, count, out / f"state_{count}")
            found[count] = {
                "unequal": resume.differences(here, back),
                "examples_equal": all(np.array_equal(examples[i], seen[i]) for i in range(steps)),
                "apart": float(np.max(np.abs(np.array(losses) / np.array(want) - 1))),
            }
    return found
