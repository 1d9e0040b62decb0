"""Trains a latent diffusion model: the first stage, then the diffusion model on its latents.

Where the config asks for it, a classifier of noisy latents follows (config.classifier).

    python -m ldm_jax.train --config=configs/quickstart.py
    python -m ldm_jax.train --config=configs/quickstart.py:smoke --config.train.lr=1e-4

Running the same command again goes on where the last run stopped.
"""

from __future__ import annotations

import pathlib

from ldm_jax.training import interrupt

if __name__ == "__main__":
    interrupt.listen()  # before all other imports, which take a while

from absl import flags

from ldm_jax import cli, distributed

distributed.define_flags()
_CONFIG = cli.define_config_flag()
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "Everything of the run goes here. Default: runs/<config name>."
)
_ALLOW_CHANGE = flags.DEFINE_bool(
    "allow_config_change", False, "Go on in a workdir whose config differs; prints what differs."
)


def main() -> None:
    """Reads the flags and runs all stages."""
    config = cli.read_config(_CONFIG)
    workdir = pathlib.Path(_WORKDIR.value or pathlib.Path("runs") / config.name)
    from ldm_jax.config import to_json
    from ldm_jax.run import run  # imports jax: bad flags are answered before that

    cli.use_compilation_cache()
    distributed.check_same({"the config": to_json(config)})
    run(config, workdir, allow_config_change=_ALLOW_CHANGE.value)


if __name__ == "__main__":
    cli.run(main)
