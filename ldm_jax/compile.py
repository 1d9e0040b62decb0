"""Compiles a part of a run for a slice of TPUs that need not be there, and says what it would take.

python -m ldm_jax.compile --config=configs/lsun_bedrooms.py --topology=v5e:4x4
python -m ldm_jax.compile --config=configs/text2img_1p4b.py --topology=v5e:16x16 \\
  --config.mesh.fsdp=16 --config.train.batch_size=1024 --out=text2img.json
python -m ldm_jax.compile --config=configs/lsun_bedrooms.py --topology=v6e:2x2 --what=sample

The TPU compiler runs on any machine (pip install 'ldm_jax[tpu]'), and nothing is allocated: not
even the weights. It prints memory, operations and exchanges of each chip, and an estimate of the
time from published figures; nothing has run. Large models take minutes to compile.

--what: train (an update of the diffusion model), sample (one step of the sampler), first_stage (an
update of it), encode, decode. --topology: v5e:4x4 or v6e:16x16 (two axes), v4:2x2x1 or v5p:4x4x4
(three), cpu:8 (as many stand-ins) or local (the devices at hand).
"""

from __future__ import annotations

import json
import pathlib

from absl import flags

from ldm_jax import cli, topology
from ldm_jax.errors import UserError

WHAT = ("train", "sample", "first_stage", "encode", "decode")

_CONFIG = cli.define_config_flag()
_TOPOLOGY = flags.DEFINE_string("topology", "", "What to compile for, such as v5e:16x16.")
_SLICES = flags.DEFINE_integer(
    "slices", 1, "So many slices, joined by the data centre's network (config.mesh.dcn_data)."
)
_WHAT = flags.DEFINE_enum("what", "train", WHAT, "Which program.")
_OUT = flags.DEFINE_string("out", "", "JSON file to write.")


def main() -> None:
    """Reads the flags, compiles, prints and writes."""
    if not _TOPOLOGY.value:
        raise UserError(f"no topology given: use --topology={topology.FORMS}")
    if _SLICES.value < 1:
        raise UserError(f"--slices is {_SLICES.value}, but must be at least 1")
    topology.prepare(_TOPOLOGY.value)
    config = cli.read_config(_CONFIG)
    piece = topology.open_slice(_TOPOLOGY.value, _SLICES.value)
    from ldm_jax.compilation import compile_program, show  # imports jax: flags come first

    record = compile_program(config, piece, _WHAT.value)
    print(show(record, piece.chip and piece.chip.hbm))
    if _OUT.value:
        out = pathlib.Path(_OUT.value)
        with cli.writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if record["fits"] is False:
        raise UserError(
            "the program does not fit: raise config.mesh.fsdp or train.accumulate, set "
            "denoiser.remat=block, or lower the batch of each chip"
        )


if __name__ == "__main__":
    cli.run(main)
