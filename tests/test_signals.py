"""SIGTERM and SIGINT to real trainings: exit code 75, no step lost, and the run ends the same."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from ldm_jax.lock import NAME

CONFIG = """
from ldm_jax import config as config_lib

def get_config(folder):
    c = config_lib.get_config()
    c.data.update(source=f"folder:{folder}", resolution=8, threads=1, max_bad=0.1)
    c.first_stage.update(kind="kl", width=8, norm_groups=4, mult=(1,), depth=1, channels=3)
    c.first_stage.update(mid_attn=False, perceptual_weight=0.0)
    c.first_stage.discriminator.weight = 0.0
    c.first_stage.eval.update(metrics=("psnr",), images=8)
    c.denoiser.update(kind="dit", width=32, depth=1, num_heads=2)
    for block in (c.first_stage.train, c.train):
        block.update(batch_size=8, log_every=1, picture_every=50, checkpoint_every=20)
    c.first_stage.train.steps = c.train.steps = 150
    c.sample.update(steps=2, batch_size=8, num_samples=8, nearest=True)
    return c
"""
HEARD = re.compile(r"(SIG\w+: \w+) ")
STEP = re.compile(r"(first stage|diffusion): step (\d+)/")


@pytest.fixture
def arguments(tmp_path):
    """Of a toy of two stages on 23 images and a bad one."""
    (tmp_path / "images").mkdir()
    for i in range(23):
        pixels = np.random.default_rng(i).integers(0, 256, (10, 10, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i:02d}.png")
    (tmp_path / "images" / "23.png").write_bytes(b"")
    (tmp_path / "toy.py").write_text(CONFIG)
    return [f"--config={tmp_path / 'toy.py'}:{tmp_path / 'images'}"]


def start(arguments, workdir):
    cache = jax.config.jax_compilation_cache_dir
    return subprocess.Popen(
        [sys.executable, "-m", "ldm_jax.train", *arguments, f"--workdir={workdir}"],
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until_it_listens(process):
    """Until Python has started, the system's own handlers end a process."""
    while True:
        with open(f"/proc/{process.pid}/status") as file:
            caught = int(re.search(r"SigCgt:\s*(\w+)", file.read())[1], 16)
        if caught >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.001)


def test_a_signal_at_the_first_moment(arguments, tmp_path):
    process = start(arguments, tmp_path / "run")
    wait_until_it_listens(process)
    for number in (signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 75, err
    assert out == "stopped before anything was done; the same command begins again\n"
    # Of two that come at the same moment, either may be heard first; one is told of.
    assert re.fullmatch(r"\nSIG(TERM|INT): stopping ...\n", err)
    assert not (tmp_path / "run").exists()


def test_a_second_writer_and_two_signals(arguments, tmp_path):
    workdir = tmp_path / "run"
    arguments += ["--config.first_stage.kind=identity", "--config.first_stage.channels=3"]
    arguments += ["--config.train.steps=100000"]
    first = start(arguments, workdir)
    try:
        while "step 5/" not in first.stdout.readline():
            assert first.poll() is None
        second = start(arguments, workdir)
        out, err = second.communicate(timeout=600)
        assert second.returncode == 1
        assert re.search(rf"error: {workdir} is in use: process {first.pid} on \S+ writes", err)
        assert (workdir / NAME).exists()
    finally:
        for _ in range(2):
            first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=600)
    assert first.returncode == 75, err
    saved = int(re.search(r"saved diffusion at step (\d+) of 100000", out)[1])
    steps = [json.loads(line)["step"] for line in open(workdir / "metrics.jsonl")]
    assert steps == list(range(1, saved + 1))
    assert not (workdir / NAME).exists()
    # The image that cannot be read comes in each epoch, and is said and counted once.
    assert (workdir / "bad_images.txt").read_text().count("\n") == 1
    assert (out + err).count("another example takes its place") <= 1
    last = json.loads(open(workdir / "metrics.jsonl").readlines()[-1])
    assert last["bad_images"] == 1


@pytest.mark.slow
def test_signals_at_random_times(arguments, tmp_path):
    """20 trials: a run is stopped and started again, and again from nothing if it was done.

    Prints what docs/reliability.md says: the seconds from the signal to the end of the process.
    """
    straight = start(arguments, tmp_path / "straight")
    assert straight.communicate(timeout=1800) and straight.returncode == 0
    choose, ended, trial, done, reached, usual = random.Random(0), [], 0, 0, {}, 60.0
    while trial < 20 or not done:
        workdir = tmp_path / f"run-{done}"
        process = start(arguments, workdir)
        wait_until_it_listens(process)
        begin = time.perf_counter()
        if trial < 20:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(choose.uniform(0, usual))
            when = time.perf_counter()
            for number in choose.choices((signal.SIGTERM, signal.SIGINT), k=2):
                process.send_signal(number)
        out, err = process.communicate(timeout=1800)
        for stage, step in re.findall(r"(first stage|diffusion): resuming at step (\d+) from", out):
            # No step that was shown is lost, and a stopped one is where it said.
            assert int(step) >= reached.get(stage, 0), (trial, out, err)
        reached = {stage: int(step) for stage, step in STEP.findall(out)} or reached
        for stage, step in re.findall(r"saved (first stage|diffusion) at step (\d+) of", out):
            assert reached[stage] == int(step)
        if process.returncode == 0:
            assert "Done in" in out
            # The machine may be slower or faster than before.
            reached, done, usual = {}, done + 1, min(usual, time.perf_counter() - begin)
        else:
            assert process.returncode == 75, (trial, out, err)
            trial += 1
            ended.append(time.perf_counter() - when)
            shown = (out.strip() or "nothing yet").splitlines()[-1][:70]
            print(f"trial {trial}: {ended[-1]:.2f} s, {HEARD.search(err)[1]} after: {shown}")
        assert not (workdir / NAME).exists()
    print(f"{len(ended)} stopped, {done} done: median {np.median(ended):.2f} s, {max(ended):.2f} s")
    runs = [tmp_path / name for name in ("straight", *(f"run-{i}" for i in range(done)))]
    for run in runs:
        for name in ("first_stage/weights.safetensors", "samples/final.png"):
            assert (run / name).read_bytes() == (runs[0] / name).read_bytes()
        rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
        assert [row["step"] for row in rows] == list(range(1, 151))
        losses = [row["loss"] for row in rows]
        if run == runs[0]:
            expected = losses
        assert losses == expected
