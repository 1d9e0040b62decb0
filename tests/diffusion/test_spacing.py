"""Spacings and the tables that samplers make from them."""

import numpy as np
import pytest
from golden_utils import load

from ldm_jax import checks, checks_diffusion
from ldm_jax.diffusion import samplers, spacing
from ldm_jax.diffusion.continuous import Flow, LogSNR
from ldm_jax.diffusion.samplers import SAMPLERS, SPACINGS, make_table
from ldm_jax.diffusion.schedule import make_schedule, posterior
from ldm_jax.errors import UserError

ANYWHERE = tuple(name for name in SAMPLERS if name != "flow_heun")  # whatever the process
SHORT = make_schedule(steps=28, beta=(0.05, 0.6))  # few time steps, yet nearly pure noise


def combinations():
    """Every sampler with every spacing that it permits."""
    return [(name, place) for name in ANYWHERE for place in SAMPLERS[name].spacings]


@pytest.mark.parametrize("total", [1, 2, 3, 10, 97, 1000])
def test_grids_have_exactly_as_many_steps_as_asked_for(total):
    grids = {name: spacing.TIMES[name] for name in ("leading", "linspace_open", "trailing")}
    for steps in range(1, total + 1):
        for name, grid in grids.items():
            t = grid(total, steps)
            assert len(t) == steps and t[0] >= 0 and t[-1] < total, (name, steps)
            assert (np.diff(t) >= 1).all(), (name, steps)
            assert name == "leading" or t[-1] == total - 1
        leading = spacing.leading_steps(total, steps)
        if total % steps == 0 and steps < total:
            np.testing.assert_array_equal(leading, spacing.uniform_steps(total, steps))


@pytest.mark.parametrize("name", ["uniform", "quad"])
def test_original_spacings_stay_inside_or_raise(name):
    schedule = make_schedule()
    for steps in range(1, 1001):
        try:
            t = make_table("ddim", schedule, steps, 0.0, name).rows["t"]
        except UserError as error:
            assert name == "uniform" and (steps > 500 or 999 % (1000 // steps) == 0), steps
            assert "visits time step 1000" in str(error) and "leading" in str(error)
        else:
            assert 1 <= t.min() and t.max() <= 999


@pytest.mark.parametrize("steps, visited", [(30, 31), (64, 67)])
def test_uniform_has_more_steps_where_it_does_not_divide(steps, visited):
    assert len(spacing.uniform_steps(1000, steps)) == visited
    assert len(spacing.leading_steps(1000, steps)) == steps


@pytest.mark.parametrize("steps", [1, 2, 7, 999, 1000])
@pytest.mark.parametrize("name", ["linspace", "karras"])
def test_grids_between_time_steps(name, steps):
    schedule = make_schedule()
    t, alpha, _ = spacing.make_grid(name, schedule, steps)
    alpha_bar = alpha**2
    assert t.shape == alpha_bar.shape == (steps,)
    ends = [-1, 0][: min(2, steps)]
    np.testing.assert_allclose(alpha_bar[[0, -1]][: len(ends)], schedule.alpha_bar[ends], 1e-9)
    np.testing.assert_array_equal(t[[0, -1]][: len(ends)], [999, 0][: len(ends)])
    assert (np.diff(alpha_bar) > 0).all() and (np.diff(t) <= 0).all()
    # The network is told a time whose noise level is that of x_t, or next to it.
    near = [np.floor(t).astype(int), np.ceil(t).astype(int)]
    if name == "karras":
        near = [np.maximum(t - 1, 0).astype(int), np.minimum(t + 1, 999).astype(int)]
    low, high = (schedule.alpha_bar[index] for index in near)
    assert (high * (1 - 1e-9) <= alpha_bar).all() and (alpha_bar <= low * (1 + 1e-9)).all()


def test_karras_levels_are_even_in_the_seventh_root_of_sigma():
    grid = spacing.make_grid("karras", make_schedule(), 12)
    roots = grid.ratio ** (1 / 7)
    np.testing.assert_allclose(np.diff(roots), np.diff(roots)[0], rtol=1e-9)


@pytest.mark.parametrize("steps", [20, 50, 100, 200, 250])
@pytest.mark.parametrize("name", ["uniform", "quad"])
def test_ddim_parameters_fixture(name, steps):
    golden = load("ddim_parameters")
    schedule, tag = make_schedule(), f"{name}_{steps}"
    for eta, key in ((0.0, "eta0"), (0.5, "eta0.5"), (1.0, "eta1")):
        rows = make_table("ddim", schedule, steps, eta, name).rows
        rows = {k: v[::-1] for k, v in rows.items()}
        np.testing.assert_array_equal(rows["t"], golden[f"{tag}.timesteps"])
        np.testing.assert_allclose(rows["alpha"] ** 2, golden[f"{tag}.alphas"], rtol=1e-6)
        np.testing.assert_allclose(rows["x0"] ** 2, golden[f"{tag}.alphas_prev"], rtol=1e-6)
        sigmas = rows.get("noise", np.zeros(steps))
        np.testing.assert_allclose(sigmas, golden[f"{tag}.{key}.sigmas"], rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("name, place", combinations())
def test_every_number_of_steps_makes_a_table(name, place):
    schedule = SHORT
    for steps in range(1, schedule.steps + 1):
        try:
            start, rows = make_table(name, schedule, steps, None, place)
        except UserError as error:
            assert place == "uniform" and "leading" in str(error)
            continue
        visited = len(spacing.make_grid(place, schedule, steps).t)
        assert visited == steps or place == "uniform"
        extra = {"plms": 1 if visited > 1 else 0, "heun": visited - 1}.get(name, 0)
        assert len(rows["t"]) == visited + extra
        for column in rows.values():
            assert column.dtype in (np.float32, bool) and np.isfinite(column).all()
        assert 0 <= rows["t"].min() and rows["t"].max() <= schedule.steps - 1
        assert (np.diff(rows["t"]) <= 0).all()
        np.testing.assert_allclose(rows["alpha"] ** 2 + rows["sigma"] ** 2, 1, rtol=1e-6)
        assert start.dtype == np.float32 and 0.9 < start <= 1


def test_only_stochastic_tables_have_noise():
    for name in ANYWHERE:
        stochastic = name in ("ddpm", "euler_ancestral") or name.endswith("_sde")
        assert ("noise" in make_table(name, SHORT, 7).rows) == stochastic
    assert "noise" in make_table("ddim", SHORT, 7, 0.5).rows


def test_the_config_knows_all_names():
    assert checks.CHOICES["sample.sampler"] == tuple(SAMPLERS)
    assert checks.CHOICES["sample.spacing"] == SPACINGS
    assert checks_diffusion.CONTINUOUS_SPACINGS == spacing.CONTINUOUS_SPACINGS


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("ddmi", 10), "ddim, ddpm, plms, euler, .*, dpmpp_3m_sde"),
        (("ddim", 0), r"1\.\.1000"),
        (("ddim", 1001), r"1\.\.1000"),
        (("ddim", 10, -0.1), r"\[0, 1\] for sampler 'ddim', not -0.1"),
        (("ddim", 10, float("nan")), r"\[0, 1\]"),
        (("ddpm", 10, 0.0), "eta must be 1 for sampler 'ddpm', not 0"),
        (("plms", 10, 1.0), "eta must be 0 for sampler 'plms', not 1"),
        (("heun", 10, 0.5), "eta must be 0 for sampler 'heun', not 0.5"),
        (("ddim", 10, 0.0, "even"), "leading, uniform, quad"),
        (("ddim", 300, 0.0, "uniform"), "leading"),
        (("ddim", 1000, 0.0, "uniform"), "leading"),
        (("plms", 10, 0.0, "karras"), "no sense for sampler 'plms': choose one of leading"),
        (("dpmpp_2m", 10, 0.0, "quad"), "no sense for sampler 'dpmpp_2m'"),
    ],
)
def test_bad_requests(arguments, message):
    name, *rest = arguments
    with pytest.raises(UserError, match=message):
        make_table(name, make_schedule(), *rest)


def test_a_default_eta_becomes_one_that_the_sampler_permits():
    assert [samplers.nearest_eta("ddim", eta) for eta in (0.0, 0.3, 1.0)] == [0.0, 0.3, 1.0]
    assert samplers.nearest_eta("ddpm", 0.0) == 1 and samplers.nearest_eta("euler", 1.0) == 0
    with pytest.raises(UserError, match="unknown sampler 'ddmi'"):
        samplers.nearest_eta("ddmi", 0.0)


def test_thinned_ancestral_sampling_is_the_posterior_of_ddpm():
    schedule = make_schedule("cosine", steps=40)
    process, rows = posterior(schedule), make_table("ddpm", schedule, 40).rows
    for name, expected in (("x0", process.mean_x0), ("x_t", process.mean_x_t)):
        np.testing.assert_allclose(rows[name], expected[::-1], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(rows["noise"] ** 2, process.variance[::-1], rtol=1e-5, atol=1e-9)


# Processes in continuous time, and those that end in pure noise

NOISY = make_schedule(steps=28, beta=(0.05, 0.6), zero_terminal_snr=True)
PROCESSES = {"flow": Flow(28), "log_snr": LogSNR((0.01, 50.0), 28), "zero_snr": NOISY}


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("name", ANYWHERE)
def test_every_number_of_steps_makes_a_table_of_every_process(name, kind):
    process = PROCESSES[kind]
    places = SAMPLERS[name].spacings if process.discrete else spacing.CONTINUOUS_SPACINGS
    for place in set(places) & set(SAMPLERS[name].spacings) - {"uniform"}:
        for steps in range(1, process.steps + 1):
            grid = spacing.make_grid(place, process, steps)
            assert grid.t.shape == grid.alpha.shape == grid.sigma.shape == (steps,), place
            assert grid.t.dtype == grid.alpha.dtype == grid.sigma.dtype == np.float64
            assert process.first <= grid.t.min() and grid.t.max() <= process.last
            assert (grid.alpha[1:] > 0).all() and (grid.sigma > 0).all()
            assert (np.diff(1 / grid.ratio) > 0).all() or place == "quad"
            if place in ("linspace", "trailing", "karras", "log_snr"):
                assert grid.t[0] == pytest.approx(process.last)
                assert (grid.alpha[0] == 0) == (kind != "log_snr")
            rows = make_table(name, process, steps, None, place).rows
            for key, column in rows.items():
                assert np.isfinite(column).all(), (place, steps, key)


def test_levels_between_time_steps_before_pure_noise():
    t = np.array([26.0, 26.5, 26.9, 27.0])
    alpha, sigma = NOISY.marginal(t)
    ends = NOISY.marginal(np.array([26, 27]))
    np.testing.assert_allclose(alpha[[0, 3]], ends[0], rtol=1e-12)
    np.testing.assert_allclose(sigma[[0, 3]], ends[1], rtol=1e-12)
    signal = (alpha / sigma) / (alpha[0] / sigma[0])
    np.testing.assert_allclose(signal, [1, 0.5, 0.1, 0], rtol=1e-9, atol=1e-12)


def test_grids_of_a_flow():
    flow = Flow(1000)
    np.testing.assert_allclose(spacing.make_grid("trailing", flow, 4).sigma, [1, 0.75, 0.5, 0.25])
    linspace = spacing.make_grid("linspace", flow, 4).t
    np.testing.assert_allclose(linspace, [1000, 667, 334, 1])
    np.testing.assert_allclose(spacing.make_grid("leading", flow, 4).t, [751, 501, 251, 1])
    karras = spacing.make_grid("karras", flow, 6)
    assert np.isinf(karras.ratio[0]) and karras.t[0] == 1000
    np.testing.assert_allclose(karras.ratio[[1, -1]], [999, 1 / 999], rtol=1e-9)
    roots = np.diff(karras.ratio[1:] ** (1 / 7))
    np.testing.assert_allclose(roots, roots[0], rtol=1e-9)


@pytest.mark.parametrize("process", [make_schedule(), LogSNR(), Flow()])
def test_log_snr_spacing_is_even_in_its_logarithm(process):
    grid = spacing.make_grid("log_snr", process, 12)
    ratio = np.log(grid.ratio[np.isfinite(grid.ratio)])
    np.testing.assert_allclose(np.diff(ratio), np.diff(ratio)[0], rtol=1e-9)
    if isinstance(process, LogSNR):  # whose clock it is
        np.testing.assert_allclose(grid.t, np.linspace(1000, 0, 12), atol=1e-9)


@pytest.mark.parametrize("process", [Flow(), LogSNR((0.01, 20.0))])
def test_time_of_inverts_the_levels(process):
    t = np.linspace(1, 999, 7)
    alpha, sigma = process.marginal(t)
    np.testing.assert_allclose(process.time_of(np.log(sigma / alpha)), t, rtol=1e-9)
    level = process.level(t.astype(np.float32), 3)
    assert level.alpha.shape == (7, 1, 1)
    np.testing.assert_allclose(np.ravel(level.alpha), alpha, rtol=1e-4)
    np.testing.assert_allclose(np.ravel(level.sigma), sigma, rtol=1e-4)


@pytest.mark.parametrize("process", [Flow(1000), LogSNR((0.05, 20.0)), make_schedule()])
def test_fall_of_the_signal_to_noise_ratio(process):
    """Compared with differences of the ratio; a discrete one is itself a difference."""
    t = np.array([100.0, 400.0, 900.0])
    before = 1 if process.discrete else 1e-2
    after = 0 if process.discrete else 1e-2
    snr = [np.divide(*process.marginal(x)) ** 2 for x in (t - before, t + after)]
    expected = process.steps * (snr[0] - snr[1]) / (before + after)
    given = t.astype(np.int32 if process.discrete else np.float32)
    np.testing.assert_allclose(process.snr_fall(given), expected, rtol=1e-3)


def test_counted_spacings_are_refused_in_continuous_time():
    for place in ("uniform", "quad", "linspace_open"):
        with pytest.raises(UserError, match="leading, linspace, trailing, karras, log_snr"):
            make_table("ddim", Flow(), 10, 0.0, place)


def test_euler_on_a_flow_is_the_euler_step_of_its_velocity():
    rows = make_table("euler", Flow(1000), 5, None, "trailing").rows
    u = np.append(rows["sigma"], 0)
    x0, eps = 0.3, -1.1
    for i in range(5):
        x_t = (1 - u[i]) * x0 + u[i] * eps
        stepped = x_t + (u[i + 1] - u[i]) * (eps - x0)
        np.testing.assert_allclose(rows["x0"][i] * x0 + rows["eps"][i] * eps, stepped, atol=1e-6)
    ddim = make_table("ddim", Flow(1000), 5, 0.0, "trailing").rows
    np.testing.assert_array_equal(ddim["x0"], rows["x0"])


def test_sampling_starts_with_the_variance_of_the_first_level():
    for name in SAMPLERS:
        start = make_table(name, Flow(1000), 4, None, "leading").start
        assert start == pytest.approx(np.hypot(0.249, 0.751))
        assert make_table(name, Flow(1000), 4, None, "trailing").start == 1
        if name in ANYWHERE:
            assert make_table(name, NOISY, 4, None, "leading").start == 1
