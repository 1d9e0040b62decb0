"""Training on images of several sizes, and what the config refuses of it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data.helpers import picture, refuses, write_tar

from ldm_jax import config as config_lib
from ldm_jax import run as run_lib
from ldm_jax.data.buckets import make_buckets
from ldm_jax.data.pipeline import Batches
from ldm_jax.data.sources import open_source
from ldm_jax.data.transforms import ImageTransform
from ldm_jax.training import latents as latents_lib
from ldm_jax.training.classifier_steps import classifier_functions
from ldm_jax.training.interrupt import Interrupts
from ldm_jax.training.loop import fit
from ldm_jax.training.sharding import make_mesh
from ldm_jax.training.stage import Stage
from ldm_jax.training.state import TrainState
from ldm_jax.training.steps import diffusion_functions

BUCKETS = ((16, 16), (16, 32))


def tiny(source="emoji", kind="unet"):
    config = config_lib.get_config()
    config.data.update(source=source, resolution=16, buckets=BUCKETS, flip=False, threads=2)
    config.first_stage.kind = "identity"
    config.denoiser.update(kind=kind, width=32, depth=1, num_heads=2)
    if kind == "unet":
        config.denoiser.update(mult=(1,), attn_downsample=())
    config.train.update(batch_size=8, steps=4, picture_every=0, log_every=1, checkpoint_every=2)
    config.sample.update(steps=1, num_samples=8, batch_size=8)
    return config


@pytest.fixture
def spec(tmp_path, monkeypatch):
    """A tar of eight images of 16x16 and eight of 16x32 pixels, each of one grey level."""
    monkeypatch.setenv("HOME", str(tmp_path))
    sizes = [(16, 16), (32, 16)] * 8  # width x height
    members = {f"{i:02d}.png": picture(10 * i, size=size) for i, size in enumerate(sizes)}
    members |= {f"{i:02d}.cls": str(i % 2) for i in range(16)}
    return f"tar:{write_tar(tmp_path / 'a.tar', members)}"


def test_the_loop_compiles_each_size_once_and_goes_on_from_a_checkpoint(spec, tmp_path):
    source, shapes = open_source(spec), []
    buckets = make_buckets(source, BUCKETS, 2)

    def init(key):
        return TrainState(jnp.int32(0), {"part": {"w": jnp.zeros(1)}}, {}, {})

    def step(state, frozen, batch, key):
        shapes.append(batch["image"].shape)
        # Of the order of batches and of what is in them; whole numbers, so that nothing is rounded
        value = jnp.sum(batch["index"]) + 7 * (batch["image"].shape[2] > 16)
        w = 3 * state.params["part"]["w"] % 10007 + value
        return state.replace(step=state.step + 1, params={"part": {"w": w}}), {"loss": value * 1.0}

    def train(folder, steps):
        block = config_lib.get_config().train.copy_and_resolve_references()
        block.update(batch_size=8, steps=steps, log_every=10, checkpoint_every=3, picture_every=0)
        stage = Stage("toy", folder, block, init, step, {}, None)

        def batches(start):
            options = {"batch_size": 8, "seed": 0, "start_step": start, "buckets": buckets}
            return Batches(source, ImageTransform(16, flip=False), **options)

        state = fit(stage, batches, jax.random.key(0), make_mesh(), Interrupts())
        return float(state.params["part"]["w"][0])

    straight = train(tmp_path / "straight", 12)
    assert sorted(shapes) == [(8, *size, 3) for size in BUCKETS]
    train(tmp_path / "stopped", 7)
    assert train(tmp_path / "stopped", 12) == straight > 0


@pytest.mark.parametrize(
    ("kind", "field"), [("unet", "image"), ("dit", "moments"), ("classifier", "image")]
)
def test_networks_take_any_size_with_the_same_weights(kind, field):
    config = tiny(kind="unet" if kind == "classifier" else kind)
    config.classifier.update(width=32, mult=(1, 2), depth=1)
    functions = classifier_functions if kind == "classifier" else diffusion_functions
    init, step = functions(config)
    state = jax.eval_shape(init, jax.random.key(0))
    frozen = {"latents": {"shift": jnp.zeros(3), "scale": jnp.ones(3)}}
    for size in BUCKETS:
        dtype = np.uint8 if field == "image" else np.float32
        batch = {field: jnp.zeros((8, *size, 3), dtype), "label": jnp.zeros(8, jnp.int32)}
        new, metrics = jax.eval_shape(step, state, frozen, batch, jax.random.key(1))
        assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
        assert metrics["loss"].shape == ()


def test_images_are_encoded_at_the_size_of_their_bucket(spec):
    config = tiny(spec)
    config.data.update(flip=True, fields=("label",))
    config.label.num_classes = 2
    source = open_source(spec)
    encode = lambda image: image[..., :1].astype(np.float32)  # noqa: E731
    buckets = make_buckets(source, BUCKETS, 2)
    held = latents_lib.encode_source(config, source, encode, lambda: None, buckets)
    for i in range(16):
        moments = held[i]["moments"]
        assert moments.shape == (2, *BUCKETS[i % 2], 1) and (moments == 10 * i).all()
        assert held[i]["label"] == i % 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_a_run_on_two_sizes(kind, spec, tmp_path, monkeypatch, capsys):
    config, shapes = tiny(spec, kind), []
    config.data.cache_latents = kind == "dit"

    def counting(config):
        init, step = diffusion_functions(config)

        def traced(state, frozen, batch, key):
            shapes.append(batch.get("image", batch.get("moments")).shape)
            return step(state, frozen, batch, key)

        return init, traced

    monkeypatch.setattr(run_lib, "diffusion_functions", counting)
    run_lib.run(config, tmp_path / "run")
    assert sorted(shape[:3] for shape in shapes) == [(8, *size) for size in BUCKETS]
    assert "buckets (height x width): 16x16 8 images, 16x32 8 images" in capsys.readouterr().out
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 4 and np.isfinite(losses).all()


class TestChecks:
    def test_sizes(self):
        config = config_lib.check(tiny())
        again = config_lib.from_json(config_lib.to_json(config))
        assert again.data.buckets == BUCKETS and not config_lib.differences(config, again)
        small = config_lib.check(config_lib.shrink(config))
        assert small.data.buckets == ((32, 32), (32, 64))
        for wrong in ((64, 64), ((64,),), ((16, 16), (16, 16)), ((0, 16),), (("a", "b"),)):
            config.data.buckets = wrong
            refuses(r"config.data.buckets is .* pairs \(height, width\)", config_lib.check, config)
        config.data.buckets = tuple((16, 1 + i) for i in range(65))
        refuses("has 65 sizes, each compiled by itself", config_lib.check, config)
        config.data.buckets = ((16, 16), (16, 18))
        config.denoiser.mult = (1, 2, 4)
        refuses(r"\(16, 18\), but sides must be multiples of 4", config_lib.check, config)

    def test_what_is_trained(self):
        config = tiny()
        config.data.update(fields=("low_res",), buckets=((16, 16), (16, 18)))
        config.conditioners = ("low_res",)
        refuses(r"multiples of 4, data.low_res.factor", config_lib.check, config)
        config.data.update(fields=("masked_image", "mask"), buckets=BUCKETS)
        config.conditioners = ("inpainting",)
        refuses("cannot be used with the field 'masked_image'", config_lib.check, config)
        config = tiny("latents:somewhere")
        refuses("data.source='latents:...'", config_lib.check, config)
