"""One image, whatever it is made together with and on however many devices."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks.reliability import toys
from ldm_jax import random
from ldm_jax import workdir as files
from ldm_jax.diffusion import samplers
from ldm_jax.pipeline import Pipeline
from ldm_jax.training.sharding import batch_parts, batch_sharding, gather, make_mesh, put
from ldm_jax.training.steps import diffusion_functions

SIZES = (1, 3, 8, 64)
DEVICES = (1, 2, 4, 8)


def weights(config: ConfigDict) -> dict[str, Any]:
    """Random weights, none of them zero, of a model that nobody trained."""
    draw = np.random.default_rng(0)
    noise = lambda x: (0.1 * draw.standard_normal(x.shape)).astype(np.float32)  # noqa: E731
    shapes = jax.eval_shape(diffusion_functions(config)[0], jax.random.key(0)).params
    found = jax.tree.map(noise, shapes)
    found["first_stage"] = jax.tree.map(noise, files.abstract_first_stage(config))
    channels = found["first_stage"]["latents"]["shift"].shape
    found["first_stage"]["latents"] = {
        "shift": np.zeros(channels, np.float32),
        "scale": np.ones(channels, np.float32),
    }
    return found


def noise(seeds: np.ndarray, shape: tuple[int, ...], size: int, devices: int) -> np.ndarray:
    """The noise (N, *shape) that images start from, drawn as in sampling: in batches of `size`
    seeds, over devices."""
    mesh = make_mesh(None, jax.devices()[:devices])
    size = -(-size // batch_parts(mesh)) * batch_parts(mesh)
    rows = np.arange(-(-len(seeds) // size) * size).clip(max=len(seeds) - 1).reshape(-1, size)
    draw = jax.jit(lambda s: samplers.initial_noise(random.seed_keys(s), shape))
    parts = [gather(draw(put(seeds[index], batch_sharding(mesh)))) for index in rows]
    return np.concatenate(parts)[: len(seeds)]


def measure(
    name: str,
    sizes: Sequence[int] = SIZES,
    devices: Sequence[int] = DEVICES,
    count: int = 64,
    steps: int = 10,
) -> dict[str, Any]:
    """Makes the same `count` images in batches of each size on each number of devices, in another
    order each time, and compares them with those of one batch on the first number of devices.

    Args:
        name: of `toys.toy`, which gets random weights.
        sizes: of the batches; with several devices, rounded up to a multiple.
        devices: how many take part.
        count: of images.
        steps: of the sampler, DDIM with fresh noise at each step and guidance.

    Returns:
        'noise_equal', 'largest_levels' (of 255), and the shares 'identical_pixels' and
        'identical_images', over all 'cases'.
    """
    config, order = toys.toy(name, 1), np.random.default_rng(1)
    variables, seeds = weights(config), np.arange(count, dtype=np.uint32)
    labels = seeds.astype(np.int32) % config.label.num_classes

    @functools.cache
    def pipe(number: int) -> Pipeline:
        return Pipeline(config, variables, 0, mesh=make_mesh(None, jax.devices()[:number]))

    def made(rows: np.ndarray, size: int, number: int) -> np.ndarray:
        condition = {"label": labels[rows]}
        sample = functools.partial(pipe(number).sample, steps=steps, eta=1.0, batch_size=size)
        return sample(seeds[rows], condition).astype(np.int32)

    everything, shape = np.arange(count), pipe(devices[0]).latent_shape
    want = made(everything, count, devices[0])
    want_noise = noise(seeds, shape, count, devices[0])
    equal, largest, same_pixels, same_images, cases = True, 0, [], [], 0
    for number in devices:
        for size in sizes:
            rows = order.permutation(count)
            difference = np.abs(made(rows, size, number) - want[rows])
            drawn = noise(seeds[rows], shape, size, number)
            equal &= drawn.tobytes() == want_noise[rows].tobytes()
            largest = max(largest, int(difference.max()))
            same_pixels.append((difference == 0).mean())
            same_images.append((difference.reshape(count, -1).max(1) == 0).mean())
            cases += 1
    return {
        "cases": cases,
        "images": count,
        "spread": float(want.std()),  # levels: they are no blank images
        "noise_equal": bool(equal),
        "largest_levels": largest,
        "identical_pixels": float(np.mean(same_pixels)),
        "identical_images": float(np.mean(same_images)),
    }
