"""Leaves a run in an orderly way when the user or the machine asks for it.

Only Python's own modules are imported here, so that a command can listen before it imports more.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType

EXIT_PREEMPTED = 75
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_FLUSHING = 2.0  # seconds that output has to be read


class Interrupted(Exception):
    """The run was asked to stop and has saved its state; exit code 75, the same command resumes."""


class Interrupts:
    """While entered, SIGINT and SIGTERM only raise a flag, which the loop reads between steps.

    A second signal changes nothing: the save that is under way is never cut short.

    Attributes:
        requested: whether a signal came.
        unsaved: whether there are steps that no checkpoint holds.
        leaving: called before the process is ended; see `listen`.
    """

    def __init__(self) -> None:
        self.requested = False
        self.unsaved = False
        self.leaving: Callable[[], None] = lambda: None
        self._alone = False  # the command's only process, which others do not wait for
        # Held while the first signal is told of, which the watching thread must not cut short;
        # reentrant, as a second one may come meanwhile.
        self._telling = threading.RLock()
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        # Python handles signals in the main thread only; elsewhere they stay as they are.
        if self is not _command and threading.current_thread() is threading.main_thread():
            self._install()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self is not _command:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before.clear()

    def check(self, place: str) -> None:
        """Raises Interrupted if a signal came; for places where nothing is left to save.

        Of several hosts, all must call it there, and all leave if one of them was asked to.
        """
        from ldm_jax import distributed

        if distributed.any_host(self.requested):
            raise Interrupted(f"stopped {place}; the same command goes on from here")

    @contextlib.contextmanager
    def saved(self) -> Iterator[None]:
        """Within, a checkpoint holds all steps so far."""
        before, self.unsaved = self.unsaved, False
        try:
            yield
        finally:
            self.unsaved = before

    def joined(self, others: bool) -> None:
        """Says, once it is known, whether the command runs in several processes.

        If not, a signal ends it at once wherever nothing is unsaved, whatever it is at: a program
        of the devices may take minutes to compile, and cannot be left otherwise.

        Raises:
            Interrupted: a signal came before, and there are no others to tell.
        """
        self._alone = not others
        if self._alone and self.requested:
            raise Interrupted("stopped before anything was done; the same command begins again")

    def _install(self) -> None:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._hear(number)

    def _hear(self, number: int) -> None:
        with self._telling:
            first, self.requested = not self.requested, True
            if first:
                what = "saving after the step in progress" if self.unsaved else "stopping"
                # Not print: the signal may have come in the middle of one, which must not be
                # entered again.
                os.write(2, f"\n{signal.Signals(number).name}: {what} ...\n".encode())

    def _watch(self, pipe: int) -> None:
        """Waits for the first signal, which the main thread may be too busy to handle."""
        while (number := os.read(pipe, 1)[0]) not in _SIGNALS:
            continue  # other signals come here too
        self._hear(number)
        if self._alone and not self.unsaved:
            # In a thread: what reads them may be gone, or may read no more.
            flushing = threading.Thread(target=_flush, daemon=True)
            flushing.start()
            flushing.join(_FLUSHING)
            try:
                self.leaving()
            finally:
                os._exit(EXIT_PREEMPTED)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


_command: Interrupts | None = None  # signals are those of the whole process


def listen() -> None:
    """Listens from now on until the process ends; for commands, as the first thing they do."""
    global _command
    pipe, end = os.pipe()
    os.set_blocking(end, False)
    _command = Interrupts()
    _command._install()
    signal.set_wakeup_fd(end, warn_on_full_buffer=False)
    threading.Thread(target=_command._watch, args=(pipe,), name="ldm-signals", daemon=True).start()


def of_command() -> Interrupts | None:
    """What the command listens with; None if it does not."""
    return _command


def end_listening() -> None:
    """Before the interpreter ends, which takes a while: what comes now changes nothing any more."""
    if _command is not None:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
