"""Data made by the tests of this directory."""

import io
import json
import tarfile
import threading
import time

import numpy as np
import pytest
from PIL import Image

from ldm_jax.errors import UserError

ROTATED = 6  # EXIF: turn by 90 degrees clockwise to show


def write_image(path, level=0, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).save(path)


def write_metadata(directory, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (directory / "metadata.jsonl").write_text("\n".join(lines) + "\n")


class Numbers:
    """Images whose pixels tell the example and the column, with a label."""

    columns = ("label", "text", "ragged")
    label_names = None
    num_labels = 3

    def __init__(self, count, broken=None):
        self.count = count
        self.broken = broken

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index == self.broken:
            raise UserError(f"cannot decode the image {self.name(index)}")
        image = np.full((6, 10, 3), index, np.uint8)
        image[..., 1] = np.arange(10)
        row = {"label": index % 3, "text": f"number {index}", "ragged": [0] * index}
        return {"image": image, **row}

    def name(self, index):
        return f"number {index}"


def loader_threads():
    return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]


def assert_threads_end():
    deadline = time.monotonic() + 5
    while loader_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not loader_threads()


def write(path, content, **options):
    """Writes an array or a Pillow image; the suffix says how."""
    image = content if isinstance(content, Image.Image) else Image.fromarray(content)
    image.save(path, **options)
    return path


def write_json(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def orientation(number):
    exif = Image.Exif()
    exif[274] = number
    return exif


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def refuses(message, function, *arguments):
    """The function raises a UserError of one line that matches."""
    with pytest.raises(UserError, match=message) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)


def picture(level=0, size=(6, 4), kind="PNG", **options):
    """The bytes of a file; size is (width, height)."""
    data = io.BytesIO()
    Image.new("RGB", size, (level, level, level)).save(data, kind, **options)
    return data.getvalue()


def write_tar(path, members, kind="w"):
    """members: name -> bytes, str, or an object for JSON; a list of pairs where names repeat."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, kind) as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            if not isinstance(content, bytes | str):
                content = json.dumps(content)
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
