"""Measures how fast parts of a run are on this machine.

python -m ldm_jax.benchmark --config=configs/lsun_bedrooms.py --what=train --batch_size=8
python -m ldm_jax.benchmark --config=configs/lsun_bedrooms.py --what=sample --steps=50 --out=s.json
python -m ldm_jax.benchmark --config=configs/quickstart.py --what=data --threads=1,2,4

--what: train (updates of the diffusion model, with and without reading data), first_stage (the same
of it), sample (from seeds to pixels: a batch, and one image), encode, decode, or data: images per
second that are read, decoded and made into batches of the diffusion model, for several numbers of
threads (config.data.threads), while nothing else runs.

Weights are random and nothing is trained or stored, so no run is needed; training reads the
config's data, unless --fixed_batch. Times are medians, with quartiles, after a first call that does
not count. MFU is the share of the operations of all products of matrices and convolutions (without
what is computed again to save memory) in the highest rate that products of large matrices reach on
the same devices, in the same type, measured before. Memory is what the compiler plans for each
device. Compiling takes less time from the cache in JAX_COMPILATION_CACHE_DIR, if that is set.

A table is printed; --out=FILE.json also writes it as JSON, --profile=DIR a trace for TensorBoard or
Perfetto. Several hosts measure one program together, and process 0 says what it found.
"""

from __future__ import annotations

import json
import pathlib

from absl import flags

from ldm_jax import cli, distributed
from ldm_jax.errors import UserError

WHAT = ("train", "first_stage", "sample", "encode", "decode", "data")  # measures.MEASURES

distributed.define_flags()
_CONFIG = cli.define_config_flag()
_WHAT = flags.DEFINE_enum("what", "data", WHAT, "What to measure.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Of the run. Default: runs/<config name>.")
_SECONDS = flags.DEFINE_float("seconds", 10.0, "How long each row is measured.")
_THREADS = flags.DEFINE_list("threads", [], "Numbers of threads to try, such as 1,2,4.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 0, "Images at a time. Default: the config's.")
_STEPS = flags.DEFINE_integer("steps", 0, "Of the sampler. Default: the config's.")
_FIXED_BATCH = flags.DEFINE_bool("fixed_batch", False, "Train on random numbers; read no data.")
_PROFILE = flags.DEFINE_string("profile", "", "Folder for a trace of a few calls.")
_OUT = flags.DEFINE_string("out", "", "JSON file to write.")


def main() -> None:
    """Reads the flags, measures, prints and writes."""
    config = cli.read_config(_CONFIG)
    if not _SECONDS.value > 0:
        raise UserError(f"--seconds is {_SECONDS.value}, but must be above 0")
    if not all(text.isdecimal() and int(text) for text in _THREADS.value):
        raise UserError("--threads must be numbers such as 1,2,4")
    for flag in (_BATCH_SIZE, _STEPS):
        if flag.value < 0:
            raise UserError(f"--{flag.name} is {flag.value}, but must be at least 1")
    from ldm_jax import measures

    options = measures.Options(
        pathlib.Path(_WORKDIR.value or pathlib.Path("runs") / config.name),
        _SECONDS.value,
        tuple(map(int, _THREADS.value)),
        _BATCH_SIZE.value,
        _STEPS.value,
        _FIXED_BATCH.value,
        _PROFILE.value,
    )
    found = measures.MEASURES[_WHAT.value](config, options)
    record = {"what": _WHAT.value, "config": config.name, **found}
    if not distributed.is_main():
        return
    print(measures.show(record))
    if _OUT.value:
        out = pathlib.Path(_OUT.value)
        with cli.writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
