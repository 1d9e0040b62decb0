"""What the loop measures of states now and then."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import config as config_lib
from ldm_jax.images import save_png
from ldm_jax.training.interrupt import Interrupted, Interrupts
from ldm_jax.training.loop import fit
from ldm_jax.training.sharding import make_mesh
from ldm_jax.training.stage import Measure, Picture, Stage
from ldm_jax.training.state import TrainState


def init(key):
    w = {"denoiser": {"w": jnp.zeros(())}}
    return TrainState(jnp.int32(0), w, {}, {}, {}, {})


def step(state, frozen, batch, key):
    loss = 1.0 / (1.0 + state.step.astype(jnp.float32))
    return state.replace(step=state.step + 1), {"loss": loss}


def batches(start):
    while True:
        yield {"x": np.zeros((8, 1), np.float32)}


def stage(folder, every, take):
    block = config_lib.get_config().train
    block.unlock()
    block.update(batch_size=8, steps=5, log_every=5, checkpoint_every=100, picture_every=0)
    return Stage("toy", folder, block, init, step, {}, None, measure=Measure("fid", every, take))


def measured(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["fid"] for row in rows if "fid" in row}


def run(*arguments):
    return fit(stage(*arguments), batches, jax.random.key(0), make_mesh(), Interrupts())


def test_measured_every_so_often_and_at_the_end(tmp_path, capsys):
    stored = []

    def take(state, number):
        stored.append((tmp_path / "checkpoints" / str(number)).is_dir())
        assert int(state.step) == number
        return 10.0 - number

    run(tmp_path, 2, take)
    assert measured(tmp_path) == {2: 8.0, 4: 6.0, 5: 5.0}
    assert stored == [True] * 3  # a signal meanwhile loses nothing
    assert "toy: step 4, fid 6\n" in capsys.readouterr().out


def test_a_picture_that_a_signal_prevented_is_made_when_the_run_goes_on(tmp_path):
    path, calls = tmp_path / "2.png", []

    def picture(state, number):
        calls.append(number)
        if calls == [2]:
            raise KeyboardInterrupt  # the process ends in the middle of it
        save_png(tmp_path / f"{number}.png", np.zeros((4, 4, 3), np.uint8))
        return Picture(tmp_path / f"{number}.png")

    made = dataclasses.replace(
        stage(tmp_path, 100, lambda state, number: 0.0),
        picture=picture,
        drawn=lambda number: (tmp_path / f"{number}.png").exists(),
    )
    made.block.picture_every = 2
    train = lambda: fit(made, batches, jax.random.key(0), make_mesh(), Interrupts())  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        train()
    assert not path.exists()
    train()
    assert calls == [2, 2, 4] and path.exists()


def test_a_finished_run_is_not_measured_again(tmp_path):
    calls = []
    take = lambda state, number: float(calls.append(number) or number)  # noqa: E731
    run(tmp_path, 5, take)
    run(tmp_path, 5, take)
    assert calls == [5] and measured(tmp_path) == {5: 5.0}


def test_a_signal_meanwhile_gives_up_and_the_end_comes_later(tmp_path):
    calls = []

    def take(state, number):
        calls.append(number)
        if calls in ([2], [2, 4, 5]):
            raise Interrupted("a signal came")
        return 1.0

    with pytest.raises(Interrupted):
        run(tmp_path, 2, take)
    assert measured(tmp_path) == {4: 1.0}
    run(tmp_path, 2, take)
    assert calls == [2, 4, 5, 5] and measured(tmp_path) == {4: 1.0, 5: 1.0}
