"""Images in tar shards of the WebDataset layout, with random access to each."""

from __future__ import annotations

import concurrent.futures
import functools
import glob
import hashlib
import io
import itertools
import os
import pathlib
import re

import numpy as np

from ldm_jax.data.decode import ANY, Limits, decode_image, image_size
from ldm_jax.data.folder import SPLITS
from ldm_jax.data.table import TableSource, select_table
from ldm_jax.data.tar_index import INDEX, ShardIndex, open_index
from ldm_jax.errors import Unreachable, UserError

OPEN_FILES = 256  # shards that are kept open
INDEXERS = 16  # shards that are indexed at a time
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_SHARDS = 10**6


def find_shards(spec: str) -> list[pathlib.Path]:
    """The shards of a name with ranges ({000..009}), choices ({a,b}) and wild cards (*, ?, [...]).

    They are in the order in which the braces count, those of a wild card sorted.

    Raises:
        UserError: a shard of a range is missing, or a wild card matches nothing.
    """
    shards: dict[pathlib.Path, None] = {}
    for name in _expand(os.path.expanduser(spec)):
        found = [name]
        if glob.has_magic(name):
            found = sorted(path for path in glob.glob(name) if not path.endswith(INDEX))
            if not found:
                raise UserError(f"no tar shard matches {name}: check config.data.source")
        elif not os.path.isfile(name):
            raise UserError(
                f"the tar shard {name} is missing: fetch it, or leave it out of config.data.source"
            )
        shards |= dict.fromkeys(map(pathlib.Path, found))
    return list(shards)


def open_tar(
    spec: str, background: tuple[int, int, int], limits: Limits = ANY, **choice: str
) -> TableSource:
    """Opens tar shards as a `Source`; `choice` is that of `select_table`, `limits` of the images.

    Its columns are those of `ShardIndex` and 'file_name', the shard and the image in it. Where the
    names of at least two kinds of shards say train, val or test (as a word of the path below the
    folder that all have in common), these are the splits; otherwise all is 'train'.
    """
    shards = find_shards(spec)
    root = pathlib.Path(os.path.commonpath([shard.absolute().parent for shard in shards]))
    titles = [shard.absolute().relative_to(root).as_posix() for shard in shards]
    with concurrent.futures.ThreadPoolExecutor(INDEXERS) as pool:
        indices = list(pool.map(open_index, shards))
    names, columns, splits = _join(indices, titles, _splits(titles))
    lengths = [len(index.names) for index in indices]
    shard_of = np.repeat(np.arange(len(shards), dtype=np.int32), lengths)
    offsets = np.fromiter(itertools.chain(*(index.offsets for index in indices)), np.int64)
    sizes = np.fromiter(itertools.chain(*(index.sizes for index in indices)), np.int64)
    row_of = {name: row for row, name in enumerate(names)}

    @functools.lru_cache(OPEN_FILES)
    def opened(number: int) -> _Shard:
        return _Shard(shards[number])

    def section(name: str) -> _Section:
        row = row_of[name]
        return _Section(opened(int(shard_of[row])), int(offsets[row]), int(sizes[row]))

    def read(name: str) -> np.ndarray:
        return decode_image(section(name).readall(), f"{root}/{name}", background, limits)

    def measure(name: str) -> tuple[int, int]:
        return image_size(io.BufferedReader(section(name), 4096), f"{root}/{name}", limits)

    title = f"the shards {spec}"
    return select_table(names, columns, splits, read, title=title, measure=measure, **choice)


def fingerprint(spec: str) -> str:
    """Tells whether the shards are others than before, by their names, sizes and times of change;
    that of shards that are not there is one of none.
    """
    said = hashlib.sha256()
    try:
        shards = find_shards(spec)
    except UserError:
        shards = []
    for shard in shards:
        stat = shard.stat()
        said.update(f"{shard}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return said.hexdigest()


class _Shard:
    """An open file, closed when the last reader has dropped it."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise Unreachable(
                f"cannot read the shard {path} ({error.strerror}): fetch it again"
            ) from error

    def read(self, count: int, offset: int) -> bytes:
        """Reads so many bytes; several threads may do so at a time."""
        try:
            data = os.pread(self._file, count, offset)
        except OSError as error:
            raise Unreachable(
                f"cannot read the shard {self.path} ({error.strerror}): fetch it again"
            ) from error
        if len(data) < count:
            raise Unreachable(
                f"the shard {self.path} has become shorter since it was opened: fetch it again"
            )
        return data

    def __del__(self):
        if hasattr(self, "_file"):
            os.close(self._file)


class _Section(io.RawIOBase):
    """A part of a shard as a file, of which a reader may take only the beginning."""

    def __init__(self, shard: _Shard, offset: int, size: int):
        self._shard, self._offset, self._size = shard, offset, size
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = max(0, start + offset)
        return self._place

    def readinto(self, buffer: memoryview) -> int:
        count = max(0, min(len(buffer), self._size - self._place))
        buffer[:count] = self._shard.read(count, self._offset + self._place)
        self._place += count
        return count

    def readall(self) -> bytes:
        return self._shard.read(self._size, self._offset)


def _expand(name: str) -> list[str]:
    """Spells out the ranges and choices in braces."""
    match = _BRACES.search(name)
    if match is None:
        return [name]
    inner, span = match[1], _RANGE.fullmatch(match[1])
    if span:
        first, last = int(span[1]), int(span[2])
        if not first <= last < first + _MOST_SHARDS:
            raise UserError(
                f"cannot read the range {match[0]} in config.data.source: count upwards"
            )
        choices = [f"{number:0{len(span[1])}d}" for number in range(first, last + 1)]
    elif "," in inner:
        choices = inner.split(",")
    else:
        raise UserError(
            f"cannot read {match[0]} in config.data.source: write a range as {{000..009}} or a "
            "choice as {a,b}"
        )
    rest = _expand(name[match.end() :])
    return [name[: match.start()] + choice + end for choice in choices for end in rest]


def _splits(titles: list[str]) -> list[str]:
    """The split of each shard by its path."""
    found = []
    for title in titles:
        words = [word for word in re.split("[^a-z]+", title.lower()) if word in SPLITS]
        found.append(words[0] if words else "")
    return found if len(set(found)) > 1 and all(found) else ["train"] * len(titles)


def _join(
    indices: list[ShardIndex], titles: list[str], splits: list[str]
) -> tuple[list[str], dict[str, list], list[str]]:
    """Names, columns and splits of the images of all shards."""
    keys = dict.fromkeys(key for index in indices for key in index.columns)
    columns: dict[str, list] = {key: [] for key in keys}
    names, split_of = [], []
    for index, title, split in zip(indices, titles, splits, strict=True):
        count = len(index.names)
        names += [f"{title}/{name}" for name in index.names]
        split_of += [split] * count
        for key in keys:
            columns[key] += index.columns.get(key, [None] * count)
    columns["file_name"] = names
    return names, columns, split_of
