"""Evaluates a workdir: its reconstructions, how samples obey conditions, or the likelihood of data.

python -m ldm_jax.evaluate --workdir=runs/quickstart
python -m ldm_jax.evaluate --workdir=runs/imported --source=folder:photos --metrics=psnr,ssim
python -m ldm_jax.evaluate --workdir=runs/layout --of=condition --split=train[4000:5000]
python -m ldm_jax.evaluate --workdir=runs/layout --of=likelihood --num_images=64 --steps=100

Of the first stage it prints a table and writes metrics.json and reconstructions.png: images, their
reconstructions, and the differences, 4 times amplified around mid-grey. Reconstructions are those
of the posterior's mode, rounded to 8 bits; psnr, ssim, lpips and mae are means over the images. The
metrics lpips and rfid need `python -m ldm_jax.weights fetch lpips` and `fetch inception` once.

With --of=condition it samples under the conditions of held-out data, and measures how well these
are obeyed, beside the same samples judged against the conditions of others (shuffled) and the real
images (real). Small networks judge; they are fitted to the run's real images in about a minute and
kept in <workdir>/evaluation. It writes the section `condition` of metrics.json and condition.png. A
model without conditions fills holes, colours greys and follows strokes.

With --of=likelihood it measures how likely the model makes held-out images, in bits per dimension
of the unscaled latents, which it draws from the first stage's posterior, or of the 8-bit pixels of
a model of pixels: by the probability-flow ODE and, of a discrete schedule, the variational bound
with its parts. Latents have a density, which may be negative and says nothing of pixels. It writes
the section `likelihood` of metrics.json.
"""

from __future__ import annotations

import pathlib
from typing import Any

from absl import flags

from ldm_jax import cli, distributed
from ldm_jax.errors import UserError

distributed.define_flags()
_OF = flags.DEFINE_string(
    "of", "reconstruction", "What is evaluated: reconstruction, condition or likelihood."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "Workdir of a run or of an imported model, or a first stage's folder."
)
_SOURCE = flags.DEFINE_string(
    "source",
    "",
    "Images: emoji, folder:PATH, tar:SHARDS or tfds:NAME. Default: those of the workdir's config.",
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
    "The first ones of the split; 0 = all. A slice such as test[:500] is a fair sample. Of "
    "conditions and likelihoods: so many from all of the split; 0 = 256 or 128.",
)
_METRICS = flags.DEFINE_list("metrics", ["psnr", "ssim", "lpips", "rfid"], "What to measure.")
_RESOLUTION = flags.DEFINE_integer(
    "resolution", 0, "Side of the square images. Default: that of the workdir's config."
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size",
    0,
    "Images at a time; never changes a result. Default: 8 for each device; of conditions and "
    "likelihoods, config.sample.batch_size.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Sample or held-out image i has the seed SEED + i.")
_SAMPLER = flags.DEFINE_string("sampler", None, "Of samples. Default: config.sample.sampler.")
_STEPS = flags.DEFINE_integer(
    "steps",
    None,
    "Of samples; default: config.sample.steps. Of the ODE of likelihoods, and time steps of their "
    "bound, at least 2, of which T is all; default: 50.",
)
_SCALE = flags.DEFINE_float(
    "guidance_scale", None, "Of samples. Default: config.sample.guidance_scale."
)
_OUT = flags.DEFINE_string("out", None, "Where to write. Default: <workdir>/evaluation.")

UNITS = {"psnr": "dB", "kl_per_element": "nats", "mae": "of values from -1 to 1"}
UNITS |= {"low_res_psnr": "dB", "luma_error": "levels", "stroke_distance": "levels"}
UNITS |= {"change_outside_hole": "levels"}
# What each kind of evaluation leaves to others.
FOREIGN = {
    "reconstruction": (_SEED, _SAMPLER, _STEPS, _SCALE),
    "condition": (_METRICS, _RESOLUTION),
    "likelihood": (_METRICS, _RESOLUTION, _SAMPLER, _SCALE),
}


def main() -> None:
    """Reads the flags, evaluates and writes."""
    if not _WORKDIR.value:
        raise UserError("no workdir given: use --workdir=runs/quickstart")
    for flag in (_NUM_IMAGES, _RESOLUTION, _BATCH_SIZE):
        if flag.value < 0:
            raise UserError(f"--{flag.name} is {flag.value}, but must be at least 0")
    if _OF.value not in FOREIGN:
        raise UserError(f"--of={_OF.value}: choose from {', '.join(FOREIGN)}")
    for flag in FOREIGN[_OF.value]:
        if flag.present:
            names = {kind: [other.name for other in FOREIGN[kind]] for kind in FOREIGN}
            others = " or ".join(kind for kind in FOREIGN if flag.name not in names[kind])
            raise UserError(f"--{flag.name} is of --of={others}: leave it out here")
    from ldm_jax.workdir import read_config

    cli.use_compilation_cache()
    root = pathlib.Path(_WORKDIR.value)
    read_config(root)  # before a folder is made in what is no workdir
    out = pathlib.Path(_OUT.value or root / "evaluation")
    with cli.writing(out):
        out.mkdir(parents=True, exist_ok=True)  # before the work, which may take long
    kinds = {
        "reconstruction": _reconstruction,
        "condition": _condition,
        "likelihood": _likelihood,
    }
    written = kinds[_OF.value](root, out)
    print(f"{written} in {out}")


def _reconstruction(root: pathlib.Path, out: pathlib.Path) -> str:
    """Evaluates the first stage; says what was written."""
    from ldm_jax import images
    from ldm_jax.records import evaluate_first_stage, write_record

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
    if distributed.is_main():
        with cli.writing(out):
            images.save_png(out / "reconstructions.png", found.grid())
            write_record(out / "metrics.json", record)
    return "metrics.json and reconstructions.png are"


def _condition(root: pathlib.Path, out: pathlib.Path) -> str:
    """Evaluates samples; says what was written."""
    from ldm_jax import condition_sheet, images
    from ldm_jax.obedience import Request, evaluate_conditions
    from ldm_jax.records import write_record

    request = Request(
        source=_SOURCE.value,
        split=_SPLIT.value,
        num_images=_NUM_IMAGES.value,
        seed=_SEED.value,
        sampler=_SAMPLER.value,
        steps=_STEPS.value,
        guidance_scale=_SCALE.value,
        batch_size=_BATCH_SIZE.value or None,
    )
    record, sheet = evaluate_conditions(root, request)
    print(condition_table(record))
    if distributed.is_main():
        with cli.writing(out):
            images.save_png(out / "condition.png", sheet, condition_sheet.COLOURS)
            write_record(out / "metrics.json", {"condition": record})
    return "metrics.json and condition.png are"


def _likelihood(root: pathlib.Path, out: pathlib.Path) -> str:
    """Evaluates held-out images; says what was written."""
    from ldm_jax.likelihoods import Request, evaluate_likelihood
    from ldm_jax.records import write_record

    request = Request(
        source=_SOURCE.value,
        split=_SPLIT.value,
        num_images=_NUM_IMAGES.value,
        seed=_SEED.value,
        steps=_STEPS.value,
        batch_size=_BATCH_SIZE.value or None,
    )
    record = evaluate_likelihood(root, request)
    print(likelihood_table(record))
    if distributed.is_main():
        with cli.writing(out):
            write_record(out / "metrics.json", {"likelihood": record})
    return "metrics.json is"


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


def condition_table(record: dict[str, Any]) -> str:
    """What a record of conditions says: a line for each figure, a column for each reference."""
    where = f", {record['where']}" if record["where"] else ""
    lines = [
        f"{record['num_images']} conditions ({record['source']}, {record['split']}{where}), step "
        f"{record['checkpoint_step']}, {record['sampler']}, {record['steps']} steps, guidance "
        f"{record['guidance_scale']:g}"
    ]
    figures = record["figures"]
    columns = list(dict.fromkeys(column for values in figures.values() for column in values))
    lines.append(" " * 26 + "".join(f"{column:>12}" for column in columns))
    for name, values in figures.items():
        shown = (f"{values[c]:12.4f}" if c in values else f"{'-':>12}" for c in columns)
        lines.append(f"  {name:<24}{''.join(shown)} {UNITS.get(name, '')}".rstrip())
    for kind, judge in record["judges"].items():
        lines.append(
            f"judge ({kind}): {judge['held_out']:.4f} on real images that it was not fitted to; "
            f"fitted to {judge['images']}"
        )
    return "\n".join(lines)


def likelihood_table(record: dict[str, Any]) -> str:
    """What a record of likelihoods says: a line for each figure, and for each part of the bound."""
    where = f", {record['where']}" if record["where"] else ""
    shape = "x".join(map(str, record["shape"]))
    lines = [
        f"{record['num_images']} images ({record['source']}, {record['split']}{where}), step "
        f"{record['checkpoint_step']}, seed {record['seed']}: bits per dimension of "
        f"{record['of']} ({shape})"
    ]
    ode = record["ode"]
    settings = {"ode": f"{ode['steps']} steps, from noise {ode['noise']:.2g}"}
    if "vlb" in record:
        vlb = record["vlb"]
        settings["vlb"] = f"{vlb['calls']} time steps, variance {vlb['variance']}"
    for name, setting in settings.items():
        mean, error = record[name]["bits_per_dim"], record[name]["standard_error"]
        lines.append(f"  {name:<10} {mean:>9.4f} +- {error:.4f}  {setting}")
    if "vlb" in record:
        parts = ("prior", "kl", "decoder")
        lines += [f"    {part:<8} {record['vlb'][part]:>9.4f}" for part in parts]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
