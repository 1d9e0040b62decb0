"""Toy models that nobody trained, and what they are given: files and flags of `sample`."""

import jax
import numpy as np
from absl.testing import flagsaver
from PIL import Image

from ldm_jax import config as config_lib
from ldm_jax import sample_inputs
from ldm_jax import workdir as files
from ldm_jax.pipeline import Pipeline
from ldm_jax.training.steps import diffusion_functions

NOISE = np.random.RandomState(0)


def model(*conditioners, **changes):
    """A pipeline of 32x32 pixels and 8x8 latents with random weights."""
    c = config_lib.get_config()
    c.data.update(source="scenes", resolution=32, flip=False)
    c.data.fields = tuple(f for name in conditioners for f in config_lib.FIELDS[name])
    c.data.low_res.factor = 4
    c.conditioners = conditioners
    c.first_stage.update(kind="kl", width=8, mult=(1,), depth=1, patch=4, norm_groups=8)
    c.first_stage.update(mid_attn=False, z_channels=3, channels=3)
    c.denoiser.update(width=32, mult=(1,), depth=1, attn_downsample=())
    c.denoiser.cross_attention = bool({"layout", "text"} & set(conditioners))
    c.layout.update(vocab_size=401, width=32, depth=1, length=20, null=True)
    c.segmentation.update(num_classes=7, stages=2)
    c.sample.update(steps=2, batch_size=8)
    c.update_from_flattened_dict(changes)
    config = config_lib.check(c)
    random = lambda x: (0.1 * NOISE.standard_normal(x.shape)).astype(np.float32)  # noqa: E731
    shapes = jax.eval_shape(diffusion_functions(config)[0], jax.random.key(0)).params
    variables = jax.tree.map(random, shapes)
    variables["first_stage"] = jax.tree.map(random, files.abstract_first_stage(config))
    variables["first_stage"]["latents"] = {
        "shift": np.zeros(3, np.float32),
        "scale": np.ones(3, np.float32),
    }
    return Pipeline(config, variables, 0, ["animal", "bus", "cat"])


def save_untrained(root, config, unscaled=False, **about):
    """A workdir of a model with small random weights; `about` is for `files.save_model`."""
    random = np.random.RandomState(0)
    small = lambda x: (0.1 * random.standard_normal(x.shape)).astype(np.float32)  # noqa: E731
    shapes = jax.eval_shape(diffusion_functions(config)[0], jax.random.key(0)).params
    weights = jax.tree.map(small, shapes)
    weights["first_stage"] = jax.tree.map(small, files.abstract_first_stage(config))
    if unscaled:
        weights["first_stage"]["latents"] = {
            "shift": np.zeros(3, np.float32),
            "scale": np.ones(3, np.float32),
        }
    files.save_model(root, config, weights, **about)
    return root


def read(pipe, count=2, **given):
    with flagsaver.flagsaver(**given):
        return sample_inputs.read_inputs(pipe, count)


def save(path, array):
    Image.fromarray(array).save(path)
    return str(path)


def pixels(*shape):
    return NOISE.randint(0, 256, shape).astype(np.uint8)
