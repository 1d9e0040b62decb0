"""Spacings and the tables that samplers make from them."""

import numpy as np
import pytest
from golden_utils import load

from ldm_jax import checks
from ldm_jax.diffusion import samplers, spacing
from ldm_jax.diffusion.samplers import SAMPLERS, SPACINGS, make_table
from ldm_jax.diffusion.schedule import make_schedule, posterior
from ldm_jax.errors import UserError

SHORT = make_schedule(steps=28, beta=(0.05, 0.6))  # few time steps, yet nearly pure noise


def combinations():
    """Every sampler with every spacing that it permits."""
    return [(name, place) for name in SAMPLERS for place in SAMPLERS[name].spacings]


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
    t, alpha_bar = spacing.make_grid(name, schedule, steps)
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
    _, alpha_bar = spacing.make_grid("karras", make_schedule(), 12)
    roots = np.sqrt(1 / alpha_bar - 1) ** (1 / 7)
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
    for name in SAMPLERS:
        assert ("noise" in make_table(name, SHORT, 7).rows) == (name == "ddpm")
    assert "noise" in make_table("ddim", SHORT, 7, 0.5).rows


def test_the_config_knows_all_names():
    assert checks.CHOICES["sample.sampler"] == tuple(SAMPLERS)
    assert checks.CHOICES["sample.spacing"] == SPACINGS


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("ddmi", 10), "ddim, ddpm, plms, dpmpp_2m, dpmpp_3m, euler, heun"),
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
