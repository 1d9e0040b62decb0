"""Spikes: put into recorded losses of trainings that go well, in which there are none."""

import json
import pathlib

import numpy as np
import pytest

from ldm_jax import config as config_lib
from ldm_jax.errors import UserError
from ldm_jax.training.spikes import LAST, QUARTERS, Spikes, heights

CURVES = sorted((pathlib.Path(__file__).parent / "curves").glob("*.json"))
BLOCK = config_lib.get_config().train
FACTOR, WINDOW = BLOCK.spike_factor, BLOCK.spike_window


def read(path):
    """The rows of metrics of a recorded training, and the name of the watched one."""
    record = json.loads(path.read_text())
    columns = {k: np.array(v, np.float64) for k, v in record["steps"].items()}
    rows = [{k: v[i] for k, v in columns.items()} for i in range(len(columns[record["watched"]]))]
    return record["watched"], [row | {"skipped": 0.0} for row in rows]


def make(tmp_path, say, name="loss", factor=FACTOR, window=WINDOW, step=0):
    return Spikes("diffusion", name, factor, window, tmp_path / "spikes.json", step, say)


def look(spikes, rows, every=50, start=0):
    """All that is found in rows, looked at so many at a time."""
    found = []
    for first in range(0, len(rows), every):
        part = rows[first : first + every]
        found += spikes.check(start + first + len(part), part)
    return found


def test_there_are_at_least_five_healthy_curves():
    assert len(CURVES) >= 5


@pytest.mark.parametrize("path", CURVES, ids=lambda path: path.stem)
def test_no_alarm_in_a_healthy_training(path, tmp_path):
    name, rows = read(path)
    assert len(rows) >= 500
    said = []
    assert look(make(tmp_path, said.append, name), rows) == [] and said == []


@pytest.mark.parametrize("path", CURVES, ids=lambda path: path.stem)
@pytest.mark.parametrize("at", [150, 321, 480])
def test_a_spike_in_a_healthy_training_is_found_once(path, at, tmp_path):
    name, rows = read(path)
    losses = np.array([row[name] for row in rows])
    before = np.log(losses[at - WINDOW : at])
    # A few steps whose loss is clearly out of what noise makes of it.
    deviation = 1.4826 * np.median(np.abs(before - np.median(before)))
    outliers = 0.5 + before.max() - np.median(before)  # of which the classifier's has many
    ratio = np.exp(max(np.log(3.0), 6 * deviation, outliers))
    for i in range(at, at + 10):
        rows[i] = rows[i] | {name: float(np.exp(np.median(before)) * ratio)}
    said = []
    ((begin, end),) = look(make(tmp_path, said.append, name), rows)
    assert at - LAST < begin - 1 <= at and end == begin + LAST - 1  # steps count from 1
    assert len(said) == 1 and f"step {end}: {name} has risen" in said[0]


def healthy(count, seed=0, spread=0.1):
    return np.exp(spread * np.random.default_rng(seed).standard_normal(count))


def rows_of(losses, **more):
    columns = {"loss": losses, "skipped": np.zeros(len(losses)), **more}
    return [{k: float(v[i]) for k, v in columns.items()} for i in range(len(losses))]


def test_the_limit_by_hand():
    """In logarithms to base 2, which shares do not depend on."""
    logs = np.array([0, 1, 2, 1, 4, 9, 6, 9, 5], np.float64)
    lowest, highest = heights(2**logs, factor=2.0, window=5)
    # The window 0, 1, 2, 1, 4 has median 1, deviation 1 (of 1, 0, 1, 0, 3) and 2 as its second
    # highest value; that from the second step on, 1, 2, 1, 4, 9, has 2, 1 and 4.
    limit = 4 * 1.4826
    np.testing.assert_allclose(lowest, [(6 - 1) / limit, (5 - 2) / limit])
    np.testing.assert_allclose(highest, [(9 - 1) / limit, (9 - 2) / limit])
    logs = np.array([0, 0, 0, 5, 7, 4, 6, 9], np.float64)  # here the second highest is what counts
    np.testing.assert_allclose(heights(2**logs, factor=2.0, window=5)[0], [(4 - 0) / 5.5])
    logs[3:5] = 0  # and here the factor
    np.testing.assert_allclose(heights(2**logs, factor=4.0, window=5)[0], [(4 - 0) / 2])


@pytest.mark.parametrize(
    ("length", "ratio", "hit"), [(1, 1e6, False), (2, 1e6, False), (3, 1.7, False), (3, 2.5, True)]
)
def test_three_steps_in_a_row_are_a_spike(length, ratio, hit, tmp_path):
    losses = healthy(300)
    losses[200 : 200 + length] = ratio
    losses[170] = 50.0  # which hides nothing
    assert bool(look(make(tmp_path, lambda line: None), rows_of(losses))) == hit


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.2])
def test_batches_with_a_rare_class_are_none(share, tmp_path):
    losses = healthy(20_000, spread=0.2)
    losses[np.random.default_rng(1).random(20_000) < share] *= 16
    assert look(make(tmp_path, pytest.fail), rows_of(losses), every=5000) == []


def test_a_new_level_is_one_spike_and_the_next_one_is_found(tmp_path):
    losses = healthy(600)
    losses[200:] *= 5
    losses[450:460] *= 5
    said = []
    found = look(make(tmp_path, said.append), rows_of(losses))
    assert [begin for begin, _ in found] == pytest.approx([200, 450], abs=2) and len(said) == 2


def test_the_quarter_of_the_noise_whose_loss_rose_most(tmp_path):
    losses = healthy(150)
    losses[140:] *= 4
    quarters = {name: healthy(150, seed) for seed, name in enumerate(QUARTERS, 1)}
    quarters["loss_q1"][140:] *= 3
    quarters["loss_q3"][140:] *= 5
    quarters["loss_q0"][130:] = np.nan  # no example
    said = []
    look(make(tmp_path, said.append), rows_of(losses, **quarters))
    (line,) = said
    assert line.startswith("warning: diffusion, step 14")
    assert "times what it was in the 100 steps before" in line
    assert line.endswith("most in loss_q3, the quarter with the most noise")


def test_skipped_steps_and_zeros_are_no_spikes(tmp_path):
    rows = rows_of(healthy(300))
    for i in (150, 151, 152, 153):
        rows[i] = {"loss": float("nan"), "skipped": 1.0}
    assert look(make(tmp_path, pytest.fail), rows) == []
    assert look(make(tmp_path, pytest.fail), rows_of(np.zeros(300))) == []
    assert look(make(tmp_path, pytest.fail, factor=0.0), rows_of(10.0 ** np.arange(300))) == []


@pytest.mark.parametrize("every", [1, 7, 300])
def test_it_does_not_matter_when_one_looks_nor_whether_the_run_was_resumed(every, tmp_path):
    losses = healthy(300)
    losses[[205, 206, 207, 208]] *= 6
    rows, quiet = rows_of(losses), lambda line: None
    whole = look(make(tmp_path, quiet), rows, every)
    assert len(whole) == 1
    first = make(tmp_path, quiet)
    assert look(first, rows[:206], every) == []
    first.store(206, keep=2)
    first.store(250, keep=2)  # of which the checkpoint was never finished
    again = make(tmp_path, quiet, step=206)
    assert look(again, rows[206:], every, start=206) == whole
    for step in (206, 210, 220):
        again.store(step, keep=2)
    assert list(json.loads((tmp_path / "spikes.json").read_text())) == ["210", "220"]


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("spike_factor", 0.9, "spike_factor is 0.9, but must be above 1, or 0"),
        ("spike_window", 5, "spike_window is 5, but must be from 10 to"),
        ("max_skipped", 0, "max_skipped is 0, but must be at least 1"),
        ("max_rollbacks", 0, "max_rollbacks is 0, but must be at least 1"),
    ],
)
@pytest.mark.parametrize("block", ["train", "first_stage.train", "classifier.train"])
def test_values_that_cannot_work(block, key, value, text):
    config = config_lib.get_config()
    config.update_from_flattened_dict({f"{block}.{key}": value})
    with pytest.raises(UserError, match=rf"config.{block}.{text}"):
        config_lib.check(config)
    config.update_from_flattened_dict({f"{block}.{key}": 20 if "factor" not in key else 0.0})
    config_lib.check(config)
