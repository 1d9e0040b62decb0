"""Processes that train, and are sent signals by the clock."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from benchmarks.reliability import machine, resume
from ldm_jax.training.checkpoint import Checkpoints, abstract_like
from ldm_jax.training.sharding import gather, make_mesh, state_shardings
from ldm_jax.training.steps import diffusion_functions

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = pathlib.Path(__file__).with_name("config.py")
PATIENCE = 600.0  # seconds after a signal, or without a step, in which a process has to end


class Life:
    """One process of a training run, from its start to its end."""

    def __init__(self, workdir: pathlib.Path, argument: str, cache: pathlib.Path) -> None:
        """Starts `ldm_jax.train` with one device; `argument` is that of config.py."""
        environment = os.environ | machine.ENVIRONMENT
        environment |= {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": machine.XLA_FLAGS}
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "ldm_jax.train", f"--config={CONFIG}:{argument}"]
        self.listens = False  # when it was last sent a signal
        self._begin = time.monotonic()
        self.process = subprocess.Popen(
            [*command, f"--workdir={workdir}"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said: list[tuple[float, str]] = []  # seconds since the start, and a line
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.said.append((self.seconds(), line.rstrip()))

    def seconds(self) -> float:
        """How long it has lived."""
        return time.monotonic() - self._begin

    def send(self, number: int, moment: float) -> bool:
        """Sends a signal when it has lived for `moment` seconds; False if it ended before."""
        try:
            self.process.wait(max(0.0, moment - self.seconds()))
        except subprocess.TimeoutExpired:
            self.listens = self.listens or self._catches()
            self.process.send_signal(number)
            return True
        return False

    def _catches(self) -> bool:
        """Whether the process, and not the system, answers SIGTERM."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)
        return bool(caught >> (signal.SIGTERM - 1) & 1)

    def end(self) -> int:
        """Waits for its end; returns its exit code, -N for signal N.

        Raises:
            TimeoutError: it does not end; it is killed.
        """
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired as error:
            self.process.kill()
            raise TimeoutError(f"no end within {PATIENCE:g} seconds: {self.text()}") from error
        self._reader.join()
        return code

    def first_step(self) -> float | None:
        """Seconds from its start to the first step that it told of; None if there was none."""
        return next((at for at, line in self.said if ": step " in line), None)

    def wait_for_step(self) -> float:
        """Waits for the first step or its end; returns how long it had lived then."""
        while self.first_step() is None and self.process.poll() is None:
            time.sleep(0.01)
        return self.first_step() or self.seconds()

    def rate(self) -> float | None:
        """Steps per second, those of saving included; None where there were too few."""
        times = [at for at, line in self.said if ": step " in line]
        return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 3 else None

    def last_line(self) -> str:
        """The last line that it printed, by which one sees what it was at."""
        lines = [line for _, line in self.said if line]
        return lines[-1] if lines else ""

    def text(self) -> str:
        """All that it printed."""
        return "\n".join(line for _, line in self.said)


def logged(folder: pathlib.Path) -> int:
    """The last step in a stage's metrics; 0 if there is none."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError):
            continue  # cut short by a kill
    return 0


def saved(folder: pathlib.Path) -> int:
    """The newest step of a stage's checkpoints; 0 if there is none."""
    steps = [int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit()]
    return max(steps, default=0)


def final_state(config: ConfigDict, workdir: pathlib.Path) -> Any:
    """The newest whole state of a diffusion model, on the host."""
    abstract = jax.eval_shape(diffusion_functions(config)[0], jax.random.key(0))
    split = state_shardings(abstract, make_mesh(None, jax.devices()[:1]))
    checkpoints = Checkpoints(workdir / "checkpoints")
    state = gather(checkpoints.restore(abstract_like(abstract, split)))
    checkpoints.close()
    return state


def compare(config: ConfigDict, ours: pathlib.Path, theirs: pathlib.Path) -> dict[str, Any]:
    """What two finished runs leave behind: see `resume.compare`."""
    a, b = (final_state(config, workdir) for workdir in (ours, theirs))
    return {
        "leaves": len(jax.tree.leaves(a)),
        "unequal": resume.differences(a, b),
        "files": resume.same_files(ours, theirs),
    }
