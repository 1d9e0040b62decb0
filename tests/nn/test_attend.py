"""Every path of attention equals the plain formula, and each is chosen where it should be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec

from ldm_jax.errors import UserError
from ldm_jax.nn import attend_tiled
from ldm_jax.nn.attend import (
    Target,
    _cuda_capability,
    all_if_none,
    attend,
    choose_path,
    cudnn_inputs,
    current_target,
    logits_in_memory,
)
from ldm_jax.nn.attend_tpu import _block, _division
from ldm_jax.nn.attention import SelfAttention

RNG = np.random.RandomState(0)


def inputs(t, s, dim, batch=2, heads=2, dtype=jnp.float32):
    shapes = ((batch, t, heads, dim), (batch, s, heads, dim), (batch, s, heads, dim))
    return tuple(jnp.asarray(RNG.standard_normal(shape), dtype) for shape in shapes)


def mask_of(kind, batch, t, s):
    """Masks in which one row has no key at all."""
    if kind == "none":
        return None
    if kind == "causal":  # the same for all examples
        return jnp.tril(jnp.ones((1, t, s), bool))
    mask = RNG.uniform(size=(batch, s) if kind == "keys" else (batch, t, s)) < 0.6
    mask[0] = False
    return jnp.asarray(mask)


@functools.partial(jax.jit, static_argnames="path")
def outputs_and_gradients(qkv, mask, path):
    out, vjp = jax.vjp(lambda *qkv: attend(*qkv, mask, path=path), *qkv)
    return out, vjp(jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))


def assert_equals_plain(qkv, mask, path):
    want = outputs_and_gradients(qkv, mask, "plain")
    got = outputs_and_gradients(qkv, mask, path)
    # Values of size 1 from sums of hundreds of float32 products in another order.
    for ours, plain in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("t", "s", "mask"),
    [(48, 32, "none"), (45, 77, "keys"), (39, 45, "queries"), (3, 21, "causal")],
)
def test_tiles_equal_the_formula(t, s, mask, monkeypatch):
    monkeypatch.setattr(attend_tiled, "SMALLEST", 16)
    monkeypatch.setattr(attend_tiled, "LARGEST", 16)
    assert_equals_plain(inputs(t, s, 8), mask_of(mask, 2, t, s), "tiled")


def test_tiles_of_large_logits_stay_finite(monkeypatch):
    monkeypatch.setattr(attend_tiled, "LARGEST", 16)
    q, k, v = inputs(40, 40, 8)
    got = outputs_and_gradients((100 * q, 100 * k, v), None, "tiled")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
    # Of such logits only the largest counts; its float32 value is within 0.01 of the exact one.
    want = outputs_and_gradients((100 * q, 100 * k, v), None, "plain")
    np.testing.assert_allclose(got[0], want[0], atol=0.02)


def test_bfloat16_has_a_float32_softmax(monkeypatch):
    monkeypatch.setattr(attend_tiled, "LARGEST", 16)
    qkv = inputs(64, 96, 16, dtype=jnp.bfloat16)
    exact = attend(*(x.astype(jnp.float32) for x in qkv), path="plain")
    for path in ("plain", "tiled"):
        out = jax.jit(functools.partial(attend, path=path))(*qkv)
        assert out.dtype == jnp.bfloat16
        # Outputs of size 0.1 to 1, weights and products rounded to 8 bits.
        np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.01)


def temporary_bytes(function, *shapes):
    return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_the_number_of_tokens():
    """4096 tokens, the latents of 512x512 pixels, without their 64 MiB matrix for each head."""
    heads, dim = 4, 16
    shape = jax.ShapeDtypeStruct((1, 4096, heads, dim), jnp.float32)
    forward = temporary_bytes(attend, shape, shape, shape)
    backward = temporary_bytes(
        jax.grad(lambda *qkv: attend(*qkv).sum(), (0, 1, 2)), shape, shape, shape
    )
    tokens, tile = 4 * 4096 * heads * dim, 4 * attend_tiled.TILE_VALUES
    assert forward < 5 * tokens + 4 * tile
    assert backward < 16 * tokens + 5 * tile
    assert backward < 4 * heads * 4096**2 / 4


def test_bytes_that_are_told_to_users():
    assert logits_in_memory(1023, 6) == 6 * 1023**2
    assert logits_in_memory(4096, 4) == 4 * 512**2  # 8 x 8 tiles
    assert logits_in_memory(1600, 16) == 16 * 232**2  # 7 x 7 tiles


def test_the_first_stages_single_wide_head_is_linear_too():
    block = SelfAttention(heads=1, epsilon=1e-6)
    x = jax.ShapeDtypeStruct((1, 64, 64, 512), jnp.float32)
    params = jax.eval_shape(block.init, jax.random.key(0), x)
    assert temporary_bytes(block.apply, params, x) < 10 * 4 * 4096 * 512
    wide = inputs(24, 24, 512, batch=1, heads=1)
    assert_equals_plain(wide, None, "tiled")


def test_the_kernel_of_tpus_equals_the_formula():
    """In the interpreter: odd lengths, keys that are masked, a row without any."""
    qkv = inputs(130, 140, 40, heads=1)
    with pltpu.force_tpu_interpret_mode():
        assert_equals_plain(qkv, mask_of("keys", 2, 130, 140), "flash")


def test_the_kernel_of_tpus_on_a_mesh_with_wide_heads():
    qkv = inputs(128, 130, 160)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    want = attend(*qkv, path="plain")
    with pltpu.force_tpu_interpret_mode(), jax.set_mesh(mesh):
        spread = jax.device_put(qkv, jax.NamedSharding(mesh, PartitionSpec("data")))
        out = jax.jit(lambda *qkv: attend(*qkv, path="flash"))(*spread)
    np.testing.assert_allclose(out, want, atol=1e-5)
    assert out.sharding.shard_shape(out.shape) == (1, 128, 1, 160)


def test_division_over_a_mesh():
    axes = {"data": 2, "fsdp": 2, "tensor": 2}
    assert _division(axes, 4, 6) == (("data", "fsdp"), "tensor")
    assert _division(axes, 3, 6) == (None, "tensor")
    assert _division(axes, 8, 1) == (("data", "fsdp"), None)
    assert _division({"data": 8}, 8, 2) == (("data",), None)


def test_blocks_divide_lengths_and_fit():
    assert [_block(n, 256) for n in (4096, 1152, 1280, 1664)] == [512, 384, 256, 128]
    assert _block(4096, 4 * 512) == 512 and _block(4096, 4 * 1024) == 256


def test_inputs_of_cudnn_give_the_formula():
    """The kernel needs a GPU; what it is given does not."""
    q, k, v = inputs(45, 77, 8)
    for kind in ("keys", "queries"):
        mask = mask_of(kind, 2, 45, 77)
        q_some, mask_some = all_if_none(q, mask)
        *tokens, bias = cudnn_inputs(q_some, k, v, mask_some)
        assert [x.shape[1] for x in tokens] == [46, 78, 78] and bias.shape == (2, 1, 46, 78)
        out = jax.nn.dot_product_attention(*tokens, mask=bias, implementation="xla")[:, :45]
        np.testing.assert_allclose(out, attend(q, k, v, mask, path="plain"), atol=1e-5)


CPU, TPU, HOPPER = Target("cpu"), Target("tpu"), Target("gpu", 9.0)
KEYS, QUERIES = (2, 4096), (2, 4096, 4096)


@pytest.mark.parametrize(
    ("target", "t", "dim", "dtype", "mask", "path"),
    [
        (CPU, 4096, 64, "float32", None, "tiled"),
        (CPU, 1024, 64, "bfloat16", KEYS, "tiled"),
        (CPU, 256, 64, "float32", None, "plain"),
        (TPU, 4096, 40, "bfloat16", None, "flash"),
        (TPU, 4096, 512, "float32", KEYS, "flash"),
        (TPU, 4096, 64, "bfloat16", QUERIES, "tiled"),
        (TPU, 4096, 64, "float16", None, "tiled"),
        (TPU, 256, 64, "bfloat16", None, "plain"),
        (TPU._replace(unknown_mesh=True), 4096, 64, "bfloat16", None, "tiled"),
        (HOPPER, 4096, 64, "bfloat16", None, "cudnn"),
        (HOPPER, 256, 128, "float16", KEYS, "cudnn"),
        (HOPPER, 4096, 64, "float32", None, "tiled"),
        (HOPPER, 4096, 512, "bfloat16", None, "tiled"),
        (HOPPER, 4096, 36, "bfloat16", None, "tiled"),
        (HOPPER, 16, 64, "bfloat16", None, "plain"),
        (Target("gpu", 7.5), 4096, 64, "bfloat16", None, "tiled"),
        (Target("gpu", 0.0), 256, 64, "bfloat16", None, "plain"),
    ],
)
def test_choice_of_the_path(target, t, dim, dtype, mask, path):
    tokens = jax.ShapeDtypeStruct((2, t, 8, dim), dtype)
    mask = None if mask is None else jax.ShapeDtypeStruct(mask, bool)
    assert choose_path(tokens, tokens, mask, target) == path


def test_short_contexts_stay_plain():
    pixels = jax.ShapeDtypeStruct((2, 4096, 8, 40), jnp.float32)
    words = jax.ShapeDtypeStruct((2, 77, 8, 40), jnp.float32)
    assert {choose_path(pixels, words, None, t) for t in (CPU, TPU)} == {"plain"}


def test_target_is_the_mesh_in_context():
    assert current_target() == Target("cpu", 0.0, unknown_mesh=True)  # eight devices, no mesh
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))):
        assert current_target() == Target("cpu")
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh(
        (4,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device
    )
    with jax.sharding.use_abstract_mesh(mesh):
        assert current_target() == Target("tpu")


def test_compute_capability():
    class Device:
        compute_capability = "9.0"

    assert _cuda_capability(Device()) == 9.0
    Device.compute_capability = "gfx942"
    assert _cuda_capability(Device()) == 0.0
    assert _cuda_capability(object()) == 0.0


def test_unknown_paths_and_masks_are_refused():
    q, k, v = inputs(4, 4, 8)
    with pytest.raises(UserError, match="'flashy' is none of plain, tiled, flash, cudnn"):
        attend(q, k, v, path="flashy")
    with pytest.raises(UserError, match="takes no mask per query"):
        attend(q, k, v, jnp.ones((2, 4, 4), bool), path="flash")
