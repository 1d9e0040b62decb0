"""The command on a tiny first stage, as a user runs it."""

import re

import jax
import numpy as np
import pytest
from commands import command
from PIL import Image

from ldm_jax import config as config_lib
from ldm_jax import images
from ldm_jax import workdir as files
from ldm_jax.metrics.reconstruction import psnr
from ldm_jax.pipeline import Pipeline

LINES = re.compile(
    r"(?P<source>\S+): (?P<height>\d+)x(?P<width>\d+); memory: at most \d+\.\d\d GB "
    r"\(\d+\.\d\d now, one tile \d+\.\d\d, canvas \d+\.\d\d\)\n"
    r"(?P<target>\S+): PSNR (?P<psnr>\d+\.\d\d) dB, \d+\.\d s\n"
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    config = config_lib.get_config()
    config.first_stage.update(kind="kl", width=8, mult=(1, 1, 1), depth=1, norm_groups=4)
    config.first_stage.update(z_channels=4, channels=4, attn_downsample=(), mid_attn=False)
    config.train.steps = 0
    noise = np.random.RandomState(0)
    shapes = files.abstract_first_stage(config)
    variables = jax.tree.map(lambda x: noise.uniform(-0.2, 0.2, x.shape).astype("f"), shapes)
    variables["latents"] = {"shift": np.zeros(4, "f"), "scale": np.full(4, 2, "f")}
    root = tmp_path_factory.mktemp("run")
    files.save_model(root, config, {"first_stage": variables})
    return root


def pipeline(root):
    config = files.read_config(root)
    return Pipeline(config, {"first_stage": files.load_first_stage(root, config)}, step=0)


def noise(*shape):
    return np.random.RandomState(1).randint(0, 256, shape).astype(np.uint8)


def read(path):
    return np.asarray(Image.open(path))


def test_whole_images_of_any_kind(workdir, tmp_path):
    pixels = noise(24, 40, 4)
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    Image.fromarray(noise(24, 40).astype(np.uint16) * 257).save(tmp_path / "grey.png")
    shown = command(
        "reconstruct",
        f"--workdir={workdir}",
        f"--image={tmp_path / 'clear.png'},{tmp_path / 'grey.png'}",
    ).stdout
    out = workdir / "reconstructions"
    names = ["clear.png", "clear_difference.png", "grey.png", "grey_difference.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clear.png", "grey.png"]
    assert read(out / "grey.png").shape == (24, 40, 3)

    on_white = np.asarray(
        Image.alpha_composite(
            Image.new("RGBA", (40, 24), (255, 255, 255, 255)), Image.fromarray(pixels)
        ).convert("RGB")
    )
    pipe = pipeline(workdir)
    want = images.to_uint8(np.asarray(pipe.decode(pipe.encode(on_white[None]))))[0]
    found = read(out / "clear.png")
    # Another process, whose products may be rounded otherwise.
    assert np.abs(found.astype(int) - want).max() <= 1
    difference = read(out / "clear_difference.png")
    np.testing.assert_array_equal(difference, images.show_difference(on_white, found))

    entries = [match.groupdict() for match in LINES.finditer(shown)]
    assert [entry["target"] for entry in entries] == [str(out / names[0]), str(out / names[2])]
    assert (entries[0]["height"], entries[0]["width"]) == ("24", "40")
    value = psnr(images.to_float(on_white)[None], images.to_float(found)[None])[0]
    assert float(entries[0]["psnr"]) == pytest.approx(float(value), abs=0.006)  # two digits


def test_tiles_of_a_cropped_image(workdir, tmp_path):
    pixels = noise(150, 59, 3)
    Image.fromarray(pixels).save(tmp_path / "tall.png")
    out = tmp_path / "out"
    shown = command(
        "reconstruct",
        f"--workdir={workdir / 'first_stage'}",
        f"--image={tmp_path / 'tall.png'}",
        "--tile=32",
        "--crop",
        f"--out={out}",
    ).stdout
    found, cropped = read(out / "tall.png"), pixels[1:149, 1:57]
    assert found.shape == cropped.shape
    pipe = pipeline(workdir)
    decoded = pipe.decode(pipe.encode(cropped[None], tile=32), tile=32)
    assert np.abs(found.astype(int) - images.to_uint8(decoded)[0]).max() <= 1
    difference = read(out / "tall_difference.png")
    np.testing.assert_array_equal(difference, images.show_difference(cropped, found))
    # More rows than are compared at a time.
    value = psnr(images.to_float(cropped)[None], images.to_float(found)[None])[0]
    assert float(LINES.search(shown)["psnr"]) == pytest.approx(float(value), abs=0.006)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "error: no image given: use --image=cat.png"),
        (
            ["--image={0}/odd.png"],
            "{0}/odd.png of 22x41 (height x width): the first stage needs "
            "multiples of 4: crop to 20x40 or pad to 24x44, or add --crop",
        ),
        (["--image={0}/even.png", "--out={0}"], "{0}/even.png would overwrite an image given"),
        (["--image={0}/even.png,{0}/even.jpg"], "would both write"),
    ],
    ids=["no image", "sides", "overwrite", "twice"],
)
def test_refusals(workdir, tmp_path, flags, message):
    for name, size in (("odd.png", (41, 22)), ("even.png", (8, 8)), ("even.jpg", (8, 8))):
        Image.new("RGB", size).save(tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    flags = [flag.format(tmp_path) for flag in flags]
    run = command("reconstruct", f"--workdir={workdir}", *flags, check=False)
    assert run.returncode == 1 and not run.stdout
    assert run.stderr.startswith("error: ") and message.format(tmp_path) in run.stderr
    assert run.stderr.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
