"""The autoencoder loss against NumPy."""

import numpy as np
import pytest

from ldm_jax.errors import UserError
from ldm_jax.first_stage.losses import autoencoder_loss

RNG = np.random.RandomState(0)
IMAGES = RNG.uniform(-1, 1, (3, 8, 8, 3)).astype(np.float32)
RECONSTRUCTION = RNG.uniform(-1, 1, (3, 8, 8, 3)).astype(np.float32)
LATENTS = np.zeros((3, 2, 2, 4), np.float32)
DIFFERENCE = RECONSTRUCTION.astype(np.float64) - IMAGES
POWER = {"l1": 1, "l2": 2}


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_kl_sums_over_an_example(loss):
    aux = {"kl": np.array([3.0, 5.0, 7.0], np.float32), "latents": LATENTS}
    total, metrics = autoencoder_loss(
        RECONSTRUCTION, IMAGES, aux, kind="kl", loss=loss, kl_weight=0.1
    )
    reconstruction = (np.abs(DIFFERENCE) ** POWER[loss]).sum() / 3
    np.testing.assert_allclose(total, reconstruction + 0.1 * 5, rtol=1e-5)
    np.testing.assert_allclose(metrics["reconstruction"], reconstruction, rtol=1e-5)
    np.testing.assert_allclose(metrics["reconstruction_mae"], np.abs(DIFFERENCE).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["kl_per_element"], 5 / 16)


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_vq_averages_over_all_elements(loss):
    counts = np.array([6.0, 0.0, 6.0, 0.0], np.float32)
    aux = {"codebook": np.array([1.0, 2.0, 6.0], np.float32), "code_counts": counts}
    total, metrics = autoencoder_loss(
        RECONSTRUCTION, IMAGES, aux, kind="vq", loss=loss, codebook_weight=0.5
    )
    reconstruction = (np.abs(DIFFERENCE) ** POWER[loss]).mean()
    np.testing.assert_allclose(total, reconstruction + 0.5 * 3, rtol=1e-5)
    np.testing.assert_allclose(metrics["reconstruction_mae"], np.abs(DIFFERENCE).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["code_usage"], 0.5)
    np.testing.assert_allclose(metrics["code_perplexity"], 2.0, rtol=1e-5)


@pytest.mark.parametrize(("kind", "loss"), [("kl", "l3"), ("identity", "l1")])
def test_unknown_names_are_refused(kind, loss):
    with pytest.raises(UserError):
        autoencoder_loss(RECONSTRUCTION, IMAGES, {}, kind=kind, loss=loss)
