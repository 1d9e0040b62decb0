"""The small networks that judge samples learn what can be told apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.metrics import judge_networks as networks

RNG = np.random.RandomState(0)


@pytest.fixture(scope="module")
def halves():
    """Images whose left or right half is bright: image, class, and map of the bright pixels."""
    classes = RNG.randint(0, 2, 64)
    bright = (np.arange(16)[None, :] >= 8) == (classes[:, None] == 1)
    maps = np.broadcast_to(bright[:, None, :], (64, 16, 16)).astype(np.int32)
    images = (60 + 120 * maps[..., None] + RNG.randint(0, 20, (64, 16, 16, 3))).astype(np.uint8)
    return images, classes, maps


def start(module, *arrays):
    arrays = [jnp.asarray(x[:1], jnp.float32) for x in arrays]
    return jax.jit(module.init)(jax.random.key(0), *arrays)["params"]


def test_a_classifier_learns(halves):
    images, classes, _ = halves
    module = networks.Classifier(2)

    def loss(params, batch, key):
        seen = networks.augment(batch["image"], key, shift=1)
        return networks.class_loss(module.apply({"params": params}, seen), batch["class"])

    arrays = {"image": images, "class": classes}
    params = networks.fit(loss, start(module, images), arrays, steps=12, batch_size=16)
    apply = lambda x: module.apply({"params": params}, x)  # noqa: E731
    assert (networks.predict(apply, images).argmax(-1) == classes).mean() > 0.9
    again = networks.fit(loss, start(module, images), arrays, steps=12, batch_size=16)
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_a_segmenter_learns(halves):
    images, _, maps = halves
    module = networks.Segmenter(2)

    def loss(params, batch, key):
        return networks.class_loss(module.apply({"params": params}, batch["image"]), batch["map"])

    arrays = {"image": images, "map": maps}
    params = networks.fit(loss, start(module, images), arrays, steps=12, batch_size=8)
    found = networks.predict(lambda x: module.apply({"params": params}, x), images)
    assert found.shape == (64, 16, 16, 2)
    assert (found.argmax(-1) == maps).mean() > 0.9


def test_a_dual_encoder_learns(halves):
    images, classes, _ = halves
    module, bags = networks.DualEncoder(), np.eye(3, dtype=np.float32)[classes]

    def loss(params, batch, key):
        found = module.apply({"params": params}, batch["image"], batch["words"])
        return networks.contrastive_loss(*found)

    arrays = {"image": images, "words": bags}
    params = networks.fit(loss, start(module, images, bags), arrays, steps=12, batch_size=8)
    apply = lambda x, w: module.apply({"params": params}, x, w)[:2]  # noqa: E731
    seen, said = networks.predict(apply, images, bags)
    # Unit length, to the precision of float32.
    np.testing.assert_allclose(np.square(seen).sum(-1), 1, rtol=1e-5)
    kinds = np.stack([said[classes == 0][0], said[classes == 1][0]])
    assert ((seen @ kinds.T).argmax(-1) == classes).mean() > 0.9


def test_maps_of_squares_and_back():
    x = RNG.standard_normal((2, 4, 6, 3)).astype(np.float32)
    deep = networks.to_depth(x)
    assert deep.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(networks.to_space(deep), x)


def test_predictions_do_not_depend_on_the_parts(monkeypatch):
    images = RNG.randint(0, 255, (7, 4, 4, 3)).astype(np.uint8)
    whole = networks.predict(lambda x: x.mean((1, 2, 3)), images)
    monkeypatch.setattr(networks, "_PREDICTED", 3)
    parts = networks.predict(lambda x: x.mean((1, 2, 3)), images)
    assert whole.shape == (7,)
    np.testing.assert_allclose(parts, whole, rtol=1e-6)  # float32 sums


def test_augmentation_draws_for_each_image_by_itself():
    images = jnp.asarray(RNG.uniform(-1, 1, (4, 8, 8, 3)), jnp.float32)
    key = jax.random.key(1)
    seen = networks.augment(images, key, shift=2, flip=True)
    assert seen.shape == images.shape
    few = networks.augment(images[:2], key, shift=2, flip=True)
    np.testing.assert_allclose(seen[:2], few, atol=1e-6)
    same = networks.augment(jnp.broadcast_to(images[:1], images.shape), key)
    assert np.abs(np.asarray(same[0] - same[1])).max() > 0.01
