"""Weights as safetensors files: lazy, streamed, all or nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from ldm_jax import tensors
from ldm_jax.errors import UserError
from ldm_jax.tensors import LazyArray, load_tensors, open_tensors, save_tensors


def make_tree() -> dict:
    tree = {"b": {name: np.arange(6).reshape(2, 3).astype(d) for name, d in tensors.DTYPES.items()}}
    tree["jax"] = jnp.arange(3, dtype=jnp.bfloat16)
    tree["a"] = {"transposed": np.arange(6.0).reshape(2, 3).T, "scalar": np.float32(2.5)}
    tree["empty"] = np.zeros((0, 3), np.float32)
    tree["lazy"] = LazyArray(
        (2, 2), np.dtype(np.int16), lambda: np.arange(8, dtype=np.int16).reshape(2, 4)[:, ::2]
    )
    return tree


def flat_arrays(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flat_arrays(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = np.asarray(value)
    return flat


def test_the_library_and_we_read_what_we_write(tmp_path):
    path, flat = tmp_path / "w.safetensors", flat_arrays(make_tree())
    save_tensors(path, make_tree(), {"step": "7"})
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata().keys() == {"step", "crc32"}
    theirs, (ours, metadata) = safetensors.numpy.load_file(path), open_tensors(path)
    assert metadata == {"step": "7"}
    assert theirs.keys() == ours.keys() == flat.keys()
    for name, array in flat.items():
        assert (ours[name].shape, ours[name].dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(np.asarray(ours[name]), array, strict=True)
        np.testing.assert_array_equal(theirs[name], array, strict=True)
    loaded = load_tensors(path, make_tree())
    assert flat_arrays(loaded).keys() == flat.keys()
    np.testing.assert_array_equal(loaded["lazy"], [[0, 2], [4, 6]])


def test_we_read_what_the_library_writes(tmp_path):
    path, flat = tmp_path / "w.safetensors", flat_arrays(make_tree())
    safetensors.numpy.save_file({n: a.copy() for n, a in flat.items()}, path)
    arrays, metadata = open_tensors(path)
    assert metadata == {}
    for name, array in flat.items():
        np.testing.assert_array_equal(np.asarray(arrays[name]), array, strict=True)


def test_lazy_arrays_are_read_one_at_a_time_and_not_kept(tmp_path):
    calls = []

    def lazy(name: str) -> LazyArray:
        return LazyArray(
            (2,), np.dtype(np.float32), lambda: calls.append(name) or np.ones(2, np.float32)
        )

    array = lazy("x")
    assert (array.ndim, array.size, np.shape(array), calls) == (1, 2, (2,), [])
    assert np.asarray(array, np.float64).dtype == np.float64
    assert np.array(array).sum() == 2 and calls == ["x", "x"]
    with pytest.raises(ValueError, match="without a copy"):
        np.array(array, copy=False)
    calls.clear()
    save_tensors(tmp_path / "w", {n: lazy(n) for n in "cab"})
    assert calls == ["a", "b", "c"]


@pytest.mark.parametrize("value", [np.ones(3, np.float32), np.ones(2), np.ones((2, 1), np.float32)])
def test_a_broken_promise_leaves_the_old_file(tmp_path, value):
    path = tmp_path / "w.safetensors"
    save_tensors(path, {"a": np.zeros(1)})
    old = path.read_bytes()
    broken = LazyArray((2,), np.dtype(np.float32), lambda: value)
    with pytest.raises(ValueError, match=r"promised float32\[2\]"):
        save_tensors(path, {"a": np.zeros(1), "b": broken})
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="'a/b' is complex64"):
        save_tensors(tmp_path / "w", {"a": {"b": np.zeros(1, np.complex64)}})
    with pytest.raises(ValueError, match="'a' is >f4"):
        save_tensors(tmp_path / "w", {"a": np.zeros(1, ">f4")})
    with pytest.raises(UserError, match=r"the name '\.\./x'"):
        save_tensors(tmp_path / "w", {"../x": np.zeros(1)})
    assert not list(tmp_path.iterdir())


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(UserError, match="no weights at"):
        open_tensors(tmp_path / "nothing")
    with pytest.raises(UserError, match="cannot read"):
        open_tensors(tmp_path)


def test_any_flipped_bit_is_noticed(tmp_path):
    """In the arrays when they are read; in the header at once, or it makes no difference."""
    path, tree = tmp_path / "w.safetensors", make_tree()
    save_tensors(path, tree, {"step": "7"})
    data, expected = path.read_bytes(), load_tensors(path, tree)
    start = 8 + int.from_bytes(data[:8], "little")
    rng = np.random.default_rng(0)
    places = [*rng.integers(8 * start, 8 * len(data), 60), *rng.integers(0, 8 * start, 60)]
    seen = 0
    for place in places:
        broken = bytearray(data)
        broken[place // 8] ^= 1 << place % 8
        path.write_bytes(broken)
        try:
            found = load_tensors(path, tree)
        except UserError as error:
            assert str(path) in str(error)
            seen += place >= 8 * start
        else:
            jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert seen == 60


def test_damage_names_the_file_and_the_array(tmp_path):
    path, tree = tmp_path / "w.safetensors", {"a": {"kernel": np.arange(4.0)}}
    save_tensors(path, tree)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"\x01")
    with pytest.raises(UserError, match=r"w\.safetensors is damaged: 'a/kernel' .* checksum"):
        load_tensors(path, tree)
    place = data.index(b'"crc32":"') + 9
    path.write_bytes(data[:place] + b"x" + data[place + 1 :])
    with pytest.raises(UserError, match="its checksums were changed"):
        load_tensors(path, tree)
    path.write_bytes(data[:-9])
    with pytest.raises(UserError, match="not a readable"):
        load_tensors(path, tree)
