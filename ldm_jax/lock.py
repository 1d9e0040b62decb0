"""One writer at a time in a folder, also where several hosts share it.

The writer's file names its host and process, and it is touched every BEAT seconds. A file whose
process is gone is taken over: on the same host the process table says so; from another host it is
the file, when nobody has touched it for STALE seconds. No clocks of two hosts are compared: the age
of a file is counted by the file system that it lies on, or by how long it has been watched.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from ldm_jax.errors import UserError

NAME = "writer.lock"
BEAT = 10.0  # seconds between two touches
STALE = 180.0  # without one, after which a file of another host counts for nothing
_CLEARING = 30.0  # seconds after which one that clears a stale file is taken for dead
_WRITING = 1.0  # seconds that a file may be empty, as it is being written
_EXIT_USER_ERROR = 1


class Lock:
    """What a process holds while it writes to a folder; see `hold`."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.path = folder / NAME
        self._token = uuid.uuid4().hex
        self._released = threading.Event()
        self._changing = threading.Lock()  # the file, by the thread or by `release`

    def take(self) -> bool:
        """Makes the file, unless there is one."""
        record = {"host": socket.gethostname(), "process": os.getpid(), "token": self._token}
        record |= {"started": _started(os.getpid()), "machine": _machine()}
        try:
            # Two that start together cannot both make it.
            file = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(file, json.dumps(record).encode())
        except OSError:  # an empty file would be taken for another writer's
            self.path.unlink()
            raise
        finally:
            os.close(file)
        return True

    def beat(self) -> None:
        """Touches the file until it is released, in a thread of its own."""
        while not self._released.wait(BEAT):
            # A file system may be away for a moment.
            with self._changing, contextlib.suppress(OSError):
                if self._released.is_set():
                    return
                found = _record(self.path)
                if found is None:  # somebody has removed it
                    self.take()
                elif found.get("token") == self._token:
                    os.utime(self.path)
                elif found:
                    self._lost()

    def release(self) -> None:
        """Removes the file; may be called twice."""
        self._released.set()
        with self._changing, contextlib.suppress(OSError):
            if (_record(self.path) or {}).get("token") == self._token:
                self.path.unlink()

    def _lost(self) -> None:
        """Ends a process that slept for so long that another one has taken its place."""
        print(
            f"error: another process has taken over {self.path.parent}, as this one had not moved "
            f"for {STALE:g} seconds; it ends without writing any more",
            file=sys.stderr,
            flush=True,
        )
        os._exit(_EXIT_USER_ERROR)


@contextlib.contextmanager
def hold(folder: str | os.PathLike[str]) -> Iterator[Lock]:
    """Makes this process the only one that writes to a folder, which is made if need be.

    It waits, for at most STALE seconds, where only time can tell whether the process of another
    host is alive. Of several processes that work together, only one may call it.

    Raises:
        UserError: another process writes there, or the folder cannot be written.
    """
    folder = pathlib.Path(folder)
    lock = Lock(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while not lock.take():
            _clear(lock.path)
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror}): choose another --workdir"
        ) from error
    threading.Thread(target=lock.beat, name="ldm-lock", daemon=True).start()
    try:
        yield lock
    finally:
        lock.release()


def _clear(path: pathlib.Path) -> None:
    """Removes another writer's file once that is known to be gone.

    Raises:
        UserError: it is alive.
    """
    record, touched = _read(path), _touched(path)
    if touched is None:  # released just now
        return
    if not record and (_age(path) or 0.0) < _WRITING:
        time.sleep(_WRITING / 10)
        return
    alive = _runs_here(record)
    if alive is None:
        alive = _is_touched(path, touched)
    if alive:
        age = max(0.0, _age(path) or 0.0)
        raise UserError(
            f"{path.parent} is in use: {_who(_read(path))} writes there, and was alive {age:.0f} "
            "seconds ago: wait for its end, stop it, or choose another --workdir"
        )
    with _alone(path.with_name(f"{path.name}.clearing")) as alone:
        if not alone:
            time.sleep(_WRITING / 10)
            return
        # Another one may have cleared it, and taken its place, since it was read.
        if _read(path) != record:
            return
        path.unlink(missing_ok=True)
    print(f"taking over {path.parent}: {_who(record)} has ended without leaving it", flush=True)


@contextlib.contextmanager
def _alone(path: pathlib.Path) -> Iterator[bool]:
    """Whether no other process is within, which takes moments; one may have died there."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except FileExistsError:
        if (_age(path) or 0.0) > _CLEARING:
            path.unlink(missing_ok=True)
        yield False
        return
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)


def _who(record: dict[str, Any]) -> str:
    return f"process {record.get('process', '?')} on {record.get('host', 'an unknown host')}"


def _is_touched(path: pathlib.Path, touched: int) -> bool:
    """Watches a file until it is touched again, or gone, or has been left alone for STALE seconds.

    touched: when it was last touched, as `_touched` tells.
    """
    age = max(0.0, _age(path) or 0.0)
    if age >= STALE:
        return False
    print(
        f"{path.parent} was in use {age:.0f} seconds ago, by {_who(_read(path))}: waiting up to "
        f"{STALE - age:.0f} seconds for a sign of life",
        flush=True,
    )
    end = time.monotonic() + STALE - age
    while time.monotonic() < end:
        time.sleep(min(1.0, BEAT / 4))
        now = _touched(path)
        if now != touched:
            return now is not None
    return False


def _runs_here(record: dict[str, Any]) -> bool | None:
    """Whether the process of a record runs on this machine; None if it is of another one."""
    if not record.get("machine") or record["machine"] != _machine():
        return None
    return record["started"] == _started(record["process"])


def _started(process: int) -> str | None:
    """When a process of this machine was started, in ticks; None if there is none, or it is dead.

    A number alone may have been given to another process since.
    """
    try:
        text = pathlib.Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name, in brackets, may hold anything
    return None if fields[0] in "ZX" else fields[19]


def _machine() -> str:
    """What tells machines apart, since their last start, and their process tables; '' if nothing
    does."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _read(path: pathlib.Path) -> dict[str, Any]:
    """What a file says; {} where there is none, or one that is not written yet."""
    try:
        return _record(path) or {}
    except OSError:
        return {}


def _record(path: pathlib.Path) -> dict[str, Any] | None:
    """What a file says, {} of one that is not written yet; None if it is gone."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _touched(path: pathlib.Path) -> int | None:
    """When a file was last touched, in nanoseconds of its file system; None if it is gone."""
    try:
        with open(path, "rb") as file:  # opened, as a network's file system may remember `stat`
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _age(path: pathlib.Path) -> float | None:
    """Seconds since a file was touched, by the clock that wrote the time; None if it is gone."""
    touched = _touched(path)
    with tempfile.TemporaryFile(dir=path.parent) as probe:
        os.utime(probe.fileno())
        now = os.fstat(probe.fileno()).st_mtime_ns
    return None if touched is None else (now - touched) / 1e9
