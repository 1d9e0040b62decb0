"""Many images, a batch at a time, through one compiled program."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ldm_jax.errors import UserError
from ldm_jax.training.sharding import batch_sharding

Measured = Callable[[jax.stages.Compiled, dict[str, Any]], None]


def in_batches(
    program: Any,
    variables: dict[str, Any],
    inputs: dict[str, Any],
    shared: tuple,
    batch_size: int,
    mesh: jax.sharding.Mesh,
    measured: Measured | None = None,
    **settings: Any,
) -> np.ndarray:
    """Calls a program on equal batches, the last one padded, and joins the results (B, ...).

    Args:
        program: jitted (variables, inputs of a batch, *shared, **settings) -> (b, ...).
        variables: of the networks.
        inputs: a tree of arrays (B, ...).
        shared: what all batches have in common.
        batch_size: of a batch; rounded up to a multiple of the number of devices.
        mesh: of the devices that share a batch.
        measured: called with the compiled program and its inputs before the first batch.
        **settings: static arguments.

    Raises:
        UserError: a batch size below 1.
    """
    if batch_size < 1:
        raise UserError(f"batch size is {batch_size}, but must be at least 1")
    total = len(jax.tree.leaves(inputs)[0])
    batch_size = -(-min(batch_size, total) // mesh.size) * mesh.size
    sharding, parts = batch_sharding(mesh), []
    run = functools.partial(program, **settings)
    for start in range(0, total, batch_size):
        index = np.minimum(np.arange(start, start + batch_size), total - 1)
        part = jax.tree.map(lambda x, i=index: jax.device_put(np.asarray(x)[i], sharding), inputs)
        if measured is not None and start == 0:
            run = program.lower(variables, part, *shared, **settings).compile()
            measured(run, part)  # what runs is what was measured
        parts.append(np.asarray(jax.device_get(run(variables, part, *shared))))
    return np.concatenate(parts)[:total]
