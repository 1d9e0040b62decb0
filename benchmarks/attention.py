"""Time and memory of the paths of attention at this machine, alternating in one run.

python -m benchmarks.attention [--lengths=1024,4096] [--heads=8] [--head_dim=64] [--dtype=bfloat16]
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import app, flags

from ldm_jax.nn.attend import PATHS, attend, choose_path, current_target

_LENGTHS = flags.DEFINE_list("lengths", ["256", "1024", "4096"], "Tokens of queries and keys.")
_KEYS = flags.DEFINE_integer("keys", 0, "Tokens of keys, if not those of queries.")
_BATCH = flags.DEFINE_integer("batch", 1, "Examples.")
_HEADS = flags.DEFINE_integer("heads", 8, "Heads.")
_HEAD_DIM = flags.DEFINE_integer("head_dim", 64, "Width of a head.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the inputs.")
_MASKED = flags.DEFINE_bool("masked", False, "Mask a third of the keys.")
_RUNS = flags.DEFINE_integer("runs", 5, "Calls of each, after a first one that does not count.")


def compiled(path: str, qkv: list, mask: jax.Array | None) -> tuple[Callable, Callable]:
    """The forward pass and the gradient of one path, compiled for these inputs."""
    forward = functools.partial(attend, path=path)

    def total(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
        return jnp.sin(forward(q, k, v, mask).astype(jnp.float32)).sum()

    functions = forward, jax.grad(total, (0, 1, 2))
    return tuple(jax.jit(f).lower(*qkv, mask).compile() for f in functions)


def available(qkv: list, mask: jax.Array | None) -> dict[str, tuple[Callable, Callable]]:
    """Compiled functions of each path that this machine and these inputs allow."""
    platform = {"flash": "tpu", "cudnn": "gpu"}
    found = {}
    for path in PATHS:
        if platform.get(path, jax.default_backend()) == jax.default_backend():
            try:
                found[path] = compiled(path, qkv, mask)
            except (NotImplementedError, RuntimeError, ValueError) as error:
                print(f"{path}: {str(error).splitlines()[0]}")
    return found


def seconds(function: Callable, *arguments: jax.Array | None) -> float:
    """Times one call."""
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def main(_: list[str]) -> None:
    """Prints a table with a row for each length and path."""
    print(f"{jax.devices()[0].device_kind}, {_DTYPE.value}, medians of {_RUNS.value}")
    print("| queries x keys | path | forward ms | MiB | gradient ms | MiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for length in map(int, _LENGTHS.value):
        lengths = length, *(2 * [_KEYS.value or length])
        draws = jax.random.split(jax.random.key(0), 4)
        shapes = [(_BATCH.value, n, _HEADS.value, _HEAD_DIM.value) for n in lengths]
        dtype = jnp.dtype(_DTYPE.value)
        qkv = [jax.random.normal(d, s, dtype) for d, s in zip(draws, shapes, strict=False)]
        mask = None
        if _MASKED.value:
            mask = jax.random.bernoulli(draws[3], 2 / 3, (_BATCH.value, lengths[1]))
        programs = available(qkv, mask)
        times = {path: ([], []) for path in programs}
        for _ in range(_RUNS.value + 1):
            for path, pair in programs.items():
                for values, program in zip(times[path], pair, strict=True):
                    values.append(seconds(program, *qkv, mask))
        chosen = choose_path(qkv[0], qkv[1], mask, current_target())
        for path, pair in programs.items():
            cells = []
            for values, program in zip(times[path], pair, strict=True):
                cells.append(f"{1e3 * statistics.median(values[1:]):.1f}")
                cells.append(f"{program.memory_analysis().temp_size_in_bytes / 2**20:.0f}")
            name = f"**{path}**" if path == chosen else path
            print(f"| {length} x {lengths[1]} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    app.run(main)
