"""Ends a process whose peers are gone, or that gets no further, so that the run can start again.

Processes that train together wait for each other in every step, for ever if one of them is dead,
stopped or stuck. A thread of each tells the others, through jax's coordination service, what it is
doing and how long ago it got further; another one reads that and gives up, with a line that says
why, the stacks of all threads and exit code 77, where

* a process has not been heard of for the time that is allowed, or says that it has ended;
* no process got any further within it. Who waits for one that compiles, saves or evaluates is not
  stuck: these may take SLOW times as long, and what is not announced as long as it likes.

The thread that tells runs in all phases, so that silence means the same in each of them. Times are
differences on one's own clock: those of hosts need not agree.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

EXIT_HUNG = 77
SLOW = 20  # times the allowed time that a phase other than STEP may take without getting further
STEP, OTHER, DONE, GONE = "step", "other", "done", "gone"  # phases that mean something here
LOOKS = 20  # within the allowed time
_PLACE = "ldm_jax/watchdog/"


class Report(NamedTuple):
    """What a process said of itself.

    Attributes:
        phase: STEP, OTHER (nothing is known of how long it takes), DONE, GONE or a slow one's name.
        step: of training, the last one that it finished.
        idle: seconds since it got further, when it said so.
        heard: when that was, in seconds of the reader's clock.
        code: its exit code, where it is DONE or GONE.
        host: its name.
    """

    phase: str
    step: int
    idle: float
    heard: float
    code: int = 0
    host: str = ""

    def age(self, now: float) -> float:
        """Seconds since it got further."""
        return self.idle + now - self.heard

    def text(self, count: int) -> str:
        """What is told, different for each `count`."""
        return f"{count} {self.phase} {self.step} {self.idle:.2f} {self.code} {self.host}"

    @staticmethod
    def read(text: str, now: float) -> Report:
        """The report that `text` told."""
        _, phase, step, idle, code, host = text.split(" ", 5)
        return Report(phase, int(step), float(idle), now, int(code), host)


def verdict(reports: Mapping[int, Report], own: int, allowed: float, now: float) -> str:
    """Why process `own` should give up, or ''.

    Args:
        reports: of all processes, by their number; its own is as of now.
        own: its number.
        allowed: seconds that a process may be silent, or take for a step.
        now: on the clock of `Report.heard`.
    """
    for i, report in sorted(reports.items()):
        if i == own or report.phase == DONE:
            continue
        if report.phase == GONE:
            return f"process {i} ({report.host}) has ended with exit code {report.code}"
        silence = now - report.heard
        if silence > allowed:
            return (
                f"process {i} ({report.host}) has not been heard of for {silence:.0f} s, "
                f"{_where(report)} then"
            )
    ages = {i: report.age(now) for i, report in reports.items() if report.phase != DONE}
    if own not in ages or any(ages[i] <= _limit(reports[i].phase, allowed) for i in ages):
        return ""
    # That one is shown which the others may be waiting for.
    last = min(ages, key=lambda i: (reports[i].step, -ages[i]))
    who = f"process {last} ({reports[last].host})" if len(reports) > 1 else "it"
    nobody = "no process got any further" if len(reports) > 1 else "the run got no further"
    return (
        f"{nobody} for {min(ages.values()):.0f} s: {who} is {_where(reports[last])} for "
        f"{ages[last]:.0f} s; where a step takes that long, raise --hang_timeout"
    )


def _where(report: Report) -> str:
    doing = "" if report.phase in (STEP, OTHER) else f"in '{report.phase}' "
    return f"{doing}after step {report.step}"


def _limit(phase: str, allowed: float) -> float:
    return {STEP: allowed, OTHER: float("inf")}.get(phase, SLOW * allowed)


class Watchdog:
    """Watches this process and its peers; `start` makes the one of a process.

    Where it has been told of the process's end (`finish`), it ends it with the code of that.
    """

    def __init__(self, allowed: float, client: Any = None, index: int = 0, count: int = 1) -> None:
        """Starts nothing.

        Args:
            allowed: seconds; see `verdict`.
            client: of jax's coordination service; None where there is no other process.
            index: this process's number.
            count: how many there are.
        """
        self._allowed, self._client, self._index = allowed, client, index
        self._host = socket.gethostname()
        self._state = (OTHER, 0, time.monotonic())  # phase, step, when it got further
        self._code: int | None = None
        others = (i for i in range(count) if i != index)
        self._heard = {i: Report(OTHER, 0, 0.0, time.monotonic(), 0, "?") for i in others}
        self._told, self._texts, self._looked = 0, {}, time.monotonic()
        self._wake, self._ended = threading.Event(), threading.Event()
        self._telling = threading.Lock()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Starts to watch."""
        loops = [self._watch] + ([self._tell_and_hear] if self._client else [])
        for loop in loops:
            self._threads.append(threading.Thread(target=loop, name=loop.__name__, daemon=True))
            self._threads[-1].start()
        if self._client:
            _on_abort(self._on_abort)

    def enter(self, phase: str, step: int | None = None) -> str:
        """Says that the process got further, and what it does now; returns what it did before."""
        before = self._state
        self._state = (phase, before[1] if step is None else step, time.monotonic())
        return before[0]

    def beat(self, step: int | None = None) -> None:
        """Says that the process got further."""
        self.enter(self._state[0], step)

    def explain(self, reason: str) -> None:
        """Writes why the process ends, what it did, and the stacks of all threads to stderr."""
        own = self._own(time.monotonic())
        line = f"error: {reason}; this is process {self._index} ({own.host}), {_where(own)}"
        # No print: the main thread may hold the lock of the stream.
        os.write(2, f"{line}\n".encode())
        faulthandler.dump_traceback(2, all_threads=True)

    def depart(self, code: int) -> None:
        """Tells the others that the process ends, as it is, with `code`; takes a second at most."""
        self._say(GONE, code)

    def finish(self, code: int) -> None:
        """The work is done: now nothing that becomes of others changes the exit code."""
        self._say(DONE, code)

    def stop(self) -> None:
        """Ends the threads."""
        self._ended.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(1)

    def _own(self, now: float) -> Report:
        phase, step, since = self._state
        return Report(phase, step, now - since, now, self._code or 0, self._host)

    def _say(self, phase: str, code: int) -> None:
        self._code = code
        self._state = (phase, *self._state[1:])
        if self._client:
            _try(self._exchange)

    def _exchange(self) -> None:
        """Tells the others, and hears of them."""
        with self._telling:
            self._told += 1
            text = self._own(time.monotonic()).text(self._told)
            self._client.key_value_set(f"{_PLACE}{self._index}", text, allow_overwrite=True)
            rows = self._client.key_value_dir_get(_PLACE)
            now = time.monotonic()
            for key, text in rows:
                index = int(key.rpartition("/")[2])
                if index in self._heard and self._texts.get(index) != text:
                    self._texts[index], self._heard[index] = text, Report.read(text, now)

    def _tell_and_hear(self) -> None:
        while not self._ended.is_set():
            # Where process 0 is gone or the network is, all are silent, which `_watch` sees.
            with contextlib.suppress(Exception):
                self._exchange()
            self._wake.wait(self._allowed / LOOKS)

    def _watch(self) -> None:
        while not self._ended.wait(self._allowed / LOOKS):
            reason = self._look()
            if reason and not self._ended.is_set():
                self._give_up(reason)

    def _look(self) -> str:
        """Why to give up, or ''."""
        before, now = self._looked, time.monotonic()
        self._looked = now
        if now - before > self._allowed / 3:
            # This process was stopped, alone or with the whole job, or had no time to look.
            self.beat()
            for index, report in list(self._heard.items()):
                self._heard[index] = report._replace(heard=now, idle=0.0)
        reports = dict(self._heard) | {self._index: self._own(now)}
        return verdict(reports, self._index, self._allowed, now)

    def _give_up(self, reason: str) -> None:
        if self._code is None:
            self.explain(reason)
            self.depart(EXIT_HUNG)
        _try(sys.stdout.flush)  # the main thread may be in the middle of a line
        os._exit(self._code)

    def _on_abort(self) -> None:
        """Called when this process is about to abort; returns if that is no other one's fault.

        Jax aborts where process 0 is gone, and the collectives of CPUs may where any is.
        """
        begin = time.monotonic()
        if not _try(lambda: self._client.key_value_dir_get(_PLACE)):
            if self._code is None:
                self.explain("process 0, which connects all others, has ended")
            os._exit(EXIT_HUNG if self._code is None else self._code)
        # If one is not heard of any more, `_watch` ends this process.
        while any(r.heard < begin and r.phase != DONE for r in self._heard.values()):
            time.sleep(self._allowed / LOOKS)


def _try(call: Callable[[], Any], seconds: float = 1.0) -> bool:
    """Calls something that may hang; tells whether it returned in time."""
    returned = []

    def attempt() -> None:
        with contextlib.suppress(Exception):
            call()
            returned.append(True)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(returned)


_HANDLERS = []  # kept for as long as the process may abort


def _on_abort(call: Callable[[], None]) -> None:
    """Calls something when the process is about to abort; if it returns, that goes on.

    Python's own handlers run in the main thread, when it comes back from whatever it waits for;
    one that is to run at once, in the thread that aborts, goes past it.
    """
    libc = ctypes.CDLL(None)
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: call())
    _HANDLERS.append(handler)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))


# -- the watchdog of this process ---------------------------------------------------------------

_watchdog: Watchdog | None = None


def start(allowed: float, client: Any = None, index: int = 0, count: int = 1) -> None:
    """Watches this process from now on; see `Watchdog`."""
    global _watchdog
    _watchdog = Watchdog(allowed, client, index, count)
    _watchdog.start()


def current() -> Watchdog | None:
    """The watchdog of this process, if there is one."""
    return _watchdog


def explain(reason: str) -> None:
    """Says why this process ends, with what is known of it; see `Watchdog.explain`."""
    if _watchdog:
        _watchdog.explain(reason)


def beat(step: int | None = None) -> None:
    """Says that the process got further, in training to the end of `step`."""
    if _watchdog:
        _watchdog.beat(step)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Announces what may take long, in one word: 'compile', 'save', 'evaluate' ..."""
    if not _watchdog:
        yield
        return
    before = _watchdog.enter(name)
    try:
        yield
    finally:
        _watchdog.enter(before)


def steps(numbers: Iterable[int]) -> Iterator[int]:
    """Yields the numbers of steps, each of which must be done within the allowed time."""
    with phase(STEP):
        for number in numbers:
            yield number
            beat(number)


def compiling(call: Callable[..., Any]) -> Callable[..., Any]:
    """A jitted function whose first call for each shape of its last argument is announced.

    It returns when the devices are done with that, as they too may wait for others.
    """
    if not _watchdog:
        return call
    seen = set()

    def announced(*arguments: Any) -> Any:
        import jax

        shapes = tuple(x.shape for x in jax.tree.leaves(arguments[-1]))
        if shapes in seen:
            return call(*arguments)
        seen.add(shapes)
        with phase("compile"):
            return jax.block_until_ready(call(*arguments))

    return announced
