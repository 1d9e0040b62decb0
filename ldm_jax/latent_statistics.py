"""Measures the latents of a first stage: their mean, their spread and the scale to make of them.

python -m ldm_jax.latent_statistics --workdir=runs/quickstart
python -m ldm_jax.latent_statistics --workdir=runs/kl_f8 --source=folder:/path/to/images \\
  --num_images=10000 --latent_scale=scalar --write

A diffusion model works on latents of size 1, which are (z - shift) * scale. Training measures them
between its stages, by the rule `first_stage.latent_scale` of its config; this shows what each rule
gives. --write stores it in first_stage/weights.safetensors, and the statistics in latents.json.

--num_images takes the first ones; of a set that is sorted, --split='train[:10%]' is a fair sample.
"""

from __future__ import annotations

import math
import pathlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from absl import flags

from ldm_jax import cli
from ldm_jax.errors import UserError

if TYPE_CHECKING:
    from ldm_jax.first_stage.statistics import LatentStatistics

_WORKDIR = flags.DEFINE_string("workdir", "", "Workdir of a training run, or its first_stage.")
_SOURCE = flags.DEFINE_string(
    "source",
    None,
    "Another data set than the config's, all of it: emoji, folder:PATH, tar:SHARDS, tfds:NAME.",
)
_SPLIT = flags.DEFINE_string("split", None, "Part of the source. Default: the config's.")
_NUM_IMAGES = flags.DEFINE_integer("num_images", 0, "How many of its images; 0 = the whole set.")
_LATENT_SCALE = flags.DEFINE_string(
    "latent_scale", None, "What --write stores: first_batch, scalar, channel or a number."
)
_WRITE = flags.DEFINE_bool("write", False, "Store the scale in the first stage.")

SECONDS = 10  # between two lines of progress


def main() -> None:
    """Reads the flags, measures, prints, and writes if asked to."""
    if not _WORKDIR.value:
        raise UserError("no workdir given: use --workdir=runs/quickstart")
    if _NUM_IMAGES.value < 0:
        raise UserError(f"--num_images is {_NUM_IMAGES.value}, but must be at least 0")
    _check_rule(_LATENT_SCALE.value)
    from ldm_jax import workdir as files
    from ldm_jax.data.sources import open_source
    from ldm_jax.training import latents
    from ldm_jax.training.sharding import make_mesh

    cli.use_compilation_cache()
    root, mesh = pathlib.Path(_WORKDIR.value), make_mesh()
    config = files.read_config(root)
    if _WRITE.value:
        files.check_unused_scale(root)
    frozen = files.load_first_stage(root, config)
    c = config.data
    source = open_source(
        c.source if _SOURCE.value is None else _SOURCE.value,
        split=c.split if _SPLIT.value is None else _SPLIT.value,
        where=c.where if _SOURCE.value is None else "",
        label="",
    )
    total = min(_NUM_IMAGES.value or len(source), len(source))
    print(f"measuring the first batch and {total} images", flush=True)
    first = latents.measure(config, frozen, latents.first_batch(config, source), mesh)
    batches = _shown(latents.one_pass(config, source, total), total)
    whole = latents.measure(config, frozen, batches, mesh)
    found = {"first_batch": first, "scalar": whole, "channel": whole}
    _print(files.first_stage_folder(root), frozen, found)
    if _WRITE.value:
        rule = _LATENT_SCALE.value
        whole.result("scalar")  # also a number is refused for latents that are not finite
        frozen = latents.rescale(frozen, rule, found.get(rule))
        record = latents.record(frozen, rule, found.get(rule, whole))
        files.set_latent_scale(root, frozen, record)
        print(f"stored the {rule} scale in {files.first_stage_folder(root)}")


def _check_rule(rule: str | None) -> None:
    """Refuses a scale that there is not, and --write without one."""
    if rule is None:
        if _WRITE.value:
            raise UserError(
                "--write needs --latent_scale: choose first_batch, scalar, channel or a number"
            )
        return
    try:
        valid = 0 < float(rule) < math.inf
    except ValueError:
        valid = rule in ("first_batch", "scalar", "channel")
    if not valid:
        raise UserError(
            f"--latent_scale is '{rule}': choose from first_batch, scalar, channel or a positive "
            "number"
        )


def _shown(batches: Iterator[Any], total: int) -> Iterator[Any]:
    """The same batches; prints once in a while how many images of all they had."""
    printed, images = time.perf_counter(), 0
    try:
        for batch in batches:
            yield batch
            images += int(batch["valid"].sum())
            if time.perf_counter() - printed > SECONDS:
                printed = time.perf_counter()
                print(f"measured {images} of {total} images", flush=True)
    finally:
        batches.close()


def _print(
    directory: pathlib.Path, frozen: dict[str, Any], found: dict[str, LatentStatistics]
) -> None:
    """Prints the statistics of all images, and the scale of each rule."""
    whole = found["scalar"]
    print(
        f"latents of {directory} over {whole.images} images: mean {whole.mean:.5g}, standard "
        f"deviation {whole.std:.5g}"
    )
    print("channel        mean         std       1/std")
    for i, (mean, std) in enumerate(zip(whole.channel_mean, whole.channel_std, strict=True)):
        print(f"{i:7d} {mean:11.5g} {std:11.5g} {1 / std if std > 0 else math.nan:11.5g}")
    print("rule         shift, scale")
    print(f"stored       {_span(frozen['latents']['shift'])}, {_span(frozen['latents']['scale'])}")
    for rule, statistics in found.items():
        try:
            shift, scale = statistics.result(rule)
        except UserError as error:
            print(f"{rule:12} {error}")
        else:
            print(f"{rule:12} {_span(shift)}, {_span(scale)}")
    print(f"first_batch is of the {found['first_batch'].images} images that training sees first")


def _span(values: Any) -> str:
    """A number, or the least and the largest where channels differ."""
    low, high = min(values), max(values)
    return f"{low:.5g}" if low == high else f"{low:.5g} to {high:.5g}"


if __name__ == "__main__":
    cli.run(main)
