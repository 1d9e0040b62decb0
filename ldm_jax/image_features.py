"""Features of many images on all devices and processes, kept on the way so that it can go on."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from ldm_jax import distributed, images, lock, memory
from ldm_jax.metrics.features import Extractor, Features
from ldm_jax.metrics.store import Collected, FeatureStore, Kinds, bytes_needed, find_store

SHOWN = 64  # images in a picture
PICTURE = "first.png"
SAVE_SECONDS = 60.0  # between two times that what is done is written


class Origin(NamedTuple):
    """Where images come from.

    Attributes:
        title: what they are, in words.
        about: all that they follow from, in values that JSON can hold.
        count: how many there are.
        size: height and width.
        unit: how many are made at a time, a multiple of the processes.
        parts: start -> of each unit from image number `start` on this process's part, (b, H, W, 3)
            uint8; see `own_rows`.
    """

    title: str
    about: dict[str, Any]
    count: int
    size: tuple[int, int]
    unit: int
    parts: Callable[[int], Iterator[np.ndarray]]


def own_rows(unit: int, count: int) -> slice:
    """Which of the `count` images of a unit are this process's: each has a piece of equal size."""
    size = unit // jax.process_count()
    first = jax.process_index() * size
    return slice(min(first, count), min(first + size, count))


def collect(
    origin: Origin,
    extractors: Mapping[str, Extractor],
    kinds: Kinds,
    folder: pathlib.Path,
    picture: pathlib.Path,
    keep: np.ndarray | None = None,
) -> Collected | None:
    """Takes the features of all images of an origin.

    They are kept in a folder below `folder` that is of this origin and these networks: a run that
    was cut off goes on, and one that is complete is read. Process 0 holds and writes them.

    Args:
        origin: of the images.
        extractors: networks by their names.
        kinds: what becomes of the features 'NETWORK.OUTPUT'.
        folder: of all that is kept.
        picture: a file that shows the first images.
        keep: (count,) bool, the images of which features are kept; None keeps all of them.

    Returns:
        what was found, on process 0; None on others.

    Raises:
        UserError: the images cannot be made or read, or the folder cannot be written.
    """
    digests = {name: extractor.digest for name, extractor in extractors.items()}
    about = {**origin.about, "count": origin.count, "networks": digests}
    place, kinds = find_store(folder, about, kinds, origin.count)
    with contextlib.ExitStack() as stack:
        store = None
        with distributed.agreed():
            if distributed.is_main():
                stack.enter_context(lock.hold(place))
                store = FeatureStore(place, about, kinds)
        done = distributed.most(store.done if store else 0)
        if done:
            print(f"{origin.title}: {done:,} of {origin.count:,} are done already", flush=True)
        if done < origin.count:
            _extract(origin, extractors, store, place, done, keep)
        if store is None:
            return None
        if (place / PICTURE).is_file():
            shutil.copyfile(place / PICTURE, picture)
        return store.result()


def _extract(
    origin: Origin,
    extractors: Mapping[str, Extractor],
    store: FeatureStore | None,
    folder: pathlib.Path,
    done: int,
    keep: np.ndarray | None,
) -> None:
    """Extracts what is left, and saves it now and then."""
    progress = _Progress(origin.title, done, origin.count)
    names = {
        f"{network}.{output}": (network, output)
        for network, extractor in extractors.items()
        for output in extractor.outputs
    }
    saved = time.monotonic()
    with contextlib.closing(progress):
        for part in origin.parts(done):
            if done == 0 and store:
                images.save_png(folder / PICTURE, images.make_grid(part[:SHOWN]))
            found = {name: extractor.extract(part) for name, extractor in extractors.items()}
            mine = {name: found[network][output] for name, (network, output) in names.items()}
            joined = _join(mine, len(part), origin.unit)
            count = min(origin.unit, origin.count - done)
            if store:
                chosen = None if keep is None else keep[done : done + count]
                store.add(joined, count, chosen)
            done += count
            progress.update(done)
            if store and (done == origin.count or time.monotonic() - saved > SAVE_SECONDS):
                store.save()
                saved = time.monotonic()


def _join(mine: Features, rows: int, unit: int) -> Features:
    """The features of all processes' parts of a unit, in order, on each of them."""
    if jax.process_count() == 1:
        return mine
    size = unit // jax.process_count()  # collectives need equal shapes
    padded = {name: np.pad(x, ((0, size - len(x)), (0, 0))) for name, x in mine.items()}
    valid = multihost_utils.process_allgather(np.arange(size) < rows).reshape(-1)
    gathered = multihost_utils.process_allgather(padded)
    return {name: x.reshape(-1, x.shape[-1])[valid] for name, x in gathered.items()}


class _Progress:
    """A bar where there is a terminal, and a line that says how long the whole will take."""

    def __init__(self, title: str, done: int, total: int) -> None:
        self._title, self._total = title, total
        self._begin, self._first = time.monotonic(), done
        self._units = 0  # that are done
        shown = {"unit": "image", "leave": False, "disable": not sys.stderr.isatty()}
        self._bar = tqdm(total=total, initial=done, desc=title[:40], **shown)

    def update(self, done: int) -> None:
        now = time.monotonic()
        self._bar.update(done - self._bar.n)
        self._units += 1
        if self._units == 1:  # which compiled its programs
            self._begin, self._first = now, done
        elif self._units == 2 and done < self._total:
            rate = (done - self._first) / max(now - self._begin, 1e-9)
            left, held = self._total - done, memory.held_by_process() / 1e9
            tqdm.write(
                f"{self._title}: {rate:.3g} images/s, so about {duration(left / rate)} for the "
                f"{left:,} that are left; this process holds {held:.1f} GB"
            )

    def close(self) -> None:
        self._bar.close()


def duration(seconds: float) -> str:
    """A length of time in words, such as '3 h 20 min'."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def foresee(sets: Sequence[tuple[str, int, int, Kinds]]) -> tuple[str, int]:
    """What the features of sets of images take, in words and in bytes.

    Each set has a title, a number of images, how many of these are kept, and kinds of features.
    """
    said, total = [], 0
    for title, count, kept, kinds in sets:
        need = bytes_needed(kinds, count, kept)
        said.append(f"{count:,} {title} {need / 1e9:.2f} GB")
        total += need
    free = memory.free_on_host()
    known = "" if free is None else f", {free / 1e9:.1f} GB are free"
    return f"memory for features at most: {', '.join(said)}{known}", total
