"""Going back past data that broke a training: what is stored, and real trainings that do it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import config as config_lib
from ldm_jax.errors import Diverged, UserError
from ldm_jax.training.checkpoint import Checkpoints
from ldm_jax.training.interrupt import Interrupted, Interrupts
from ldm_jax.training.loop import fit
from ldm_jax.training.rollbacks import MARGIN, Rollbacks, choose_step
from ldm_jax.training.sharding import make_mesh
from ldm_jax.training.stage import Stage
from ldm_jax.training.steps import diffusion_functions

BROKEN = 48  # the number of the batch that breaks the weights
BREAK = 1.0  # which is added to each


def test_the_checkpoint_to_go_back_to():
    assert choose_step([10, 20, 30], begin=40) == 30
    assert choose_step([10, 20, 30], begin=30 + MARGIN) == 20  # one step too near
    assert choose_step([10, 20, 30], begin=30 + MARGIN + 1) == 30
    assert choose_step([30, 40], begin=31) == 30  # none is old enough
    assert choose_step([], begin=31) == 0


class TestRollbacks:
    def numbers(self, rollbacks, step, count=6):
        counting = lambda first: iter(range(first, 10**6))  # noqa: E731
        found = iter(rollbacks.batches(counting, step))
        return [next(found) for _ in range(count)]

    def test_without_any_the_batch_is_the_step(self, tmp_path):
        rollbacks = Rollbacks(tmp_path)
        assert rollbacks.count == 0 and rollbacks.batch(7) == 7
        assert self.numbers(rollbacks, 3) == [3, 4, 5, 6, 7, 8]
        assert list(tmp_path.iterdir()) == []

    def test_the_data_between_is_left_out_also_after_a_restart(self, tmp_path):
        first = Rollbacks(tmp_path)
        assert first.add(step=14, to_step=10) == (10, 13)
        for rollbacks in (first, Rollbacks(tmp_path)):
            assert self.numbers(rollbacks, 10) == [14, 15, 16, 17, 18, 19]
            assert rollbacks.batch(12) == 16 and rollbacks.batch(9) == 9
            # A run that fell back further does again what it did, and leaves out the same.
            assert self.numbers(rollbacks, 7) == [7, 8, 9, 14, 15, 16]

    def test_one_after_the_other(self, tmp_path):
        rollbacks = Rollbacks(tmp_path)
        rollbacks.add(14, 10)
        assert rollbacks.add(12, 10) == (14, 15)  # again, to the same step
        assert self.numbers(rollbacks, 10, 3) == [16, 17, 18]
        assert rollbacks.add(25, 20) == (26, 30)  # later
        assert self.numbers(rollbacks, 18, 4) == [24, 25, 31, 32]
        assert rollbacks.add(22, 5) == (5, 32)  # further back than all
        assert self.numbers(Rollbacks(tmp_path), 3, 20) == [3, 4, *range(33, 51)]
        assert rollbacks.count == 4

    def test_a_damaged_file_is_no_reason_to_train_on_other_data(self, tmp_path):
        for text in ("[{", '[{"to_step": 3}]', '[{"to_step": 3, "next_batch": "x"}]', "[3]"):
            (tmp_path / "rollbacks.json").write_text(text)
            with pytest.raises(UserError, match=r"rollbacks.json is damaged .* data the run"):
                Rollbacks(tmp_path)


def real_stage(directory, **changes):
    """A tiny diffusion transformer on 8x8 pixels, whose weights a batch may break."""
    c = config_lib.get_config()
    c.data.resolution = 8
    c.first_stage.kind = "identity"
    c.denoiser.update(kind="dit", width=32, depth=1, num_heads=2, dropout=0.1)
    c.train.update(batch_size=8, steps=70, log_every=10, picture_every=0, checkpoint_every=20)
    c.train.update(spike_window=20, rollback=True, lr=1e-3)
    c.train.update(changes)
    init, step = diffusion_functions(config_lib.check(c))

    def breaking(state, frozen, batch, key):
        bad = batch.pop("bad").max()
        new, metrics = step(state, frozen, batch, key)
        params = jax.tree.map(lambda p: p + bad, new.params)
        return new.replace(params=params), metrics

    frozen = {"latents": {"shift": jnp.zeros(3), "scale": jnp.ones(3)}}
    return Stage("diffusion", directory, c.train, init, breaking, frozen, None)


def real_batches(bad, stop=None, interrupts=None):
    """start -> batches, each a function of its number; `stop` asks for the end before that one."""

    def batches_from(start):
        number = start
        while True:
            if number == stop:
                interrupts.requested = True
            image = np.random.default_rng(number).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
            yield {"image": image, "bad": np.full(8, BREAK * (number in bad), np.float32)}
            number += 1

    return batches_from


def train(stage, bad=(BROKEN,), stop=None):
    interrupts = Interrupts()
    batches = real_batches(bad, stop, interrupts)
    return fit(stage, batches, jax.random.key(0), make_mesh(), interrupts)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_a_training_goes_back_and_resumes_bit_for_bit(tmp_path, capsys):
    stage = real_stage(tmp_path / "whole")
    state = train(stage)
    printed = capsys.readouterr().out
    assert int(state.step) == 70
    (entry,) = json.loads((tmp_path / "whole" / "rollbacks.json").read_text())
    end = entry["from_step"]
    assert BROKEN + 1 < end <= BROKEN + 5
    assert entry == {"from_step": end, "to_step": 40, "next_batch": end}
    assert f"warning: diffusion, step {end}: loss has risen to" in printed
    assert f"going back to step 40, and on without batches 40 to {end - 1} (1 of at most 3" in (
        printed
    )
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [row["step"] for row in found] == [10, 20, 30, 40, 50, 60, 70]
    assert max(row["loss"] for row in found[4:]) < 1.5 * max(row["loss"] for row in found[2:4])

    # A run that is stopped after it went back, and goes on.
    stage = dataclasses.replace(stage, directory=tmp_path / "resumed")
    with pytest.raises(Interrupted, match="saved diffusion at step"):
        train(stage, stop=end + 13)
    assert_same(train(stage), state)
    assert len(json.loads((tmp_path / "resumed" / "rollbacks.json").read_text())) == 1

    # The same data without what is left out, from the start.
    whole = [n for n in range(200) if n < 40 or n >= end]
    plain = dataclasses.replace(stage, directory=tmp_path / "plain")
    chosen = lambda start: (next(real_batches(())(whole[n])) for n in range(start, len(whole)))  # noqa: E731
    assert_same(fit(plain, chosen, jax.random.key(0), make_mesh(), Interrupts()), state)


def test_it_ends_where_going_back_does_not_help(tmp_path):
    stage = real_stage(tmp_path, max_rollbacks=2, steps=500)
    with pytest.raises(Diverged, match=r"^diffusion: .*, after it went back 2 times; "):
        train(stage, bad=range(BROKEN, 10**6))
    assert len(json.loads((tmp_path / "rollbacks.json").read_text())) == 2
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    # Trouble so soon after step 40 says that its state is no good either.
    assert checkpoints.latest_step() == 20
    checkpoints.close()


def test_skipped_steps_in_a_row_are_a_reason_too(tmp_path, capsys):
    stage = real_stage(tmp_path, max_skipped=4, spike_factor=0.0)

    def breaking(state, frozen, batch, key):
        bad = batch["bad"].max() > 0
        new, metrics = stage.step(state, frozen, batch | {"bad": 0 * batch["bad"]}, key)
        return new, metrics | {"loss": jnp.where(bad, jnp.nan, 1.0), "skipped": bad * 1.0}

    state = train(dataclasses.replace(stage, step=breaking), bad=range(45, 49))
    (entry,) = json.loads((tmp_path / "rollbacks.json").read_text())
    assert entry == {"from_step": 49, "to_step": 40, "next_batch": 49} and int(state.step) == 70
    assert "4 steps in a row had no finite loss or gradient, from step 46 on" in (
        capsys.readouterr().out
    )


def test_a_checkpoint_that_is_too_near_is_removed(tmp_path):
    stage = real_stage(tmp_path, checkpoint_every=22, log_every=1, steps=52)
    train(stage, bad=(43,))  # the state at step 44 is broken, which only the next loss shows
    (entry,) = json.loads((tmp_path / "rollbacks.json").read_text())
    assert entry["to_step"] == 22
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line)["loss"] for line in lines]
    assert len(found) == 52 and max(found[40:]) < 2 * max(found[20:40])


def test_a_damaged_checkpoint_is_not_gone_back_to(tmp_path, capsys, monkeypatch):
    """A newer good one is not removed for its sake."""
    stage = real_stage(tmp_path / "run")
    checks = Checkpoints.is_good
    asked = []

    def damaging(self, step):
        asked.append(step)
        if step == 40:
            (self.directory / "40" / "digests" / "metadata").write_text("")
        return checks(self, step)

    monkeypatch.setattr(Checkpoints, "is_good", damaging)
    assert int(train(stage).step) == 70
    assert asked == [40, 20]
    assert "going back to step 20" in capsys.readouterr().out
