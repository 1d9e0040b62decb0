"""How likely a denoiser makes data: the variational bound, and the probability-flow ODE.

Both are negative log-likelihoods in bits per dimension, example by example; less is better. They
are of the scaled latents x0 that the denoiser knows: `unscaled` gives those of z, where x0 is
(z - shift) * scale. Of continuous data they are densities, which may be negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import random
from ldm_jax.diffusion.guidance import Denoise
from ldm_jax.diffusion.schedule import Process, Schedule, at, posterior
from ldm_jax.diffusion.solvers import Row, level_of
from ldm_jax.diffusion.spacing import Grid
from ldm_jax.errors import UserError
from ldm_jax.types import Array

VARIANCES = ("beta", "posterior")
HALF_LEVEL = 1 / 255  # half the distance of two 8-bit levels, of pixels from -1 to 1
LEVEL_BITS = math.log2(1 / (2 * HALF_LEVEL))  # from a density of such pixels to that of levels

# (mean (B, ...), std) of a Gaussian in x0 -> -log p (B,) in nats of the data
DecoderNll = Callable[[Array, Array], Array]


def bits_per_dim(nats: Array, shape: tuple[int, ...]) -> Array:
    """Nats (B,) of examples of `shape` -> bits per dimension (B,)."""
    return nats / (math.prod(shape) * math.log(2))


def unscaled(bits: Array, scale: Array) -> Array:
    """Bits per dimension of (z - shift) * scale -> those of z: `scale` (C,) is per channel.

    The densities differ by the log-determinant of the scale, so that figures of models whose
    latents are scaled differently can be compared.
    """
    return bits - jnp.log2(jnp.abs(scale)).mean()


# The variational bound


class Bound(NamedTuple):
    """The parts of a variational bound, (B,) bits per dimension each.

    Attributes:
        prior: of the last x_t to pure noise.
        kl: of all steps between two noise levels.
        decoder: of the data given the least noisy x_t.
    """

    prior: Array
    kl: Array
    decoder: Array

    @property
    def total(self) -> Array:
        """(B,) bits per dimension, at least the negative log-likelihood in the mean over noise."""
        return self.prior + self.kl + self.decoder


def reverse_variance(schedule: Schedule, variance: str) -> np.ndarray:
    """Variances (T,) float64 of p(x_{t-1} | x_t) by a name of VARIANCES (Ho et al. 2020, 3.2).

    'beta' is the best choice for data of unit variance, and the one that closes the bound with more
    time steps where data are smooth at the scale of the least noise; 'posterior', the sampler
    `ddpm`'s, is that for single points. Its entry 0, which is 0, copies entry 1: a decoder must
    have some.

    Raises:
        UserError: for another name.
    """
    if variance not in VARIANCES:
        raise UserError(f"unknown variance '{variance}': choose one of {', '.join(VARIANCES)}")
    if variance == "beta" or schedule.steps == 1:
        return schedule.betas
    found = posterior(schedule).variance
    return np.append(found[1], found[1:])


def kl_terms(schedule: Schedule, variance: str) -> tuple[np.ndarray, np.ndarray]:
    """KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)) in nats, as an affine function of the error.

    Returns `constant` and `weight`, (T,) float64: the divergence is the sum over dimensions of
    `constant + weight * (x0 - predicted x0)^2`. Entry 0, which is the decoder's, is 0.
    """
    true, model = posterior(schedule), reverse_variance(schedule, variance)
    share = true.variance / model
    share[0] = 1
    constant = 0.5 * (share - 1 - np.log(share))
    weight = true.mean_x0**2 / (2 * model)
    weight[0] = 0
    return constant, weight


def strata(schedule: Schedule, times: int) -> np.ndarray:
    """Splits the time steps 1 to T - 1 into parts whose log SNR spans about the same.

    A unit of log SNR adds about as much to the bound wherever it lies.

    Returns:
        edges (times + 1,) int: part i is edges[i] to edges[i + 1] - 1, never empty.
    """
    levels = np.log(schedule.ratio)
    levels[~np.isfinite(levels)] = levels[np.isfinite(levels)].max() + 1
    whole = np.arange(times + 1)
    if not times:
        return whole[:1] + 1
    wanted = np.linspace(levels[1], levels[-1], times + 1)
    edges = np.interp(wanted, levels, np.arange(schedule.steps)).round().astype(int)
    edges[-1] = schedule.steps
    edges = np.maximum.accumulate(edges - whole) + whole  # one step at least
    return np.minimum(edges, schedule.steps - times + whole)


def noise_of(keys: Array, t: Array, shape: tuple[int, ...]) -> Array:
    """The noise (B, *shape) of examples that own `keys` (B,), in x_t of their t (B,)."""
    own = jax.vmap(jax.random.fold_in)(random.fold_in(keys, 1), t)
    return random.normal(own, shape)


def variational_bound(
    denoise: Denoise,
    x0: Array,
    keys: Array,
    schedule: Schedule,
    times: int,
    variance: str = "beta",
    decoder_nll: DecoderNll | None = None,
) -> Bound:
    """The bound of a discrete schedule (Ho et al. 2020, eq. 5), as one scan over network calls.

    The divergences are estimated without bias from `times` of the T - 1 time steps, one drawn from
    each of the `strata`; with T - 1 all are taken. Each takes one draw of noise. The decoder, at
    t = 0, is always called: times + 1 calls.

    Args:
        denoise: `(x_t, level) -> Prediction`.
        x0: (B, ...) scaled latents.
        keys: (B,) that noise and time steps are drawn from.
        schedule: of discrete time.
        times: from 1 to T - 1.
        variance: of the reverse process, one of VARIANCES.
        decoder_nll: of the data; None is the density of x0. See `pixel_nll`.

    Raises:
        UserError: a process in continuous time, or a setting outside its range.
    """
    if not schedule.discrete:
        raise UserError("the variational bound is of a discrete schedule: take the ODE's")
    most = schedule.steps - 1
    if not min(1, most) <= times <= most:
        raise UserError(f"the bound is of 1 to {most} time steps, not {times}")
    shape = x0.shape[1:]
    axes = tuple(range(1, x0.ndim))
    constant, weight = (x.astype(np.float32) for x in kl_terms(schedule, variance))
    edges = strata(schedule, times)
    # t = 0 comes last, so that the x0 which is left over is the decoder's.
    low = np.append(edges[:-1][::-1], 0)
    size = np.append(np.diff(edges)[::-1], 1)

    def call(carry: tuple[Array, Array], row: tuple[Array, Array, Array]):
        index, low, size = row
        drawn = random.uniform(random.fold_in(random.fold_in(keys, 0), index))
        t = low + jnp.minimum((drawn * size).astype(jnp.int32), size - 1)
        level = schedule.level(t, x0.ndim)
        predicted = denoise(level.noised(x0, noise_of(keys, t, shape)), level).x0
        error = jnp.square(x0 - predicted).sum(axes)
        kl = at(constant, t, 1) * math.prod(shape) + at(weight, t, 1) * error
        return (carry[0] + size * kl, predicted), None

    rows = (jnp.arange(len(low)), jnp.asarray(low, jnp.int32), jnp.asarray(size, jnp.int32))
    start = (jnp.zeros(x0.shape[0]), jnp.zeros_like(x0))
    (kl, mean), _ = jax.lax.scan(call, start, rows)
    kept = schedule.alpha_bar[-1]
    prior = 0.5 * (kept * jnp.square(x0) - kept - np.log1p(-kept)).sum(axes)
    std = np.sqrt(reverse_variance(schedule, variance)[0]).astype(np.float32)
    decoder = gaussian_nll(x0, mean, std) if decoder_nll is None else decoder_nll(mean, std)
    return Bound(*(bits_per_dim(nats, shape) for nats in (prior, kl, decoder)))


def gaussian_nll(x: Array, mean: Array, std: Array | float) -> Array:
    """-log N(x; mean, std^2) in nats, summed per example: (B, ...) -> (B,)."""
    scaled = jnp.square((x - mean) / std)
    nll = 0.5 * (jnp.log(2 * jnp.pi) + scaled) + jnp.log(std)
    return nll.sum(range(1, x.ndim))


def pixel_nll(pixels: Array, mean: Array, std: Array | float) -> Array:
    """-log P of 8-bit pixels in nats under a Gaussian that is cut into levels (Ho et al., eq. 13).

    The lowest level has all that is below it, the highest all that is above.

    Args:
        pixels: (B, ...) at the levels k / 127.5 - 1.
        mean: (B, ...) of the Gaussian.
        std: of the Gaussian; broadcasts.

    Returns:
        (B,), summed per example.
    """
    below, above = ((pixels + d - mean) / std for d in (-HALF_LEVEL, HALF_LEVEL))
    below = jnp.where(pixels < -1 + HALF_LEVEL, -jnp.inf, below)
    above = jnp.where(pixels > 1 - HALF_LEVEL, jnp.inf, above)
    # In the lower tail differences of probabilities do not cancel; the upper one is its mirror.
    flipped = below + above > 0
    low, high = jnp.where(flipped, -above, below), jnp.where(flipped, -below, above)
    log_high = jax.scipy.special.log_ndtr(high)
    share = jnp.exp(jax.scipy.special.log_ndtr(low) - log_high)
    nll = -log_high - jnp.log1p(-share)
    return nll.sum(range(1, pixels.ndim))


def dequantized(keys: Array, pixels: Array) -> Array:
    """8-bit pixels (B, ...) in [-1, 1] with uniform noise of the width of a level.

    The density of these, and `LEVEL_BITS`, bound the bits of the levels (Theis et al. 2016).
    """
    draw = jax.vmap(lambda key: jax.random.uniform(key, pixels.shape[1:], jnp.float32))
    return pixels + HALF_LEVEL * (2 * draw(keys) - 1)


# The probability-flow ODE


def rademacher(keys: Array, count: int, shape: tuple[int, ...]) -> Array:
    """`count` probes of Hutchinson's estimator, (count, B, *shape) of -1 and 1, from keys (B,)."""
    draw = jax.vmap(lambda key: jax.random.rademacher(key, (count, *shape), jnp.float32))
    return jnp.moveaxis(draw(keys), 1, 0)


def unit_probes(shape: tuple[int, ...]) -> Array:
    """Probes (D, 1, *shape) that give the exact divergence of few dimensions, at D times the
    gradients; broadcast over the batch."""
    size = math.prod(shape)
    return math.sqrt(size) * jnp.eye(size).reshape(size, 1, *shape)


def ode_grid(process: Process, steps: int) -> Grid:
    """The steps + 1 noise levels of the ODE, from the least to the most noise of the process.

    They are even in the cube root of sigma / (alpha + sigma). That is finite at pure noise, and
    resolves data of any spread: even steps in log SNR spend too many at much noise, and even steps
    of a flow too few at little. Of a discrete process, the network is told times between its own.

    Raises:
        UserError: no steps.
    """
    if steps < 1:
        raise UserError(f"the ODE needs at least 1 step, not {steps}")
    t = np.linspace(process.first, process.last, 16 * process.steps + 1)
    alpha, sigma = process.marginal(t)
    place = np.cbrt(sigma / (alpha + sigma))
    t = np.interp(np.linspace(place[0], place[-1], steps + 1), place, t)
    t[-1] = process.last  # which rounding may miss
    return Grid(t, *process.marginal(t))


def ode_rows(process: Process, steps: int) -> Row:
    """The network calls of `ode_nll`, two for each step of Heun's method: arrays (2 * steps,)."""
    grid = ode_grid(process, steps)
    angle = np.arctan2(grid.sigma, grid.alpha)
    step, corrector = np.divmod(np.arange(2 * steps), 2)
    rows = grid.at(step + corrector)._asdict() | {"h": np.diff(angle)[step]}
    return {name: x.astype(np.float32) for name, x in rows.items()} | {"corrector": corrector == 1}


def ode_nll(denoise: Denoise, x0: Array, probes: Array, rows: Row) -> Array:
    """-log p of the probability-flow ODE (Song et al. 2021, eq. 39), (B,) bits per dimension.

    The density is that of the samples which the ODE makes of noise, by Heun's method, where it
    starts at the last level with unit variance as samplers do, and stops at the first one. There
    x_t / alpha is taken for x0: data are given as they are, and what is found is their likelihood
    under a model that adds noise of sigma / alpha at that level, as is usual.

    The equation is that of u = x_t / sqrt(alpha^2 + sigma^2) in the angle whose tangent is
    sigma / alpha: du = (cos eps - sin x0) d angle, which is regular at pure noise. Its divergence
    is the mean over probes v of v^T J v (Hutchinson; Grathwohl et al. 2019), with the derivatives
    in reverse mode.

    Args:
        denoise: `(x_t, level) -> Prediction`, each example on its own.
        x0: (B, ...) scaled latents.
        probes: (P, B, ...) from `rademacher`, or `unit_probes`.
        rows: from `ode_rows`.
    """
    axes, shape = tuple(range(1, x0.ndim)), x0.shape[1:]
    probes = jnp.broadcast_to(probes, (probes.shape[0], *x0.shape))

    def call(carry: tuple[Array, ...], row: Row) -> tuple[tuple[Array, ...], None]:
        u, base, before, log_p = carry
        level, h, corrector = level_of(row), row["h"], row["corrector"]
        size = jnp.hypot(level.alpha, level.sigma)

        def velocity(u: Array) -> Array:
            found = denoise(size * u, level)
            return (level.alpha * found.eps - level.sigma * found.x0) / size

        now, pullback = jax.vjp(velocity, u)
        trace = jax.lax.map(lambda v: (v * pullback(v)[0]).sum(axes), probes).mean(0)
        base = jnp.where(corrector, base, u)
        after = base + h * jnp.where(corrector, 0.5 * (before + now), now)
        return (after, base, now, log_p + 0.5 * h * trace), None

    ratio = rows["sigma"][0] / rows["alpha"][0]
    cosine = 1 / jnp.sqrt(1 + ratio**2)
    u = cosine * x0
    log_p = jnp.full(x0.shape[0], math.prod(shape) * jnp.log(cosine))
    (u, _, _, log_p), _ = jax.lax.scan(call, (u, u, jnp.zeros_like(u), log_p), rows)
    return bits_per_dim(gaussian_nll(u, jnp.zeros_like(u), 1.0) - log_p, shape)
