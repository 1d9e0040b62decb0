"""Alarms: from made-up scalars, and through the loop."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ldm_jax import config as config_lib
from ldm_jax.first_stage.discriminator import discriminator_loss
from ldm_jax.training.alarms import UNDECIDED, Alarms, first_stage_alarms
from ldm_jax.training.interrupt import Interrupted, Interrupts
from ldm_jax.training.loop import fit
from ldm_jax.training.sharding import make_mesh
from ldm_jax.training.stage import Picture, Stage
from ldm_jax.training.state import TrainState

WELL = {
    "loss": 0.4,
    "adversarial_factor": 1.0,
    "discriminator": 0.8,
    "adaptive_weight": 3.0,
    "codes_alive": 0.9,
}


def found(loss="hinge", weight=0.5, **changes):
    config = config_lib.get_config()
    config.first_stage.discriminator.update(loss=loss, weight=weight)
    return first_stage_alarms(WELL | changes, config)


def test_all_is_well():
    assert found() == found(loss="vanilla", discriminator=0.6) == {}
    config = config_lib.get_config()  # without a discriminator or a codebook
    assert first_stage_alarms({"loss": 2000.0, "kl": 3.0}, config) == {}


@pytest.mark.parametrize(("loss", "won", "not_won"), [("hinge", 0.05, 0.2), ("vanilla", 0.05, 0.1)])
def test_the_discriminator_wins(loss, won, not_won):
    message = found(loss=loss, discriminator=won)["discriminator"]
    assert "discriminator.weight" in message and "\n" not in message
    assert found(loss=loss, discriminator=not_won) == {}
    assert found(loss=loss, discriminator=won, adversarial_factor=0.0) == {}  # not yet in use


@pytest.mark.parametrize("loss", UNDECIDED)
def test_undecided_is_the_loss_of_logits_that_say_nothing(loss):
    zero = jnp.zeros((2, 3, 3, 1))
    np.testing.assert_allclose(discriminator_loss(zero, zero, loss), UNDECIDED[loss], rtol=1e-6)


@pytest.mark.parametrize("weight", [0.5, 0.75])
def test_the_adaptive_weight_is_at_its_limit(weight):
    limit = 1e4 * weight  # the metric includes the weight
    message = found(weight=weight, adaptive_weight=limit)["adaptive_weight"]
    assert "discriminator.lecam" in message and f"{limit:.4g}" in message
    assert found(weight=weight, adaptive_weight=0.4 * limit) == {}
    assert found(weight=weight, adaptive_weight=limit, adversarial_factor=0.0) == {}


def test_codes_die():
    message = found(codes_alive=0.04)["codes"]
    assert "4.0%" in message and "codebook.reset" in message and "codebook.rule=ema" in message
    assert found(codes_alive=0.11) == {}


def test_the_ways_out_are_keys_of_the_config():
    keys = config_lib.flatten(config_lib.get_config())
    for key in ("codebook.reset", "codebook.rule"):
        assert f"first_stage.{key}" in keys
    for key in ("weight", "warmup", "ramp", "lecam", "start"):
        assert f"first_stage.discriminator.{key}" in keys


def test_an_alarm_is_said_when_it_begins():
    said, find = [], lambda scalars: {name: f"{name}!" for name in scalars["wrong"]}
    alarms = Alarms("first stage", find, said.append)
    counts = [
        alarms.check(step, {"wrong": wrong})
        for step, wrong in enumerate(["", "a", "ab", "b", "ab", ""])
    ]
    assert counts == [0, 1, 2, 1, 2, 0]
    assert said == [
        "warning: first stage, step 1: a!",
        "warning: first stage, step 2: b!",
        "warning: first stage, step 4: a!",
    ]


def toy_stage(directory, picture, **changes):
    """Five steps, of which the third is wrong."""
    block = config_lib.get_config().first_stage.train
    block = block.copy_and_resolve_references()
    block.update(batch_size=8, steps=5, log_every=1, picture_every=2, checkpoint_every=5)

    def init(key):
        return TrainState(jnp.int32(0), {"first_stage": {"w": jnp.zeros(1)}}, {}, {})

    def step(state, frozen, batch, key):
        alive = jnp.where(state.step % 4 == 2, 0.05, 0.5)
        new = state.replace(step=state.step + 1)
        return new, {"loss": batch["x"].mean(), "codes_alive": alive}

    config = config_lib.get_config()
    return Stage(
        "first stage",
        directory,
        block,
        init,
        step,
        {},
        picture,
        alarms=lambda scalars: first_stage_alarms(scalars, config),
        **changes,
    )


def toy_batches(start):
    while True:
        yield {"x": np.zeros((8, 1), np.float32)}


def test_the_loop_warns_counts_and_writes_what_a_picture_measured(tmp_path, capsys):
    shown = []

    def picture(state, step):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{step}.png")
        shown.append(step)
        if step == 4:
            raise Interrupted("a signal came")  # the loop goes on to where it saves
        return Picture(tmp_path / f"{step}.png", {"eval_psnr": 10.0 + step, "eval_images": 64})

    stage = toy_stage(tmp_path, picture, picture_at_end=True)
    state = fit(stage, toy_batches, jax.random.key(0), make_mesh(), Interrupts())
    assert int(state.step) == 5 and shown == [2, 4, 5]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["alarms"] for row in steps] == [0, 0, 1, 0, 0]
    assert [row for row in rows if "loss" not in row] == [
        {"step": 2, "eval_psnr": 12.0, "eval_images": 64},
        {"step": 5, "eval_psnr": 15.0, "eval_images": 64},
    ]
    lines = capsys.readouterr().out.splitlines()
    (warning,) = [line for line in lines if line.startswith("warning: ")]
    assert warning.startswith("warning: first stage, step 3: codes die (5.0% are in use)")
    assert "first stage: step 2, eval_psnr 12, eval_images 64" in lines


@pytest.mark.parametrize(
    ("every", "at_end", "shown"),
    [(2, False, [2, 4]), (2, True, [2, 4, 5]), (5, True, [5]), (0, True, [])],
)
def test_which_steps_are_shown(tmp_path, every, at_end, shown):
    stage = toy_stage(tmp_path, lambda state, step: None, picture_at_end=at_end)
    stage.block.picture_every = every
    assert [step for step in range(1, 6) if stage.shows(step)] == shown


def test_a_signal_in_the_last_evaluation_stops_the_run_which_then_shows_its_end(tmp_path):
    calls = []

    def picture(state, step):
        calls.append(step)
        if len(calls) == 1:
            raise Interrupted("a signal came")
        Image.new("RGB", (4, 4)).save(tmp_path / "end.png")
        return Picture(tmp_path / "end.png", {"eval_psnr": 1.0})

    stage = toy_stage(tmp_path, picture, picture_at_end=True)
    stage.block.picture_every = 5
    run = lambda: fit(stage, toy_batches, jax.random.key(0), make_mesh(), Interrupts())  # noqa: E731
    with pytest.raises(Interrupted):
        run()
    assert int(run().step) == 5 and calls == [5, 5]
    assert '"eval_psnr": 1.0' in (tmp_path / "metrics.jsonl").read_text()
