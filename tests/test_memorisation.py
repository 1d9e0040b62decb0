"""Copies of training images are found among samples, and held-out images are none."""

import json

import jax
import numpy as np
import pytest
from commands import command
from PIL import Image
from toy_models import save_untrained

from ldm_jax import config as config_lib
from ldm_jax import judges, memorisation, tensors
from ldm_jax import workdir as files
from ldm_jax.errors import UserError
from ldm_jax.evaluation_tables import memorisation_table
from ldm_jax.first_stage import lpips as lpips_module
from ldm_jax.images import save_numbered
from ldm_jax.memorisation import Request, Training, evaluate_memorisation, search
from ldm_jax.metrics.features import Extractor
from ldm_jax.perceptual import load_perceptual
from ldm_jax.preflight import open_data
from ldm_jax.weights import FILES


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """LPIPS is small, and there; Inception is not."""
    monkeypatch.setenv("LDM_JAX_WEIGHTS", str(tmp_path / "cache"))
    monkeypatch.setattr(lpips_module, "VGG16", ((1, 4), (1, 4)))
    monkeypatch.setattr(memorisation, "_BATCH", 16)
    params = judges.load_networks(["lpips"], "random")["lpips"]
    for name in params:
        if name.startswith("head"):  # whose weights are above 0, so that a copy is nearest
            params[name] = jax.tree.map(np.abs, params[name])
    tensors.save_tensors(tmp_path / "cache" / FILES["lpips"], jax.device_get(params))


def toy(**changes):
    c = config_lib.get_config()
    c.data.update(source="emoji", split="train[:40]", resolution=32, flip=True, threads=2)
    c.data.fields = ("label",)
    c.conditioners = ("label",)
    c.first_stage.update(kind="kl", width=8, mult=(1,), depth=1, patch=4, norm_groups=8)
    c.first_stage.update(mid_attn=False, z_channels=3, channels=3)
    c.first_stage.eval.split = "train[300:600]"
    c.denoiser.update(width=32, mult=(1,), depth=1, attn_downsample=())
    c.denoiser.cross_attention = False
    c.label.update(num_classes=9, width=128, slot="vector")
    c.sample.update(steps=2, batch_size=8)
    c.update_from_flattened_dict(changes)
    return config_lib.check(c)


def save(root, config):
    return save_untrained(root, config, label_names=tuple("abcdefghi"))


def training_images(config, folder):
    training = Training(config, open_data(config, folder))
    return training, training.images(2 * np.arange(training.count))


def coarse(pixels):
    """Features in place of Inception's: means of 8x8 pixels."""
    means = pixels.reshape(len(pixels), 4, 8, 4, 8, 3).mean((2, 4))
    return {"pool": means.reshape(len(pixels), -1).astype(np.float32)}


def test_copies_are_found_in_every_space(tmp_path):
    config = toy()
    training, real = training_images(config, tmp_path)
    assert real.shape == (40, 32, 32, 3)
    slightly = np.clip(real[33].astype(int) + 2, 0, 255).astype(np.uint8)
    queries = np.stack([real[7], real[11][:, ::-1], slightly, np.full_like(real[0], 9)])
    inception = Extractor("coarse", "", "", {"pool": 48}, coarse)
    found = search(training, queries, load_perceptual(config)[0], inception)
    assert list(found) == ["pixels", "lpips", "inception"]
    for name, space in found.items():
        assert space.numbers[:3].tolist() == [14, 23, 66], name
        # A copy's distance is 0, but for products of LPIPS, and others' is not.
        np.testing.assert_allclose(space.distances[:2], 0, atol=1e-5, err_msg=name)
        assert 0 < space.distances[2] < space.distances[3]
    # The root mean square in levels: all are 2 but where that is above 255.
    moved = np.sqrt(np.square(slightly - real[33].astype(float)).mean())
    np.testing.assert_allclose(found["pixels"].distances[2], moved, rtol=1e-4)
    # All images are searched, one by one and mirrored.
    both = np.concatenate([real, real[:, :, ::-1]]).astype(float)
    rms = np.sqrt(np.square(both - 9.0).mean((1, 2, 3)))
    np.testing.assert_allclose(found["pixels"].distances[3], rms.min(), rtol=1e-4)
    assert training.name(found["pixels"].numbers[1]).endswith(" (mirrored)")


def test_without_mirroring_mirrored_images_are_no_copies(tmp_path):
    config = toy(**{"data.flip": False})
    training, real = training_images(config, tmp_path)
    found = search(training, real[:2, :, ::-1], None, None)
    assert list(found) == ["pixels"] and (found["pixels"].distances > 1).all()
    assert (found["pixels"].numbers % 2 == 0).all()


def test_samples_made_elsewhere(tmp_path):
    config = toy()
    root = save(tmp_path / "run", config)
    real = training_images(config, root)[1]
    random = np.random.RandomState(0).randint(0, 256, (10, 32, 32, 3)).astype(np.uint8)
    save_numbered(tmp_path / "made", np.concatenate([real[:30], random]))
    done = command(
        "evaluate", f"--workdir={root}", "--of=memorisation", f"--samples={tmp_path / 'made'}",
        "--num_images=60",
    )  # fmt: skip
    assert "40 samples beside 40 training images and their mirror images (emoji," in done.stdout
    assert "note: no distances by Inception: " in done.stdout
    record = json.loads((root / "evaluation" / "metrics.json").read_text())["memorisation"]
    # The small LPIPS is this process's: the command finds no whole one.
    assert list(record["spaces"]) == ["pixels"] and "note: no LPIPS: " in done.stdout
    assert record["networks"] == {}
    assert "memory for 100 samples and held-out images at most: 0.01 GB, " in done.stdout
    pixels = record["spaces"]["pixels"]
    # Copies are below any threshold, and noise is not.
    assert pixels["share"] == 0.75 and pixels["least"] == 0
    # The second part is that of a threshold that follows from 60 images.
    error = np.sqrt(0.75 * 0.25 / 40 + 0.05 * 0.95 / 60)
    assert pixels["standard_error"] == pytest.approx(error)
    assert pixels["held_out_share"] == pytest.approx(0.05, abs=1 / 60)
    assert len(record["closest"]) == 32
    assert {entry["sample"] for entry in record["closest"][:30]} == set(range(30))
    picture = np.asarray(Image.open(root / "evaluation" / "memorisation.png"))
    rows = 2  # the first tile: a copy, and below it the same image
    np.testing.assert_array_equal(picture[4:36, 4:36], picture[36:68, 4:36])
    assert (picture.shape[0] - 4) % (rows * 32 + 4) == 0


def test_samples_of_a_model_have_the_conditions_of_held_out_images(tmp_path, monkeypatch):
    config = toy()
    root = save(tmp_path / "run", config)
    pipe, given = files.load(root), []

    def sample(seeds, condition=None, **settings):
        given.append((list(seeds), condition, settings))
        return np.zeros((len(seeds), 32, 32, 3), np.uint8)

    monkeypatch.setattr(pipe, "sample", sample)
    monkeypatch.setattr(files, "load", lambda root: pipe)
    record, sheet = evaluate_memorisation(root, Request(num_images=20, seed=5, steps=1))
    ((seeds, condition, settings),) = given
    assert seeds == list(range(5, 25)) and condition["label"].shape == (20,)
    assert settings.pop("batch_size") is None
    assert settings == {
        "sampler": "ddim", "steps": 1, "eta": 1.0, "spacing": "leading", "guidance_scale": 1.0
    }  # fmt: skip
    assert settings.items() <= record.items()
    assert list(record["spaces"]) == ["pixels", "lpips"]
    lpips = judges.load_networks(["lpips"])["lpips"]
    assert record["networks"] == {"lpips": tensors.digest(lpips)}
    assert record["weights"] == tensors.digest(pipe.variables)
    assert record["held_out"] == {
        "num_images": 20, "source": "emoji", "split": "train[300:600]"
    }  # fmt: skip
    assert record["training"]["num_images"] == 40 and record["training"]["mirrored"]
    assert (record["seed"], record["checkpoint_step"]) == (5, 0)
    assert sheet.dtype == np.uint8
    assert "20 samples beside 40 training images" in memorisation_table(record)
    fewer, _ = evaluate_memorisation(root, Request(num_images=20, num_training=10))
    assert fewer["training"]["num_images"] == 10


def test_the_error_of_a_share_has_that_of_the_threshold():
    """Samples that are like the held-out images: the error is the spread of their shares."""
    random, shares, squares = np.random.RandomState(0), [], []
    for _ in range(4000):
        drawn = random.standard_normal(400 + 100)
        found = {"pixels": memorisation.Found(drawn, np.zeros(500, int))}
        record = memorisation._figures(found, 400)[0]["pixels"]
        shares.append(record["share"])
        squares.append(record["standard_error"] ** 2)
    # 4000 draws tell a spread to 1.1 %; the threshold is an order statistic, of which the binomial
    # variance is an approximation. Without the threshold's part the error is less than a half.
    assert np.mean(shares) == pytest.approx(0.05, abs=0.01)
    assert np.std(shares) == pytest.approx(np.sqrt(np.mean(squares)), rel=0.1)


def test_what_cannot_be_told(tmp_path, monkeypatch):
    root = save(tmp_path / "run", toy())
    with pytest.raises(UserError, match=r"40 of the 40 images of --split=train\[:40\] are trained"):
        evaluate_memorisation(root, Request(split="train[:40]"))
    with pytest.raises(UserError, match="19 held-out images are too few"):
        evaluate_memorisation(root, Request(num_images=19))
    for name in ("seed", "steps", "guidance_scale", "batch_size"):
        with pytest.raises(UserError, match=f"--{name} is of samples that are made here"):
            evaluate_memorisation(root, Request(samples="made.npz", **{name: 3}))
    save_numbered(tmp_path / "alike", np.zeros((1, 32, 32, 3), np.uint8))
    monkeypatch.setattr("ldm_jax.memorisation.memory.free_on_host", lambda: 1000)
    with pytest.raises(UserError, match=r"at most: 0\.00 GB, 0\.0 GB .*--samples with fewer"):
        evaluate_memorisation(root, Request(samples=str(tmp_path / "alike"), num_images=20))
    save_numbered(tmp_path / "made", np.zeros((1, 16, 16, 3), np.uint8))
    with pytest.raises(UserError, match="has images of 16x16, but training images have 32x32"):
        evaluate_memorisation(root, Request(samples=str(tmp_path / "made"), num_images=20))
