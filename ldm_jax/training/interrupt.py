"""Leaves a run in an orderly way when the user or the machine asks for it."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType

from ldm_jax import distributed


class Interrupted(Exception):
    """The run was asked to stop and has saved its state; exit code 75, the same command resumes."""


class Interrupts:
    """While entered, SIGINT and SIGTERM only raise a flag, which the loop reads between steps.

    A second signal changes nothing: the save that is under way is never cut short.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        # Python handles signals in the main thread only; elsewhere they stay as they are.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            name = signal.Signals(number).name
            # Not print: the signal may have come in the middle of one, which must not be entered
            # again.
            os.write(2, f"\n{name}: saving after the step in progress ...\n".encode())
        self.requested = True

    def check(self, place: str) -> None:
        """Raises Interrupted if a signal came; for places where nothing is left to save.

        Of several hosts, all must call it there, and all leave if one of them was asked to.
        """
        if distributed.any_host(self.requested):
            raise Interrupted(f"stopped {place}; the same command goes on from here")
