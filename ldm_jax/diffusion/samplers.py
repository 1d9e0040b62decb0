"""Running a sampler: its table, its noise, known parts of the image, and the loop.

The samplers themselves are in `solvers`, the noise levels that they visit in `spacing`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import random
from ldm_jax.diffusion.exponential import (
    deis_table,
    dpmpp_table,
    unipc_init,
    unipc_step,
    unipc_table,
)
from ldm_jax.diffusion.guidance import Denoise
from ldm_jax.diffusion.resampling import resample
from ldm_jax.diffusion.schedule import Process
from ldm_jax.diffusion.solvers import (
    Row,
    Sampler,
    Table,
    ddim_step,
    ddim_table,
    ddpm_step,
    ddpm_table,
    euler_ancestral_table,
    euler_table,
    flow_heun_table,
    heun_table,
    level_of,
    linear_init,
    linear_step,
    plms_table,
)
from ldm_jax.diffusion.spacing import SPACINGS, make_grid
from ldm_jax.errors import UserError
from ldm_jax.types import Array

# Steps count up from 0 and never get there.
KNOWN_STREAM, RENOISE_STREAM = np.uint32(2**32 - 1), np.uint32(2**32 - 2)


_DIFFERING = tuple(name for name in SPACINGS if name != "quad")  # which repeats time steps

SAMPLERS = {
    "ddim": Sampler(ddim_table, lambda x_T: (x_T,), ddim_step, etas=(0.0, 1.0)),
    "ddpm": Sampler(ddpm_table, lambda x_T: (x_T,), ddpm_step, etas=(1.0, 1.0), blend="after"),
    "plms": Sampler(
        plms_table,
        linear_init(3),
        linear_step("eps"),
        # Its weights are those of equal steps.
        spacings=("leading", "uniform", "linspace", "linspace_open", "trailing"),
        multistep=True,
    ),
    "euler": Sampler(euler_table, lambda x_T: (x_T,), ddim_step),
    "euler_ancestral": Sampler(
        euler_ancestral_table, lambda x_T: (x_T,), ddim_step, etas=(1.0, 1.0)
    ),
    "heun": Sampler(heun_table, linear_init(1), linear_step("eps"), multistep=True),
    "flow_heun": Sampler(flow_heun_table, linear_init(1), linear_step("velocity"), multistep=True),
    "deis": Sampler(
        deis_table, linear_init(2), linear_step("eps"), (0.0, 0.0), _DIFFERING
    )._replace(multistep=True),
    "unipc": Sampler(unipc_table, unipc_init, unipc_step, (0.0, 0.0), _DIFFERING)._replace(
        multistep=True
    ),
}
for _order in (2, 3):
    _dpmpp = Sampler(
        dpmpp_table(_order),
        linear_init(_order - 1),
        linear_step("x0"),
        spacings=_DIFFERING,
        multistep=True,
    )
    SAMPLERS[f"dpmpp_{_order}m"] = _dpmpp
    SAMPLERS[f"dpmpp_{_order}m_sde"] = _dpmpp._replace(etas=(1.0, 1.0))


class Known(NamedTuple):
    """Parts of the latents that sampling keeps.

    Attributes:
        x0: (B, ...) latents.
        mask: 1 = keep x0, 0 = sample; broadcasts against x0.
        noise: (N, B, ...), one per row of the table, to noise x0 with in place of own draws.
    """

    x0: Array
    mask: Array
    noise: Array | None = None


def sampler_of(name: str) -> Sampler:
    """Returns the sampler of a name. Raises UserError for an unknown one."""
    if name not in SAMPLERS:
        raise UserError(f"unknown sampler '{name}': choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def nearest_eta(name: str, eta: float) -> float:
    """The eta nearest to `eta` that a sampler permits: what a default for any sampler becomes."""
    low, high = sampler_of(name).etas
    return min(max(eta, low), high)


def make_table(
    name: str,
    process: Process,
    steps: int,
    eta: float | None = None,
    spacing: str = "leading",
    strength: float = 1.0,
    resampling: tuple[int, int] = (1, 1),
) -> Table:
    """Makes the table of a sampler: what `sample` runs through.

    Args:
        name: a key of SAMPLERS.
        process: the forward process, with a clock of T steps.
        steps: number of steps in [1, T]; the rows of the table are the network calls, which are
            2 * steps - 1 for 'heun' and 'flow_heun', steps + 1 for 'plms' and steps for the others;
            one less for 'heun' and 'plms' where the first level is pure noise.
        eta: for 'ddim' in [0, 1]: 0 (the default) is deterministic, 1 has the variance of ancestral
            sampling. It is 1 for 'ddpm', 'euler_ancestral' and '..._sde', and 0 for the others.
        spacing: one of SPACINGS.
        strength: share of the steps, the last ones, that are made; for starts from an image. At
            least one is.
        resampling: how often each step is made, and how many steps x_t goes back each time; see
            `resample`. The rows grow by that factor.

    Raises:
        UserError: for an unknown name, a value outside its range, a spacing that leaves [0, T), or
            an eta, spacing or resampling that makes no sense for the sampler.
    """
    sampler = sampler_of(name)
    eta = nearest_eta(name, 0.0) if eta is None else eta
    low, high = sampler.etas
    if not low <= eta <= high:
        allowed = f"{low:g}" if low == high else f"in [{low:g}, {high:g}]"
        raise UserError(f"eta must be {allowed} for sampler '{name}', not {eta:g}")
    if spacing in SPACINGS and spacing not in sampler.spacings:
        raise UserError(
            f"spacing '{spacing}' makes no sense for sampler '{name}': choose one of "
            f"{', '.join(sampler.spacings)}"
        )
    if not 0 < strength <= 1:
        raise UserError(f"strength must be above 0 and at most 1, not {strength:g}")
    grid = make_grid(spacing, process, steps)
    skipped = len(grid.t) - max(1, round(strength * len(grid.t)))
    grid = grid.at(slice(skipped, None))
    table = sampler.table(process, grid, eta)
    if tuple(resampling) == (1, 1):
        return table
    if sampler.multistep:
        alone = ", ".join(name for name, other in SAMPLERS.items() if not other.multistep)
        raise UserError(
            f"sampler '{name}' makes each step of earlier predictions, so none can be made again "
            f"from noisier latents: resample with one of {alone}"
        )
    return resample(table, grid, *resampling)


def initial_noise(keys: Array, shape: tuple[int, ...]) -> Array:
    """x_T (B, *shape), of unit variance, of the samples that own `keys` (B,)."""
    return random.normal(random.fold_in(keys, 0), shape)


def step_noise(keys: Array, index: int | Array, shape: tuple[int, ...]) -> Array:
    """The noise (B, *shape) of row `index` of the samples that own `keys` (B,)."""
    return random.normal(random.fold_in(keys, index + 1), shape)  # 0 is the initial noise


def known_noise(keys: Array, index: int | Array, shape: tuple[int, ...]) -> Array:
    """The noise (B, *shape) that known latents get at row `index`; independent of the others."""
    return random.normal(random.fold_in(random.fold_in(keys, KNOWN_STREAM), index), shape)


def renoise(keys: Array, index: int | Array, shape: tuple[int, ...]) -> Array:
    """The noise (B, *shape) by which row `index` goes back; independent of the others."""
    return random.normal(random.fold_in(random.fold_in(keys, RENOISE_STREAM), index), shape)


def make_step(
    denoise: Denoise, keys: Array, sampler: Sampler, known: Known | None = None
) -> Callable[[tuple, tuple], tuple]:
    """Makes `step(carry, (index, row, noise, known_noise)) -> carry`, which `sample` repeats.

    The noises are (B, ...), or None to draw them from `keys`; other arguments as in `sample`.
    """

    def blend(carry: tuple, index: Array, row: Row, noise: Array | None) -> tuple:
        x_t = carry[0]
        if noise is None:
            noise = known_noise(keys, index, x_t.shape[1:])
        mixed = known.mask * level_of(row).noised(known.x0, noise) + (1 - known.mask) * x_t
        # A corrector is the second half of a step, between whose halves nothing is replaced.
        return (jnp.where(row.get("corrector", False), x_t, mixed), *carry[1:])

    def step(carry: tuple, xs: tuple[Array, Row, Array | None, Array | None]) -> tuple:
        index, row, noise, for_known = xs
        if "noise" not in row:
            noise = None
        elif noise is None:
            noise = step_noise(keys, index, carry[0].shape[1:])
        # Where x_t goes back to a noisier level, only 'before' finds known parts at that level.
        before = sampler.blend == "before" or "renoise" in row
        if known is not None and "corrected" in row:  # it would undo what is replaced
            row = row | {"corrected": jnp.zeros_like(row["corrected"])}
        if known is not None and before:
            carry = blend(carry, index, row, for_known)
        carry = sampler.step(denoise, carry, row, noise)
        if known is not None and not before:
            carry = blend(carry, index, row, for_known)
        if "renoise" in row:
            x_t = carry[0]
            fresh = renoise(keys, index, x_t.shape[1:])
            carry = (row["forward"] * x_t + row["renoise"] * fresh, *carry[1:])
        return carry

    return step


def sample(
    denoise: Denoise,
    x_T: Array,
    keys: Array,
    table: Table,
    sampler: Sampler,
    noise: Array | None = None,
    known: Known | None = None,
    x0: Array | None = None,
) -> Array:
    """Runs a sampler from x_T (B, ...) to the latents (B, ...), as one `lax.scan` over the table.

    With `known`, the kept parts of x_t are replaced by x0 with fresh noise, before each step or,
    for ancestral sampling without resampling, after it, as in the original code. The result is
    therefore only close to x0 there: blend it once more for x0 itself.

    Args:
        denoise: `(x_t, level) -> Prediction`.
        x_T: noise of unit variance, usually `initial_noise(keys, shape)`.
        keys: (B,), one per sample; unused if nothing is to be drawn.
        table: of the same sampler, from `make_table`.
        sampler: an entry of SAMPLERS.
        noise: (N, B, ...) in the order of the rows, instead of draws from `keys`.
        known: parts of the latents that are given.
        x0: (B, ...) latents to start from: with the noise x_T of the first row's level (Meng et al.
            2022, "SDEdit"), so that a table of fewer steps keeps more of them. None: pure noise.
    """
    step = make_step(denoise, keys, sampler, known)
    indices = jnp.arange(len(table.rows["t"]))
    xs = (indices, table.rows, noise, None if known is None else known.noise)
    first = table.start * x_T
    if x0 is not None:
        first = level_of(jax.tree.map(lambda column: column[0], table.rows)).noised(x0, x_T)
    start = sampler.init(first)
    carry, _ = jax.lax.scan(lambda carry, xs: (step(carry, xs), None), start, xs)
    return carry[0]
