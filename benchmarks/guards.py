"""What the guards of a training cost, alternating in one run: steps with them and without.

python -m benchmarks.guards --config=configs/quickstart.py [--what=train|first_stage] [--rounds=100]
python -m benchmarks.guards --config=configs/quickstart.py --what=digests

Of a step it compares the guard against non-finite losses and gradients (training/guard.py), and the
host's search for spikes (training/spikes.py), with the step alone. Of digests (training/digests.py)
it says how fast those of the whole state are made. Weights and images are random. Writes one line
of JSON.
"""

from __future__ import annotations

import datetime
import json
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import numpy as np
from absl import flags

from ldm_jax import cli

_CONFIG = cli.define_config_flag()
_WHAT = flags.DEFINE_enum("what", "train", ["train", "first_stage", "digests"], "What to measure.")
_ROUNDS = flags.DEFINE_integer("rounds", 100, "Steps of each, in turns, after a first one.")


def main() -> None:
    """Measures and prints."""
    config = cli.read_config(_CONFIG)
    from ldm_jax import programs
    from ldm_jax.stand_ins import random_inputs, random_state
    from ldm_jax.training.sharding import make_mesh

    mesh = make_mesh(config.mesh)
    stage = "train" if _WHAT.value == "digests" else _WHAT.value
    program = programs.PROGRAMS[stage](config, mesh)
    state, *inputs = program.arguments
    make_state = lambda: random_state(state)  # noqa: E731
    if _WHAT.value == "digests":
        found = digest_speed(make_state(), _ROUNDS.value)
    else:
        block = config.train if stage == "train" else config.first_stage.train
        found = guard_cost(program, mesh, make_state, random_inputs(inputs), _ROUNDS.value)
        found["watch_us_per_step"] = 1e6 * watch_seconds(block)
        found["watch_share"] = 1e-3 * found["watch_us_per_step"] / found["off_ms"]
    record = {
        "what": _WHAT.value,
        "config": config.name,
        "rounds": _ROUNDS.value,
        **found,
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "machine": platform.processor() or platform.machine(),
        "load": pathlib.Path("/proc/loadavg").read_text().split()[0],
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(record))


def guard_cost(
    program: Any, mesh: Any, make_state: Callable[[], Any], inputs: list[Any], rounds: int
) -> dict[str, float]:
    """Milliseconds of a step with and without its guard, and the share that the guard adds.

    They take turns in a random order, so that other work on the machine meets all alike. The share
    is the median over rounds of the ratio of the steps of a round, and `same_share` that of two
    steps without the guard: what the measurement itself is good for.
    """
    from ldm_jax.training import guard

    compiled = {"on": program.trace(mesh).lower().compile()}
    with mock.patch.object(guard, "checked_update", lambda update, _, seen: (update(), seen)):
        # Another function: a known one would not be traced again.
        anew = lambda *arguments: program.function(*arguments)  # noqa: E731
        compiled["off"] = program._replace(function=anew).trace(mesh).lower().compile()
    compiled["same"] = compiled["off"]
    found = {
        f"{name}_temporaries": compiled[name].memory_analysis().temp_size_in_bytes
        for name in ("on", "off")
    }
    states = {name: make_state() for name in compiled}
    times = {name: [] for name in compiled}
    for turn in range(rounds + 1):
        for name in np.random.default_rng(turn).permutation(list(compiled)):
            begin = time.perf_counter(), time.process_time()
            states[name], metrics = compiled[name](states[name], *inputs)
            jax.block_until_ready((states[name], metrics))
            end = time.perf_counter(), time.process_time()
            times[name].append(np.subtract(end, begin))
    # Seconds on the clock, and of the processor: other work on the machine takes of the first.
    for column, clock in enumerate(("", "cpu_")):
        on, off, same = (np.array(times[name][1:])[:, column] for name in ("on", "off", "same"))
        found |= {f"{clock}on_ms": 1e3 * np.median(on), f"{clock}off_ms": 1e3 * np.median(off)}
        for name, ratio in (("share", on / off - 1), ("same_share", same / off - 1)):
            low, middle, high = np.percentile(ratio, (25, 50, 75))
            found |= {f"{clock}{name}": middle, f"{clock}{name}_quartiles": [low, high]}
    return found


def watch_seconds(block: Any, intervals: int = 50) -> float:
    """Seconds per step that the host takes to look for skipped steps and spikes; the median."""
    from ldm_jax.training.guard import Skips
    from ldm_jax.training.spikes import QUARTERS, Spikes

    draws = np.exp(0.1 * np.random.default_rng(0).standard_normal((block.log_every, 5)))
    rows = [dict(zip(("loss", *QUARTERS), row, strict=True)) | {"skipped": 0.0} for row in draws]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "spikes.json"
        skips = Skips("diffusion", block.max_skipped, print)
        spikes = Spikes("diffusion", "loss", block.spike_factor, block.spike_window, path, 0, print)
        times = []
        for interval in range(intervals):
            begin = time.perf_counter()
            skips.check((interval + 1) * len(rows), rows)
            spikes.check((interval + 1) * len(rows), rows)
            times.append(time.perf_counter() - begin)
    return statistics.median(times) / len(rows)


def digest_speed(state: Any, rounds: int) -> dict[str, float]:
    """Gigabytes per second of the digests of a state, the median."""
    from ldm_jax.training.digests import digests

    tree = state.replace(step=None)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    times = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        digests(tree)
        times.append(time.perf_counter() - begin)
    seconds = statistics.median(times[1:])
    return {
        "gigabytes": size / 1e9,
        "seconds": seconds,
        "gigabytes_per_second": size / 1e9 / seconds,
    }


if __name__ == "__main__":
    cli.run(main)
