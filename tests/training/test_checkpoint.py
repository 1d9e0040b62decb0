"""Checkpoints give back what they were given."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax import tensors
from ldm_jax.errors import UserError
from ldm_jax.training.checkpoint import Checkpoints, abstract_like
from ldm_jax.training.checkpoint_files import restore_newest
from ldm_jax.training.sharding import make_mesh, replicated
from ldm_jax.training.state import TrainState


def make_state(step: int) -> TrainState:
    params = {"denoiser": {"w": jnp.arange(6.0).reshape(2, 3) + step}, "conditioner": {}}
    ema = {"denoiser": {"w": params["denoiser"]["w"] / 2}}
    return TrainState(jnp.int32(step), params, ema, optax.adam(1e-3).init(params))


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_round_trip_and_retention(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest_step() is None
    for step in (1, 2, 3):
        checkpoints.save(make_state(step))
    checkpoints.wait()
    sharding = replicated(make_mesh())
    abstract = abstract_like(jax.eval_shape(lambda: make_state(0)), sharding)
    assert_equal(checkpoints.restore(abstract), make_state(3))
    assert_equal(checkpoints.restore(abstract, step=2), make_state(2))
    step, items, damaged = restore_newest(
        tmp_path, {"ema_params.denoiser": abstract.ema_params["denoiser"]}
    )
    assert (step, damaged) == (3, [])
    assert_equal(items["ema_params.denoiser"], make_state(3).ema_params["denoiser"])
    checkpoints.close()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["2", "3"]


def test_no_checkpoint_and_another_shape_are_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    sharding = replicated(make_mesh())
    abstract = abstract_like(jax.eval_shape(lambda: make_state(0)), sharding)
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoints.restore(abstract)
    checkpoints.save(make_state(1))
    checkpoints.wait()
    wrong = {"denoiser": {"w": jax.ShapeDtypeStruct((5, 5), jnp.float32, sharding=sharding)}}
    with pytest.raises(UserError, match="does not fit"):
        restore_newest(tmp_path, {"ema_params.denoiser": wrong["denoiser"]})
    checkpoints.close()


def test_tensors_round_trip_and_refusals(tmp_path):
    path = tmp_path / "weights.safetensors"
    tree = {
        "a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)},
        "b": np.zeros(2, np.int32),
    }
    tensors.save_tensors(path, tree)
    assert_equal(tensors.load_tensors(path, tree), tree)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(UserError, match=r"'b' is unexpected"):
        tensors.load_tensors(path, {"a": tree["a"]})
    with pytest.raises(UserError, match=r"'c' is missing"):
        tensors.load_tensors(path, tree | {"c": np.zeros(1)})
    with pytest.raises(UserError, match=r"'b' in .* is int32\[2\]"):
        tensors.load_tensors(path, tree | {"b": np.zeros(3, np.int32)})
    with pytest.raises(UserError, match="no weights"):
        tensors.load_tensors(tmp_path / "nothing", tree)
    path.write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="not a readable"):
        tensors.load_tensors(path, tree)
