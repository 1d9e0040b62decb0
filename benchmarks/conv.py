"""Filter gradients of 3x3 convolutions: stock against by patches, alternating in one run.

python -m benchmarks.conv
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import jax

from ldm_jax.nn.conv import _conv, _kernel_grad, _kernel_grad_by_patches

SHAPES = ((64, 32, 32), (32, 64, 32), (16, 64, 32), (8, 128, 64))  # side, channels, batch
RUNS = 7


def seconds(function: Callable, *arguments: jax.Array) -> float:
    """Times one call."""
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def main() -> None:
    """Prints the medians of each shape."""
    print(f"{jax.devices()[0].device_kind}, medians of {RUNS} alternating runs, ms")
    print("| map, channels, batch | forward | stock filter gradient | by patches | ratio |")
    print("| --- | --- | --- | --- | --- |")
    for side, channels, batch in SHAPES:
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (batch, side, side, channels))
        grad = jax.random.normal(keys[1], x.shape)
        kernel = jax.random.normal(keys[2], (3, 3, channels, channels))
        place = dict(stride=1, padding=(1, 1))
        functions = (
            (jax.jit(functools.partial(_conv, **place)), (x, kernel)),
            (jax.jit(functools.partial(_kernel_grad, **place)), (x, grad)),
            (jax.jit(functools.partial(_kernel_grad_by_patches, **place)), (x, grad)),
        )
        times = [[seconds(f, *arguments) for f, arguments in functions] for _ in range(RUNS + 1)]
        forward, stock, ours = (
            statistics.median(column) for column in zip(*times[1:], strict=True)
        )
        print(
            f"| {side}x{side}, {channels}, {batch} | {forward * 1e3:.0f} | {stock * 1e3:.0f} "
            f"| {ours * 1e3:.0f} | {stock / ours:.1f} |"
        )


if __name__ == "__main__":
    main()
