import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import load

from ldm_jax.conditioners.segmentation import SpatialRescaler, resize_matrix
from ldm_jax.convert.text import text_to_flax
from ldm_jax.errors import UserError

CLASSES = jnp.asarray(np.random.RandomState(0).randint(0, 5, (2, 12, 16)))


@pytest.mark.parametrize("case", [f"case{i}" for i in range(6)])
def test_fixture(case):
    golden = load("spatial_rescaler")
    config = golden.meta["config"][case]
    rescaler = SpatialRescaler(
        num_classes=config["in_channels"],
        channels=config.get("out_channels") or 0,
        stages=config["n_stages"],
        method=config.get("method", "bilinear"),
        scale=config.get("multiplier", 0.5),
        use_bias=config.get("bias", False),
    )
    names = [name for name in golden.arrays if name.startswith(f"{case}.channel_mapper")]
    weights = {name.removeprefix(f"{case}."): golden[name] for name in names}
    variables = {"params": text_to_flax(weights, rescaler, "compvis")}
    maps = jnp.asarray(golden.nhwc(f"{case}.in"))
    out = rescaler.apply(variables, maps, method="rescale")
    np.testing.assert_allclose(out, golden.nhwc(f"{case}.out"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [0, 3])
@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
def test_a_map_of_classes_is_one_hot(channels, method):
    rescaler = SpatialRescaler(5, channels, method=method, use_bias=True)
    variables = rescaler.init(jax.random.key(0), {"segmentation": CLASSES})
    cond = rescaler.apply(variables, {"segmentation": CLASSES})
    assert cond.concat.shape == (2, 3, 4, channels or 5) and len(jax.tree.leaves(cond)) == 1
    one_hot = jax.nn.one_hot(CLASSES, 5)
    want = rescaler.apply(variables, one_hot, method="rescale")
    np.testing.assert_allclose(cond.concat, want, atol=1e-6)


def test_published_size():
    rescaler = SpatialRescaler(num_classes=182, channels=3)
    params = rescaler.init(jax.random.key(0), {"segmentation": CLASSES})["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 546


def test_a_class_outside_the_range_is_not_clamped():
    rescaler = SpatialRescaler(5, 3)
    variables = rescaler.init(jax.random.key(0), {"segmentation": CLASSES})
    for bad in (5, -1):
        cond = rescaler.apply(variables, {"segmentation": CLASSES.at[0].set(bad)})
        assert np.isnan(cond.concat[0]).all() and np.isfinite(cond.concat[1]).all()


@pytest.mark.parametrize("method", ["bilinear", "bicubic", "nearest", "area"])
def test_resizing_keeps_a_constant(method):
    matrix = resize_matrix(11, 0.5, method)
    assert matrix.shape == (5, 11)
    np.testing.assert_allclose(matrix.sum(1), 1)


def test_refusals():
    with pytest.raises(UserError, match="bilinear, bicubic, nearest, area"):
        resize_matrix(4, 0.5, "lanczos")
    with pytest.raises(UserError, match="nothing is left"):
        SpatialRescaler(5, 3, stages=5).init(jax.random.key(0), {"segmentation": CLASSES})
    with pytest.raises(UserError, match="guidance_scale 1"):
        SpatialRescaler(5, 0).apply({}, 2, method="null")
