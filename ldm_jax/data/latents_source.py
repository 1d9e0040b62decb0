"""Stored latents as a source to train from, and what becomes of an example on its way to a batch.

Order, flips and captions are drawn by the same numbers as for images, so that a run sees what it
would see of the images themselves.
"""

from __future__ import annotations

import bisect
import concurrent.futures
import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from ml_collections import ConfigDict

from ldm_jax.data import task_fields
from ldm_jax.data.latents_index import PREFIX, TEXT_CONTEXT, TEXT_MASK, check_index, read_index
from ldm_jax.data.latents_index import unpack as unpack_record
from ldm_jax.data.task_fields import Arrays
from ldm_jax.data.transforms import Draw, draw_flip_and_crop
from ldm_jax.errors import UserError
from ldm_jax.images import to_float

OPENING_THREADS = 16
_READER = "readahead_buffer_size:0"  # examples are read in random order


class LatentsSource:
    """Random access to stored latents; a `Source` whose examples have 'moments' and no 'image'.

    'moments' is (flips, crops, h, w, M), and so begin the shapes of 'segmentation' and 'low_res';
    `LatentsTransform` picks from them.

    Attributes:
        folder: where they are.
        index: what it says of itself.

    Raises:
        UserError: nothing there, or a shard is missing or damaged.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder, self.index = folder, read_index(folder)
        with concurrent.futures.ThreadPoolExecutor(OPENING_THREADS) as pool:
            self._readers = list(pool.map(self._open, range(self.index.shards)))
        self._starts = [self.index.rows(shard).start for shard in range(self.index.shards)]
        self.columns = tuple(f for f in self.index.fields if f != "noise_level")
        self.label_names, self.num_labels = self.index.label_names, self.index.num_labels

    def __len__(self) -> int:
        return self.index.count

    def __getitem__(self, index: int) -> dict:
        shard = bisect.bisect(self._starts, index) - 1
        try:
            (record,) = self._readers[shard].read([index - self._starts[shard]])
            return unpack_record(record, self.index.arrays)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise UserError(
                f"{self.folder / self.index.file(shard)} is damaged at {self.name(index)} "
                f"({reason}): remove it and run ldm_jax.encode again, which makes it anew"
            ) from error

    def name(self, index: int) -> str:
        return f"{PREFIX}{self.folder} number {index}"

    def _open(self, shard: int) -> ArrayRecordReader:
        path, count = self.folder / self.index.file(shard), len(self.index.rows(shard))
        again = "run ldm_jax.encode again, which makes what is missing"
        if not path.is_file():
            raise UserError(f"{path} is missing: {again}")
        try:
            reader = ArrayRecordReader(str(path), _READER)
            found = reader.num_records() if reader.ok() else None
        except (RuntimeError, ValueError, OSError):
            found = None
        if found != count:
            what = "is truncated" if found is None else f"has {found} records in place of {count}"
            raise UserError(f"{path} {what}: remove it and {again}")
        return reader


def latents_folder(source: str) -> pathlib.Path | None:
    """The folder in 'latents:FOLDER'; None where a data set is another."""
    if not source.startswith(PREFIX):
        return None
    return pathlib.Path(source.removeprefix(PREFIX)).expanduser()


def open_latents(config: ConfigDict) -> LatentsSource:
    """Opens config.data.source='latents:FOLDER'.

    Raises:
        UserError: as `LatentsSource` does, or what is stored is not what the config asks for.
    """
    folder = latents_folder(config.data.source)
    check_index(read_index(folder), config, folder)
    return LatentsSource(folder)


@dataclasses.dataclass(frozen=True)
class LatentsTransform:
    """Picks 'moments' (h, w, M) and makes the conditions' fields of a stored example.

    Attributes:
        flip: mirror half of the examples.
        makers: of the fields: (example, draw, (flip, crop) to pick) -> arrays.
    """

    flip: bool
    makers: tuple[Callable[[dict, Draw, tuple[int, int]], Arrays], ...]

    def draw(self, uniforms: np.ndarray) -> Draw:
        return draw_flip_and_crop(uniforms, self.flip, "random")

    def apply(self, example: dict, draw: Draw) -> Arrays:
        crops = example["moments"].shape[1]
        crop = 0 if draw.crop is None else int(draw.crop[0] * crops)
        # What was random of the crop is over: it is one of those that are stored.
        stored = tuple(example["crops"][crop].tolist()) if "crops" in example else None
        draw, place = draw._replace(crop=stored), (int(draw.flip), crop)
        arrays = {"moments": example["moments"][place]}
        for make in self.makers:
            arrays |= make(example, draw, place)
        return arrays


def make_latents_transform(config: ConfigDict, fields: Sequence[str]) -> LatentsTransform:
    """Returns the transform of a config's stored examples that makes `fields`."""
    layout = task_fields.layout(config.layout.length, config.layout.vocab_size)
    noise = config.data.low_res.noise

    def captions(example: dict, draw: Draw, place: tuple[int, int]) -> Arrays:
        row = task_fields.choose_caption(len(example["tokens"]), draw)
        names = ("tokens", TEXT_CONTEXT, TEXT_MASK)
        return {name: example[name][row] for name in names if name in example}

    def boxes(example: dict, draw: Draw, place: tuple[int, int]) -> Arrays:
        entries = [{"label": int(box[0]), "bbox": box[1:].tolist()} for box in example["boxes"]]
        # Of the image, only its size counts.
        image = np.broadcast_to(np.uint8(0), (*example["size"].tolist(), 3))
        return layout(image, {"image": image, "boxes": entries}, draw)

    def segmentation(example: dict, draw: Draw, place: tuple[int, int]) -> Arrays:
        return {"segmentation": example["segmentation"][place].astype(np.int32)}

    def low_res(example: dict, draw: Draw, place: tuple[int, int]) -> Arrays:
        return task_fields.noised(to_float(example["low_res"][place]), noise, draw)

    makers = {"tokens": captions, "boxes": boxes, "segmentation": segmentation, "low_res": low_res}
    return LatentsTransform(config.data.flip, tuple(makers[f] for f in fields if f in makers))
