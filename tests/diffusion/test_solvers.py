"""Samplers against the closed form: the best prediction for Gaussian data is affine in x_t."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import quick_jit

from ldm_jax.diffusion import spacing
from ldm_jax.diffusion.continuous import Flow, LogSNR
from ldm_jax.diffusion.guidance import make_denoise
from ldm_jax.diffusion.parameterization import regression_target, to_prediction
from ldm_jax.diffusion.samplers import SAMPLERS, SPACINGS, make_table, sample
from ldm_jax.diffusion.schedule import Level, at, make_schedule
from ldm_jax.diffusion.spacing import CONTINUOUS_SPACINGS
from ldm_jax.errors import UserError
from ldm_jax.types import Prediction

ANYWHERE = tuple(name for name in SAMPLERS if name != "flow_heun")  # whatever the process
ANCESTRAL = ("ddpm", "euler_ancestral")
SHORT = make_schedule(steps=28, beta=(0.05, 0.6))  # few time steps, yet nearly pure noise


# Known answers: for x0 ~ N(MEAN, STD^2) the best prediction is a known affine function of x_t.

MEAN, STD = 0.7, 0.3


def gaussian_denoise(x_t, level):
    """The optimal prediction at any noise level, for x_t (B, 1)."""
    alpha, sigma = level.alpha, level.sigma
    x0 = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x_t - alpha * MEAN)
    return Prediction(x0=x0, eps=(x_t - alpha * x0) / sigma)


def gaussian_network(levels, predict, x_t, t, cond):
    """The optimal network at whole time steps: x_t (B, 1), levels (alpha (T,), sigma (T,))."""
    level = Level(t, *(at(values, t.astype(jnp.int32), 2) for values in levels))
    best = gaussian_denoise(x_t, level)
    return regression_target(best.x0, best.eps, level, predict)


def stack(tables):
    """Tables of equal size as one with a leading axis, to run them all in one compiled loop."""
    return jax.tree.map(lambda *columns: np.stack(columns), *tables)


def final_moments(name, tables, network=None, denoise=gaussian_denoise):
    """Exact (means, standard deviations) of the samples of stacked tables.

    x_T has its true marginal. Every step is affine, so unit inputs give the factors of x_T and of
    the noise of each row. `network` is a stack of (schedule's alpha, its sigma) and a name of what
    is predicted; without it, `denoise` is used, by default the optimal prediction of each level.
    """
    sampler, rows = SAMPLERS[name], tables.rows
    count = rows["t"].shape[1] if "noise" in rows else 0
    x_T = jnp.zeros((2 + count, 1)).at[1].set(1.0)
    noise = jnp.eye(count, 2 + count, 2)[..., None] if count else None
    levels, predict = network or (None, None)

    def run(table, levels):
        chosen = denoise
        if levels is not None:
            chosen = make_denoise(functools.partial(gaussian_network, levels, predict), predict)
        unscaled = table._replace(start=1.0)
        return sample(chosen, x_T, None, unscaled, sampler, noise)[:, 0]

    out = np.asarray(quick_jit(jax.vmap(run))(tables, levels), np.float64)
    alpha, sigma = (rows[key][:, 0].astype(np.float64) for key in ("alpha", "sigma"))
    factors = out[:, 1:] - out[:, :1]
    mean = out[:, 0] + factors[:, 0] * alpha * MEAN
    factors[:, 0] *= np.sqrt(alpha**2 * STD**2 + sigma**2)
    return mean, np.sqrt((factors**2).sum(axis=1))


def true_moments(schedule):
    """The marginal at the least noisy level of training, alpha_bar[0]."""
    end = schedule.alpha_bar[0]
    return np.sqrt(end) * MEAN, np.sqrt(end * STD**2 + 1 - end)


def moments_of_x0(schedule):
    """Those of the prediction of x0 if x_t has the marginal at alpha_bar[0]: a last step to 0."""
    end = schedule.alpha_bar[0]
    return MEAN, np.sqrt(end) * STD**2 / true_moments(schedule)[1]


def ancestral_std(schedule, t, last=None):
    """Exact standard deviation of ancestral sampling down the steps t, from DDPM's posterior.

    `last` is alpha_bar at the end, by default DDIM's.
    """
    end = schedule.alpha_bar[t[-1]]
    variance = end * STD**2 + 1 - end
    last = last or (1.0 if t[0] == 0 else schedule.alpha_bar[0])
    for now, then in itertools.pairwise([*schedule.alpha_bar[t[::-1]], last]):
        ratio = now / then  # the posterior of x_then given x_now and x0, eq. 7 of DDPM
        gain = np.sqrt(now) * STD**2 / (now * STD**2 + 1 - now)
        factor = np.sqrt(then) * (1 - ratio) * gain + np.sqrt(ratio) * (1 - then)
        variance = (factor / (1 - now)) ** 2 * variance + (1 - then) * (1 - ratio) / (1 - now)
    return np.sqrt(variance)


KINDS = {
    "scaled_linear": (0.0015, 0.0195),
    "linear": (0.0015, 0.0195),
    "cosine": (0.1, 0.1),
    "sqrt": (0.00001, 0.001),
}


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
@pytest.mark.parametrize("name", ANYWHERE)
def test_all_time_steps_give_the_exact_result(name, predict):
    """With every parameterization and schedule, up to a small discretisation error."""
    schedules = [make_schedule(kind, beta, 1000) for kind, beta in KINDS.items()]
    tables = stack([make_table(name, schedule, 1000) for schedule in schedules])
    levels = stack([(schedule.alpha, schedule.sigma) for schedule in schedules])
    means, stds = final_moments(name, tables, (levels, predict))
    true_means, true_stds = np.transpose([moments_of_x0(schedule) for schedule in schedules])
    if name in ANCESTRAL:
        true_stds = [ancestral_std(schedule, np.arange(1000)) for schedule in schedules]
    np.testing.assert_allclose(means, true_means, rtol=1e-5)
    np.testing.assert_allclose(stds, true_stds, rtol=2e-2)


@pytest.mark.parametrize("steps", [1, 2, 7, 28])
@pytest.mark.parametrize("name", ANYWHERE)
def test_few_steps_are_sound_with_every_spacing(name, steps):
    spacings = [place for place in SAMPLERS[name].spacings if steps < 28 or place != "uniform"]
    tables = stack([make_table(name, SHORT, steps, None, place) for place in spacings])
    means, stds = final_moments(name, tables)
    # DDIM and PLMS end at the least noise of training, unless they were there already.
    early = (tables.rows["t"][:, -1] > 0) & (name in ("ddim", "plms"))
    np.testing.assert_allclose(means, np.where(early, true_moments(SHORT)[0], MEAN), rtol=1e-4)
    # A corrector across the whole range is of no use.
    most = 30 if (name, steps) in (("heun", 2), ("plms", 2)) else 1.3 * STD
    assert (stds > 0).all() and (stds < most).all()
    if steps == 1 and not early.any():  # a single prediction of x0
        alpha, sigma = (tables.rows[key][:, 0] for key in ("alpha", "sigma"))
        expected = alpha * STD**2 / np.sqrt(alpha**2 * STD**2 + sigma**2)
        np.testing.assert_allclose(stds, expected, rtol=1e-2)


def errors_of(name, place, steps, schedule):
    """Relative errors of the standard deviation for each number of steps."""
    true = moments_of_x0(schedule) if SPACINGS.index(place) > 2 else true_moments(schedule)
    stds = [
        final_moments(name, stack([make_table(name, schedule, n, None, place)]))[1] for n in steps
    ]
    return np.abs(np.ravel(stds) / true[1] - 1)


@pytest.mark.parametrize(
    "name, place, order",
    [
        ("ddim", "leading", 1),
        ("euler", "linspace", 1),
        ("heun", "linspace", 2),
        ("heun", "karras", 2),
        ("dpmpp_2m", "karras", 2),
        ("dpmpp_2m_sde", "karras", 2),
        ("dpmpp_3m_sde", "karras", 2),
        ("deis", "karras", 3),
        ("unipc", "karras", 4),  # the corrector adds one to the predictor's three
    ],
)
def test_order_of_convergence(name, place, order):
    """Doubling the steps divides the error by 2^order."""
    schedule = make_schedule("linear", (1e-4, 0.02))
    errors = errors_of(name, place, (40, 80, 160), schedule)  # not yet quite in the limit
    np.testing.assert_allclose(errors[:-1] / errors[1:], 2**order, rtol=0.2)


@pytest.mark.parametrize(
    "better, worse, place, factor",
    [("plms", "ddim", "leading", 20), ("dpmpp_3m", "dpmpp_2m", "karras", 2.5)],
)
def test_more_history_makes_the_error_smaller(better, worse, place, factor):
    schedule = make_schedule("linear", (1e-4, 0.02))
    steps = (20, 40, 80)
    errors = errors_of(better, place, steps, schedule)
    assert (factor * errors < errors_of(worse, place, steps, schedule)).all()


@pytest.mark.parametrize("steps", [50, 200, 1000])
@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_ancestral_noise_gives_the_variance_of_the_recursion(name, steps):
    schedule = make_schedule()
    mean, std = final_moments(name, stack([make_table(name, schedule, steps, 1.0)]))
    t = spacing.leading_steps(1000, steps)
    end = None if name == "ddim" else 1.0
    np.testing.assert_allclose(std, ancestral_std(schedule, t, end), rtol=1e-3)
    np.testing.assert_allclose(mean, MEAN, rtol=2e-3)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_perfect_denoiser_keeps_the_marginal_of_every_step(eta):
    """With x0 known, x_t keeps the law N(alpha x0, sigma^2) after each step, whatever eta."""
    schedule = make_schedule()
    rows = make_table("ddim", schedule, 13, eta).rows
    previous = schedule.alpha_bar[np.append(rows["t"][1:], 0).astype(int)]
    np.testing.assert_allclose(rows["x0"] ** 2, previous, rtol=1e-6)
    total = rows["eps"] ** 2 + (rows["noise"] ** 2 if eta else 0)
    np.testing.assert_allclose(total, 1 - previous, rtol=1e-5)


# Other processes: they end in pure noise, do not preserve the variance, or have no time steps.

PROCESSES = {
    "flow": Flow(1000),
    "log_snr": LogSNR((0.005, 80.0)),
    "zero_snr": make_schedule(zero_terminal_snr=True),
}


OUTPUTS = itertools.cycle(["v", "flow", "edm", "x0"])


def moments_of(name, process, steps, place, predict):
    """Exact moments of the samples, through the conversions of a parameterization."""

    def denoise(x_t, level):
        best = gaussian_denoise(x_t, level)
        raw = regression_target(best.x0, best.eps, level, predict, 0.5)
        return to_prediction(raw, x_t, level, predict, 0.5)

    table = make_table(name, process, steps, None, place)
    return [float(x[0]) for x in final_moments(name, stack([table]), denoise=denoise)]


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("name, predict", [*zip(ANYWHERE, OUTPUTS, strict=False)])
def test_many_steps_are_exact_on_every_process(name, predict, kind):
    mean, std = moments_of(name, PROCESSES[kind], 1000, "trailing", predict)
    expected = STD
    if kind == "zero_snr":  # which begins at alpha_bar = 0.9985; the rest of the way is one step
        expected = moments_of_x0(PROCESSES[kind])[1]
        if name in ANCESTRAL:
            expected = ancestral_std(PROCESSES[kind], np.arange(1000), 1.0)
    # float32 sums of 1000 steps, and a discretisation error of first order
    np.testing.assert_allclose(mean, MEAN, rtol=2e-3)
    np.testing.assert_allclose(std, expected, rtol=2e-2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_few_steps_are_sound_on_a_flow(name):
    for steps in (1, 2, 5):
        # Few steps by large factors of sigma / alpha are unstable for a method of its ODE.
        unsuited = {"log_snr", "karras"} if "heun" in name else set()
        for place in set(CONTINUOUS_SPACINGS) & set(SAMPLERS[name].spacings) - unsuited:
            mean, std = moments_of(name, PROCESSES["flow"], steps, place, "flow")
            np.testing.assert_allclose(mean, MEAN, rtol=1e-3, err_msg=f"{steps} {place}")
            assert 0 <= std < 2.5 * STD, (steps, place)  # pure noise has 1 = 3.3 STD


@pytest.mark.parametrize("name, order", [("euler", 1), ("flow_heun", 2)])
def test_order_on_a_flow(name, order):
    stds = [moments_of(name, PROCESSES["flow"], n, "trailing", "flow")[1] for n in (20, 40, 80)]
    errors = np.abs(np.array(stds) - STD)
    np.testing.assert_allclose(errors[:-1] / errors[1:], 2**order, rtol=0.1)


def test_the_flow_heun_is_for_flows():
    with pytest.raises(UserError, match=r"flow_heun.*use heun"):
        make_table("flow_heun", SHORT, 5)


def test_one_step_of_a_straight_flow_is_exact():
    """For a single point of data the velocity is constant: from noise to it in one step."""

    def point(x_t, level):
        x0 = jnp.full_like(x_t, MEAN)
        return Prediction(x0=x0, eps=(x_t - level.alpha * x0) / level.sigma)

    x_T = jnp.linspace(-2, 2, 5)[:, None]
    for name in ("euler", "ddim", "unipc"):
        table = make_table(name, PROCESSES["flow"], 1, None, "trailing")
        out = sample(point, x_T, None, table, SAMPLERS[name])
        np.testing.assert_allclose(out, MEAN, rtol=1e-6)
