"""Moves batches to the devices ahead of their use."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from ldm_jax.types import Array

_END = object()


class DeviceBatches:
    """An iterator of batches of global arrays; see `to_device`.

    Attributes:
        wait_seconds: how long the consumer has waited for data so far.
    """

    def __init__(
        self, batches: Iterable[dict[str, np.ndarray]], sharding: jax.sharding.Sharding, size: int
    ):
        self.wait_seconds = 0.0
        self._queue = queue.Queue(maxsize=size)
        stop = threading.Event()
        # The thread must not hold `self`, or an abandoned iterator would never be collected.
        thread = threading.Thread(
            target=_feed,
            args=(iter(batches), sharding, self._queue, stop),
            name="ldm-to-device",
            daemon=True,
        )
        # Runs on close(), when the iterator is collected, and before the interpreter exits: a
        # thread that is inside JAX at exit can crash the process.
        self._finalize = weakref.finalize(self, _shut_down, thread, stop)
        thread.start()

    def __iter__(self) -> DeviceBatches:
        return self

    def __next__(self) -> dict[str, Array]:
        if not self._finalize.alive:
            raise StopIteration
        start = time.perf_counter()
        item = self._queue.get()
        self.wait_seconds += time.perf_counter() - start
        if isinstance(item, dict):
            return item
        self.close()
        if item is _END:
            raise StopIteration
        raise item

    def close(self) -> None:
        """Ends the thread and the iterator of batches that it reads; may be called twice."""
        self._finalize()

    def __enter__(self) -> DeviceBatches:
        return self

    def __exit__(self, *unused) -> None:
        self.close()


def to_device(
    batches: Iterable[dict[str, np.ndarray]], sharding: jax.sharding.Sharding, size: int = 2
) -> DeviceBatches:
    """Moves batches to the devices in a thread, up to `size` steps ahead.

    Every array of a batch is this process's part of a global array with the given sharding, which
    is of the leading axis. An exception in `batches` is raised by `next`. Call `close`, or use
    `with`, when done before the end.
    """
    return DeviceBatches(batches, sharding, size)


def _feed(
    batches: Iterator[dict[str, np.ndarray]],
    sharding: jax.sharding.Sharding,
    out: queue.Queue,
    stop: threading.Event,
) -> None:
    """Fills the queue with batches on the devices, then with _END or an exception."""
    try:
        for batch in batches:
            moved = {
                name: jax.make_array_from_process_local_data(sharding, array)
                for name, array in batch.items()
            }
            if not _put(moved, out, stop):
                break
        else:
            _put(_END, out, stop)
    except BaseException as error:
        _put(error, out, stop)
    finally:
        if hasattr(batches, "close"):
            batches.close()


def _put(item: object, out: queue.Queue, stop: threading.Event) -> bool:
    """Puts an item into the queue unless the consumer stops before there is room."""
    while not stop.is_set():
        try:
            out.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False


def _shut_down(thread: threading.Thread, stop: threading.Event) -> None:
    stop.set()
    if thread is not threading.current_thread():
        thread.join()
