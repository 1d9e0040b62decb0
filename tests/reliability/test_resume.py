"""Runs that are broken off end like runs that nobody disturbed: largest difference 0."""

import jax
import numpy as np
import pytest

from benchmarks.reliability import curves, resume, toys
from benchmarks.reliability.resume import Stop

STEPS = 8
# A crash goes on from the checkpoint before it, a signal from the step after it.
STOPS = {
    "unet": [Stop("diffusion", 5, "crash")],
    "dit": [Stop("diffusion", 3, "signal")],
}


@pytest.fixture(scope="module", params=sorted(STOPS))
def compared(request, tmp_path_factory):
    """A run's name, its folder, and what `resume.compare` finds of it."""
    name, out = request.param, tmp_path_factory.mktemp(request.param)
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # compile once
    yield name, out, resume.compare(toys.toy(name, STEPS), out, STOPS[name], devices=1)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


def check(found):
    assert found["unequal"] == {} and found["leaves"] > 20
    assert found["examples_equal"]
    assert found["images_seen"] >= 3 * toys.EXAMPLES  # across the ends of epochs
    assert all(found["files"].values()) and found["files"], found["files"]


def test_a_broken_run_ends_like_an_undisturbed_one(compared):
    _, _, found = compared
    check(found)
    assert found["resumed"] == [("diffusion", 4)]
    assert {"samples/final.png", "metrics.jsonl"} < set(found["files"])


def test_first_steps_are_those_of_the_golden_curves(compared):
    name, out, _ = compared
    for curve, columns in curves.read(out / "straight", name).items():
        found = curves.compare(curve, columns)
        assert found["steps"] == STEPS
        if found["same_machine"]:
            assert found["first_unequal"] == 0, found
        assert found["apart_at_first"] <= curves.TOLERANCE, found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kl_unet_classifier", "vq_dit"])
def test_all_stages_on_several_devices(name, tmp_path):
    config = toys.toy(name, STEPS)
    check(resume.compare(config, tmp_path, resume.stops_of(config, 3, ("signal", "crash"))))


@pytest.mark.slow
@pytest.mark.parametrize("name", toys.names())
def test_every_config(name, tmp_path):
    config = toys.shrunk(name, STEPS)
    stops = resume.stops_of(config, 3, ("crash", "signal"))
    assert stops
    check(resume.compare(config, tmp_path, stops, devices=1))


def test_one_bit_is_a_difference():
    a = {"x": np.array([1.0, np.nan], np.float32), "y": np.zeros(2, np.float32)}
    assert resume.differences(a, jax.tree.map(np.copy, a)) == {}
    b = jax.tree.map(np.copy, a) | {"y": np.array([0.0, -0.0], np.float32)}
    assert resume.differences(a, b) == {"['y']": 0.0}
    b["x"][0] = np.nextafter(np.float32(1), 2)
    assert set(resume.differences(a, b)) == {"['x']", "['y']"}
    with pytest.raises(ValueError, match="float32 against"):
        resume.differences(a, a | {"y": np.zeros(2)})
    with pytest.raises(ValueError, match="different parts"):
        resume.differences(a, a | {"z": np.zeros(2)})
