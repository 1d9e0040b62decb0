import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.conditioners.inpainting import Inpainting
from ldm_jax.errors import UserError


def test_latents_then_the_shrunk_mask():
    latents = np.random.RandomState(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    mask = -np.ones((2, 12, 8, 1), np.float32)
    mask[0, 4, 2] = 1  # the pixel that latent (1, 1) is nearest to
    mask[1, 5:8, 3] = 1  # none of these is one
    batch = {"masked_latents": jnp.asarray(latents), "mask": jnp.asarray(mask)}
    variables = Inpainting().init(jax.random.key(0), batch)
    assert not jax.tree.leaves(variables)
    cond = Inpainting().apply(variables, batch)
    assert cond.concat.shape == (2, 3, 4, 6) and len(jax.tree.leaves(cond)) == 1
    np.testing.assert_array_equal(cond.concat[..., :5], latents)
    want = -np.ones((2, 3, 4))
    want[0, 1, 1] = 1
    np.testing.assert_array_equal(cond.concat[..., 5], want)


def test_an_uneven_ratio_is_shrunk_as_pytorch_does():
    torch = pytest.importorskip("torch")
    mask = np.where(np.random.RandomState(0).rand(1, 13, 10, 1) < 0.5, -1, 1).astype(np.float32)
    want = torch.nn.functional.interpolate(torch.tensor(mask[..., 0][:, None]), size=(5, 4))
    batch = {"masked_latents": jnp.zeros((1, 5, 4, 3)), "mask": jnp.asarray(mask)}
    np.testing.assert_array_equal(Inpainting().apply({}, batch).concat[..., 3], want[:, 0])


def test_no_null():
    with pytest.raises(UserError, match="guidance_scale 1"):
        Inpainting().apply({}, 2, method="null")
