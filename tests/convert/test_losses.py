"""The name tables of the loss and feature networks: there and back, and what they refuse."""

import jax
import numpy as np
import pytest
from golden_utils import load

from ldm_jax.convert import losses
from ldm_jax.errors import UserError
from ldm_jax.first_stage.discriminator import PatchDiscriminator

DISCRIMINATOR = PatchDiscriminator(16, 3)


def lpips_weights() -> dict[str, np.ndarray]:
    """Zeros of the right shapes: the trunk as in torchvision, the heads as in lpips."""
    golden = load("lpips_vgg16")
    shapes = {name: spec[0] for name, spec in golden.meta["weights_spec"].items()}
    shapes |= {f"lin{i}.model.1.weight": golden[f"heads.lin{i}"].shape for i in range(5)}
    return {name: numbered(shape) for name, shape in shapes.items()}


def numbered(shape: list[int]) -> np.ndarray:
    """Values that differ from each other, without the time of random numbers."""
    return np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)


def inception_weights() -> dict[str, np.ndarray]:
    spec = load("inception_fid").meta["weights_spec"]
    return {name: numbered(shape) for name, (shape, *_) in spec.items()}


@pytest.mark.parametrize(
    ("weights", "to_flax", "from_flax"),
    [
        (lpips_weights, losses.lpips_to_flax, losses.lpips_from_flax),
        (inception_weights, losses.inception_to_flax, losses.inception_from_flax),
        (
            lambda: load("discriminator_0").weights(),
            lambda theirs: losses.discriminator_to_flax(theirs, DISCRIMINATOR),
            lambda ours: losses.discriminator_from_flax(ours, DISCRIMINATOR),
        ),
    ],
    ids=["lpips", "inception", "discriminator"],
)
def test_there_and_back_is_exact(weights, to_flax, from_flax):
    theirs = weights()
    ours = to_flax(theirs)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(ours))
    back = from_flax(ours)
    assert back.keys() == theirs.keys()
    for name, value in back.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def test_loss_of_a_published_first_stage_is_read():
    """As `loss.perceptual_loss.*` and `loss.discriminator.*` lie in the released checkpoints."""
    lpips = {f"scaling_layer.{name}": np.zeros((1, 3, 1, 1)) for name in ("shift", "scale")}
    for name, weight in lpips_weights().items():
        layer = name.split(".")[1]
        # A slice begins at the pooling before its first convolution.
        place = 1 + sum(int(layer) > last for last in (3, 8, 15, 22)) if layer.isdigit() else 0
        lpips[name.replace("features", f"net.slice{place}")] = weight
    assert {"net.slice1.2.bias", "net.slice4.17.weight", "net.slice5.28.weight"} <= lpips.keys()
    ours, want = losses.lpips_to_flax(lpips), losses.lpips_to_flax(lpips_weights())
    jax.tree.map(np.testing.assert_array_equal, ours, want)

    net, images = PatchDiscriminator(), jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    abstract = jax.eval_shape(net.init, jax.random.key(0), images)
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract)
    theirs = losses.discriminator_from_flax(variables, net)
    theirs["main.3.num_batches_tracked"] = np.int64(7)
    variables = losses.discriminator_to_flax(theirs, net)
    counts = [sum(w.size for w in jax.tree.leaves(v["params"])) for v in (ours, variables)]
    # With the log-variance these are the 17,481,794 of the published autoencoders' losses.
    assert counts == [14_716_160, 2_765_633]


def test_input_channels_and_depth_are_those_of_the_weights():
    net = PatchDiscriminator(32, 2)
    variables = losses.discriminator_to_flax(load("discriminator_1").weights(), net)
    assert variables["params"]["conv_0"]["kernel"].shape == (4, 4, 4, 32)
    with pytest.raises(UserError, match=r"main\.11\.bias, .* missing; .*unexpected"):
        losses.discriminator_to_flax(load("discriminator_1").weights(), PatchDiscriminator(32, 3))


def test_misfits_are_listed():
    theirs = lpips_weights() | {"classifier.0.weight": np.zeros(3)}
    theirs["lin0.model.1.weight"] = np.zeros((1, 64, 3, 3), np.float32)
    theirs["extra"] = theirs.pop("features.0.bias")
    message = r"features\.0\.bias missing; extra unexpected; lin0\.model\.1\.weight \(1, 64, 3, 3\)"
    with pytest.raises(UserError, match=message):
        losses.lpips_to_flax(theirs)
    theirs = inception_weights()
    del theirs["Mixed_7c.branch_pool.bn.running_var"]
    with pytest.raises(UserError, match=r"Mixed_7c\.branch_pool\.bn\.running_var missing"):
        losses.inception_to_flax(theirs)
