"""The transformer: its parts against NumPy, its size, positions, and what it refuses."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from golden_utils import quick_jit

from ldm_jax.conditioners.label import LabelEmbedder
from ldm_jax.denoisers.dit import DiT
from ldm_jax.errors import UserError
from ldm_jax.nn.positions import grid, rotary_angles, rotate, sincos_embedding
from ldm_jax.nn.resnet import depth_to_space, space_to_depth
from ldm_jax.training.optim import _matrices
from ldm_jax.types import Condition

from .helpers import normal, randomised

TINY = DiT(width=32, out_channels=3, depth=1, num_heads=2)
JOINT = dataclasses.replace(TINY, context="joint")
T = np.array([3, 700])
X = normal(0, 2, 4, 8, 3)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def modulated(x, shift, scale):
    centred = x - x.mean(-1, keepdims=True)
    variance = np.square(centred).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + 1e-6) * (1 + scale[:, None]) + shift[:, None]


def split(p, embedding, count):
    return np.split(dense(p["dense"], silu(embedding)), count, axis=-1)


def turned(x, height, width):
    """Rotary positions as complex numbers: x (B, T, heads, D)."""
    quarter = x.shape[-1] // 4
    frequencies = 100.0 ** (-np.arange(quarter) / quarter)
    place = np.arange(height * width)
    angles = [place[:, None] // width * frequencies, place[:, None] % width * frequencies]
    numbers = x[..., : 2 * quarter] + 1j * x[..., 2 * quarter :]
    numbers = numbers * np.exp(1j * np.concatenate(angles, -1))[None, :, None]
    return np.concatenate([numbers.real, numbers.imag], -1)


def heads_of(p, x, heads):
    q, k, v = dense(p["dense"], x).reshape(*x.shape[:2], 3, heads, -1).transpose(2, 0, 1, 3, 4)
    rms = lambda a, n: a / np.sqrt(np.square(a).mean(-1, keepdims=True) + 1e-6) * p[n]["scale"]  # noqa: E731
    return rms(q, "norm_q"), rms(k, "norm_k"), v


def numpy_dit(p, net, x_t, t, cond):
    """A joint, rotary, gelu DiT of one block with QK norm and a context mask, in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), p)
    frequencies = 10000.0 ** (-np.arange(128) / 128)
    angles = t[:, None] * frequencies
    h = np.concatenate([np.cos(angles), np.sin(angles)], -1)
    e = dense(p["time_embed"]["dense_1"], silu(dense(p["time_embed"]["dense_0"], h)))
    e = e + cond.vector
    batch, height, width, channels = x_t.shape
    rows, columns = height // 2, width // 2
    patches = x_t.reshape(batch, rows, 2, columns, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    streams = {"image": dense(p["patch_in"], patches.reshape(batch, rows * columns, -1))}
    streams["context"] = dense(p["context_in"], cond.context)
    block, qkv, told = jax.tree.map(lambda leaf: leaf[0], p["blocks"]), [], {}
    for name, x in streams.items():
        told[name] = split(block[f"{name}_modulation"], e, 6)
        q, k, v = heads_of(block[f"{name}_qkv"], modulated(x, *told[name][:2]), net.num_heads)
        if name == "image":
            q, k = turned(q, rows, columns), turned(k, rows, columns)
        qkv.append((q, k, v))
    q, k, v = (np.concatenate(parts, 1) for parts in zip(*qkv, strict=True))
    logits = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    seen = np.concatenate([np.ones((batch, rows * columns), bool), cond.context_mask], 1)
    weights = np.exp(logits - logits.max(-1, keepdims=True)) * seen[:, None, None]
    weights /= weights.sum(-1, keepdims=True)
    attended = np.einsum("bhts,bshd->bthd", weights, v).reshape(batch, -1, net.width)
    x = streams["image"]
    _, _, gate, shift, scale, gate_mlp = told["image"]
    x = x + gate[:, None] * dense(block["image_out"], attended[:, : x.shape[1]])
    hidden = gelu(dense(block["image_mlp"]["in"], modulated(x, shift, scale)))
    x = x + gate_mlp[:, None] * dense(block["image_mlp"]["out"], hidden)
    x = dense(p["patch_out"], modulated(x, *split(p["modulation_out"], e, 2)))
    x = x.reshape(batch, rows, columns, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height, width, -1)


def test_one_joint_block_is_what_numpy_computes():
    mask = np.array([[True, True, False], [True, False, True]])
    cond = Condition(context=normal(1, 2, 3, 8), context_mask=mask, vector=normal(2, 2, 32))
    params = randomised(JOINT, X, T, cond)
    out = quick_jit(JOINT.apply)({"params": params}, X, T, cond)
    want = numpy_dit(params, JOINT, X, T, cond)
    assert want.std() > 0.3
    # The rounding of float32: sums of up to 128 terms of size one, a few deep.
    np.testing.assert_allclose(out, want, atol=3e-5)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_patches_come_back(size):
    x = normal(3, 2, 8, 4, 3)
    patches = space_to_depth(x, size)
    assert patches.shape == (2, 8 // size, 4 // size, 3 * size**2)
    np.testing.assert_array_equal(depth_to_space(patches, size), x)
    np.testing.assert_array_equal(
        patches[0, 1, 0].reshape(size, size, 3), x[0, size : 2 * size, :size]
    )


def test_rotated_products_depend_on_relative_positions_only():
    q, k = normal(4, 2, 12, 2, 16), normal(5, 2, 12, 2, 16)
    places = grid(3, 4)

    def products(shift):
        angles = jnp.asarray(rotary_angles(places + np.asarray(shift), 16))
        return jnp.einsum("bthd,bshd->bhts", rotate(q, angles), rotate(k, angles))

    here, there = products((0, 0)), products((5, 9))
    # Angles of up to 13 radians carry float32 errors of 1e-6, in sums of 16 products.
    np.testing.assert_allclose(here, there, atol=1e-4)
    angles = jnp.asarray(rotary_angles(places, 16))
    fixed = jnp.einsum("bthd,bshd->bhts", rotate(q, 0 * angles), rotate(k, angles))
    assert np.abs(fixed - here).max() > 0.5
    # Same content everywhere: equal offsets on the map give equal products.
    same = [jnp.broadcast_to(a[:, :1], a.shape) for a in (q, k)]
    logits = jnp.einsum("bthd,bshd->bhts", rotate(same[0], angles), rotate(same[1], angles))
    np.testing.assert_allclose(logits[..., 0, 5], logits[..., 6, 11], atol=1e-5)
    assert np.abs(logits[..., 0, 1] - logits[..., 0, 4]).max() > 0.1  # right is not down


def test_sincos_positions_tell_columns_then_rows_apart():
    table = sincos_embedding(grid(2, 3), 8)
    frequencies = 10000.0 ** -np.array([0, 0.5])
    row, column = 1, 2
    want = [f(place * frequencies) for place in (column, row) for f in (np.sin, np.cos)]
    np.testing.assert_allclose(table[row * 3 + column], np.concatenate(want), atol=1e-6)


@pytest.mark.parametrize("positions", ["rotary", "sincos"])
def test_positions_matter_and_sizes_may_change(positions):
    net = dataclasses.replace(TINY, positions=positions)
    params = randomised(net, X, T, Condition())
    apply = quick_jit(lambda x: net.apply({"params": params}, x, T, Condition()))
    out = apply(X)
    assert apply(normal(6, 2, 8, 6, 3)).shape == (2, 8, 6, 3)
    # Without positions, tokens in another order would give the same in that order.
    order = np.array([1, 2, 3, 0, 6, 7, 4, 5])
    patches = space_to_depth(X, 2).reshape(2, 8, -1)[:, order].reshape(2, 2, 4, -1)
    moved = space_to_depth(apply(depth_to_space(patches, 2)), 2).reshape(2, 8, -1)
    straight = space_to_depth(out, 2).reshape(2, 8, -1)[:, order]
    assert np.abs(moved - straight).max() > 1e-2


def test_parameter_count_of_dit_xl_2():
    # Peebles & Xie 2023, table 4 (675M). The published weights hold 675,129,632 numbers: among them
    # fixed positions, 256 * 1152, and the output of the learned variance, (1152 + 1) * 2 * 2 * 4.
    net = DiT(
        width=1152,
        out_channels=4,
        depth=28,
        num_heads=16,
        positions="sincos",
        qk_norm=False,
    )
    cond, labels = jax.eval_shape(
        lambda key: LabelEmbedder(1000, 1152, slot="vector").init_with_output(
            key, {"label": jnp.zeros(1, jnp.int32)}
        ),
        jax.random.key(0),
    )
    x = jnp.zeros((1, 32, 32, 4))
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, jnp.zeros(1), cond)
    total = sum(math.prod(p.shape) for p in jax.tree.leaves((shapes, labels)))
    assert total == 675_129_632 - 256 * 1152 - (1152 + 1) * 16 == 674_816_272


def test_layers_start_apart_and_gates_at_zero():
    net = dataclasses.replace(JOINT, depth=3, context="cross")
    cond = Condition(context=normal(1, 2, 3, 8))
    params = quick_jit(net.init)(jax.random.key(0), X, T, cond)["params"]
    for path, value in flatten_dict(params, sep="/").items():
        gates = "modulation" in path or "cross_out" in path or "patch_out" in path
        if gates or (path.endswith("bias") and "time_embed" not in path):
            assert not value.any(), path
        elif path.endswith("kernel"):
            fan = sum(value.shape[-2:])
            if "time_embed" not in path:
                np.testing.assert_allclose(value.std(), np.sqrt(2 / fan), rtol=0.1, err_msg=path)
            if path.startswith("blocks"):
                assert value.shape[0] == 3 and np.abs(value[0] - value[1]).max() > 0.01, path


def test_muon_sees_one_matrix_per_block():
    shapes = jax.eval_shape(TINY.init, jax.random.key(0), X, T, Condition())["params"]
    numbers = flatten_dict(_matrices(shapes), sep="/")
    qkv = numbers["blocks/image_qkv/dense/kernel"]
    assert (qkv.reduction_axis, qkv.output_axis) == ((1,), (2,))
    assert numbers["blocks/image_qkv/dense/bias"] is None  # (depth, C), not a matrix


@pytest.mark.parametrize(
    ("fields", "shape", "cond", "message"),
    [
        ({}, (2, 7, 8, 3), Condition(), "patch 2 .* got 7x8"),
        ({"context": "cross"}, X.shape, Condition(), "context='cross', but .* no context"),
        ({}, X.shape, Condition(context=jnp.zeros((2, 1, 8))), "set context='cross' or 'joint'"),
        ({}, X.shape, Condition(vector=jnp.zeros((2, 128))), "must be 32 wide"),
        ({"head_dim": 16}, X.shape, Condition(), "either num_heads or"),
        ({"num_heads": 16}, X.shape, Condition(), "'rotary' need .* heads of 2"),
        ({"positions": "learned"}, X.shape, Condition(), "choose from sincos, rotary"),
        ({"mlp": "relu"}, X.shape, Condition(), "choose from gelu, swiglu"),
    ],
)
def test_input_that_does_not_fit_is_refused(fields, shape, cond, message):
    net = dataclasses.replace(TINY, **fields)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros(shape), jnp.zeros(2), cond)
