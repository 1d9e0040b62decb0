"""Features come from the right places of the network, whatever the batches and the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import quick_jit
from jax.sharding import Mesh
from PIL import Image

from ldm_jax.errors import UserError
from ldm_jax.metrics.features import (
    check_images,
    inception_extractor,
    make_extractor,
    prepare_inception,
)
from ldm_jax.metrics.inception import Inception


def mesh(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), ("data",))


def levels(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)


@pytest.fixture(scope="module")
def weights() -> dict:
    """Random ones that keep the size of what goes through them."""
    like = jax.eval_shape(Inception().init, jax.random.key(0), jnp.zeros((1, 299, 299, 3)))
    random = np.random.RandomState(1)

    def make(path, leaf):
        name = path[-1].key
        if name != "kernel":
            return np.full(leaf.shape, 1.0 if name in ("var", "scale") else 0.01, np.float32)
        kernel = random.standard_normal(leaf.shape).astype(np.float32)
        return kernel * np.float32(np.sqrt(2 / np.prod(leaf.shape[:-1])))

    return jax.tree_util.tree_map_with_path(make, like)


def test_outputs_of_inception(weights):
    images = levels(1, 40, 50, 3)
    extractor = inception_extractor(weights, resize="tensorflow", mesh=mesh(1))
    found = extractor.extract(images)
    assert extractor.outputs == {"pool": 2048, "logits": 1008, "spatial": 2023}
    assert {name: x.shape for name, x in found.items()} == {
        name: (1, width) for name, width in extractor.outputs.items()
    }
    kernel = weights["params"]["fc"]["kernel"]  # without the bias, which is not 0
    np.testing.assert_allclose(found["logits"], found["pool"] @ kernel, rtol=1e-4, atol=1e-4)

    @quick_jit  # without the later part of the network, whose outputs nobody asks for
    def sixth_block(variables, images):
        prepared = prepare_inception(images, "tensorflow")
        seen = Inception().apply(variables, prepared, capture_intermediates=_is_sixth)[1]
        return seen["intermediates"]["Mixed_6d"]["__call__"][0]

    block = np.asarray(sixth_block(weights, images))
    assert block.shape == (1, 17, 17, 768)
    want = block[..., :7].reshape(1, -1)  # its first branch comes first
    assert want.std() > 0.1
    # Two programs: sums in another order.
    np.testing.assert_allclose(found["spatial"], want, rtol=0, atol=1e-4 * want.std())


def _is_sixth(module, _) -> bool:
    return module.path == ("Mixed_6d",)


def test_what_a_digest_says(weights):
    def digest(variables, resize="pytorch"):
        return inception_extractor(variables, resize=resize, mesh=mesh(1), outputs=("pool",)).digest

    one = digest(weights)
    assert len(one) == 64 and digest(weights) == one != digest(weights, "tensorflow")
    # The last layer is not among the features: weights without it are of the same network.
    rest = {name: layer for name, layer in weights["params"].items() if name != "fc"}
    assert digest({**weights, "params": rest}) == one
    kernel = rest["Conv2d_1a_3x3"]["conv"]["kernel"] + np.float32(1e-6)
    rest["Conv2d_1a_3x3"] = {**rest["Conv2d_1a_3x3"], "conv": {"kernel": kernel}}
    assert digest({**weights, "params": rest}) != one


def test_levels_as_the_networks_take_them():
    images = levels(1, 299, 299, 3)  # which no rule resizes
    for resize, want in [
        ("pytorch", images / 127.5 - 1),
        ("tensorflow", (images - 128.0) / 128),
        ("antialiased", (images - 128.0) / 128),
    ]:
        taken = 2 * np.asarray(prepare_inception(jnp.asarray(images), resize)) - 1
        np.testing.assert_allclose(taken, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(32, 45), (410, 620)])
def test_antialiased_is_the_bicubic_of_pillow(size):
    image = levels(*size, 3)
    image[:, :10], image[:, 10:20] = 0, 255  # at whose edge the cubic overshoots
    want = [
        np.asarray(Image.fromarray(c.astype(np.float32)).resize((299, 299), Image.BICUBIC))
        for c in np.moveaxis(image, -1, 0)
    ]
    want = np.stack(want, -1)
    assert want.min() < 0 and want.max() > 255
    want = np.clip(want, 0, 255)
    found = quick_jit(lambda x: prepare_inception(x, "antialiased") * 256)(image[None])[0]
    # Levels; sums in float32.
    np.testing.assert_allclose(found, want, rtol=0, atol=2e-4)


def toy(devices: int, per_device: int = 4, seen: list | None = None):
    def apply(variables, images):
        if seen is not None:
            seen.append(images.shape)
        means = images.astype(jnp.float32).mean((1, 2))
        return {"pool": means * variables["scale"], "first": images[:, 0, 0, :1] / 1.0}

    variables = {"scale": np.float32(2)}
    outputs = {"pool": 3, "first": 1}
    return make_extractor("toy", "0", "none", outputs, apply, variables, mesh(devices), per_device)


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("count", [0, 1, 3, 16, 53])
def test_the_number_of_images_and_devices_changes_nothing(devices, count):
    images = levels(count, 5, 6, 3)
    found = toy(devices).extract(images)
    assert {x.dtype for x in found.values()} == {np.dtype(np.float32)}
    np.testing.assert_allclose(found["pool"], 2 * images.mean((1, 2)).reshape(-1, 3), rtol=1e-6)
    np.testing.assert_array_equal(found["first"], images[:, 0, 0, :1])


def test_a_smaller_batch_needs_no_other_program():
    seen = []
    extractor = toy(1, seen=seen)
    for count in (4, 9, 1, 3):
        extractor.extract(levels(count, 5, 6, 3))
    assert seen == [(4, 5, 6, 3)]
    extractor.extract(levels(2, 8, 8, 3))
    assert seen == [(4, 5, 6, 3), (2, 8, 8, 3)]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 8, 8), np.uint8), "grey images must be repeated"),
        (np.zeros((2, 8, 8, 1), np.uint8), "grey images must be repeated"),
        (np.zeros((2, 8, 8, 4), np.uint8), "images with alpha on a background"),
        (np.zeros((8, 8, 3), np.float32), "grey images"),
        (np.zeros((2, 8, 8, 2), np.uint8), r"expected images \(B, H, W, 3\), got \(2, 8, 8, 2\)"),
        (np.zeros((2, 8, 8, 3), np.float32), "uint8, 0 to 255.*got float32"),
        (
            [np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)],
            "not all of one size, but 8x8x3 and 8x9x3",
        ),
    ],
)
def test_images_that_are_no_batch_are_refused(images, message):
    for check in (check_images, toy(1).extract):
        with pytest.raises(UserError, match=message):
            check(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": "bicubic"}, "unknown resize rule 'bicubic'.*pytorch, tensorflow, antialiased"),
        ({"outputs": ("pool", "class")}, "no output 'class'"),
        ({}, "no class scores.*--from=pt_inception"),
    ],
)
def test_bad_choices_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        inception_extractor({"params": {}}, mesh=mesh(1), **options)
