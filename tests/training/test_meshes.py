"""Meshes and microbatches change where and when things are computed, and no result."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from ldm_jax import config as config_lib
from ldm_jax import memory
from ldm_jax.errors import UserError
from ldm_jax.preflight import _check_state_fits, check_parts
from ldm_jax.training import sharding
from ldm_jax.training.checkpoint import Checkpoints, abstract_like
from ldm_jax.training.sharding import (
    batch_sharding,
    bytes_per_device,
    check_batch,
    gather,
    local_part,
    make_mesh,
    on_mesh,
    put,
    replicated,
    state_shardings,
)
from ldm_jax.training.steps import diffusion_functions

SIZES = {"data": -1, "fsdp": 1, "tensor": 1, "dcn_data": 1}
FROZEN = {"latents": {"shift": np.zeros(3, np.float32), "scale": np.ones(3, np.float32)}}
BATCH = {
    "image": np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8),
    "label": np.arange(8, dtype=np.int32) % 4,
}

# Its blocks are a scan, which compiles sooner than a UNet.
TRANSFORMER = {
    "denoiser.kind": "dit",
    "denoiser.cross_attention": False,
    "denoiser.dit.context": "joint",
    "denoiser.width": 64,
}
KINDS = {"unet": {}, "dit": TRANSFORMER | {"denoiser.depth": 2}}


def tiny_config(**changes):
    """Diffusion on 8x8 pixels whose one attention is a transformer block with two heads."""
    c = config_lib.get_config()
    c.data.update(resolution=8, fields=("label",))
    c.first_stage.kind = "identity"
    c.denoiser.update(width=32, mult=(1,), depth=1, attn_downsample=(), head_dim=16)
    c.denoiser.cross_attention = True
    c.conditioners = ("label",)
    c.label.update(num_classes=4, width=32)
    c.train.update(batch_size=8, lr=1e-3)
    c.cond_drop_rate = 0.2
    c.update_from_flattened_dict(changes)
    return config_lib.check(c)


def mesh_of(**sizes):
    sizes = SIZES | sizes
    count = max(1, sizes["data"]) * sizes["fsdp"] * sizes["tensor"]
    return make_mesh(ConfigDict(sizes), jax.devices()[:count])


@pytest.fixture
def split_all(monkeypatch):
    monkeypatch.setattr(sharding, "SMALL", 32)  # the toy's arrays are all small


@functools.cache
def start(kind):
    init, _ = diffusion_functions(tiny_config(**KINDS[kind]))
    return jax.device_get(jax.jit(init)(jax.random.key(0)))


def train(kind, mesh, steps=20, **changes):
    """Losses of the first steps, and the state after them."""
    _, step = diffusion_functions(tiny_config(**KINDS[kind], **changes))
    split = state_shardings(start(kind), mesh)
    state, frozen = put(start(kind), split), put(FROZEN, state_shardings(FROZEN, mesh))
    step = jax.jit(step, donate_argnums=0, out_shardings=(split, replicated(mesh)))
    batch, losses = put(BATCH, batch_sharding(mesh)), []
    for _ in range(steps):
        state, metrics = on_mesh(mesh, step)(state, frozen, batch, jax.random.key(1))
        losses.append(float(metrics["loss"]))
    return np.array(losses), state


@functools.cache
def one_device(kind):
    return train(kind, mesh_of(data=1))


MESHES = [{"data": 2, "fsdp": 2, "tensor": 2}]
MORE = [
    {"data": 4, "fsdp": 2},
    {"data": 2},
    {"data": 4},
    {"data": 8},
    {"data": 2, "fsdp": 4},
    {"data": 4, "tensor": 2},
]
CASES = [("dit", sizes) for sizes in MESHES]
CASES += [
    pytest.param(kind, sizes, marks=pytest.mark.slow)
    for kind, every in (("dit", MORE), ("unet", MESHES + MORE))
    for sizes in every
]


def test_a_state_that_is_too_large_is_refused_before_it_is_compiled(monkeypatch, split_all):
    config = tiny_config()
    split = config_lib.get_config().mesh
    state = jax.eval_shape(diffusion_functions(config)[0], jax.random.key(0))
    whole = bytes_per_device(abstract_like(state, state_shardings(state, make_mesh(split))))
    with split.unlocked():
        split.fsdp = 8
    part = bytes_per_device(abstract_like(state, state_shardings(state, make_mesh(split))))
    assert whole / 8 < part < whole / 4  # what 8 does not divide lies on every device
    monkeypatch.setattr(memory, "free_on_device", lambda: whole - 1)
    _check_state_fits(state, make_mesh(split))
    with pytest.raises(UserError, match=r"alone take 0\.\d\d GiB of each device.*mesh\.fsdp"):
        _check_state_fits(state, make_mesh())


@pytest.mark.parametrize(("kind", "sizes"), CASES, ids=str)
def test_the_loss_does_not_depend_on_the_mesh_and_a_state_moves_to_another(
    kind, sizes, split_all, tmp_path
):
    losses, state = train(kind, mesh_of(**sizes))
    # 20 updates amplify the rounding of sums in another order; 1e-5 as promised to users.
    np.testing.assert_allclose(losses, one_device(kind)[0], rtol=1e-5)
    parts = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
    held = {
        name: sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(tree))
        / sum(leaf.size for leaf in jax.tree.leaves(tree))
        for name, tree in (
            ("params", state.params["denoiser"]),
            ("ema", state.ema_params),
            ("moments", state.opt_state),
        )
    }
    fsdp = sizes.get("fsdp", 1)  # which splits everything here; 'tensor' only some of it
    assert all(1 / parts <= share < 1.02 / fsdp for share in held.values()), held
    if parts == 1:
        return
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state)
    checkpoints.wait()
    for other in ({"data": 1}, {"data": 1, "fsdp": 8}):
        split = state_shardings(start(kind), mesh_of(**other))
        restored = checkpoints.restore(abstract_like(start(kind), split))
        held = jax.tree.map(lambda leaf: leaf.sharding, restored.params)
        assert held == split.params
        jax.tree.map(np.testing.assert_array_equal, gather(restored), gather(state))
    checkpoints.close()


@pytest.mark.parametrize("kind", ["dit", pytest.param("unet", marks=pytest.mark.slow)])
def test_microbatches_change_no_update(kind):
    whole, state = one_device(kind)
    losses, parts = train(kind, mesh_of(data=2), **{"train.accumulate": 4})
    np.testing.assert_allclose(losses, whole, rtol=1e-5)
    ours, theirs = (jax.tree.leaves(gather(s.opt_state[0].mu)) for s in (parts, state))
    for a, b in zip(ours, theirs, strict=True):  # Adam's averages of the gradients
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * max(1e-3, np.abs(b).max()))


def shapes(**changes):
    init, _ = diffusion_functions(config_lib.check(tiny_config(**changes)))
    return jax.eval_shape(init, jax.random.key(0))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_first_moment_has_the_type_that_is_asked_for(optimizer):
    changes = {"train.moment_dtype": "bfloat16", "train.optimizer": optimizer}
    found = {leaf.dtype.name for leaf in jax.tree.leaves(shapes(**changes).opt_state)}
    assert found == {"bfloat16", "float32", "int32"}
    changes["train.moment_dtype"] = "float32"
    found = {leaf.dtype.name for leaf in jax.tree.leaves(shapes(**changes).opt_state)}
    assert found == {"float32", "int32"}


@pytest.mark.parametrize("changes", [{}, TRANSFORMER], ids=["unet", "dit"])
def test_tensor_splits_heads_and_hidden_units(changes):
    tree = shapes(**changes)
    found = state_shardings(tree, mesh_of(data=1, fsdp=1, tensor=2))
    split = {
        "/".join(key.key for key in path): sharding.spec
        for path, sharding in jax.tree_util.tree_leaves_with_path(found.params["denoiser"])
        if "tensor" in sharding.spec
    }
    layers = {path.rpartition("/")[0] for path in split}
    if not changes:
        names = ("self/q", "self/k", "self/v", "self/out", "cross/q", "cross/k", "cross/v")
        wanted = {f"mid_attn/block_0/{n}" for n in (*names, "cross/out", "mlp_in", "mlp_out")}
    else:
        wanted = {f"blocks/{s}_{n}" for s in ("image", "context")
                  for n in ("qkv/dense", "out", "mlp/in", "mlp/out")}  # fmt: skip
    assert layers == wanted
    for path, spec in split.items():
        rows = path.endswith(("out/kernel",))
        assert spec[-2 if rows else -1] == "tensor", path
        assert rows or not path.endswith("out/bias")
    # Averages and moments lie where their weights do.
    assert found.ema_params["denoiser"] == found.params["denoiser"]
    assert found.opt_state[0].mu == found.params


def test_small_arrays_lie_everywhere_and_others_are_split_by_their_largest_dimension():
    mesh = mesh_of(data=1, fsdp=4)
    for shape, spec in (
        ((3, 3, 32, 64), (None, None, None, "fsdp")),
        ((9, 64, 130), (None, "fsdp", None)),  # 4 does not divide 130
        ((2**14 - 4,), (None,)),
        ((2**14 + 1,), (None,)),
        ((), ()),
    ):
        leaf = jax.ShapeDtypeStruct(shape, np.float32)
        assert state_shardings({"w": leaf}, mesh)["w"].spec == PartitionSpec(*spec), shape


def test_meshes_that_do_not_fit_get_one_clear_line(tmp_path):
    def refused(message, **sizes):
        with pytest.raises(UserError, match=message):
            make_mesh(ConfigDict(SIZES | sizes))

    assert make_mesh(ConfigDict(SIZES | {"fsdp": 4})).shape == {"data": 2, "fsdp": 4, "tensor": 1}
    assert local_part(make_mesh()) == (0, 1)
    refused("data 3 x fsdp 1 x tensor 1, but there are 8 devices", data=3)
    refused("data -1 x fsdp 3 x tensor 1, but there are 8 devices", fsdp=3)
    refused("dcn_data is 3, but must divide mesh.data, 8", dcn_data=3)
    refused("dcn_data is 2, but must be the number of slices, .*, 1", dcn_data=2)
    with pytest.raises(UserError, match=r"train.batch_size is 6, which 4 parts .* try 4"):
        check_batch(6, mesh_of(data=2, fsdp=2, tensor=2), "train.batch_size")
    with pytest.raises(UserError, match=r"is 8, which 4 devices times 4 microbatches do .* 16"):
        check_parts(tiny_config(**{"train.accumulate": 4}), tmp_path, None, mesh_of(data=4))
    check_batch(4, mesh_of(data=4, tensor=2), "train.batch_size")  # 'tensor' splits no batch


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh.tensor": 4}, "mesh.tensor is 4, which does not divide the 2 attention heads of"),
        ({"mesh.tensor": 8, **TRANSFORMER}, "which does not divide the 4 attention heads of"),
        ({"mesh.fsdp": 0}, "mesh.fsdp is 0, but must be at least 1, or -1"),
        ({"mesh.fsdp": -1}, "mesh.data and mesh.fsdp are both -1"),
        ({"mesh.data": 4, "mesh.dcn_data": 3}, "dcn_data is 3, but must divide mesh.data, 4"),
        ({"train.accumulate": 3}, "train.accumulate is 3, but must divide train.batch_size, 8"),
        ({"first_stage.train.accumulate": 2}, "first_stage.train.accumulate must be 1"),
        ({"denoiser.remat": "all"}, "denoiser.remat is 'all': choose from none, block, dots"),
    ],
)
def test_configs_that_cannot_work_are_refused_without_devices(changes, message):
    with pytest.raises(UserError, match=message):
        tiny_config(**changes)


def test_another_mesh_is_no_other_config_and_old_files_can_be_read():
    ours = tiny_config(**{"mesh.fsdp": 2, "train.accumulate": 2, "denoiser.remat": "block"})
    assert config_lib.differences(tiny_config(), ours) == []
    old = config_lib.to_json(ours).replace('"remat": "block"', '"remat": true')
    assert '"remat": true' in old and config_lib.from_json(old).denoiser.remat == "block"
    old = old.replace('"remat": true', '"remat": false')
    assert config_lib.from_json(old).denoiser.remat == "none"


@pytest.mark.parametrize("remat", ["none", "block", "dots"])
def test_what_is_recomputed_takes_less_memory(remat):
    """Temporaries of a gradient, of a net whose activations are most of its memory."""
    assert temporaries(remat) <= temporaries("none")
    if remat == "block":
        assert temporaries("block") < 0.8 * temporaries("dots") < 0.8 * temporaries("none")


@functools.cache
def temporaries(remat):
    # The scan of a transformer: unrolled blocks are freed, or not, as a CPU's scheduler likes.
    changes = {"denoiser.depth": 6, "train.batch_size": 32, "denoiser.remat": remat}
    config = tiny_config(**TRANSFORMER | changes, **{"data.resolution": 16})
    init, step = diffusion_functions(config)
    state = jax.eval_shape(init, jax.random.key(0))
    batch = {
        "image": jax.ShapeDtypeStruct((32, 16, 16, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((32,), np.int32),
    }
    compiled = jax.jit(step).lower(state, FROZEN, batch, jax.random.key(1)).compile()
    return compiled.memory_analysis().temp_size_in_bytes
