"""Train, sample, load and resume through the real entry points, at toy size."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from commands import command
from PIL import Image
from test_configs import CONFIGS, load

import ldm_jax
from ldm_jax import memory
from ldm_jax.data.transforms import Draw
from ldm_jax.errors import UserError
from ldm_jax.preflight import open_data
from ldm_jax.run import run
from ldm_jax.training.latents import transform

ROOT = pathlib.Path(__file__).parents[1]
QUICKSTART = next(path for path in CONFIGS if path.stem == "quickstart")


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("quickstart") / "run"
    command("train", f"--config={QUICKSTART}:smoke", f"--workdir={path}")
    return path


@pytest.fixture(scope="session")
def pipe(workdir):
    return ldm_jax.load(workdir)


def training_images(pipe, count=16):
    source = open_data(pipe.config, pathlib.Path("/none"))
    return np.stack(
        [transform(pipe.config).apply(source[i], Draw())["image"] for i in range(count)]
    )


def test_a_run_leaves_what_it_promises(workdir):
    for name in (
        "config.json",
        "labels.json",
        "parameters.txt",
        "checkpoints/2",
        "first_stage/weights.safetensors",
        "first_stage/latents.json",
        "first_stage/checkpoints/2",
        "first_stage/reconstructions/step_0000002.png",
        "samples/step_0000002.png",
        "samples/final.png",
        "samples/final_nearest.png",
    ):
        assert (workdir / name).exists(), name
    assert list(workdir.glob("events.out.tfevents.*"))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(np.isfinite(line["loss"]) for line in lines)


def test_a_finished_run_trains_nothing_again(workdir):
    before = (workdir / "metrics.jsonl").read_text()
    weights = (workdir / "first_stage" / "weights.safetensors").read_bytes()
    command("train", f"--config={QUICKSTART}:smoke", f"--workdir={workdir}")
    assert (workdir / "metrics.jsonl").read_text() == before
    assert (workdir / "first_stage" / "weights.safetensors").read_bytes() == weights


def test_latents_have_the_asked_for_scale(pipe):
    source = training_images(pipe)
    latents = np.asarray(pipe.encode(source))
    # The mode varies less than a sample; at toy size the posterior's noise is most of the latent.
    assert latents.shape == (len(source), *pipe.latent_shape)
    assert np.isfinite(latents).all() and latents.std() < 1.5


def test_sample_shapes_and_types(pipe):
    pixels = pipe.sample(seeds=[0, 1, 2], condition={"label": [3, 3, 5]}, guidance_scale=2.0)
    size = pipe.config.data.resolution
    assert pixels.shape == (3, size, size, 3) and pixels.dtype == np.uint8
    latents = pipe.sample(seeds=[0], condition={"label": [3]}, decode=False)
    assert latents.shape == (1, *pipe.latent_shape) and latents.dtype == np.float32


def test_an_image_depends_on_its_seed_alone(pipe):
    seeds, labels = list(range(11)), [i % 5 for i in range(11)]
    settings = dict(sampler="ddim", steps=3, eta=1.0, guidance_scale=2.0, decode=False)
    whole = pipe.sample(seeds, {"label": labels}, batch_size=16, **settings)
    for batch_size, order in ((1, range(11)), (3, range(10, -1, -1)), (8, [7, 2, 9])):
        part = pipe.sample(
            [seeds[i] for i in order],
            {"label": [labels[i] for i in order]},
            batch_size=batch_size,
            **settings,
        )
        # float32 rounding differs with the shape of the products; 1e-4 of latents of size 1.
        np.testing.assert_allclose(part, whole[list(order)], atol=1e-4, rtol=1e-4)


def test_noise_replaces_the_seeds_own(pipe):
    noise = np.random.default_rng(0).standard_normal((2, *pipe.latent_shape)).astype(np.float32)
    a = pipe.sample([0, 1], {"label": [1, 2]}, noise=noise, eta=0.0, decode=False)
    b = pipe.sample([5, 6], {"label": [1, 2]}, noise=noise, eta=0.0, decode=False)
    np.testing.assert_array_equal(a, b)
    with pytest.raises(UserError, match="noise has the shape"):
        pipe.sample([0], noise=noise)


def test_parts_fit_together(pipe):
    z = pipe.sample([0, 1], {"label": [1, 2]}, decode=False)
    decoded = np.asarray(pipe.decode(z))
    assert decoded.dtype == np.float32 and np.abs(decoded).max() <= 1
    np.testing.assert_array_equal(
        np.round((decoded + 1) * 127.5).astype(np.uint8), pipe.sample([0, 1], {"label": [1, 2]})
    )
    cond = pipe.condition({"label": [1, 2]})
    raw = pipe.denoise(z, np.array([10, 20], np.int32), cond)
    assert raw.shape == z.shape and raw.dtype == np.float32
    # uint8 and the same image as floats are the same to the encoder
    image = training_images(pipe, 2)
    floats = image.astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(pipe.encode(image), pipe.encode(floats), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(seeds=[0], condition={"label": [16]}), "label 16 is out of range.*0 to 15"),
        (dict(seeds=[0], condition={"label": [-1]}), "label -1 is out of range"),
        (dict(seeds=[0], condition={"label": [0.5]}), "whole numbers"),
        (dict(seeds=[0, 1], condition={"label": [0]}), "one value per seed, 2"),
        (dict(seeds=[0], condition={"lable": [0]}), "unknown condition 'lable'.*label"),
        (dict(seeds=[]), "at least one whole number"),
        (dict(seeds=[-1]), "seeds must lie in"),
        (dict(seeds=[0], steps=0), "1..1000"),
        (dict(seeds=[0], steps=1001), "1..1000"),
        (dict(seeds=[0], eta=2.0), "eta"),
        (dict(seeds=[0], sampler="ddmi"), "unknown sampler"),
        (dict(seeds=[0], spacing="even"), "unknown spacing"),
    ],
)
def test_bad_sampling_input_is_refused(pipe, arguments, message):
    with pytest.raises(UserError, match=message):
        pipe.sample(**arguments)


def test_sample_command(workdir, tmp_path):
    out = tmp_path / "out"
    done = command(
        # A relative path, as most people write it.
        "sample", f"--workdir={workdir.relative_to('/')}", "--num_samples=3", "--seed=7",
        "--steps=3",
        "--label=cat-face,3", "--guidance_scale=1.5", "--eta=0.5", f"--out={out}",
        "--also=5:0.5", f"--autoguidance={workdir}",
    )  # fmt: skip
    assert "3 images of step 2" in done.stdout
    assert sorted(p.name for p in out.iterdir()) == [
        "000000.png", "000001.png", "000002.png", "grid.png", "samples.json",
    ]  # fmt: skip
    record = json.loads((out / "samples.json").read_text())
    cat = json.loads((workdir / "labels.json").read_text()).index("cat-face")
    assert record == {
        "checkpoint_step": 2,
        "sampler": "ddim",
        "steps": 3,
        "eta": 0.5,
        "guidance_scale": 1.5,
        "spacing": "leading",
        "also": ["5:0.5"],
        "autoguidance": str(workdir),
        "seeds": [7, 8, 9],
        "condition": {"label": [cat, 3, cat]},
    }
    # The same seed and class from Python, on eight devices instead of one.
    pipe = ldm_jax.load(workdir)
    guides = dict(guidance_scale=1.5, also=[({"label": [5]}, 0.5)], weak=pipe)
    again = pipe.sample([8], {"label": [3]}, steps=3, eta=0.5, **guides)
    image = np.asarray(Image.open(out / "000001.png"), int)
    assert np.abs(image - again[0].astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("module", "args", "message"),
    [
        ("sample", [], "no workdir given"),
        ("sample", ["--workdir=/nowhere"], "/nowhere is no workdir"),
        ("sample", ["--workdri=x"], "Did you mean: workdir"),
        ("sample", ["--workdir=/nowhere", "--num_samples=0"], "must be at least 1"),
        ("train", [], "no config given"),
        ("train", ["--config=configs/nothing.py"], "no config file configs/nothing.py"),
        ("train", [f"--config={QUICKSTART}:smok"], "choose from modern, smoke"),
        ("train", [f"--config={QUICKSTART}", "--config.train.lrr=1"], 'Did you mean "lr"'),
        ("train", [f"--config={QUICKSTART}", "--config.train.steps=many"], "train.steps=many"),
        (
            "train",
            [f"--config={QUICKSTART}:smoke", "--config.data.source=folder:/nowhere"],
            "/nowhere",
        ),
        ("train", [f"--config={QUICKSTART}:smoke", "--workdir=/dev/null/x"], "cannot write"),
        (
            "train",
            [f"--config={QUICKSTART}:smoke", "--config.first_stage.weights=/nowhere",
             "--workdir=/nowhere/else"],
            "no first stage in /nowhere",
        ),
    ],
)  # fmt: skip
def test_bad_commands_get_one_clear_line(module, args, message):
    done = command(module, *args, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line


def test_a_workdir_without_a_checkpoint_is_refused(workdir, tmp_path):
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    with pytest.raises(UserError, match="not trained yet"):
        ldm_jax.load(tmp_path)
    (tmp_path / "first_stage").symlink_to(workdir / "first_stage")
    with pytest.raises(UserError, match="no checkpoint"):
        ldm_jax.load(tmp_path)


def test_a_codebook_beyond_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_on_host", lambda: 10**9)
    config = load(QUICKSTART, "smoke")
    config.first_stage.update(kind="vq", codes=10**7)
    with pytest.raises(UserError, match=r"so many codes of 8 channels takes 1\.9 GB, but 1\.0 GB"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_batch_that_devices_do_not_divide_is_refused(tmp_path):
    config = load(QUICKSTART, "smoke")
    config.train.batch_size = 12
    with pytest.raises(UserError, match=r"train\.batch_size is 12, which 8 devices do not divide"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_first_stage_of_another_run_is_used(workdir, tmp_path):
    args = [f"--config={QUICKSTART}:smoke", f"--config.first_stage.weights={workdir}"]
    command("train", *args, f"--workdir={tmp_path / 'run'}")
    theirs, ours = workdir / "first_stage", tmp_path / "run" / "first_stage"
    name = "weights.safetensors"
    assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    assert not (ours / "checkpoints").exists()
    args += ["--config.first_stage.channels=3", f"--workdir={tmp_path / 'other'}"]
    done = command("train", *args, check=False)
    assert done.returncode == 1
    assert "error: config.first_stage.channels is 3, but the first stage in" in done.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_an_interrupted_run_ends_like_an_undisturbed_one(tmp_path):
    """A real SIGINT in either stage: exit code 75, and bit-equal parameters after resuming."""
    steps = []
    for block in ("train", "first_stage.train"):
        steps += [f"--config.{block}.steps=16", f"--config.{block}.checkpoint_every=8"]
        steps += [f"--config.{block}.picture_every=0"]

    def arguments(name: str) -> list[str]:
        return [f"--config={QUICKSTART}:smoke", f"--workdir={tmp_path / name}", *steps]

    command("train", *arguments("straight"))
    resumed = ""
    for stage in ("first stage", "diffusion"):
        process = subprocess.Popen(
            [sys.executable, "-m", "ldm_jax.train", *arguments("broken")],
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir},
            stdout=subprocess.PIPE,
            text=True,
        )
        said = ""
        for line in process.stdout:
            said += line
            if line.startswith(f"{stage}: step 3/"):
                process.send_signal(signal.SIGINT)
        assert process.wait() == 75, said
        assert resumed in said
        saved = re.search(rf"saved {stage} at step (\d+) of 16", said)
        assert saved and int(saved[1]) < 16, said
        resumed = f"{stage}: resuming at step {saved[1]}"
    assert resumed in command("train", *arguments("broken")).stdout

    name = "first_stage/weights.safetensors"
    assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
    straight, broken = (ldm_jax.load(tmp_path / n) for n in ("straight", "broken"))
    assert straight.step == broken.step == 16
    jax.tree.map(np.testing.assert_array_equal, straight.variables, broken.variables)
    for run_name in ("straight", "broken"):
        lines = (tmp_path / run_name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, 17))


def test_a_changed_config_needs_the_flag(workdir, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    args = [f"--config={QUICKSTART}:smoke", f"--workdir={copy}", "--config.sample.eta=0.5"]
    assert "another config" in command("train", *args, check=False).stderr
    done = command("train", *args, "--allow_config_change")
    assert "config changed: sample.eta: 0.0 -> 0.5" in done.stdout
    assert json.loads((copy / "config.json").read_text())["sample"]["eta"] == 0.5
