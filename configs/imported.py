"""The config of an imported or trained workdir, to fine-tune its model.

python -m ldm_jax.train --config=configs/imported.py:WORKDIR --workdir=NEW \\
  --config.data.source=folder:PATH

The run starts from the weights in WORKDIR, which stays as it is.
"""

import pathlib

from ldm_jax import config as base
from ldm_jax.errors import UserError


def get_config(arg=""):
    if not arg:
        raise UserError("say which workdir: --config=configs/imported.py:WORKDIR")
    path = pathlib.Path(arg) / "config.json"
    if not path.is_file():
        raise UserError(f"{arg} is no workdir: it has no config.json")
    c = base.from_json(path.read_text(encoding="utf-8"))
    if not c.train.steps:
        raise UserError(
            f"{arg} is a first stage only: use it as --config.first_stage.weights={arg}"
        )
    c.init_from = c.first_stage.weights = arg
    return c
