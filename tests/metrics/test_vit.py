"""Image encoders against transformers, with the small random weights of tests/golden_towers."""

import pathlib

import jax
import numpy as np
import pytest
from golden_utils import quick_jit
from PIL import Image

from ldm_jax.convert.vision import load_tower
from ldm_jax.errors import UserError
from ldm_jax.metrics.vit import (
    VisionTransformer,
    interpolate_positions,
    resize_levels,
    tower_extractor,
)
from ldm_jax.training.sharding import make_mesh

FOLDERS = pathlib.Path(__file__).parents[1] / "golden_towers"
# Float32 in both, of values around 1. A wrong epsilon is seen from about 1e-4 on, as is a missing
# layer scale, another activation or table of positions.
TOLERANCE = 2e-5


def outputs(name):
    with np.load(FOLDERS / name / "outputs.npz") as stored:
        return dict(stored)


@pytest.mark.parametrize("name", ["dino", "dino_gated"])
def test_dino_is_that_of_transformers(name):
    want, tower = outputs(name), load_tower("dino", FOLDERS / name)
    module = tower.module.clone(position_offset=0.0)  # as transformers has it
    apply = quick_jit(module.apply)
    for key in ("pixels", "wide"):  # of the size of the table of positions, and of another
        found = apply({"params": tower.params}, want[key].transpose(0, 2, 3, 1))
        np.testing.assert_allclose(found, want[f"of_{key}"], rtol=0, atol=TOLERANCE, err_msg=key)


# From pixels of any size on, resized as published. One level of one pixel would be seen.
@pytest.mark.parametrize("name", ["dino", "dino_gated", "clip"])
def test_features_from_the_pixels_on(name):
    want, kind = outputs(name), name.partition("_")[0]
    extractor = tower_extractor(load_tower(kind, FOLDERS / name), make_mesh())
    found = extractor.extract(want["pictures"])
    assert list(found) == ["pool"]
    assert extractor.outputs == {"pool": want["features"].shape[1]}
    np.testing.assert_allclose(found["pool"], want["features"], rtol=0, atol=TOLERANCE)


def test_the_digest_is_of_weights_and_of_how_images_are_prepared():
    tower, mesh = load_tower("dino", FOLDERS / "dino"), make_mesh()
    other = tower._replace(params=jax.tree.map(lambda x: x * 2, tower.params))
    towers = [tower, other, tower._replace(crop=True), tower._replace(mean=(0.5, 0.5, 0.5))]
    towers.append(tower._replace(module=tower.module.clone(position_offset=0.0)))
    digests = [tower_extractor(one, mesh).digest for one in towers]
    assert len(set(digests)) == len(towers)
    assert tower_extractor(tower, mesh).digest == digests[0]


def test_positions_of_a_constant_table_stay_constant():
    table = np.full((5, 5, 2), 3.0, np.float32)
    found = interpolate_positions(table, 4, 7, 0.1)
    np.testing.assert_allclose(found, np.full((4, 7, 2), 3.0), rtol=1e-6)
    assert interpolate_positions(table, 5, 5, 0.1) is table


def test_images_without_a_whole_number_of_patches():
    module = VisionTransformer(8, 1, 2, 8, patch=4, grid=2)
    with pytest.raises(UserError, match="9x8 have no whole number of patches of 4"):
        jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 9, 8, 3), np.float32))


@pytest.mark.parametrize("size", [(7, 40), (40, 7), (30, 19), (12, 19)])
def test_levels_are_exactly_those_of_pillow(size):
    images = np.random.RandomState(0).randint(0, 256, (2, 12, 19, 3)).astype(np.uint8)
    found = quick_jit(resize_levels, static_argnums=(1, 2))(images, *size)
    bicubic, want = Image.Resampling.BICUBIC, []
    for image in images:  # the width first, which not every version does by itself
        wide = Image.fromarray(image).resize((size[1], 12), bicubic)
        want.append(np.asarray(wide.resize(size[::-1], bicubic)))
    np.testing.assert_array_equal(found, np.stack(want))
