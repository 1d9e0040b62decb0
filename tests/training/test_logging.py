"""Metrics on disk and progress lines."""

import json
import time

import jax.numpy as jnp
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm_jax.training.logging import MetricWriter, Progress


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_both_files_hold_the_scalars(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(1, {"loss": 0.5})
    writer.write(2, {"loss": 0.25, "grad_norm": 3.0})
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    writer.write_image(2, "samples", tmp_path / "a.png")
    writer.close()
    assert read(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.25, "grad_norm": 3.0},
    ]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert [e.step for e in events.Images("samples")] == [2]


def test_resuming_repeats_no_step(tmp_path):
    writer = MetricWriter(tmp_path)
    for step in range(1, 6):
        writer.write(step, {"loss": float(step)})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # a crash cut this line short
    writer = MetricWriter(tmp_path, start_step=3)
    writer.write(4, {"loss": 40.0})
    writer.close()
    assert [row["loss"] for row in read(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 3.0, 40.0]


def test_progress_averages_and_leaves_empty_quartiles_out(capsys):
    progress = Progress("diffusion", start=0, total=10, batch_size=4)
    nan = float("nan")
    progress.step({"loss": jnp.float32(1), "loss_q0": jnp.float32(nan), "loss_q1": jnp.float32(2)})
    progress.step(
        {"loss": jnp.float32(3), "loss_q0": jnp.float32(nan), "loss_q1": jnp.float32(nan)}
    )
    scalars = progress.report(2, wait_seconds=0.0)
    progress.close()
    assert scalars["loss"] == 2.0 and scalars["loss_q1"] == 2.0
    assert "loss_q0" not in scalars
    assert scalars["images_per_second"] > 0
    assert scalars["data_wait_share"] == pytest.approx(0)
    assert "diffusion: step 2/10, loss 2.0000" in capsys.readouterr().out


def test_a_pause_does_not_count_as_time_of_the_steps(capsys):
    progress = Progress("first stage", start=0, total=4, batch_size=8)
    progress.step({"loss": jnp.float32(1)})
    with progress.pause():
        time.sleep(0.5)
    scalars = progress.report(1, wait_seconds=0.0)
    assert scalars["images_per_second"] > 8 / 0.4  # less than 16 with the pause
    progress.close()
    assert capsys.readouterr().out.count("first stage: step 1/4") == 1


def test_say_prints_a_line(capsys):
    progress = Progress("first stage", start=0, total=4, batch_size=8)
    progress.say("warning: this")
    progress.close()
    assert capsys.readouterr().out == "warning: this\n"
