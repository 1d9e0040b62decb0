"""Times of the same work here and in PyTorch (`diffusers`), in turns, in one run.

python -m benchmarks.vs_pytorch --only=lsun_forward,vq_f4_decode --out=runs/vs_pytorch
python -m benchmarks.vs_pytorch --device=gpu --dtype=bfloat16 --batch_size=32 --rounds=20

The UNet2DModel, AutoencoderKL or VQModel of `diffusers` has the same number of weights, takes the
same shapes and computes in the same type. It is tried eager, in the layout channels_last, and with
torch.compile; the fastest counts. Then both sides take turns, each in a process of its own that
waits while the other works: medians of --rounds turns, and their ratio, which is below 1 where ours
is faster. Writes vs_pytorch.json and vs_pytorch.md into --out.

Needs the extra [bench] in this environment, or --torch_python=/another/environment/bin/python.
"""

from __future__ import annotations

import json
import os
import pathlib
import platform
import sys

from absl import flags

from benchmarks.comparison import TASKS, VARIANTS, check_torch, chosen_tasks, compare, table
from benchmarks.lockstep import Side
from ldm_jax import cli
from ldm_jax.errors import UserError

ONLY = flags.DEFINE_list("only", [], f"Of {', '.join(TASKS)}. Default: all but large ones.")
LARGE = flags.DEFINE_bool("large", False, "Also what takes much memory.")
VARIANT = flags.DEFINE_list("variants", list(VARIANTS), "Of PyTorch, of which the fastest counts.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Examples at a time.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each side.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 50, "Of DDIM.", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the networks.")
DEVICE = flags.DEFINE_enum("device", "cpu", ["cpu", "gpu"], "Where both sides run.")
TORCH_PYTHON = flags.DEFINE_string("torch_python", sys.executable, "Python that has PyTorch.")
TINY = flags.DEFINE_bool("tiny", False, "The configs' smoke sizes; the times mean nothing.")
OUT = flags.DEFINE_string("out", "", "Folder for the results.")


def start_jax() -> Side:
    """Our side."""
    where = "cuda" if DEVICE.value == "gpu" else "cpu"
    environment = {"JAX_PLATFORMS": where, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return Side(sys.executable, "benchmarks.side_jax", environment)


def start_torch() -> Side:
    """PyTorch's side."""
    return Side(TORCH_PYTHON.value, "benchmarks.side_torch", {})


def main() -> None:
    """Times the tasks and writes the results after each."""
    names = chosen_tasks(ONLY.value, LARGE.value)
    for variant in VARIANT.value:
        if variant not in VARIANTS:
            raise UserError(f"--variants: no '{variant}': choose from {', '.join(VARIANTS)}")
    if not VARIANT.value or not OUT.value:
        raise UserError("give --out=FOLDER, and at least one of --variants")
    check_torch(TORCH_PYTHON.value)
    settings = {
        "machine": platform.processor() or platform.machine(),
        "processors": len(os.sched_getaffinity(0)),
        "device": DEVICE.value,
        "dtype": DTYPE.value,
        "batch_size": BATCH_SIZE.value,
        "steps": STEPS.value,
        "rounds": ROUNDS.value,
        "tiny": TINY.value,
    }
    out, results = pathlib.Path(OUT.value), {}
    for name in names:
        task = TASKS[name]
        request = {key: settings[key] for key in ("device", "dtype", "steps", "tiny")}
        request |= {"config": task.config, "work": task.work}
        request["batch_size"] = task.times * BATCH_SIZE.value
        print(f"{name}: {task.said}", flush=True)
        results[name] = compare(request, VARIANT.value, ROUNDS.value, start_jax, start_torch)
        with cli.writing(out):
            out.mkdir(parents=True, exist_ok=True)
            record = json.dumps({"settings": settings, "tasks": results}, indent=2)
            (out / "vs_pytorch.json").write_text(record + "\n", encoding="utf-8")
            (out / "vs_pytorch.md").write_text(table(results, settings), encoding="utf-8")
    print(table(results, settings))


if __name__ == "__main__":
    cli.run(main)
