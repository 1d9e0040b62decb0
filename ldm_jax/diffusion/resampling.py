"""Steps that are made again from noisier latents, so that made parts come to fit the known ones.

RePaint (Lugmayr et al. 2022, "RePaint: Inpainting using denoising diffusion probabilistic models",
algorithm 1 and section 4.2): a step that puts known parts into x_t does not yet know how the rest
should answer them. So x_t is noised forward again and the step repeated.
"""

from __future__ import annotations

import numpy as np

from ldm_jax.diffusion.solvers import Table
from ldm_jax.diffusion.spacing import Grid
from ldm_jax.errors import UserError

MOST_TIMES = 1000  # far above the paper's 10; more is a mistake that would take forever


def visit_order(count: int, times: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The order in which `count` steps are made, and by how many x_t goes back after each.

    Every `length` steps, counted from the end, x_t goes back by as many, times - 1 times. What
    the last step made has no noise any more, and stays.

    Returns:
        (M,) the step of each row, and (M,) 0 or `length`.
    """
    left = dict.fromkeys(range(count - 1, length - 1, -length), times - 1)
    steps, back, place = [], [], 0
    while place < count:
        steps.append(place)
        place += 1
        again = left.get(place, 0) > 0
        if again:
            left[place] -= 1
            place -= length
        back.append(length if again else 0)
    return np.array(steps), np.array(back)


def resample(table: Table, grid: Grid, times: int, length: int = 1) -> Table:
    """Repeats the rows of a table of `grid` and adds how much noise x_t gets after each.

    Rows get 'forward' and 'renoise', the factors of x_t and of fresh noise, float64 until here: 1
    and 0 where the next row goes on, and those of the forward process between the two levels where
    it goes back. They keep x_t on the process.

    Args:
        table: of a sampler that is not multistep, with a row for each level of the grid.
        grid: the levels.
        times: how often each step is made, 1 to MOST_TIMES; the steps after the last multiple of
            `length` are made once.
        length: of a jump back, in steps; less than there are.

    Raises:
        UserError: a value outside its range.
    """
    count = len(grid.t)
    if not 1 <= times <= MOST_TIMES:
        raise UserError(f"resampling {times} times: choose from 1 to {MOST_TIMES}")
    if not 1 <= length < max(count, 2):
        raise UserError(
            f"resampling jumps of {length} steps do not fit {count} steps: choose from 1 to "
            f"{max(count - 1, 1)}"
        )
    steps, back = visit_order(count, times, length)
    reached = np.minimum(steps + 1, count - 1)  # the level after the step; unused for the last
    noisier = reached - back
    again = back > 0
    ones = np.ones(len(steps))
    forward = np.divide(grid.alpha[noisier], grid.alpha[reached], out=ones, where=again)
    added = np.where(again, grid.sigma[noisier] ** 2 - (forward * grid.sigma[reached]) ** 2, 0.0)
    rows = {name: column[steps] for name, column in table.rows.items()}
    rows["forward"] = forward.astype(np.float32)
    rows["renoise"] = np.sqrt(np.maximum(added, 0)).astype(np.float32)
    return Table(table.start, rows)
