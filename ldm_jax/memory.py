"""How many bytes a compiled program takes, and how many are free."""

from __future__ import annotations

import pathlib

import jax

# Libraries that compiled programs call on a CPU hold scratch that the compiler does not count.
SCRATCH_SHARE, SCRATCH_BYTES = 0.125, 64 * 2**20


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
    return None if free is None else 1024 * int(free.split()[0])


def free_on_device() -> int | None:
    """Bytes free on the first accelerator; None where programs run in the host's memory."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats["bytes_in_use"]
