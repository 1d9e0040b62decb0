"""Encodes the images of a config once, so that training reads latents instead.

python -m ldm_jax.encode --config=configs/quickstart.py --workdir=runs/quickstart --out=latents
python -m ldm_jax.train --config=configs/quickstart.py --config.data.source=latents:latents

What is written are the moments of the first stage, from which training draws anew each time, plain
and mirrored (config.data.flip), and all fields of the config's conditions. The first stage is that
of --workdir, of --first_stage or of config.first_stage.weights; a copy of it goes to --out.

Several hosts share the work, each with its own shards. The same command goes on where it stopped.
"""

from __future__ import annotations

import pathlib
import sys

from absl import flags

from ldm_jax import cli, distributed
from ldm_jax.errors import UserError

distributed.define_flags()
_CONFIG = cli.define_config_flag()
_OUT = flags.DEFINE_string("out", "", "Folder for the latents; the next run goes on with it.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Run, or imported model, whose first stage is used.")
_FIRST_STAGE = flags.DEFINE_string(
    "first_stage", "", "Workdir or folder of a first stage, which is scaled as the config says."
)
_SHARDS = flags.DEFINE_integer("shards", 0, "Number of files; 0 = of about 256 MB each.")
_CROPS = flags.DEFINE_integer("crops", 1, "Crops of each image, with config.data.crop='random'.")
_DTYPE = flags.DEFINE_string(
    "dtype",
    "float16",
    "Of what is stored: float16 (rounds by at most 1/2048), bfloat16 (1/256) or float32 (exact).",
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Images at a time on this host's devices.")
_TEXT_EMBEDDINGS = flags.DEFINE_bool(
    "text_embeddings",
    False,
    "Also store what a text encoder that is not trained makes of captions.",
)


def main() -> None:
    """Reads the flags and encodes."""
    if not _OUT.value:
        raise UserError("no folder to write to: use --out=latents")
    if _WORKDIR.value and _FIRST_STAGE.value:
        raise UserError("give --workdir or --first_stage, not both")
    config = cli.read_config(_CONFIG)
    import jax

    from ldm_jax.config import to_json
    from ldm_jax.preflight import open_data
    from ldm_jax.stored_latents import encode_data
    from ldm_jax.training.encoding import Settings, my_shards
    from ldm_jax.training.interrupt import Interrupted, Interrupts

    cli.use_compilation_cache()
    distributed.check_same({"the config": to_json(config)})
    out = pathlib.Path(_OUT.value)
    settings = Settings(
        _CROPS.value,
        _DTYPE.value,
        _SHARDS.value,
        _BATCH_SIZE.value,
        jax.process_index(),
        jax.process_count(),
    )
    stopped = None
    with Interrupts() as interrupts, distributed.agreed(), cli.writing(out):

        def check(place: str) -> None:
            # Not `interrupts.check`, for which hosts would wait for each other.
            if interrupts.requested:
                raise Interrupted(f"stopped {place}; the same command goes on from here")

        source = open_data(config, pathlib.Path(_WORKDIR.value or out))
        try:
            index = encode_data(
                config,
                source,
                out,
                settings,
                check,
                workdir=_WORKDIR.value,
                first_stage=_FIRST_STAGE.value,
                text_embeddings=_TEXT_EMBEDDINGS.value,
            )
        except Interrupted as stop:
            stopped = stop
        except Exception as error:
            if distributed.in_use():  # the others encode their share first
                print(f"error: {error}", file=sys.stderr, flush=True)
            raise
    if distributed.any_host(stopped is not None):
        raise stopped or Interrupted("another host was stopped; the same command goes on")
    mine = [out / index.file(shard) for shard in my_shards(index, settings)]
    size = sum(path.stat().st_size for path in mine)
    images = sum(len(index.rows(shard)) for shard in my_shards(index, settings))
    print(
        f"{images} of {index.count} images are in {len(mine)} of {index.shards} shards, "
        f"{size / max(1, images) / 1000:.1f} kB each. Train with:\n"
        f"  --config.data.source=latents:{out}"
    )


if __name__ == "__main__":
    cli.run(main)
