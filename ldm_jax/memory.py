"""How many bytes a compiled program takes, and how many are free."""

from __future__ import annotations

import math
import pathlib
import resource

import jax

# Libraries that compiled programs call on a CPU hold scratch that the compiler does not count.
SCRATCH_SHARE, SCRATCH_BYTES = 0.125, 64 * 2**20
CGROUP = pathlib.Path("/sys/fs/cgroup")


def program_bytes(program: jax.stages.Compiled) -> int:
    """Bytes that a call of `program` takes on its device besides its arguments."""
    stats = program.memory_analysis()
    counted = stats.output_size_in_bytes + stats.temp_size_in_bytes
    return int((1 + SCRATCH_SHARE) * counted) + SCRATCH_BYTES


def free_on_host() -> int | None:
    """Bytes of memory that are free; None where the system does not say."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    free = dict(line.split(":", 1) for line in lines).get("MemAvailable")
    if free is None:
        return None
    return min(1024 * int(free.split()[0]), _free_in_container())


def _free_in_container() -> float:
    """What a container's own limit leaves (cgroups, version 2); infinite without one."""
    try:
        limit, used = ((CGROUP / name).read_text() for name in ("memory.max", "memory.current"))
        return max(0, int(limit) - int(used))
    except (OSError, ValueError):  # no such files, or the limit 'max'
        return math.inf


def held_by_process() -> int:
    """Bytes of memory that this process holds now; 0 where the system does not say."""
    try:
        pages = pathlib.Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]
    except OSError:
        return 0
    return int(pages) * resource.getpagesize()


def free_on_device() -> int | None:
    """Bytes free on the first accelerator; None where programs run in the host's memory."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats["bytes_in_use"]
