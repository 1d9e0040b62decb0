"""What judges a first stage: while it trains, and by the command `evaluate`."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import command
from PIL import Image

from ldm_jax import config as config_lib
from ldm_jax import judges, tensors
from ldm_jax import workdir as files
from ldm_jax.data.sources import open_source
from ldm_jax.errors import UserError
from ldm_jax.first_stage import lpips as lpips_module
from ldm_jax.images import to_float
from ldm_jax.judges import first_stage_judges
from ldm_jax.metrics.reconstruction import psnr
from ldm_jax.records import evaluate_first_stage
from ldm_jax.run import run
from ldm_jax.training.state import TrainState
from ldm_jax.weights import FILES, load_lpips


@pytest.fixture(autouse=True)
def no_weights(tmp_path, monkeypatch):
    """Nothing is fetched, and LPIPS is small."""
    monkeypatch.setenv("LDM_JAX_WEIGHTS", str(tmp_path / "cache"))
    monkeypatch.setattr(lpips_module, "VGG16", ((1, 4), (1, 4)))


@pytest.fixture
def fetched(tmp_path):
    """The folder of the weights, with LPIPS in it."""
    params = judges.load_networks(["lpips"], "random")["lpips"]
    tensors.save_tensors(tmp_path / "cache" / FILES["lpips"], jax.device_get(params))
    return tmp_path / "cache"


def toy(**changes):
    c = config_lib.get_config()
    c.data.update(source="emoji", resolution=16, threads=2)
    c.first_stage.update(kind="kl", width=8, mult=(1,), depth=1, patch=4, norm_groups=8)
    c.first_stage.update(mid_attn=False, perceptual_weight=0.0, latent_scale="0.5")
    c.first_stage.discriminator.weight = 0.0
    c.first_stage.train.update(batch_size=8, steps=3, log_every=3, picture_every=2)
    c.first_stage.eval.update(images=11, metrics=("psnr", "ssim"))
    c.train.steps, c.denoiser.mult = 0, (1,)
    c.update_from_flattened_dict(changes)
    return config_lib.check(c)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A first stage that nobody trained."""
    root = tmp_path_factory.mktemp("run") / "run"
    files.save_model(root, toy(), {"first_stage": untrained(toy())})
    return root


def untrained(config):
    """Variables of a first stage; `init` would take longer to compile than all else."""
    normal = np.random.RandomState(0).standard_normal
    return jax.tree.map(
        lambda x: (0.3 * normal(x.shape)).astype(np.float32), files.abstract_first_stage(config)
    )


# -- the command ------------------------------------------------------------------------------


def test_a_record_of_what_was_measured(workdir, fetched):
    found, record = evaluate_first_stage(
        workdir, num_images=5, metrics=("psnr", "lpips"), split="train[90%:]"
    )
    weights = (workdir / "first_stage" / files.WEIGHTS).read_bytes()
    values = record.pop("reconstruction")
    assert record == {
        "source": "emoji",
        "split": "train[90%:]",
        "where": "",
        "num_images": 5,
        "resolution": 16,
        "first_stage": {
            "file": "first_stage/weights.safetensors",
            "sha256": hashlib.sha256(weights).hexdigest(),
        },
        "networks": {"lpips": "lpips_vgg16.safetensors"},
    }
    assert list(values) == ["psnr", "lpips", "kl_per_element", "mae"]
    source = open_source("emoji", split="train[90%:]")
    first = np.asarray(Image.fromarray(source[0]["image"]).resize((16, 16), 3))
    np.testing.assert_array_equal(found.images[0], first)
    want = psnr(to_float(found.images), to_float(found.reconstructions)).mean()
    np.testing.assert_allclose(values["psnr"], want, rtol=1e-6)
    params = {"params": load_lpips()}
    pair = to_float(found.images), to_float(found.reconstructions)
    want = lpips_module.LPIPS().apply(params, *pair).mean()
    np.testing.assert_allclose(values["lpips"], want, rtol=1e-4)  # float32


def test_the_folder_of_a_first_stage_at_another_resolution(workdir):
    settings = dict(num_images=3, metrics=("psnr",), resolution=24, batch_size=1)
    found, record = evaluate_first_stage(workdir / "first_stage", **settings)
    assert found.reconstructions.shape == (3, 24, 24, 3) and record["resolution"] == 24
    assert record["first_stage"]["file"] == "weights.safetensors"
    assert (record["source"], record["split"]) == ("emoji", "train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(metrics=["psnr", "fid"]),
            "unknown metric 'fid': choose from psnr, ssim, lpips, rfid",
        ),
        (dict(metrics=["lpips"]), r"fetch lpips`, or leave 'lpips' out of --metrics"),
        (dict(metrics=["rfid"]), r"fetch inception`, or leave 'rfid' out of --metrics"),
        (dict(metrics=[], split="test"), "the emoji set has no split 'test'; it has: train"),
        (dict(metrics=[], source="folder:/nowhere"), "/nowhere does not exist"),
        (dict(metrics=[], resolution=30), "30, but the first stage divides it by 4: try 32"),
        (dict(metrics=["ssim"], resolution=8, num_images=1), "at least 11x11, got 8x8"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(workdir, settings, message):
    with pytest.raises(UserError, match=message):
        evaluate_first_stage(workdir, **settings)


def test_first_stages_that_cannot_be_evaluated_are_refused(workdir, tmp_path):
    with pytest.raises(UserError, match="nowhere is no workdir"):
        evaluate_first_stage(tmp_path / "nowhere", metrics=[])
    pixels = tmp_path / "pixels"
    pixels.mkdir()
    files.save_model(pixels, toy(**{"first_stage.kind": "identity"}), {})
    with pytest.raises(UserError, match="a model of pixels"):
        evaluate_first_stage(pixels, metrics=[])
    files.save_model(pixels, toy(), {})
    with pytest.raises(UserError, match="no first stage in"):
        evaluate_first_stage(pixels, metrics=[])
    variables = jax.tree.map(np.array, files.load_first_stage(workdir, toy()))
    variables["params"]["post_quant_conv"]["bias"][:] = np.nan
    files.save_model(pixels, toy(), {"first_stage": variables})
    with pytest.raises(UserError, match="not finite"):
        evaluate_first_stage(pixels, metrics=[], num_images=1)


def test_command(workdir, tmp_path):
    out = tmp_path / "deep" / "out"
    done = command(
        "evaluate", f"--workdir={workdir}", "--metrics=psnr,ssim", "--num_images=10",
        "--split=train[90%:]", f"--out={out}",
    )  # fmt: skip
    assert "10 images of 16x16 (emoji, train[90%:])" in done.stdout
    assert sorted(path.name for path in out.iterdir()) == ["metrics.json", "reconstructions.png"]
    record = json.loads((out / "metrics.json").read_text())
    line = next(line for line in done.stdout.splitlines() if line.startswith("  psnr"))
    assert line.split()[1:] == [f"{record['reconstruction']['psnr']:.4f}", "dB"]
    assert Image.open(out / "reconstructions.png").size == (8 * 20 + 4, 3 * 16 + 8)
    # The same from Python, on eight devices instead of one; a level may round the other way.
    _, again = evaluate_first_stage(
        workdir, metrics=("psnr", "ssim"), num_images=10, split="train[90%:]"
    )
    for name, value in again["reconstruction"].items():
        np.testing.assert_allclose(record["reconstruction"][name], value, rtol=1e-4, err_msg=name)


def test_a_bad_command_gets_one_clear_line():
    done = command("evaluate", "--workdir=/nowhere", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: /nowhere is no workdir") and done.stderr.count("\n") == 1


# -- while it trains --------------------------------------------------------------------------


def test_networks_are_loaded_once_and_shared(monkeypatch, fetched):
    loaded = []
    monkeypatch.setattr(judges, "load_lpips", lambda path: loaded.append(path) or {"a": 1})
    changes = {"first_stage.perceptual_weight": 1.0, "first_stage.eval.metrics": ("psnr", "lpips")}
    found = first_stage_judges(toy(**{**changes, "first_stage.train.picture_every": 0}), None)
    assert found.networks == {"lpips": {"a": 1}} and loaded == [""]
    monkeypatch.setattr(judges, "measure_batch", lambda *args: None)
    found = first_stage_judges(toy(**changes), open_source("emoji"))
    assert found.networks == {"lpips": {"a": 1}} and loaded == ["", ""]


def test_the_random_lpips_of_the_loss_is_also_the_metric():
    changes = {"first_stage.perceptual_weight": 1.0, "first_stage.lpips": "random"}
    alone = first_stage_judges(toy(**changes), open_source("emoji")).networks
    both = toy(**changes, **{"first_stage.eval.metrics": ("lpips",)})
    both = first_stage_judges(both, open_source("emoji")).networks
    assert both.keys() == {"lpips"}
    jax.tree.map(np.testing.assert_array_equal, alone, both)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"eval.metrics": ("psnr", "lpips")},
            r"run `python -m ldm_jax.weights fetch lpips`, or leave 'lpips' out of "
            r"config.first_stage.eval.metrics",
        ),
        (
            {"eval.metrics": ("rfid",)},
            r"fetch inception`, or leave 'rfid' out of config.first_stage.eval.metrics",
        ),
        ({"perceptual_weight": 1.0}, "fetch lpips`$"),
        ({"eval.split": "test"}, "the emoji set has no split 'test'"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_written(changes, message, tmp_path):
    config = toy(**{f"first_stage.{key}": value for key, value in changes.items()})
    with pytest.raises(UserError, match=message):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_metrics_that_the_images_do_not_allow_are_refused(monkeypatch):
    source = open_source("emoji")
    with pytest.raises(UserError, match=r"eval\.metrics: SSIM needs images of at least 11x11"):
        first_stage_judges(toy(**{"data.resolution": 8}), source)
    monkeypatch.setattr(judges, "load_inception", dict)
    config = toy(**{"first_stage.eval.metrics": ("rfid",), "first_stage.eval.images": 1})
    with pytest.raises(UserError, match="'rfid', which needs two images"):
        first_stage_judges(config, source)


def test_training_writes_grids_and_metrics_of_held_out_images(tmp_path, monkeypatch, capsys):
    def init(key):
        params = {"first_stage": untrained(config)["params"]}
        return TrainState(jnp.int32(0), params, {}, {})

    def step(state, frozen, batch, key):  # each brightens what is decoded
        params = state.params["first_stage"]
        decoder = params["decoder"]
        out = decoder["conv_out"] | {"bias": decoder["conv_out"]["bias"] + 0.1}
        params = params | {"decoder": decoder | {"conv_out": out}}
        new = state.replace(step=state.step + 1, params={"first_stage": params})
        return new, {"loss": batch["image"].mean()}

    monkeypatch.setattr("ldm_jax.run.first_stage_functions", lambda config: (init, step))
    config = toy(
        **{
            "data.split": "train[:90%]",
            "first_stage.eval.split": "train[90%:]",
            "first_stage.eval.metrics": ("psnr", "lpips"),
            "first_stage.lpips": "random",
        }
    )
    run(config, tmp_path)
    said = capsys.readouterr().out
    directory = tmp_path / "first_stage"
    shown = sorted((directory / "reconstructions").iterdir())
    assert [path.name for path in shown] == ["step_0000002.png", "step_0000003.png"]
    held_out = open_source("emoji", split="train[90%:]")
    first = np.asarray(Image.fromarray(held_out[0]["image"]).resize((16, 16), 3))
    np.testing.assert_array_equal(np.asarray(Image.open(shown[0]))[4:20, 4:20], first)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "eval_psnr" in row]
    assert [row.pop("step") for row in rows] == [2, 3]
    names = ["eval_psnr", "eval_lpips", "eval_kl_per_element", "eval_mae", "eval_images"]
    assert list(rows[0]) == names and rows[0]["eval_images"] == 11
    assert rows[0]["eval_psnr"] != rows[1]["eval_psnr"]
    assert f"first stage: step 3, eval_psnr {rows[1]['eval_psnr']:.4g}, eval_lpips" in said
    assert "note:" not in said
    # What is stored in the end is what was evaluated last, with its latents scaled.
    _, record = evaluate_first_stage(tmp_path, num_images=11, metrics=("psnr",))
    assert record["split"] == "train[90%:]"
    psnr_stored = record["reconstruction"]["psnr"]
    np.testing.assert_allclose(psnr_stored, rows[1]["eval_psnr"], rtol=1e-4)


def test_held_out_images_that_are_trained_on_are_noticed(capsys):
    config = toy(**{"first_stage.eval.split": "train[90%:]"})
    first_stage_judges(config, open_source("emoji", split="train[:95%]"))
    assert "note: 92 of the 185 images of config.first_stage.eval.split" in capsys.readouterr().out
