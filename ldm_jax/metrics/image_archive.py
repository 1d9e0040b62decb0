"""Archives (.npz): written all or nothing; images in them, as the ADM suite keeps samples, read
piece by piece.
"""

from __future__ import annotations

import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from ldm_jax.errors import UserError
from ldm_jax.metrics.features import check_images

IMAGES = "arr_0"  # what np.savez calls the first array that has no name
_BATCH = 256


class ImageArchive(NamedTuple):
    """N images in a file.

    Attributes:
        path: of the file.
        shape: (N, H, W, 3).
    """

    path: pathlib.Path
    shape: tuple[int, ...]

    def batches(self, size: int = _BATCH, start: int = 0) -> Iterator[np.ndarray]:
        """The images from number `start` on, `size` at a time: (B, H, W, 3) uint8.

        Raises:
            UserError: the file is damaged.
        """
        row = int(np.prod(self.shape[1:]))
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{IMAGES}.npy") as file:
                _read_header(file)
                file.seek(start * row, os.SEEK_CUR)
                for first in range(start, self.shape[0], size):
                    count = min(size, self.shape[0] - first)
                    data = file.read(count * row)
                    if len(data) != count * row:
                        raise UserError(f"{self.path} ends within its images: get it again")
                    yield np.frombuffer(data, np.uint8).reshape(count, *self.shape[1:])
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise UserError(f"{self.path} is damaged ({error}): get it again") from error


def open_images(path: str | os.PathLike[str]) -> ImageArchive | None:
    """Opens the images of an .npz file; None if it has no array 'arr_0'.

    Raises:
        UserError: no .npz file, or that array is not (N, H, W, 3) uint8.
    """
    path = pathlib.Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{IMAGES}.npy" not in archive.namelist():
                return None
            with archive.open(f"{IMAGES}.npy") as file:
                shape, column_major, dtype = _read_header(file)
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as .npz: {error}") from error
    if dtype.hasobject:
        raise UserError(f"{path} has images of several sizes: crop and resize them alike")
    try:
        check_images(np.empty((0, *shape[1:]), dtype))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if column_major:
        raise UserError(f"{path} has its images in Fortran's order: save them in C's")
    return ImageArchive(path, shape)


def _read_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def write_archive(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to a file, all or nothing; raises OSError if it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
