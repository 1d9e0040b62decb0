"""Batches of images of one size out of several, so that not all must be cut to squares.

Each image goes to the bucket, a size, whose ratio is nearest to its own. As without buckets, the
step alone says which images make a batch. Every bucket has an endless sequence of positions of its
own, epoch after epoch, and its batches take them in turn. In epoch e of the run the bucket b of
n_b images has floor((e + 1) n_b / B) - floor(e n_b / B) batches of B: what does not fill a batch
waits for the next epoch, and nothing is dropped. The batches of an epoch come in random order.
"""

from __future__ import annotations

import bisect
import concurrent.futures
import functools
from collections.abc import Sequence

import numpy as np

from ldm_jax.data.order import permutation
from ldm_jax.data.sources import Source, size_of

Size = tuple[int, int]
_CHUNK = 256  # images that a thread measures at a time
_SAME_RATIO = 1e-6  # difference of the logarithms of two ratios


class Buckets:
    """The images of each bucket, and what the batches of a run are made of.

    Args:
        sizes: (height, width) of each bucket.
        bucket_of: (N,) the bucket of each image of a source, as `assign` gives it.

    Attributes:
        sizes: as given.
        members: of each bucket, the places of its images in the source, in its order.
    """

    def __init__(self, sizes: Sequence[Size], bucket_of: np.ndarray):
        self.sizes = tuple((int(height), int(width)) for height, width in sizes)
        self.members = [np.flatnonzero(bucket_of == b) for b in range(len(sizes))]
        self._count = len(bucket_of)
        # At the boundary of an epoch, two of each are needed.
        self._permutation = functools.lru_cache(2 * len(sizes) + 2)(permutation)

    def __len__(self) -> int:
        return self._count

    def summary(self) -> str:
        """The sizes and how many images each has, for a message."""
        parts = zip(self.sizes, self.members, strict=True)
        return ", ".join(f"{high}x{wide} {len(rows)} images" for (high, wide), rows in parts)

    def batch(self, seed: int, step: int, batch_size: int) -> tuple[Size, np.ndarray]:
        """The size of a step's images, and their places in the source: (batch_size,) int."""
        epoch = self._epoch(step, batch_size)
        before, after = (self._batches(e, batch_size) for e in (epoch, epoch + 1))
        ends = np.cumsum([b - a for a, b in zip(before, after, strict=True)])
        order = self._permutation(seed, epoch, int(ends[-1]))
        slot = int(order[step - sum(before)])
        bucket = int(np.searchsorted(ends, slot, "right"))
        # Of all batches of this bucket so far, counted from the run's beginning
        number = after[bucket] - (int(ends[bucket]) - slot)
        return self.sizes[bucket], self._take(seed, bucket, number * batch_size, batch_size)

    def _take(self, seed: int, bucket: int, first: int, count: int) -> np.ndarray:
        members, part = self.members[bucket], bucket + 1  # part 0 orders the batches
        rows = []
        while count > 0:
            epoch, place = divmod(first, len(members))
            order = self._permutation(seed, epoch, len(members), part)
            rows.append(members[order[place : place + count]])
            first, count = first + len(rows[-1]), count - len(rows[-1])
        return np.concatenate(rows)

    def _batches(self, epoch: int, batch_size: int) -> list[int]:
        """How many batches of each bucket there are before an epoch."""
        return [epoch * len(members) // batch_size for members in self.members]

    def _epoch(self, step: int, batch_size: int) -> int:
        """The last epoch that begins at or before a step."""
        low = step * batch_size // self._count
        high = (step + len(self.sizes)) * batch_size // self._count + 2
        epochs = range(low, high)
        begun = bisect.bisect(epochs, step, key=lambda e: sum(self._batches(e, batch_size)))
        return epochs[begun - 1]


def assign(sizes: Sequence[Size], images: np.ndarray) -> np.ndarray:
    """The bucket of each image: (N,) int, for buckets `sizes` and (N, 2) heights and widths.

    Its ratio is the nearest in the logarithm. Of buckets of the same ratio it is the largest that
    an image fills without being enlarged, or else the smallest.
    """
    boxes, images = np.asarray(sizes, np.float64), np.asarray(images, np.float64)
    ratios, own = (np.log(x[:, 1] / x[:, 0]) for x in (boxes, images))
    distance = np.abs(own[:, None] - ratios)  # (N, buckets)
    near = distance <= distance.min(axis=1, keepdims=True) + _SAME_RATIO
    filled = (images[:, None] >= boxes).all(axis=-1)
    area = boxes.prod(axis=-1)
    return np.where(near, np.where(filled, area, -area), -np.inf).argmax(axis=1)


def image_sizes(source: Source, threads: int) -> np.ndarray:
    """Heights and widths of all images of a source, (N, 2) int; reads the header of each.

    Raises:
        UserError: one cannot be read.
    """

    def measure(start: int) -> list[Size]:
        return [size_of(source, i) for i in range(start, min(start + _CHUNK, len(source)))]

    with concurrent.futures.ThreadPoolExecutor(max(1, threads)) as pool:
        parts = pool.map(measure, range(0, len(source), _CHUNK))
        return np.array([size for part in parts for size in part], np.int64).reshape(-1, 2)


def make_buckets(source: Source, sizes: Sequence[Size], threads: int) -> Buckets:
    """Measures the images of a source and gives each its bucket."""
    return Buckets(sizes, assign(sizes, image_sizes(source, threads)))
