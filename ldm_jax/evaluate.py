"""Evaluates the first stage of a workdir: how close its reconstructions come to the images.

python -m ldm_jax.evaluate --workdir=runs/quickstart
python -m ldm_jax.evaluate --workdir=runs/imported --source=folder:photos --metrics=psnr,ssim

Prints a table, and writes metrics.json and reconstructions.png: images, their reconstructions, and
the differences, 4 times amplified around mid-grey. Reconstructions are those of the posterior's
mode, rounded to 8 bits; psnr, ssim, lpips and mae are means over the images. The metrics lpips and
rfid need `python -m ldm_jax.weights fetch lpips` and `fetch inception` once.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from absl import flags

from ldm_jax import cli
from ldm_jax.errors import UserError

_WORKDIR = flags.DEFINE_string(
    "workdir", "", "Workdir of a run or of an imported model, or a first stage's folder."
)
_SOURCE = flags.DEFINE_string(
    "source", "", "Images: emoji, folder:PATH or tfds:NAME. Default: those of the workdir's config."
)
_SPLIT = flags.DEFINE_string(
    "split",
    "",
    "Part of them, such as test or train[90%:]. Default: what the workdir's config holds out, else "
    "its training images; train of another --source.",
)
_NUM_IMAGES = flags.DEFINE_integer(
    "num_images",
    0,
    "The first ones of the split; 0 = all. A slice such as test[:500] is a fair sample.",
)
_METRICS = flags.DEFINE_list("metrics", ["psnr", "ssim", "lpips", "rfid"], "What to measure.")
_RESOLUTION = flags.DEFINE_integer(
    "resolution", 0, "Side of the square images. Default: that of the workdir's config."
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 0, "Images at a time; never changes a result. Default: 8 for each device."
)
_OUT = flags.DEFINE_string("out", None, "Where to write. Default: <workdir>/evaluation.")

UNITS = {"psnr": "dB", "kl_per_element": "nats", "mae": "of values from -1 to 1"}


def main() -> None:
    """Reads the flags, evaluates and writes."""
    if not _WORKDIR.value:
        raise UserError("no workdir given: use --workdir=runs/quickstart")
    for flag in (_NUM_IMAGES, _RESOLUTION, _BATCH_SIZE):
        if flag.value < 0:
            raise UserError(f"--{flag.name} is {flag.value}, but must be at least 0")
    from ldm_jax import images
    from ldm_jax.report import evaluate_first_stage
    from ldm_jax.workdir import read_config

    cli.use_compilation_cache()
    root = pathlib.Path(_WORKDIR.value)
    read_config(root)  # before a folder is made in what is no workdir
    out = pathlib.Path(_OUT.value or root / "evaluation")
    with cli.writing(out):
        out.mkdir(parents=True, exist_ok=True)  # before the work, which may take long
    found, record = evaluate_first_stage(
        root,
        source=_SOURCE.value,
        split=_SPLIT.value,
        num_images=_NUM_IMAGES.value,
        metrics=_METRICS.value,
        resolution=_RESOLUTION.value,
        batch_size=_BATCH_SIZE.value,
    )
    print(table(record))
    with cli.writing(out):
        images.save_png(out / "reconstructions.png", found.grid())
        (out / "metrics.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"metrics.json and reconstructions.png are in {out}")


def table(record: dict[str, Any]) -> str:
    """What the record says, a line for each number."""
    where = f", {record['where']}" if record["where"] else ""
    size = record["resolution"]
    lines = [
        f"{record['num_images']} images of {size}x{size} ({record['source']}, {record['split']}"
        f"{where})"
    ]
    for name, value in record["reconstruction"].items():
        lines.append(f"  {name:<16} {value:>9.4f} {UNITS.get(name, '')}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
