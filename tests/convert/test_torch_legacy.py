"""Files of PyTorch before 1.6: read exactly, at any length cut off they are refused."""

import struct

import numpy as np
import pytest

from convert.archives import (
    DATA,
    MAGIC,
    NONE,
    call,
    legacy,
    listed,
    mapping,
    name,
    number,
    storage,
    tensor,
    text,
)
from convert.hostile_legacy import pair, python_2
from ldm_jax.convert import torch_legacy
from ldm_jax.convert.reader import open_checkpoint
from ldm_jax.errors import UserError

SIX = np.arange(6, dtype=np.float32)


def test_tensors_are_views_of_storages_in_the_listed_order(tmp_path):
    """The second storage comes first; shapes and types are known before anything is read."""
    half = storage(4, "b", "HalfStorage", rest=NONE)
    body = mapping(
        *(text("plain"), tensor(where=storage(6, "a", rest=NONE))),
        *(text("turned"), tensor((3, 2), (1, 3), where=storage(6, "a", rest=NONE))),
        *(text("late"), tensor((2,), (2,), 1, half)),
        *(text("old"), tensor((), (), 5, storage(6, "a", rest=NONE), 6, "_rebuild_tensor", ())),
        *(text("number"), number(7)),
    )  # fmt: skip
    halves = np.arange(4, dtype=np.float16)
    data = struct.pack("<q", 4) + halves.tobytes() + struct.pack("<q", 6) + DATA
    arrays = open_checkpoint(legacy(tmp_path / "m.pth", body, keys=listed("b", "a"), data=data))
    expected = {
        "plain": SIX.reshape(2, 3),
        "turned": SIX.reshape(2, 3).T,
        "late": halves[1::2],
        "old": np.float32(5),
        "number": np.int64(7),
    }
    assert {n: (a.shape, a.dtype) for n, a in arrays.items()} == {
        n: (a.shape, a.dtype) for n, a in expected.items()
    }
    for key, array in arrays.items():
        np.testing.assert_array_equal(np.asarray(array), expected[key])


def test_state_dicts_of_python_2(tmp_path):
    """OrderedDicts are lists of pairs there; hooks and version numbers are such dicts, too."""
    value = tensor(where=storage(6, rest=NONE), rest=(b"\x89", python_2()))
    short = b"U\x08a.weight"  # as byte strings
    state = python_2(pair(short, value))
    metadata = mapping(text("_metadata"), python_2(pair(text(""), mapping())))
    arrays = open_checkpoint(legacy(tmp_path / "m.pth", state + metadata + b"b"))
    assert list(arrays) == ["a.weight"]
    np.testing.assert_array_equal(np.asarray(arrays["a.weight"]), SIX.reshape(2, 3))


def test_parameters_and_training_checkpoints(tmp_path):
    value = tensor(where=storage(6, rest=NONE))
    parameter = call(name("torch._utils", "_rebuild_parameter"), value, b"\x88", python_2())
    state = mapping(text("epoch"), number(3), text("state_dict"), mapping(text("w"), parameter))
    for protocol in (1, 2, 4):
        path = legacy(tmp_path / "m.ckpt", state, protocol=protocol)
        np.testing.assert_array_equal(np.asarray(open_checkpoint(path)["w"]), SIX.reshape(2, 3))


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    path = legacy(tmp_path / "m.pth")
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"damaged|truncated") as refusal:
            open_checkpoint(path)
        assert str(refusal.value).isprintable()


def test_a_file_that_is_cut_after_opening(tmp_path):
    path = legacy(tmp_path / "m.pth")
    (lazy,) = open_checkpoint(path).values()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="was changed or is truncated"):
        np.asarray(lazy)


def test_limit(tmp_path, monkeypatch):
    """No more is read of the pickles than may be, whatever lengths they claim."""
    monkeypatch.setattr(torch_legacy, "MAX_BYTES", 100)
    with pytest.raises(UserError, match="pickles have more than 100 bytes"):
        open_checkpoint(legacy(tmp_path / "m.pth"))
    with pytest.raises(UserError, match="pickles have more than 4096 bytes"):
        open_checkpoint(legacy(tmp_path / "m.pth", header=MAGIC + b"B\xff\xff\xff\x7f"))
    line = legacy(tmp_path / "m.pth", header=MAGIC + b"I" + b"1" * 5000 + b"\nR")
    with pytest.raises(UserError, match="is damaged"):
        open_checkpoint(line)
