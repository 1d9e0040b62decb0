"""Processes that take turns, so that none slows another, each in an environment of its own.

A side is a module that calls `serve`: it answers requests, one line of JSON each, on its standard
input and output. While one side works, the other waits for its next line. Uses the standard library
only.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
AT_LEAST = 0.3  # seconds of a turn: quicker calls are repeated in it

Call = Callable[[], None]  # starts the work, once
Prepare = Callable[[dict[str, Any]], tuple[Call, Call, dict[str, Any]]]


class SideFailed(Exception):
    """A side could not do what it was asked for; says why."""


class Side:
    """A process that runs one thing whenever it is asked to. Use with `with`."""

    def __init__(self, python: str, module: str, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [python, "-m", module],
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        """Builds what is to be timed and runs it once; returns what the side says of it.

        Raises:
            SideFailed: that went wrong.
        """
        return self._ask({"prepare": request})

    def seconds(self) -> float:
        """Runs it in a turn, for `AT_LEAST`, and returns the mean time of a call."""
        return self._ask({"run": True})["seconds"]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SideFailed(f"its process ended with {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise SideFailed(answer["error"])
        return answer

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *unused: object) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(prepare: Prepare) -> None:
    """Answers requests until the input ends.

    prepare: request -> (starts the work, waits until it is done, what to say of it). Several starts
    may come before a wait.
    """
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    start = wait = None
    calls = 1
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "prepare" in request:
                start, wait, answer = prepare(request["prepare"])
                begin = time.perf_counter()
                timed(start, wait, 1)  # compiles
                answer["first_seconds"] = time.perf_counter() - begin
                # Of a second call, since the first may have compiled.
                calls = max(1, round(AT_LEAST / max(1e-6, timed(start, wait, 1))))
            else:
                answer = {"seconds": timed(start, wait, calls)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def timed(start: Call, wait: Call, calls: int) -> float:
    """Mean seconds of so many calls in a row."""
    begin = time.perf_counter()
    for _ in range(calls):
        start()
    wait()
    return (time.perf_counter() - begin) / calls
