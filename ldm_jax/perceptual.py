"""LPIPS of sets of 8-bit images, batch by batch, where its weights are at hand."""

from __future__ import annotations

import functools

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax import tensors
from ldm_jax.errors import UserError
from ldm_jax.first_stage.lpips import LPIPS, SMALLEST
from ldm_jax.images import to_float
from ldm_jax.metrics.judge_networks import predict
from ldm_jax.weights import load_lpips


class Perceptual:
    """LPIPS with given parameters: `Perceptual(params)(images, others)`."""

    def __init__(self, params: dict) -> None:
        self._params = params

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the parameters."""
        return tensors.digest(self._params)

    def __call__(self, images: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Distances of two sets of images (N, H, W, 3) uint8: (N,) float32."""
        return self._run("__call__", images, others)

    def maps(self, images: np.ndarray, others: np.ndarray) -> np.ndarray:
        """The same at each place: (N, H, W) float32; see `LPIPS.distance_map`."""
        return self._run("distance_map", images, others)

    def _run(self, method: str, images: np.ndarray, others: np.ndarray) -> np.ndarray:
        apply = functools.partial(LPIPS().apply, {"params": self._params}, method=method)
        with jax.default_matmul_precision("highest"):
            return predict(lambda a, b: apply(a, to_float(b)), images, others)


def load_perceptual(config: ConfigDict) -> tuple[Perceptual | None, str]:
    """Returns LPIPS for images of the config's size, or None and why there is none."""
    if config.data.resolution < SMALLEST:
        return None, f"no LPIPS: it needs images of at least {SMALLEST}x{SMALLEST}"
    try:
        return Perceptual(load_lpips()), ""
    except UserError as error:
        return None, f"no LPIPS: {error}"
