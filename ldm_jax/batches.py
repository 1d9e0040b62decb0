"""Many images, a batch at a time, through one compiled program."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ldm_jax.errors import UserError
from ldm_jax.training.sharding import batch_parts, batch_sharding, gather, on_mesh, put

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
        batch_size: of a batch; rounded up to a multiple of the parts that the mesh splits it into.
        mesh: of the devices that share a batch; of several hosts, each calls this with the same.
        measured: called with the compiled program and its inputs before the first batch.
        **settings: static arguments.

    Raises:
        UserError: a batch size below 1.
    """
    if batch_size < 1:
        raise UserError(f"batch size is {batch_size}, but must be at least 1")
    total = len(jax.tree.leaves(inputs)[0])
    unit = batch_parts(mesh)
    batch_size = -(-min(batch_size, total) // unit) * unit
    sharding, parts = batch_sharding(mesh), []
    run = on_mesh(mesh, functools.partial(program, **settings))
    for start in range(0, total, batch_size):
        index = np.minimum(np.arange(start, start + batch_size), total - 1)
        part = put(jax.tree.map(lambda x, i=index: np.asarray(x)[i], inputs), sharding)
        if measured is not None and start == 0:
            lower = on_mesh(mesh, functools.partial(program.lower, **settings))
            run = lower(variables, part, *shared).compile()
            measured(run, part)  # what runs is what was measured
        parts.append(gather(run(variables, part, *shared)))
    return np.concatenate(parts)[:total]
