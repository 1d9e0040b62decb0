"""The likelihood of held-out images: the command and its record, on untrained models."""

import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import command
from golden_utils import quick_jit

from ldm_jax import config as config_lib
from ldm_jax import likelihoods
from ldm_jax import workdir as files
from ldm_jax.diffusion.schedule import make_schedule
from ldm_jax.errors import UserError
from ldm_jax.first_stage.identity import Identity
from ldm_jax.likelihoods import Request, evaluate_likelihood
from ldm_jax.records import write_record
from ldm_jax.training.steps import diffusion_functions

# Of every kind that needs something made for it: maps, small images, holes, a vector.
CONDITIONS = ("label", "segmentation", "low_res", "noise_level", "inpainting")


def toy(*conditioners, **changes):
    c = config_lib.get_config()
    fields = tuple(f for name in conditioners for f in config_lib.FIELDS[name])
    c.data.update(source="scenes", split="train[:300]", resolution=32, flip=False, fields=fields)
    c.data.threads = 2
    c.data.low_res.noise = 0.2 if "noise_level" in conditioners else 0.0
    c.conditioners = conditioners
    c.first_stage.update(kind="kl", width=8, mult=(1,), depth=1, patch=4, norm_groups=8)
    c.first_stage.update(mid_attn=False, z_channels=3, channels=3)
    c.first_stage.eval.split = "train[300:600]"
    c.denoiser.update(kind="dit", width=32, depth=1, num_heads=2)  # the quickest to compile
    c.label.update(num_classes=6, width=32, slot="vector")
    c.segmentation.update(num_classes=7, stages=2)
    c.sample.batch_size = 8
    c.update_from_flattened_dict(changes)
    return config_lib.check(c)


def save(root, config, scale=1.0):
    """A workdir of a model that nobody trained."""
    random = np.random.RandomState(0)
    small = lambda x: (0.1 * random.standard_normal(x.shape)).astype(np.float32)  # noqa: E731
    shapes = jax.eval_shape(diffusion_functions(config)[0], jax.random.key(0)).params
    weights = jax.tree.map(small, shapes)
    weights["first_stage"] = jax.tree.map(small, files.abstract_first_stage(config))
    channels = config_lib.latent_channels(config)
    weights["first_stage"]["latents"] = {
        "shift": np.zeros(channels, np.float32),
        "scale": np.full(channels, scale, np.float32),
    }
    files.save_model(root, config, weights)
    return root


def test_the_command_and_its_record(tmp_path):
    root = save(tmp_path / "run", toy(*CONDITIONS), scale=0.5)
    (root / "evaluation").mkdir()
    (root / "evaluation" / "metrics.json").write_text('{"condition": 1, "resolution": 32}')
    done = command(
        "evaluate", f"--workdir={root}", "--of=likelihood", "--num_images=3", "--steps=4",
        "--seed=5", "--batch_size=2",
    )  # fmt: skip
    record = json.loads((root / "evaluation" / "metrics.json").read_text())
    assert record["condition"] == 1 and record["resolution"] == 32
    found = record["likelihood"]
    ode, vlb = found.pop("ode"), found.pop("vlb")
    assert found == {
        "of": "latents",
        "shape": [8, 8, 3],
        "log2_scale": -1,
        "num_images": 3,
        "source": "scenes",
        "split": "train[300:600]",
        "where": "",
        "seed": 5,
        "checkpoint_step": 0,
        "notes": [],
    }
    assert ode["steps"] == 4 and ode["standard_error"] > 0
    np.testing.assert_allclose(ode["noise"], np.sqrt(0.0015 / 0.9985), rtol=1e-6)
    total = vlb["prior"] + vlb["kl"] + vlb["decoder"]
    np.testing.assert_allclose(vlb["bits_per_dim"], total, rtol=1e-9)
    assert (vlb["calls"], vlb["variance"]) == (4, "beta") and vlb["kl"] > 0
    first, *lines = done.stdout.splitlines()
    assert first == (
        "3 images (scenes, train[300:600]), step 0, seed 5: bits per dimension of latents (8x8x3)"
    )
    assert lines[0].split()[:2] == ["ode", f"{ode['bits_per_dim']:.4f}"]
    assert [line.split()[0] for line in lines[1:5]] == ["vlb", "prior", "kl", "decoder"]
    assert lines[5].startswith("metrics.json is in")
    # The same from Python, on eight devices, with another batch size.
    again = evaluate_likelihood(root, Request(num_images=3, seed=5, steps=4))
    for name, values in (("ode", ode), ("vlb", vlb)):
        for key in ("bits_per_dim", "standard_error"):
            np.testing.assert_allclose(again[name][key], values[key], rtol=1e-4)
    # A later evaluation of the first stage leaves it there.
    write_record(root / "evaluation" / "metrics.json", {"resolution": 64})
    kept = json.loads((root / "evaluation" / "metrics.json").read_text())
    assert list(kept) == ["resolution", "condition", "likelihood"] and kept["resolution"] == 64


@pytest.fixture
def stub(monkeypatch):
    """What would be measured, without doing it: (inputs, batch_size) of each call."""
    calls = []

    def in_batches(program, variables, inputs, shared, batch_size, mesh):
        calls.append((inputs, batch_size))
        return np.random.RandomState(0).standard_normal((len(inputs["seeds"]), 1))

    monkeypatch.setattr(likelihoods, "in_batches", in_batches)
    return calls


def test_other_data_seeds_and_training_images(tmp_path, capsys, stub):
    root = save(tmp_path / "run", toy("label", **{"diffusion.schedule": "log_snr"}))
    settings = dict(num_images=3, steps=2)
    found = evaluate_likelihood(root, Request(seed=7, batch_size=5, **settings))
    assert "vlb" not in found and found["ode"]["noise"] == pytest.approx(0.002)
    inputs, batch_size = stub[0]
    assert inputs["seeds"].tolist() == [7, 8, 9] and batch_size == 5
    assert inputs["image"].shape == (3, 32, 32, 3) and inputs["fields"]["label"].shape == (3,)
    assert "note" not in capsys.readouterr().out
    trained = evaluate_likelihood(root, Request(split="train[:300]", **settings))
    assert trained["split"] == "train[:300]" and stub[1][1] == 8
    assert trained["notes"][0].startswith("3 of the 3 images are trained on: --split or")
    assert trained["notes"][0] in capsys.readouterr().out
    root = save(tmp_path / "other", toy(**{"diffusion.schedule": "log_snr"}))
    emoji = evaluate_likelihood(root, Request(source="emoji", **settings))
    assert (emoji["source"], emoji["split"], emoji["notes"]) == ("emoji", "train", [])
    assert stub[2][0]["fields"] is None


@pytest.mark.parametrize("kind", ["identity", "kl"])
def test_the_figures_of_a_model_of_unit_gaussians(kind):
    """Where the output is v = 0, the ODE stands still: its density is N(0, 1) at every level."""
    config = toy(**{"diffusion.predict": "v", "first_stage.kind": kind})
    image = np.random.RandomState(1).randint(1, 255, (8, 6, 6, 3)).astype(np.uint8)
    shift, scale = np.float32([0.1, 0.0, -0.2]), np.float32([2.0, 0.5, 1.0])
    networks = SimpleNamespace(
        config=config,
        first_stage=Identity(),  # of which 'kl' has the latents
        denoise=lambda variables, z_t, t, cond: jnp.zeros_like(z_t),
    )
    batch = {"image": image, "seeds": np.arange(8, dtype=np.uint32), "fields": None}
    variables = {"first_stage": {"latents": {"shift": shift, "scale": scale}}}
    process = make_schedule()
    measure = functools.partial(likelihoods.measure_batch, networks, process, 999)
    found = np.asarray(quick_jit(measure)(variables, batch), np.float64)
    mean, std = shift.astype(np.float64), 1 / scale.astype(np.float64)
    scaled = (image / 127.5 - 1 - mean) / std
    exact = 0.5 * scaled**2 / np.log(2) + np.log2(std * np.sqrt(2 * np.pi))
    exact = exact.mean((1, 2, 3)) + (np.log2(127.5) if kind == "identity" else 0)
    # The first level has 0.0015 of noise, and pixels are spread over their level.
    np.testing.assert_allclose(found[:, 0], exact, atol=5e-3, rtol=0)
    # One draw of noise for each of 1000 time steps and of 108 dimensions.
    gap = found[:, 1:].sum(1) - exact
    assert abs(gap.mean()) < 3 * gap.std(ddof=1) / np.sqrt(8) < 0.2, gap


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(steps=0), "--steps is 0, but must be at least 1"),
        (dict(num_images=1), r"1 images are too few \(--num_images, --split=train\[300:600\]\)"),
        (dict(split="tset"), "no split 'tset'"),
        (dict(seed=-1), "seeds must lie in 0 to"),
        (dict(batch_size=-1), "batch size is -1"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(tmp_path, changes, message):
    root = save(tmp_path / "run", toy())
    with pytest.raises(UserError, match=message):
        evaluate_likelihood(root, Request(**{"num_images": 2, "steps": 1} | changes))


def test_models_without_a_part_or_with_nans_are_refused(tmp_path):
    config = toy(**{"train.steps": 0})
    variables = jax.tree.map(
        lambda x: np.ones(x.shape, np.float32), files.abstract_first_stage(config)
    )
    files.save_model(tmp_path / "alone", config, {"first_stage": variables})
    with pytest.raises(UserError, match="no weights of its denoiser"):
        evaluate_likelihood(tmp_path / "alone", Request())
    unet = toy(**{"denoiser.kind": "unet", "denoiser.mult": (1,), "denoiser.attn_downsample": ()})
    root = save(tmp_path / "nan", unet, scale=np.nan)
    with pytest.raises(UserError, match="not finite: the model seems to hold NaNs"):
        evaluate_likelihood(root, Request(num_images=2, steps=1))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--of=likelihood", "--metrics=psnr"],
            "--metrics is of --of=reconstruction or samples: leave",
        ),
        (
            ["--of=likelihood", "--sampler=ddim"],
            "--sampler is of --of=condition or memorisation or samples: leave",
        ),
        (["--seed=3"], "--seed is of --of=condition or likelihood or memorisation or samples: "),
    ],
)
def test_bad_commands_get_one_clear_line(args, message):
    done = command("evaluate", "--workdir=/nowhere", *args, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert message in done.stderr
