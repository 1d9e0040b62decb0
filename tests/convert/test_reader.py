"""Foreign checkpoints: read exactly, one array at a time; hostile ones are refused by name."""

import pickle
import resource
import subprocess
import sys
import time

import numpy as np
import pytest

from convert import archives, hostile, hostile_mutations
from convert.archives import mapping, number, pickled, storage, tensor, text
from ldm_jax import tensors
from ldm_jax.convert import pickles, reader, torch_values
from ldm_jax.convert.reader import open_checkpoint
from ldm_jax.convert.torch_file import save_checkpoint
from ldm_jax.errors import UserError
from ldm_jax.tensors import open_tensors, save_tensors


def archive(tmp_path, body, protocol=2, **members):
    return archives.archive(tmp_path / "m.ckpt", pickled(body, protocol), **members)


@pytest.mark.parametrize("title", hostile.CASES)
def test_hostile_files_are_refused_by_name(title, tmp_path):
    case = hostile.CASES[title]
    with pytest.raises(UserError, match=case.message) as refusal:
        open_checkpoint(case.make(tmp_path))
    assert str(refusal.value).isprintable()  # one line
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("title", [t for t, case in hostile.CASES.items() if case.code])
def test_the_hostile_code_is_live(title, tmp_path):
    try:
        pickle.loads(hostile.CASES[title].code(hostile.touch(tmp_path)))
    except TypeError:
        pass  # what the code gave is no good, after it ran
    assert (tmp_path / "marker").exists()


def colliding(count: int) -> list[bytes]:
    """Numbers that all have the hash 0."""
    return [number(n * (2**61 - 1)) for n in range(count)]


def test_numbers_of_one_hash_take_no_time(tmp_path):
    """As keys of dicts or of the memo they would take minutes: no number is ever hashed."""
    numbers = colliding(40_000)
    keys = mapping(*(part for n in numbers for part in (n, b"N")))
    memo = b"".join(b"p%d\n" % (n * (2**61 - 1)) for n in range(40_000))
    path = archive(tmp_path, hostile.beside(keys + memo))
    start = time.process_time()
    assert list(open_checkpoint(path)) == ["w"]
    assert time.process_time() - start < 10


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@pytest.mark.parametrize("count", [600, pytest.param(20_000, marks=pytest.mark.slow)])
def test_damaged_files_are_refused_in_one_line_or_read(count, tmp_path):
    """The numbers: `pytest -n 0 -m slow -rP -k damaged_files tests/convert/test_reader.py`."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times, refused = [], 0
    for seed in range(count):
        path = hostile_mutations.mutant(tmp_path, seed)
        start = time.process_time()
        try:
            for array in open_checkpoint(path).values():
                np.asarray(array)
        except UserError as error:
            refused += 1
            assert str(error).isprintable(), f"seed {seed}"
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        times.append(time.process_time() - start)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024
    print(f"{count} files, {refused} refused, slowest {max(times):.3f} s, {memory / 1e6:.1f} MB")
    assert 0.5 * count < refused < 0.99 * count
    assert max(times) < 5 and memory < 200e6


def test_a_flipped_bit_is_refused_by_name(tmp_path):
    """A storage that is read whole is compared with its checksum, if the file has one."""
    body = mapping(text("whole"), tensor((3, 2), (1, 3)), text("part"), tensor((2,), (1,)))
    path = archives.patched(archive(tmp_path, body), archives.DATA, b"\1" + archives.DATA[1:])
    arrays = open_checkpoint(path)
    with pytest.raises(UserError, match="is damaged: 'whole' does not have its checksum"):
        np.asarray(arrays["whole"])
    assert np.asarray(arrays["part"]).shape == (2,)
    # PyTorch writes 0 if it is told to compute no checksum.
    hostile.central(path, b"archive/data/0", 16, bytes(4))
    assert np.asarray(open_checkpoint(path)["whole"]).shape == (3, 2)


def test_our_files_have_checksums_and_plain_names(tmp_path):
    path = tmp_path / "m.ckpt"
    weights = {"a": np.arange(6.0, dtype=np.float32).reshape(2, 3), "empty": np.zeros((0, 2), "f4")}
    weights["scalar"] = np.asarray(3)
    save_checkpoint(path, weights)
    for key, array in open_checkpoint(path).items():
        np.testing.assert_array_equal(np.asarray(array), weights[key], strict=True)
    archives.patched(path, weights["a"].tobytes(), bytes(24))
    with pytest.raises(UserError, match="'a' does not have its checksum"):
        np.asarray(open_checkpoint(path)["a"])


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "m.ckpt"
    path.write_bytes(b"old")

    def fail():
        raise OSError("gone")

    lazy = tensors.LazyArray((1,), np.dtype(np.float32), fail)
    with pytest.raises(OSError, match="gone"):
        save_checkpoint(path, {"a": lazy})
    with pytest.raises(UserError, match="a is float64, but only"):
        save_checkpoint(path, {"a": np.zeros(1)})
    with pytest.raises(UserError, match=r"the name '\.\./a'"):
        save_checkpoint(path, {"../a": np.zeros(1, np.float32)})
    assert [p.name for p in tmp_path.iterdir()] == ["m.ckpt"] and path.read_bytes() == b"old"


def test_limits(tmp_path, monkeypatch):
    path = archives.archive(tmp_path / "m.ckpt")
    monkeypatch.setattr(pickles, "MAX_STEPS", 10)
    with pytest.raises(UserError, match="more than 10 steps"):
        open_checkpoint(path)
    monkeypatch.setattr(reader, "MAX_BYTES", 100)
    with pytest.raises(UserError, match=r"in 'archive/data.pkl': refused, more than 100"):
        open_checkpoint(path)
    archives.safetensors(tmp_path / "m.safetensors", {"w": archives.entry(0, 4)}, bytes(4))
    monkeypatch.setattr(tensors, "MAX_HEADER", 20)
    with pytest.raises(UserError, match="cut off or too long"):
        open_checkpoint(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("shape", "strides", "start"),
    [
        ((2, 3), (3, 1), 0),
        ((3, 2), (1, 3), 0),  # transposed
        ((3,), (2,), 1),  # every other one
        ((2, 1, 3), (3, 2**62, 1), 0),  # the stride of a single element means nothing
        ((), (), 5),
        ((0, 3), (3, 1), 0),
        ((2, 2), (2, 1), 1),
        ((4, 3), (1, 1), 0),  # overlapping
        ((5, 2), (0, 1), 2),  # repeated
    ],
)
def test_views(tmp_path, shape, strides, start):
    sizes = [4 * stride if size > 1 else 0 for size, stride in zip(shape, strides, strict=True)]
    memory = np.arange(6, dtype=np.float32)
    expected = np.ndarray(shape, np.float32, memory, 4 * start, sizes)
    path = archive(tmp_path, mapping(text("w"), tensor(shape, strides, start)))
    (lazy,) = open_checkpoint(path).values()
    assert (lazy.shape, lazy.dtype) == (shape, np.float32)
    np.testing.assert_array_equal(np.asarray(lazy), expected)
    save_tensors(tmp_path / "w.safetensors", {"w": lazy})
    np.testing.assert_array_equal(
        np.asarray(open_tensors(tmp_path / "w.safetensors")[0]["w"]), expected
    )


@pytest.mark.parametrize("kind", sorted(torch_values.STORAGES))
def test_types(tmp_path, kind):
    dtype = torch_values.STORAGES[kind]
    values = np.asarray([0, 1, 2, 3, 250]).astype(dtype)
    module, attribute = kind.rsplit(".", 1)
    where = storage(5, kind=attribute, module=module)
    path = archive(
        tmp_path, mapping(text("w"), tensor((5,), (1,), where=where)), data__0=values.tobytes()
    )
    read = np.asarray(open_checkpoint(path)["w"])
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, values)


def test_training_checkpoint(tmp_path):
    sd = open_checkpoint(archive(tmp_path, archives.TRAINING, 4, byteorder=b"little"))
    assert list(sd) == ["a.weight", "a.old", "a.param", "num", "flag", "rate"]
    for key in ("a.weight", "a.old", "a.param"):
        np.testing.assert_array_equal(np.asarray(sd[key]), np.arange(6.0).reshape(2, 3))
    assert [np.asarray(sd[key]).item() for key in ("num", "flag", "rate")] == [-3, True, 0.0]


def test_what_looks_bad_and_does_no_harm(tmp_path):
    """Memory is not reserved at the file's word, and members are not looked into unasked."""
    code = pickled(archives.call(hostile.SYSTEM, text(hostile.touch(tmp_path))))
    far = tensor() + b"r\xff\xff\xff\x7f"  # memo number 2^31 - 1
    frame = b"\x95" + (2**40).to_bytes(8, "little")
    body = frame + mapping(text("w"), far, text("v"), b"j\xff\xff\xff\x7f")
    path = archive(tmp_path, body, 4, extra_pkl=code, data__9=code)
    assert list(open_checkpoint(path)) == ["w", "v"]
    assert not (tmp_path / "marker").exists()


def test_files_that_change_after_opening(tmp_path):
    path = archives.archive(tmp_path / "m.ckpt")
    (lazy,) = open_checkpoint(path).values()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="was changed or is truncated"):
        np.asarray(lazy)
    path.unlink()
    with pytest.raises(UserError, match="cannot read"):
        np.asarray(lazy)


def test_other_names_and_folders(tmp_path):
    for file in ("missing.ckpt", "."):
        with pytest.raises(UserError, match="no checkpoint at"):
            open_checkpoint(tmp_path / file)
    archives.archive(tmp_path / "m.zip")
    with pytest.raises(UserError, match=r"by its name: \.ckpt"):
        open_checkpoint(tmp_path / "m.zip")


def test_sharded(tmp_path):
    archives.safetensors(tmp_path / "1.safetensors", {"a": archives.entry(0, 4)}, bytes(4))
    archives.archive(tmp_path / "2.bin")
    index = tmp_path / "model.index.json"
    index.write_text('{"metadata": {}, "weight_map": {"w": "2.bin", "a": "1.safetensors"}}')
    sd = open_checkpoint(index)
    assert {k: v.shape for k, v in sd.items()} == {"w": (2, 3), "a": (1,)}
    np.testing.assert_array_equal(np.asarray(sd["w"]), np.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_files_of_pytorch(tmp_path, protocol, zipped):
    torch = pytest.importorskip("torch")
    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)]
    sd = torch.nn.Sequential(*layers).state_dict()
    sd["t"] = torch.randn(4, 5).t()
    sd["half"] = torch.randn(3).bfloat16()[1:]
    sd["parameter"] = torch.nn.Parameter(torch.randn(2))
    optimiser = torch.optim.Adam(layers[0].parameters()).state_dict()
    checkpoint = {"state_dict": sd, "optimizer_states": [optimiser], "epoch": 1}
    options = dict(pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    torch.save(checkpoint, tmp_path / "m.ckpt", **options)
    arrays = open_checkpoint(tmp_path / "m.ckpt")
    assert list(arrays) == list(sd)
    for key, value in sd.items():
        value, array = value.detach(), np.asarray(arrays[key])
        if value.dtype == torch.bfloat16:
            value, array = value.float(), array.astype(np.float32)
        np.testing.assert_array_equal(array, value.numpy(), strict=True)


MEMORY = """
import resource, sys
from ldm_jax import tensors
from ldm_jax.convert import reader
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tensors.save_tensors(sys.argv[2], reader.open_checkpoint(sys.argv[1]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("zipped", [True, False])
def test_memory(tmp_path, zipped):
    """300 MB in twenty transposed tensors take no more memory than two of them."""
    count, body, data = 2**22 - 2**18, b"", []
    for i in range(20):
        where = storage(count, str(i), rest=() if zipped else archives.NONE)
        body += text(f"w{i}") + tensor((1024, count // 1024), (1, 1024), where=where)
        data.append(np.random.default_rng(i).bytes(4 * count))
    if zipped:
        path = archive(tmp_path, mapping(body), **{f"data__{i}": d for i, d in enumerate(data)})
    else:
        stored = b"".join(count.to_bytes(8, "little") + part for part in data)
        keys = archives.listed(*map(str, range(20)))
        path = archives.legacy(tmp_path / "m.pth", mapping(body), keys=keys, data=stored)
        del stored
    out = tmp_path / "m.safetensors"
    del data
    command = [sys.executable, "-c", MEMORY, str(path), str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert out.stat().st_size > 300e6
    assert int(run.stdout) < 3 * 4 * count  # read, made contiguous, and some slack
    expected = np.asarray(open_checkpoint(path)["w7"])
    np.testing.assert_array_equal(np.asarray(open_tensors(out)[0]["w7"]), expected)
