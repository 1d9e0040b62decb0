"""Averages made after training are those that would have been tracked."""

import numpy as np
import pytest

from ldm_jax import tensors
from ldm_jax.errors import UserError
from ldm_jax.training.ema import Profile, exponent
from ldm_jax.training.posthoc import expressible, inner_product, mix
from ldm_jax.training.snapshots import find_snapshots, open_mix, write_snapshots

STEPS, STDS = np.repeat(np.arange(100, 1001, 100), 2), np.tile([0.05, 0.2], 10)


def density(tau, step, std):
    """Of a profile at times tau; its integral from 0 to `step` is 1."""
    gamma = exponent(std)
    return np.where(tau <= step, (gamma + 1) / step * (tau / step) ** gamma, 0)


def tracked(values, step, std):
    """Average (C,) after `step` updates of values (T, C), in float64."""
    edges = (np.arange(step + 1) / step) ** (exponent(std) + 1)
    return np.diff(edges) @ values[:step]


def walk():
    """Weights that drift and jitter, (1000, 50) float64."""
    random = np.random.default_rng(0)
    return np.cumsum(random.standard_normal((1000, 50)), 0) + 3 * random.standard_normal((1000, 50))


@pytest.mark.parametrize("a", [(100, 0.05), (70, 0.2)])
@pytest.mark.parametrize("b", [(100, 0.1), (40, 0.28)])
def test_inner_products_are_the_integrals(a, b):
    tau = (np.arange(100_000) + 0.5) / 1000  # the middles of cells, which end at the steps
    integral = (density(tau, *a) * density(tau, *b)).sum() / 1000
    found = [inner_product(x[0], exponent(x[1]), y[0], exponent(y[1])) for x, y in ((a, b), (b, a))]
    # The middle rule is off by the square of the cells' width over the profiles', 1e-3 / 1.
    np.testing.assert_allclose(found, integral, rtol=1e-5)


@pytest.mark.parametrize("std", [0.05, 0.2])
def test_a_stored_width_is_taken_as_it_is(std):
    found = mix(STEPS, STDS, 1000, [std])
    np.testing.assert_array_equal(found.weights[0], (STEPS == 1000) & (STDS == std))
    assert found.residual[0] == 0


def test_residual_is_the_distance_of_the_profiles():
    found = mix(STEPS, STDS, 1000, [0.1, 0.01])
    tau = (np.arange(200_000) + 0.5) / 200
    profiles = np.stack([density(tau, *pair) for pair in zip(STEPS, STDS, strict=True)])
    for weights, residual, std in zip(found.weights, found.residual, (0.1, 0.01), strict=True):
        wanted = density(tau, 1000, std)
        off = np.sqrt(((weights @ profiles - wanted) ** 2).sum() / (wanted**2).sum())
        np.testing.assert_allclose(residual, off, rtol=1e-3)
    np.testing.assert_allclose(found.weights.sum(1), 1, atol=1e-9)


def test_mix_is_the_nearest_of_those_that_sum_to_one():
    """Any step away from it, along which the sum stays, makes the residual larger."""
    weights = mix(STEPS, STDS, 1000, [0.01]).weights[0]
    gammas = np.array([exponent(std) for std in STDS])
    gram = inner_product(STEPS[:, None], gammas[:, None], STEPS, gammas)
    cross = inner_product(STEPS, gammas, 1000, exponent(0.01))
    gradient = gram @ weights - cross
    # All parts of the gradient are alike: none is left within the constraint.
    np.testing.assert_allclose(gradient, gradient.mean(), atol=1e-8 * np.abs(cross).max())
    assert abs(gradient.mean()) > 1e-5 * np.abs(cross).max()  # without it, another mix is nearest


@pytest.mark.parametrize("std", [0.04, 0.1, 0.15, 0.25])
def test_a_width_is_made_of_two_others(std):
    values = walk()
    stored = np.stack([tracked(values, *pair) for pair in zip(STEPS, STDS, strict=True)])
    expected = tracked(values, 1000, std)
    found = mix(STEPS, STDS, 1000, [std]).weights[0] @ stored
    nearest = min(np.linalg.norm(average - expected) for average in stored[-2:])
    # The residuals are 1 to 3 %; the nearest stored average is off by ten times as much or more.
    assert np.linalg.norm(found - expected) < 0.1 * nearest


def test_weights_that_never_moved_stay_as_they_are():
    found = mix([60, 100], [0.1, 0.1], 100, [0.2])  # a poor mix
    assert found.residual[0] > 0.1
    np.testing.assert_allclose(found.weights[0] @ np.full((2, 3), 5.0), 5, rtol=1e-12)


def test_widths_that_are_almost_alike_do_not_blow_up():
    found = mix([100] * 3, [0.1, 0.1 + 1e-9, 0.2], 100, [0.15])
    assert np.abs(found.weights).sum() < 10
    alone = mix([100] * 2, [0.1, 0.2], 100, [0.15])
    np.testing.assert_allclose(found.residual, alone.residual, rtol=1e-4)


def test_range_is_where_the_residual_is_small():
    ((low, high),) = expressible(STEPS, STDS, 1000, 0.1)
    assert low < 0.05 and high > 0.2
    outside = mix(STEPS, STDS, 1000, [low, high, 0.9 * low]).residual
    assert (outside[:2] <= 0.1).all() and outside[2] > 0.1
    # Two single averages far apart, with nothing in between
    ranges = expressible([100, 100], [0.01, 0.2], 100, 0.1)
    assert [any(a <= std <= b for a, b in ranges) for std in (0.01, 0.05, 0.2)] == [1, 0, 1]


def test_snapshots_come_back_and_mix(tmp_path):
    random = np.random.default_rng(0)
    profiles = (Profile("std", 0.05), Profile("decay", 0.9))
    trees = {}
    for step in (20, 3):
        averages = {
            p.name: {"denoiser": {"w": random.standard_normal((2, 3), np.float32)}, "empty": {}}
            for p in profiles
        }
        write_snapshots(tmp_path, averages, profiles, step)
        trees |= {(step, p): averages[p.name] for p in profiles}
    found = find_snapshots(tmp_path)
    assert [(s.step, s.profile) for s in found] == [
        (step, p) for step in (3, 20) for p in sorted(profiles)
    ]
    like = trees[3, profiles[0]]
    for i, snapshot in enumerate(found):
        (same,) = (open_mix(found, np.eye(4)[i], like)["denoiser"]["w"],)
        np.testing.assert_array_equal(same, trees[snapshot[1:]]["denoiser"]["w"])
    weights = np.array([0.5, -2.0, 0.0, 2.5])
    arrays = [trees[s[1:]]["denoiser"]["w"] for s in found]
    expected = np.tensordot(weights, np.stack(arrays).astype(np.float64), 1).astype(np.float32)
    mixed = open_mix(found, weights, like)
    np.testing.assert_allclose(mixed["denoiser"]["w"], expected, rtol=1e-6)
    assert mixed["empty"] == {} and mixed["denoiser"]["w"].dtype == np.float32
    with pytest.raises(UserError, match="belong to another architecture"):
        open_mix(found, weights, {"denoiser": {"v": like["denoiser"]["w"]}})


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "does not say of which average"),
        ({"step": "3"}, "does not say of which average"),
        ({"step": "3", "std": "0.1", "decay": "0.9"}, "does not say of which average"),
        ({"step": "many", "std": "0.1"}, "does not say of which average"),
        ({"step": "0", "std": "0.1"}, "step 0 and std 0.1: neither"),
        ({"step": "3", "std": "nan"}, "step 3 and std nan: neither"),
    ],
)
def test_other_files_are_refused(metadata, message, tmp_path):
    tensors.save_tensors(tmp_path / "a.safetensors", {"w": np.zeros(2)}, metadata)
    with pytest.raises(UserError, match=message):
        find_snapshots(tmp_path)


def test_a_full_disk_gets_one_clear_line(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    profile = Profile("std", 0.05)
    with pytest.raises(UserError, match=r"cannot write an averaged model to .* \(No space left"):
        write_snapshots(tmp_path, {profile.name: {"w": np.zeros(2)}}, (profile,), 1)
    assert not list(tmp_path.iterdir())
