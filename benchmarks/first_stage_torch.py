"""Trains the first stage of a finished run once more in PyTorch, by the reference's formulas.

python -m benchmarks.first_stage_torch --workdir=runs/kl --out=runs/kl_torch
python -m ldm_jax.evaluate --workdir=runs/kl_torch

Needs the extra [parity]; runs on the CPU. The network is `diffusers`' AutoencoderKL or VQModel. All
else is that of `python -m ldm_jax.train`, which trained `--workdir`: the config, the weights to
start from, the batches, the posterior's noise, the learning rates and the number of steps. So the
losses of both runs lie over each other until rounding has parted them.

`--out` becomes a workdir that holds this first stage, with the same metrics as that of `--workdir`,
and `speed.json`. The discriminator learns as in the original code from a reconstruction of its own,
made after the autoencoder's update and with other noise; `ldm_jax` reuses the first one. So the
metrics 'discriminator' and 'logits_*' differ a little from the first step on, and all others once
the discriminator's loss counts.
"""

from __future__ import annotations

import json
import os
import pathlib
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

# Read when torch is loaded. Threads that spin while they wait for each other make a step several
# times slower as soon as anything else runs on the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import flags
from ml_collections import ConfigDict

from benchmarks.trainer_torch import Trainer
from ldm_jax import cli, random
from ldm_jax import config as config_lib
from ldm_jax import workdir as files
from ldm_jax.data.pipeline import Batches
from ldm_jax.data.sources import Source
from ldm_jax.errors import UserError
from ldm_jax.preflight import open_data
from ldm_jax.training import latents as latents_lib
from ldm_jax.training.checkpoint import Checkpoints
from ldm_jax.training.first_stage_steps import first_stage_functions
from ldm_jax.training.logging import MetricWriter, Progress
from ldm_jax.training.loop import restore_or_init
from ldm_jax.training.optim import learning_rate
from ldm_jax.training.sharding import make_mesh
from ldm_jax.training.stage import Stage
from ldm_jax.training.state import TrainState

WORKDIR = flags.DEFINE_string("workdir", "", "Workdir whose first stage ldm_jax.train has trained.")
OUT = flags.DEFINE_string("out", "", "A new workdir for the first stage that is trained here.")

# All that the original code can do of these keys of config.first_stage.
REFERENCE = {
    "kind": ("kl", "vq"),
    "weights": ("",),
    "patch": (1,),
    "dropout": (0.0,),
    "learn_log_variance": (False,),
    "discriminator.warmup": (0,),
    "discriminator.ramp": (0,),
    "discriminator.lecam": (0.0,),
    "discriminator.lr": (0.0,),
    "codebook.rule": ("gradient",),
    "codebook.reset": (0.0,),
    "ema_decay": (0.0,),
    "train.optimizer": ("adamw",),
    "train.dtype": ("float32",),
}
WARM_UP = 10  # steps that the speed leaves out
# Step -> noise of both reconstructions, (2, B, C, h, w), and the learning rate.
Draw = Callable[[int], tuple[torch.Tensor, float]]


def main() -> None:
    """Reads the flags, trains and writes."""
    if not WORKDIR.value or not OUT.value:
        raise UserError("use --workdir=RUN, trained by ldm_jax.train, and --out=NEW_WORKDIR")
    workdir, out = pathlib.Path(WORKDIR.value), pathlib.Path(OUT.value)
    config = files.read_config(workdir)
    check(config)
    files.open_first_stage(workdir, config)  # there is something to compare with
    if (out / "first_stage" / files.WEIGHTS).is_file():
        raise UserError(f"{out} has a first stage already: choose another --out")
    torch.set_num_threads(cores())
    source, key = open_data(config, workdir), jax.random.fold_in(jax.random.key(config.seed), 1)
    trainer = Trainer(config, start(config, key))
    config = config.copy_and_resolve_references()
    config.train.steps = 0  # the workdir will hold a first stage only
    files.claim(out, config)
    seconds = fit(trainer, config, source, draws(config, key), out / "first_stage")
    files.save_first_stage(out / "first_stage", config, trainer.variables())
    batch_size = config.first_stage.train.batch_size
    speed = {
        "images_per_second": batch_size / statistics.median(seconds[WARM_UP:] or seconds),
        "peak_memory_bytes": peak_memory(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    files.write_text(out / "speed.json", json.dumps(speed, indent=2) + "\n")
    print(
        f"{speed['images_per_second']:.2f} images/s, {speed['peak_memory_bytes'] / 2**30:.2f} GiB "
        f"at most; measure it: python -m ldm_jax.evaluate --workdir={out}"
    )


def check(config: ConfigDict) -> None:
    """Refuses what the original code does not have.

    Raises:
        UserError: such an option, by its key.
    """
    flat = config_lib.flatten(config.first_stage)
    for name, allowed in REFERENCE.items():
        if flat[name] not in allowed:
            raise UserError(
                f"config.first_stage.{name} is {flat[name]!r}, which the reference does not have: "
                f"train a run to compare with {' or '.join(map(repr, allowed))}"
            )


def start(config: ConfigDict, key: jax.Array) -> TrainState:
    """The state that `ldm_jax.train` starts from; `key` is that of the stage."""
    init, step = first_stage_functions(config)
    with tempfile.TemporaryDirectory() as empty:
        checkpoints = Checkpoints(pathlib.Path(empty))
        directory, block = checkpoints.directory, config.first_stage.train
        stage = Stage("first stage", directory, block, init, step, {}, lambda *_: directory)
        state = restore_or_init(stage, checkpoints, key, make_mesh())
        checkpoints.close()
    return state


def draws(config: ConfigDict, key: jax.Array) -> Draw:
    """All that a step draws at random or reads from a schedule, as `ldm_jax` does.

    The first noise is that of its only reconstruction.
    """
    block, rate = config.first_stage.train, learning_rate(config.first_stage.train)
    side, channels = config_lib.latent_size(config), config_lib.latent_channels(config)
    key = jax.random.fold_in(key, 1)

    @jax.jit
    def draw(step: int) -> tuple[jax.Array, jax.Array]:
        keys = random.example_keys(jax.random.fold_in(key, step), block.batch_size)
        pair = (random.fold_in(keys, i) for i in range(2))
        noise = jnp.stack([random.normal(keys, (side, side, channels)) for keys in pair])
        return noise.transpose(0, 1, 4, 2, 3), jnp.asarray(rate(step), jnp.float32)

    def draw_tensor(step: int) -> tuple[torch.Tensor, float]:
        noise, lr = jax.device_get(draw(step))
        return torch.from_numpy(np.array(noise)), float(lr)

    return draw_tensor


def fit(
    trainer: Trainer, config: ConfigDict, source: Source, draw: Draw, directory: pathlib.Path
) -> list[float]:
    """Trains to the last step, with a line of metrics as often as `ldm_jax.train` writes one.

    Returns the seconds of each step, the wait for its images included.
    """
    block = config.first_stage.train
    batches = Batches(
        source,
        latents_lib.transform(config),
        batch_size=block.batch_size,
        seed=config.seed,
        threads=config.data.threads,
    )
    writer = MetricWriter(directory)
    progress = Progress("first stage in PyTorch", 0, block.steps, block.batch_size)
    seconds, waited, iterator = [], 0.0, iter(batches)
    try:
        for step in range(block.steps):
            begin = time.perf_counter()
            image = next(iterator)["image"]
            waited += time.perf_counter() - begin
            progress.step(trainer.step(step, image, *draw(step)))
            seconds.append(time.perf_counter() - begin)
            if (step + 1) % block.log_every == 0 or step + 1 == block.steps:
                writer.write(step + 1, progress.report(step + 1, waited))
    finally:
        iterator.close()
        progress.close()
        writer.close()
    return seconds


def cores() -> int:
    """How many processors this process may use."""
    may_ask = hasattr(os, "sched_getaffinity")  # not on every system
    return len(os.sched_getaffinity(0)) if may_ask else os.cpu_count() or 1


def peak_memory() -> int:
    """The most bytes that this process has had in memory, its start in JAX included."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    cli.run(main)
