"""From a source to batches, in an order that is a function of (seed, step) alone.

The examples of all epochs form one endless sequence of positions 0, 1, 2, ...; step k of a run
takes the positions k * batch_size to (k + 1) * batch_size. The example at a position follows from
the seed and the epoch, and its crop and flip from the seed and the position. So the step is the
whole state of the data: a resumed run, or one on another number of hosts, sees the same batches.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from ldm_jax.data.bad import first_good
from ldm_jax.data.buckets import Buckets
from ldm_jax.data.draws import Uniforms
from ldm_jax.data.order import epoch_order, uniforms_at
from ldm_jax.data.sources import Source
from ldm_jax.data.transforms import UNIFORMS, Draw, Transform
from ldm_jax.errors import UserError

Batch = dict[str, np.ndarray]
MADE = 0  # the stream of random numbers for what is made of an example


class Batches:
    """An endless iterable of training batches.

    A batch holds the arrays of `transform`, such as 'image' (b, R, R, 3) uint8, then 'index' (b,)
    int32, the places in the source, and each of `fields` (b, ...), where numbers are int32 or
    float32. With p processes b is batch_size / p: each process gets its contiguous part of the
    global batch.

    Args:
        source: where the examples come from.
        transform: what is done to each.
        batch_size: size of the global batch; the source may be smaller.
        seed: of order, crops and flips; not negative.
        start_step: the first step to yield.
        fields: metadata columns to add, such as 'label'.
        threads: batches in the making at a time; 0 makes each when it is asked for.
        prefetch: finished batches that may wait, beyond those in the making.
        process_index: this process.
        process_count: number of processes.
        buckets: sizes among which the batches change; None where all have the transform's own.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        *,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        fields: Sequence[str] = (),
        threads: int = 4,
        prefetch: int = 2,
        process_index: int = 0,
        process_count: int = 1,
        buckets: Buckets | None = None,
    ):
        check_fields(source, fields)
        if buckets is not None and len(buckets) != len(source):
            raise ValueError(f"the buckets have {len(buckets)} images, the source {len(source)}")
        self._source = source
        self._transform = transform
        self._seed = seed
        self._start_step = start_step
        self._fields = tuple(fields)
        self._threads = threads
        self._prefetch = prefetch
        self._batch_size = batch_size
        self._part = _part(batch_size, process_index, process_count)
        self._buckets = buckets

    def batch(self, step: int) -> Batch:
        """Makes the batch of a step, the same whenever and wherever it is called."""
        first = step * self._batch_size + self._part.start
        size, indices = None, []
        if self._buckets is not None:
            size, rows = self._buckets.batch(self._seed, step, self._batch_size)
            indices = rows[self._part.start : self._part.stop].tolist()
        else:
            for position in range(first, first + len(self._part)):
                epoch, place = divmod(position, len(self._source))
                indices.append(int(epoch_order(self._seed, epoch, len(self._source))[place]))
        uniforms = uniforms_at(self._seed, first, len(self._part), UNIFORMS)

        def draw(i: int) -> Draw:
            drawn = self._transform.draw(uniforms[i])
            return drawn._replace(random=Uniforms(self._seed, MADE, first + i), size=size)

        return _make_batch(self._source, self._transform, indices, draw, self._fields)

    def __iter__(self) -> Iterator[Batch]:
        return _iterate(
            self.batch, range(self._start_step, sys.maxsize), self._threads, self._prefetch
        )


def epoch_batches(
    source: Source,
    transform: Transform,
    batch_size: int,
    *,
    count: int = 0,
    rows: Sequence[int] | None = None,
    size: tuple[int, int] | None = None,
    flip: bool = False,
    fields: Sequence[str] = (),
    replace: bool = False,
    threads: int = 4,
    prefetch: int = 2,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """One pass over the source, in order and without augmentation: centred crops, all of them
    mirrored if `flip`, and first captions; over its first `count` examples, if that is not 0, or
    over those at the places `rows`. `size` is (height, width) where it is not the transform's own.

    Batches are those of `Batches` and 'valid' (b,) bool. All have the same size: the last one is
    filled up with copies of the last example, where 'valid' is False. Where another example is in
    the place of a bad one it is so too, unless `replace` says that it counts.
    """
    check_fields(source, fields)
    part = _part(batch_size, process_index, process_count)
    rows = range(len(source)) if rows is None else rows
    count = min(count or len(rows), len(rows))

    def make(step: int) -> Batch:
        indices = np.arange(part.start, part.stop) + step * batch_size
        valid = indices < count
        indices = [int(rows[place]) for place in np.minimum(indices, count - 1)]

        def draw(i: int) -> Draw:
            return Draw(flip, random=Uniforms(0, MADE, indices[i]), first=True, size=size)

        batch = _make_batch(source, transform, indices, draw, fields)
        good = replace | (batch["index"] == indices)
        return {**batch, "valid": valid & good}

    steps = range(-(-count // batch_size))
    return _iterate(make, steps, threads, prefetch)


class CachedSource:
    """Arrays in memory that stand for the images of a source, such as first-stage moments.

    `CachedTransform` picks from them, with the flips that `ImageTransform` would draw.

    Args:
        source: the source whose examples these are, in its order; it still names them.
        cached: name -> (N, 2, ...) array of the plain [:, 0] and the mirrored [:, 1] image, or
            (N, 1, ...) where nothing is flipped; or a list of N such arrays, of one shape for each
            bucket.
        fields: name -> (N, ...) array of metadata.
    """

    def __init__(
        self,
        source: Source,
        cached: dict[str, Sequence[np.ndarray]],
        fields: dict[str, np.ndarray],
    ):
        for name, array in {**cached, **fields}.items():
            if len(array) != len(source):
                raise ValueError(f"'{name}' has {len(array)} rows, the source {len(source)}")
        self._source = source
        self._cached = dict(cached)
        self._fields = dict(fields)
        self.columns = tuple(fields)
        self.label_names = source.label_names
        self.num_labels = source.num_labels

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        arrays = {**self._cached, **self._fields}
        return {name: array[index] for name, array in arrays.items()}

    def name(self, index: int) -> str:
        return self._source.name(index)


def check_fields(source: Source, fields: Sequence[str]) -> None:
    """Raises UserError if the source lacks one of the metadata columns `fields`."""
    for field in fields:
        if field not in source.columns:
            has = ", ".join(source.columns) or "no metadata"
            raise UserError(f"the data has no field '{field}'; it has: {has}")


def _part(batch_size: int, process_index: int, process_count: int) -> range:
    """The rows of the global batch that belong to a process."""
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"the batch size ({batch_size}) must be a positive multiple of the number of "
            f"processes ({process_count})"
        )
    size = batch_size // process_count
    return range(process_index * size, (process_index + 1) * size)


def _make_batch(
    source: Source,
    transform: Transform,
    indices: Sequence[int],
    draw: Callable[[int], Draw],
    fields: Sequence[str],
) -> Batch:
    """Makes a batch of the examples at the places `indices`, or of what is taken for bad ones.

    draw: row of the batch -> its random choices, anew each time.
    """

    def make(index: int, row: int) -> tuple[dict, dict]:
        example = source[index]
        try:
            arrays = transform.apply(example, draw(row))
        except UserError as error:  # which does not know whose example it is
            raise UserError(f"{source.name(index)}: {error}") from error
        for field in fields:
            if example.get(field) is None:
                raise UserError(f"{source.name(index)} has no value for the field '{field}'")
        return {field: example[field] for field in fields}, arrays

    made = [
        first_good(source, index, functools.partial(make, row=row))
        for row, index in enumerate(indices)
    ]
    rows = [arrays for _, (_, arrays) in made]
    batch = {name: np.stack([arrays[name] for arrays in rows]) for name in rows[0]}
    batch["index"] = np.asarray([index for index, _ in made], np.int32)
    for field in fields:
        batch[field] = _field_array([values[field] for _, (values, _) in made], field)
    return batch


def _field_array(values: list, field: str) -> np.ndarray:
    """Stacks the values of a field: integers as int32, floats as float32, text as it is."""
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise UserError(f"the field '{field}' differs in shape between examples") from error
    narrow = {"i": np.int32, "u": np.int32, "f": np.float32}
    return array.astype(narrow.get(array.dtype.kind, array.dtype))


def _iterate(
    make: Callable[[int], Batch], steps: range, threads: int, prefetch: int
) -> Iterator[Batch]:
    """Yields make(step) for each step in order, made ahead of time by threads.

    Threads rather than processes: Pillow releases the interpreter lock while it decodes and
    resizes. An exception in `make` is raised here, when its step is due.
    """
    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=threads + prefetch if threads else 0
    )
    dataset = grain.MapDataset.range(steps.start, steps.stop).map(make)
    iterator = iter(dataset.to_iter_dataset(options))
    try:
        yield from iterator
    finally:  # the threads end when the consumer stops, also in mid-iteration
        iterator.close()
