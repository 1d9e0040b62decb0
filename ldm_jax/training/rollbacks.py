"""Goes back to a checkpoint from before a training broke, and on from there with other data."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from ldm_jax.errors import UserError

FILE = "rollbacks.json"
# Trouble shows after it has begun: a state must be older than this many steps before to be trusted.
MARGIN = 5


def choose_step(steps: Sequence[int], begin: int) -> int:
    """The checkpoint to go back to, of those that there are, if trouble shows from `begin` on.

    It is the newest of those that are old enough; the oldest, where none is; and 0, the start,
    where there are none at all.
    """
    trusted = [step for step in steps if step <= begin - 1 - MARGIN]
    return max(trusted) if trusted else min(steps, default=0)


class Rollbacks:
    """Which batches a stage is trained on: all in order, but those that broke it.

    Stored in the stage's folder in one file, `rollbacks.json`, replaced as a whole, which has an
    entry for each time that the stage went back: to which step, and with which batch it went on.

    Attributes:
        count: how often it went back.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        """Reads what is stored.

        Raises:
            UserError: the file is damaged.
        """
        self._path = pathlib.Path(directory) / FILE
        self._entries: list[dict[str, int]] = []
        try:
            self._entries = json.loads(self._path.read_text(encoding="utf-8"))
            self._starts()
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self._path} is damaged ({error}); it says which data the run leaves out: "
                "restore it, or delete it to train on all data from here on"
            ) from error

    @property
    def count(self) -> int:
        return len(self._entries)

    def _starts(self) -> list[tuple[int, int]]:
        """Steps from which on batches are counted from another one, and that one; in order.

        An entry undoes those before it that went back to the same step or a later one.
        """
        starts = [(0, 0)]
        for entry in self._entries:
            step, batch = int(entry["to_step"]), int(entry["next_batch"])
            starts = [start for start in starts if start[0] < step] + [(step, batch)]
        return starts

    def batch(self, step: int) -> int:
        """The number of the batch for the update of a state at `step`, both counted from 0."""
        start, batch = max(start for start in self._starts() if start[0] <= step)
        return batch + step - start

    def batches(self, batches_from: Callable[[int], Iterable[Any]], step: int) -> Iterable[Any]:
        """The batches for the updates from `step` on; `batches_from(n)` are those from the n-th."""
        later = [start for start, _ in self._starts() if start > step]
        if not later:
            return batches_from(self.batch(step))
        # A run that was set back further, as a checkpoint was damaged, comes by here again.
        return self._chained(batches_from, [step, *later])

    def _chained(
        self, batches_from: Callable[[int], Iterable[Any]], steps: list[int]
    ) -> Iterator[Any]:
        for step, end in itertools.zip_longest(steps, steps[1:]):
            batches = iter(batches_from(self.batch(step)))
            try:
                yield from itertools.islice(batches, None if end is None else end - step)
            finally:
                if hasattr(batches, "close"):
                    batches.close()

    def add(self, step: int, to_step: int) -> tuple[int, int]:
        """Goes back from the state at `step` to that at `to_step`, past the data in between.

        Returns the first and the last batch that are left out.
        """
        left_out = self.batch(to_step), self.batch(step) - 1
        self._entries.append(
            {"from_step": step, "to_step": to_step, "next_batch": self.batch(step)}
        )
        if jax.process_index() == 0:
            temporary = self._path.with_suffix(".tmp")
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump(self._entries, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path)
        return left_out
