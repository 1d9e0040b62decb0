"""Digests see every change, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from ldm_jax.training import digests as lib
from ldm_jax.training.digests import device_sums, digest_of, digests, host_sums
from ldm_jax.training.sharding import make_mesh

RNG = np.random.default_rng(0)
ARRAYS = {
    "kernel": RNG.normal(size=(3, 3, 16, 8)).astype(np.float32),
    "half": RNG.normal(size=(5, 7)).astype(jnp.bfloat16),
    "codes": RNG.integers(0, 9, 40).astype(np.int32),
    "bytes": RNG.integers(0, 256, (2, 2, 9), dtype=np.uint8),
    "flags": np.array([True, False, True]),
    "count": np.int32(7),
    "nothing": np.zeros((0, 4), np.float32),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_devices_and_hosts_agree_however_an_array_is_split_and_cut(name, monkeypatch):
    array = ARRAYS[name]
    expected = host_sums(array)
    np.testing.assert_array_equal(np.asarray(device_sums(jnp.asarray(array))), expected)
    monkeypatch.setattr(lib, "CHUNK", 5)
    np.testing.assert_array_equal(host_sums(array), expected)
    np.testing.assert_array_equal(host_sums(np.array(array, order="F")), expected)


def test_the_mesh_changes_no_digest():
    array = ARRAYS["kernel"]
    config = ConfigDict({"data": 2, "fsdp": 2, "tensor": 2, "dcn_data": 1})
    mesh, found = make_mesh(config, jax.devices()), set()
    for spec in ((), (None, None, "fsdp", "tensor"), (None, None, ("data", "fsdp", "tensor"))):
        put = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
        found |= {tuple(host_sums(put)), tuple(np.asarray(device_sums(put)))}
    assert found == {tuple(host_sums(array))}
    assert digests({"a": [put, array]}) == {"a/0": digest_of(array), "a/1": digest_of(array)}


@pytest.mark.parametrize("name", ["kernel", "half", "codes", "bytes"])
def test_each_flipped_bit_changes_both_halves(name):
    array, seen = ARRAYS[name], 0
    text = digest_of(array).text
    for place in RNG.integers(0, array.nbytes * 8, 200):
        data = bytearray(array.tobytes())
        data[place // 8] ^= 1 << place % 8
        other = digest_of(np.frombuffer(data, array.dtype).reshape(array.shape)).text
        seen += other[:8] != text[:8] and other[8:] != text[8:]
    assert seen == 200


def test_other_damage_changes_them_too():
    array = ARRAYS["kernel"]
    flat, signs, zeros, swapped = array.reshape(-1), array.copy(), array.copy(), array.copy()
    signs.reshape(-1)[:2] *= -1  # the same bit twice, which cancels in a plain sum
    zeros[0] = 0
    swapped[0, 1], swapped[1, 0] = array[1, 0], array[0, 1]
    shifted = np.roll(flat, 1).reshape(array.shape)
    turned = array.transpose(1, 0, 2, 3)
    found = [digest_of(a).text for a in (array, signs, zeros, swapped, shifted, turned)]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_non_finite_elements_are_counted(dtype):
    array = np.array([np.nan, np.inf, -np.inf, 0, np.finfo(np.float16).max, -1e-8], dtype)
    assert digest_of(array).bad == int(device_sums(jnp.asarray(array))[2]) == 3
    assert digest_of(np.array([-1, 2**31 - 1], np.int32)).bad == 0
