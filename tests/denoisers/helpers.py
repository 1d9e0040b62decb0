"""Inputs and weights of tiny denoisers."""

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ldm_jax.types import Condition


def normal(seed: int, *shape: int) -> np.ndarray:
    """Standard normal float32 numbers."""
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def randomised(net: nn.Module, x: np.ndarray, t: np.ndarray, cond: Condition) -> dict:
    """Params of the net with nothing left at zero, so that the output depends on all of it."""
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, t, cond)["params"]
    rng, flat = np.random.RandomState(0), flatten_dict(shapes)
    for path, shape in flat.items():
        # Kernels of three axes are those of repeated blocks.
        inputs = shape.shape[1:-1] if len(shape.shape) == 3 else shape.shape[:-1]
        spread = 1 / np.sqrt(np.prod(inputs)) if path[-1] == "kernel" else 0.1
        value = spread * rng.standard_normal(shape.shape) + (path[-1] == "scale")
        flat[path] = value.astype(shape.dtype)
    return unflatten_dict(flat)
