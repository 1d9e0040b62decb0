"""What a command runs on, and when a workdir's training was started on what."""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import platform
from typing import Any

import jax

STARTS = "starts.jsonl"  # in the workdir: a line for each start of its training


def describe() -> dict[str, Any]:
    """The machine, for records: devices of all hosts, processors and memory of this one."""
    return {
        "devices": jax.device_count(),
        "device": jax.devices()[0].device_kind,
        "hosts": jax.process_count(),
        "processor": _processor(),
        "processors": processors(),
        "memory_bytes": _memory(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def add_start(workdir: pathlib.Path) -> None:
    """Notes in a workdir that its training starts, or goes on, now and here."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with open(workdir / STARTS, "a", encoding="utf-8") as file:
        file.write(json.dumps({"time": now} | describe()) + "\n")


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    """The name of the processor, as the system says it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> int | None:
    """Bytes of memory of this machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
