"""Small networks in place of Inception and DINOv2, on the same way through the package."""

import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import extractors
from ldm_jax.errors import UserError
from ldm_jax.metrics.features import make_extractor

WIDTHS = {"pool": 6, "logits": 4, "spatial": 5}


def features(kind, outputs, variables, images):
    """Of images (B, 8, 8, 3) uint8, in float32."""
    x = images.reshape(len(images), -1).astype(jnp.float32) / 255
    return {name: jnp.tanh(x @ variables[name]) for name in outputs}


def load(kind, *, mesh, resize="pytorch", path="", outputs=("pool", "logits", "spatial")):
    if kind == "dino" and not path:
        raise UserError("no weights")
    random = np.random.RandomState(len(kind))
    weights = {n: random.standard_normal((192, w)) / 8 for n, w in WIDTHS.items()}
    weights = jax.tree.map(np.float32, weights)
    digest = hashlib.sha256(f"{kind} {resize}".encode()).hexdigest()
    apply = functools.partial(features, kind, outputs)
    widths = {name: WIDTHS[name] for name in outputs}
    return make_extractor(kind, digest, resize, widths, apply, weights, mesh)


def install():
    extractors.load_extractor = load
