"""What becomes of the bad examples of a set: others are taken in their place, up to a share.

Which other one follows from the place in the set alone, so every pass over the set, a resumed run
and one on another number of hosts see the same.
"""

from __future__ import annotations

import os
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from tqdm import tqdm

from ldm_jax.data.draws import Uniforms
from ldm_jax.data.sources import Source, size_of
from ldm_jax.errors import Unreachable, UserError

BAD_IMAGES = "bad_images.txt"
BAD_HELD_OUT = "bad_held_out_images.txt"
_STREAM = 1  # of random numbers; 0 is that of what is made of the examples
_TRIES = 100

T = TypeVar("T")


class TolerantSource:
    """A source whose bad examples are replaced, said once each, written down and counted.

    It is `first_good` that replaces them, for whoever reads the set; the source itself still raises
    what is wrong with an example.

    Args:
        source: where the examples come from.
        max_bad: share of the set, from 0 to 1, above which bad examples end a run.
        path: a file with a line for each, its name and what is wrong, which runs that go on read
            and several processes share; made when there is one. None keeps no list.
        total: examples of the set, where `source` is a part of it that was drawn: the share is of
            these; 0 = those of `source`.
    """

    def __init__(
        self, source: Source, max_bad: float, path: pathlib.Path | None, total: int = 0
    ) -> None:
        self._source, self._max_bad, self._path = source, max_bad, path
        self._total = total or len(source)
        self._lock = threading.Lock()
        self._known = _read_names(path)
        self.columns = source.columns
        self.label_names, self.num_labels = source.label_names, source.num_labels
        self.flippable = getattr(source, "flippable", True)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        return self._source[index]

    def name(self, index: int) -> str:
        return self._source.name(index)

    def image_size(self, index: int) -> tuple[int, int]:
        """Height and width of an image, or of the one in its place if its header is bad."""
        return self.first_good(index, lambda place: size_of(self._source, place))[1]

    @property
    def bad(self) -> int:
        """How many bad examples are known, to any process."""
        with self._lock:
            self._known |= _read_names(self._path)
            return len(self._known)

    def first_good(self, index: int, make: Callable[[int], T]) -> tuple[int, T]:
        """Returns `index` and make(index), or of what comes in its place if that raises UserError.

        Raises:
            UserError: there are too many bad ones.
            Unreachable: a file system failed, which says nothing of the example.
        """
        for place in self._places(index):
            try:
                return place, make(place)
            except Unreachable:
                raise
            except UserError as error:
                self._note(place, error)
        see = f": see {self._path}" if self._path else ""
        raise UserError(
            f"there is no good example in place of {self.name(index)} among {_TRIES}{see}"
        )

    def _places(self, index: int) -> Iterator[int]:
        """`index`, and those that may be taken in its place, in their order."""
        yield index
        random = Uniforms(0, _STREAM, index)
        for _ in range(_TRIES):
            yield random.integer(0, len(self) - 1)

    def _note(self, index: int, error: UserError) -> None:
        name, reason = _printable(self.name(index)), _printable(str(error))
        with self._lock:
            if name not in self._known:
                self._known |= _read_names(self._path)  # what other processes have found since
            if name not in self._known:
                self._known.add(name)
                if self._path:
                    _append(self._path, f"{name}\t{reason}\n")
                tqdm.write(f"warning: {reason}; another example takes its place")
            count, total = len(self._known), self._total
        if count > self._max_bad * total:
            listed = "Mend them, or raise max_bad"
            if self._path:
                listed = f"All are listed in {self._path}: mend them and remove that list, or "
                listed += "raise max_bad"
            raise UserError(
                f"{count} of {total} examples ({count / total:.2%}) are bad, more than "
                f"config.data.max_bad={self._max_bad:g} allows; the last: {reason}. {listed}"
            )


def first_good(source: Source, index: int, make: Callable[[int], T]) -> tuple[int, T]:
    """Returns `index` and make(index), or of what comes in its place where a source allows that."""
    if isinstance(source, TolerantSource):
        return source.first_good(index, make)
    return index, make(index)


def _read_names(path: pathlib.Path | None) -> set[str]:
    """The names in a file that `_append` has written."""
    if path is None:
        return set()
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from error
    return {line.partition("\t")[0] for line in text.split("\n") if "\t" in line}


def _append(path: pathlib.Path, line: str) -> None:
    """Adds a line in one write, so that those of several processes do not mix."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror})") from error


def _printable(text: str) -> str:
    """Text in one line, in which every character can be printed and written."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )
