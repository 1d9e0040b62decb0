"""How long calls take, what a machine can do at most, and what a program takes of its memory."""

from __future__ import annotations

import collections
import contextlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import distributed

# Products of matrices in a call, whose start then costs little, and the largest side: 16384 are
# 1 GB in float32.
PRODUCTS, LARGEST = 4, 2**14
ENOUGH = 0.1  # seconds of a call from which larger matrices are not faster


def call_times(
    call: Callable[[], Any], seconds: float, *, least: int = 3, ahead: int = 0
) -> list[float]:
    """Seconds of each of at least `least` calls, for at least `seconds`, after one to warm up.

    A call takes from when the one before it was done until it is done itself, with all arrays that
    it returns. `ahead`: calls that are sent before the result of the first of them is waited for,
    as training does; each must depend on the one before, or they would run at the same time.

    Where there are `seconds`, all processes must call it, and make as many calls as the one that
    wants most after the first `least` of them: programs of several processes wait for each other.
    """
    jax.block_until_ready(call())
    begin = last = time.perf_counter()
    times, sent = [], collections.deque()
    together, count = seconds > 0 and distributed.in_use(), least
    while len(times) < count or (not together and last - begin < seconds):
        while len(sent) <= ahead:
            sent.append(call())
        jax.block_until_ready(sent.popleft())
        now = time.perf_counter()
        times.append(now - last)
        last = now
        if together and len(times) == least:
            count = distributed.most(max(least, math.ceil(seconds * least / (now - begin))))
            last = time.perf_counter()
    jax.block_until_ready(list(sent))
    return times


def summary(times: Sequence[float], images: int) -> dict[str, float]:
    """Median and quartiles of the times of calls, in ms, and images per second by the median."""
    low, median, high = np.percentile(times, (25, 50, 75))
    return {
        "median_ms": 1e3 * median,
        "low_ms": 1e3 * low,
        "high_ms": 1e3 * high,
        "images_per_second": images / median,
    }


def throughput(
    batches: Iterable[Any], batch_size: int, seconds: float, warm_up: int
) -> dict[str, float]:
    """Takes batches as fast as they come, for at least `seconds` and one batch after `warm_up`.

    Returns 'images_per_second', and 'slowest_batch_ms', the longest wait for a batch.
    """
    with contextlib.closing(iter(batches)) as made:
        for _ in range(warm_up):
            next(made)
        begin = last = time.perf_counter()
        count, slowest = 0, 0.0
        while last - begin < seconds or count == 0:
            next(made)
            now = time.perf_counter()
            count, slowest, last = count + 1, max(slowest, now - last), now
    return {
        "images_per_second": count * batch_size / (last - begin),
        "slowest_batch_ms": 1000 * slowest,
    }


def matrix_peak(dtype: str, devices: Sequence[jax.Device] | None = None, tries: int = 5) -> float:
    """Operations per second of one device in products of square matrices, the highest rate found.

    A multiplication and an addition are two. Sides double from 1024 until a call takes `ENOUGH`;
    all `devices`, by default those of this process, work at the same time. Products have the
    precision that networks have by default: on GPUs, that of float32 is TF32's.
    """
    devices, side, best = devices or jax.local_devices(), 1024, 0.0

    @jax.jit
    def products(x: jax.Array, y: jax.Array) -> jax.Array:
        for _ in range(PRODUCTS):
            x = x @ y
        return x

    while True:
        # Of this spread, products keep the size of their factors.
        x, y = np.random.default_rng(0).standard_normal((2, side, side), np.float32)
        pair = jnp.asarray(x, dtype), jnp.asarray(y / side**0.5, dtype)
        pairs = [jax.device_put(pair, device) for device in devices]
        call = lambda pairs=pairs: [products(*pair) for pair in pairs]  # noqa: E731
        least = min(call_times(call, 0.0, least=tries))
        best = max(best, PRODUCTS * 2 * side**3 / least)
        if least > ENOUGH or side >= LARGEST:
            return best
        side *= 2


def memory_of(program: jax.stages.Compiled) -> dict[str, int]:
    """Bytes that a compiled program takes on each device, by the compiler's own plan."""
    stats = program.memory_analysis()
    return {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }


def most_in_use() -> int | None:
    """The most bytes that were ever in use on this process's first device; None on a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
