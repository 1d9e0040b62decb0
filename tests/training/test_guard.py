"""Steps whose loss or gradient is not finite: by themselves, of real stages, and in the loop."""

import dataclasses
import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import cli
from ldm_jax import config as config_lib
from ldm_jax.errors import Diverged
from ldm_jax.training import guard
from ldm_jax.training.checkpoint import Checkpoints
from ldm_jax.training.first_stage_steps import first_stage_functions
from ldm_jax.training.guard import CHECKED, Broken, Skips, checked_update
from ldm_jax.training.interrupt import Interrupts
from ldm_jax.training.loop import fit
from ldm_jax.training.sharding import make_mesh
from ldm_jax.training.stage import Stage
from ldm_jax.training.state import TrainState
from ldm_jax.training.steps import diffusion_functions
from tests.commands import command

NAN, INF = math.nan, math.inf


def flat(tree):
    return {jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree.leaves_with_path(tree)}


def bits(tree):
    return {path: leaf.tobytes() for path, leaf in flat(tree).items()}


def toy_state():
    w = {"denoiser": {"w": jnp.arange(3.0)}}
    return TrainState(
        jnp.int32(7), w, {"denoiser": {"w": -jnp.arange(3.0)}}, {"count": jnp.int32(5)},
        {"mean": jnp.float32(NAN)}, {"decay": jnp.ones(2, jnp.bfloat16)},
    )  # fmt: skip


@jax.jit
def change(state, metrics):
    """A step that changes each leaf."""
    change = lambda leaf: (leaf + 1).astype(leaf.dtype)  # noqa: E731
    return checked_update(lambda: jax.tree.map(change, state), state, metrics)


@pytest.fixture(params=["cpu", "gpu"])
def platform(request, monkeypatch):
    """Both ways of keeping a state, which run on any machine."""
    target = guard.current_target()._replace(platform=request.param)
    monkeypatch.setattr(guard, "current_target", lambda: target)
    jax.clear_caches()
    return request.param


def test_each_measure_that_is_not_finite_keeps_the_state_bit_for_bit(platform):
    metrics = dict.fromkeys(CHECKED, 1.0) | {"other": NAN}
    cases = [(metrics, 0)]
    cases += [(metrics | {name: bad}, 1) for name in CHECKED for bad in (NAN, INF, -INF)]
    for given, skipped in cases:
        given = {key: jnp.float32(value) for key, value in given.items()}
        new, found = change(toy_state(), given)
        assert found["skipped"] == skipped and int(new.step) == 8
        before = bits(toy_state().replace(step=jnp.int32(8)))
        changed = {path for path, leaf in bits(new).items() if leaf != before[path]}
        # A leaf that was NaN may have the same bits afterwards.
        assert changed - {".stats['mean']"} == (set() if skipped else set(before) - {
            ".step", ".stats['mean']"}), given  # fmt: skip


def test_a_stage_without_gradient_norms():
    assert change(toy_state(), {"loss": jnp.float32(1)})[1]["skipped"] == 0
    assert change(toy_state(), {"loss": jnp.float32(NAN)})[1]["skipped"] == 1


def tiny_diffusion():
    c = config_lib.get_config()
    c.data.resolution = 8
    c.first_stage.kind = "identity"
    c.denoiser.update(kind="dit", width=32, depth=1, num_heads=2)
    c.ema_snapshots.stds = (0.1,)
    c.data.cache_latents = True
    return config_lib.check(c)


def test_a_poisoned_batch_of_the_diffusion_model():
    config = tiny_diffusion()
    init, step = diffusion_functions(config)
    frozen = {"latents": {"shift": jnp.zeros(3), "scale": jnp.ones(3)}}
    run = jax.jit(step)
    well = {"moments": jnp.full((4, 8, 8, 3), 0.5)}
    poisoned = {"moments": well["moments"].at[2, 3, 4, 1].set(NAN)}
    state, metrics = run(jax.jit(init)(jax.random.key(0)), frozen, well, jax.random.key(1))
    assert metrics["skipped"] == 0
    after, metrics = run(state, frozen, poisoned, jax.random.key(1))
    assert metrics["skipped"] == 1 and not np.isfinite(metrics["loss"])
    assert bits(after) == bits(state.replace(step=state.step + 1))
    went_on, metrics = run(after, frozen, well, jax.random.key(1))
    assert metrics["skipped"] == 0 and np.isfinite(metrics["grad_norm"])
    before = bits(after)
    changed = {path for path, leaf in bits(went_on).items() if leaf != before[path]}
    for part in (".params", ".ema_params", ".averages", ".opt_state"):
        assert any(path.startswith(part) for path in changed), part


def test_a_discriminator_whose_gradient_alone_is_not_finite():
    c = config_lib.get_config()
    c.data.resolution = 8
    c.first_stage.update(kind="kl", width=8, mult=(1,), depth=1, norm_groups=4, mid_attn=False)
    c.first_stage.perceptual_weight = 0.0
    c.first_stage.discriminator.update(start=0, layers=1, width=4, lecam=0.1)
    init, step = first_stage_functions(config_lib.check(c))
    state = jax.jit(init)(jax.random.key(0))
    broken = {"real": jnp.float32(NAN), "generated": jnp.float32(0)}
    state = state.replace(stats=state.stats | {"logits": broken})
    batch = {"image": np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)}
    after, metrics = jax.jit(step)(state, {}, batch, jax.random.key(1))
    finite = {name: bool(np.isfinite(metrics[name])) for name in CHECKED}
    assert finite == {
        "loss": True, "grad_norm": True, "discriminator": True, "discriminator_grad_norm": False
    }  # fmt: skip
    assert metrics["skipped"] == 1
    assert bits(after) == bits(state.replace(step=state.step + 1))


def rows(skipped, loss=NAN):
    """Metrics of steps, of which those with an x were skipped."""
    return [{"loss": loss if x == "x" else 1.0, "skipped": float(x == "x")} for x in skipped]


class TestSkips:
    def test_they_are_told_of_once_per_look(self):
        said = []
        skips = Skips("diffusion", 3, said.append)
        skips.check(4, rows("...."))
        skips.check(8, rows(".x.x", INF))
        skips.check(9, rows("x"))
        assert said == [
            "warning: diffusion: 2 steps of the last 4 skipped, the first of them step 6 "
            "(loss inf)",
            "warning: diffusion: 1 step of the last 1 skipped, the first of them step 9 (loss nan)",
        ]

    @pytest.mark.parametrize("parts", [["..xxx."], ["..x", "xx", "."], ["..", "xx", "x."]])
    def test_too_many_in_a_row_however_they_are_seen(self, parts):
        skips, step = Skips("diffusion", 3, lambda line: None), 0
        with pytest.raises(Broken, match=r"3 steps in a row .* from step 3 on \(loss nan\)") as e:
            for part in parts:
                step += len(part)
                skips.check(step, rows(part))
        assert (e.value.begin, e.value.step) == (3, 5)

    def test_one_good_step_in_between_starts_anew(self):
        Skips("diffusion", 3, lambda line: None).check(11, rows("xx.xx.xx.xx"))


def toy_stage(directory, **changes):
    """The weight is the sum of all batches whose numbers are finite; so is the loss."""
    block = config_lib.get_config().train.copy_and_resolve_references()
    block.update(batch_size=8, steps=8, log_every=4, picture_every=0, checkpoint_every=4)
    block.update(changes)

    def init(key):
        w = {"denoiser": {"w": jnp.zeros(1)}}
        return TrainState(jnp.int32(0), w, jax.tree.map(jnp.copy, w), {})

    def step(state, frozen, batch, key):
        x = batch["x"].mean()
        params = jax.tree.map(lambda w: w + x, state.params)
        update = lambda: state.replace(step=state.step + 1, params=params)  # noqa: E731
        return checked_update(update, state, {"loss": x, "grad_norm": x})

    return Stage("diffusion", directory, block, init, step, {}, None)


def toy_fit(stage, bad):
    """Trains on batches of the number of their step, but those of `bad` steps, which are NaN."""

    def batches_from(start):
        step = start
        while True:
            step += 1
            yield {"x": np.full((8, 1), NAN if step in bad else step, np.float32)}

    return fit(stage, batches_from, jax.random.key(0), make_mesh(), Interrupts())


def test_a_run_goes_on_after_a_poisoned_batch_and_counts_it(tmp_path, capsys):
    state = toy_fit(toy_stage(tmp_path), bad={6})
    assert int(state.step) == 8
    assert state.params["denoiser"]["w"].tolist() == [1 + 2 + 3 + 4 + 5 + 7 + 8]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [row["skipped"] for row in found] == [0, 1]
    assert found[1]["loss"] == pytest.approx((5 + 7 + 8) / 3)
    printed = capsys.readouterr().out
    assert "1 step of the last 4 skipped, the first of them step 6 (loss nan, grad_norm nan)" in (
        printed
    )
    assert "diffusion: step 8/8, loss 6.6667" in printed and "skipped 1, ETA" in printed


def test_too_many_in_a_row_end_the_run_which_keeps_what_it_has_saved(tmp_path):
    stage = toy_stage(tmp_path, steps=20, max_skipped=3, log_every=100)
    with pytest.raises(Diverged) as e:
        toy_fit(stage, bad={6, 7, 8})
    text = str(e.value)
    assert text.startswith(
        "diffusion: 3 steps in a row had no finite loss or gradient, from step 6"
    )
    assert "train.lr" in text and "--allow_config_change" in text and "\n" not in text
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest_step() == 4
    checkpoints.close()


def test_a_state_that_is_not_finite_though_its_loss_is(tmp_path):
    stage = toy_stage(tmp_path, log_every=100)

    def step(state, frozen, batch, key):
        new, metrics = stage.step(state, frozen, batch, key)
        w = jnp.where(state.step < 5, new.params["denoiser"]["w"], INF)
        return new.replace(ema_params={"denoiser": {"w": w}}), metrics

    with pytest.raises(Diverged, match="step 8 holds elements that are not finite, in ema_params"):
        toy_fit(dataclasses.replace(stage, step=step), bad=())
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest_step() == 4
    checkpoints.close()


def test_an_interval_in_which_all_steps_are_skipped(tmp_path, capsys):
    toy_fit(toy_stage(tmp_path, log_every=2, checkpoint_every=8, steps=4), bad={1, 2})
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert "loss" not in found[0] and found[0]["skipped"] == 2 and found[1]["loss"] == 3.5
    assert "step 2/4, loss not finite" in capsys.readouterr().out


def test_the_exit_code(capsys, monkeypatch):
    def main():
        raise Diverged("diffusion: 10 steps in a row")

    with pytest.raises(SystemExit) as e:
        cli.run(main, [sys.argv[0]])
    assert e.value.code == cli.EXIT_DIVERGED == 76
    assert capsys.readouterr().err == "error: diffusion: 10 steps in a row\n"


@pytest.mark.slow
def test_a_command_that_diverges_ends_with_76_and_keeps_its_checkpoint(tmp_path):
    args = [
        f"--config={pathlib.Path(__file__).parents[2] / 'configs/quickstart.py:smoke'}",
        f"--workdir={tmp_path / 'run'}",
    ]
    args += [f"--config.train.{key}" for key in ("steps=9", "log_every=1", "picture_every=0")]
    args += ["--config.train.max_skipped=3", "--config.train.lr=1e30"]
    done = command("train", *args, check=False)
    assert done.returncode == 76, done.stderr
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert line.startswith(
        "error: diffusion: 3 steps in a row had no finite loss or gradient, from"
    )
    assert "Traceback" not in done.stderr
    verified = command("checkpoint", "verify", f"--workdir={tmp_path / 'run'}", check=False)
    assert verified.returncode == 0, verified.stdout + verified.stderr
