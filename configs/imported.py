"""The config of an imported or trained workdir, to fine-tune its model.

python -m ldm_jax.train --config=configs/imported.py:WORKDIR --config.data.source=folder:PATH

In the workdir itself the run starts from its weights. To leave it as it is, give another one by
--workdir=NEW --config.init_from=WORKDIR --config.first_stage.weights=WORKDIR.
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
    return base.from_json(path.read_text(encoding="utf-8"))
