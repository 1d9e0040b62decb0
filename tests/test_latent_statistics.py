"""The command that measures latents, and what it may write."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import command

from ldm_jax import builders, random
from ldm_jax import config as config_lib
from ldm_jax import workdir as files
from ldm_jax.data.sources import open_source
from ldm_jax.errors import UserError
from ldm_jax.images import save_numbered
from ldm_jax.run import run
from ldm_jax.training import latents
from ldm_jax.training.sharding import make_mesh

SHIFT, SCALE = np.float32([1, 2]), np.float32([3, 4])


@pytest.fixture(scope="module")
def config():
    config = config_lib.get_config()
    config.data.update(source="emoji", where="category=Smileys & Emotion", resolution=32, threads=2)
    config.first_stage.update(kind="kl", width=8, norm_groups=8, mult=(1, 1), depth=1, channels=2)
    config.first_stage.update(z_channels=2, mid_attn=False, log_variance=-6.0)
    config.train.update(batch_size=12, steps=0)
    return config


@pytest.fixture(scope="module")
def weights(config):
    module, image = builders.build_first_stage(config), jnp.zeros((1, 32, 32, 3))
    keys = random.example_keys(jax.random.key(0), 1)
    params = jax.jit(module.init)(jax.random.key(0), image, keys)["params"]
    return {"params": params, "latents": {"shift": SHIFT, "scale": SCALE}}


@pytest.fixture
def workdir(config, weights, tmp_path):
    """An imported or exported first stage."""
    files.save_model(tmp_path / "run", config, {"first_stage": weights})
    return tmp_path / "run"


def measured(config, weights, source, count):
    return latents.measure(
        config, weights, latents.one_pass(config, source, count), make_mesh()
    ).summary()


def test_command_prints_what_each_rule_gives(config, weights, workdir):
    before = (workdir / "first_stage" / files.WEIGHTS).read_bytes()
    out = command("latent_statistics", f"--workdir={workdir}").stdout
    whole = measured(config, weights, open_source("emoji", where=config.data.where), 0)
    assert f"over {whole['images']} images" in out
    number = r"(-?[\d.e-]+)"
    rows = re.findall(rf"^ +\d +{number} +{number} +{number}$", out, re.MULTILINE)
    found = np.array(rows, float).T
    std = np.array(whole["channel_std"])
    # Five digits are printed; the test's eight devices round otherwise than the command's one.
    np.testing.assert_allclose(found, [whole["channel_mean"], std, 1 / std], rtol=1e-4)
    (scale,) = re.findall(rf"^scalar +0, {number}$", out, re.MULTILINE)
    np.testing.assert_allclose(float(scale), 1 / whole["std"], rtol=1e-4)
    assert re.search(r"^stored +1 to 2, 3 to 4$", out, re.MULTILINE)
    assert "first_batch is of the 12 images" in out
    assert (workdir / "first_stage" / files.WEIGHTS).read_bytes() == before
    assert not (workdir / "first_stage" / files.LATENTS).exists()


def test_command_stores_the_scale_of_another_set_in_a_bare_folder(
    config, weights, workdir, tmp_path
):
    folder = tmp_path / "bare"
    shutil.copytree(workdir / "first_stage", folder)
    (folder / "checkpoints" / "2").mkdir(parents=True)  # of the first stage's own training
    images = tmp_path / "images"
    pixels = np.random.RandomState(0).randint(0, 256, (3, 32, 32, 3), np.uint8)
    save_numbered(images, pixels)
    arguments = [f"--source=folder:{images}", "--num_images=2", "--latent_scale=channel", "--write"]
    out = command("latent_statistics", f"--workdir={folder}", *arguments).stdout
    assert f"stored the channel scale in {folder}" in out
    record = json.loads((folder / files.LATENTS).read_text())
    expected = measured(config, weights, open_source(f"folder:{images}"), 2)
    for name, value in expected.items():
        np.testing.assert_allclose(record[name], value, rtol=1e-4, err_msg=name)
    stored = files.load_first_stage(folder, config)
    np.testing.assert_array_equal(stored["latents"]["shift"], np.float32(record["channel_mean"]))
    np.testing.assert_allclose(stored["latents"]["scale"], 1 / np.array(record["channel_std"]))
    assert record["rule"] == "channel"
    for name in ("shift", "scale"):
        np.testing.assert_array_equal(stored["latents"][name], np.float32(record[name]))
    jax.tree.map(np.testing.assert_array_equal, stored["params"], weights["params"])
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("rule", ["first_batch", "scalar", "channel", "0.5", "stored"])
def test_training_records_the_scale(rule, tmp_path):
    """Pixels as latents, so that no network is trained before they are measured."""
    config = config_lib.get_config()
    config.data.update(source="emoji", where="category=Smileys & Emotion", resolution=32, threads=2)
    config.first_stage.update(kind="identity", latent_scale=rule, stats_images=20)
    config.train.update(batch_size=8, steps=0)
    run(config, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "first_stage" / files.LATENTS).read_text())
    stored = files.load_first_stage(tmp_path / "run", config)["latents"]
    for name in ("shift", "scale"):
        np.testing.assert_array_equal(stored[name], np.float32(record[name]))
    assert record["rule"] == rule
    assert record["images"] == {"first_batch": 8, "scalar": 20, "channel": 20}.get(rule, 0)
    assert ("std" in record) == (record["images"] > 0)
    if rule == "channel":
        np.testing.assert_allclose(stored["shift"], record["channel_mean"], rtol=1e-6)
        np.testing.assert_allclose(stored["scale"], 1 / np.array(record["channel_std"]), rtol=1e-6)
    else:
        scale = 1 / record["std"] if "std" in record else {"0.5": 0.5, "stored": 1}[rule]
        np.testing.assert_allclose(stored["scale"], np.full(3, scale), rtol=1e-6)
        np.testing.assert_array_equal(stored["shift"], 0)


@pytest.mark.parametrize("sign", ["checkpoints/7", files.WEIGHTS])
def test_a_scale_that_a_diffusion_model_knows_stays(sign, workdir, tmp_path):
    files.check_unused_scale(workdir)
    if sign == files.WEIGHTS:
        (workdir / sign).write_bytes(b"")
    else:
        (workdir / sign).mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "first_stage").symlink_to(workdir / "first_stage")
    before = (workdir / "first_stage" / files.WEIGHTS).read_bytes()
    for path in (workdir, workdir / "first_stage", tmp_path / "other"):
        with pytest.raises(UserError, match=r"run holds a diffusion model that was trained on"):
            files.set_latent_scale(path, {}, {})
    arguments = [f"--workdir={workdir}", "--latent_scale=0.5", "--write"]
    done = command("latent_statistics", *arguments, check=False)
    assert done.returncode == 1 and "holds a diffusion model" in done.stderr
    assert (workdir / "first_stage" / files.WEIGHTS).read_bytes() == before


def test_a_failed_write_leaves_the_old_scale(weights, workdir, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    before = (workdir / "first_stage" / files.WEIGHTS).read_bytes()
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(UserError, match=r"cannot write to .*first_stage \(No space left"):
        files.set_latent_scale(workdir, weights, {})
    assert (workdir / "first_stage" / files.WEIGHTS).read_bytes() == before
    assert not list((workdir / "first_stage").glob("*.tmp"))


def test_another_first_stage_takes_the_record_along(config, weights, workdir):
    directory = workdir / "first_stage"
    files.save_first_stage(directory, config, weights, {"rule": "stored"})
    assert json.loads((directory / files.LATENTS).read_text()) == {"rule": "stored"}
    files.save_first_stage(directory, config, weights)
    assert not (directory / files.LATENTS).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no workdir given"),
        (["--num_images=-1"], "--num_images is -1"),
        (["--write"], "--write needs --latent_scale: choose first_batch"),
        (["--latent_scale=pixel"], "--latent_scale is 'pixel': choose from"),
        (["--latent_scale=0"], "--latent_scale is '0': choose from"),
        (["--latent_scale=inf", "--write"], "--latent_scale is 'inf': choose from"),
    ],
)
def test_bad_commands_get_one_clear_line(arguments, message):
    given = ["--workdir=/nowhere", *arguments] if arguments else []
    done = command("latent_statistics", *given, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {message}")
