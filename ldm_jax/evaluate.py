"""Evaluates a workdir: samples, copies, reconstructions, how conditions are obeyed, likelihoods.

python -m ldm_jax.evaluate --workdir=runs/quickstart
python -m ldm_jax.evaluate --workdir=runs/imported --source=folder:photos --metrics=psnr,ssim
python -m ldm_jax.evaluate --workdir=runs/layout --of=condition --split=train[4000:5000]
python -m ldm_jax.evaluate --workdir=runs/layout --of=likelihood --num_images=64 --steps=100
python -m ldm_jax.evaluate --workdir=runs/quickstart --metrics=fid,kid,is,precision,recall
python -m ldm_jax.evaluate --samples=made_elsewhere.npz --reference=cifar.npz --metrics=fid --out=.

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

With --of=samples, or --metrics of these, it samples the model on all devices, or takes --samples,
and compares them with real images: fid, fid_infinity, sfid, kid, is, precision, recall, density,
coverage and fd_dino. Real images are those of training, cropped and resized alike, or --reference.
The same command goes on where it was cut off. It writes the section `samples` of metrics.json, a
line in the workdir's README.md, samples.png and reference.png; of --samples the section and the
picture are `foreign_samples`. docs/evaluation.md says more.

With --of=memorisation it looks for the training image that is nearest to each sample, in pixels, by
LPIPS and by Inception, and says which share is nearer than all but 5 % of held-out images are. It
writes the section `memorisation` of metrics.json, and memorisation.png with the nearest ones.
"""

from __future__ import annotations

import pathlib

from absl import flags

from ldm_jax import cli, distributed, evaluation_tables
from ldm_jax.errors import UserError

# Of `metrics.sets`, which must not be imported before other processes are joined.
SAMPLE_METRICS = ("fid", "fid_infinity", "sfid", "fd_dino", "kid", "is")
SAMPLE_METRICS += ("precision", "recall", "density", "coverage")

distributed.define_flags()
_OF = flags.DEFINE_string(
    "of",
    None,
    "What is evaluated: samples, reconstruction, condition, likelihood or memorisation. Default: "
    "samples where --metrics are of these, else reconstruction.",
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
    "its training images, as of samples always; train of another --source.",
)
_NUM_IMAGES = flags.DEFINE_integer(
    "num_images",
    0,
    "The first ones of the split; 0 = all. A slice such as test[:500] is a fair sample. Of "
    "conditions, likelihoods and memorisation: so many from all of the split; 0 = 256, 128 or 256. "
    "Of samples: real images that they are compared to, from all of the split.",
)
_METRICS = flags.DEFINE_list(
    "metrics",
    None,
    "What to measure. Of reconstructions psnr, ssim, lpips and rfid, the default; of samples "
    f"{', '.join(SAMPLE_METRICS)}; default fid, sfid, kid, precision, recall.",
)
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
_NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples",
    None,
    "How many samples. Default: 50000, or all of --samples; 0 = only write the reference.",
)
_SAMPLES = flags.DEFINE_string(
    "samples",
    "",
    "Folder, or .npz file (arr_0), of images made elsewhere, to evaluate as they are.",
)
_REFERENCE = flags.DEFINE_string(
    "reference",
    "",
    "Real images: a folder, or an .npz file of ours, the ADM suite's or pytorch-fid's. Default: "
    "the training data.",
)
_WRITE_REFERENCE = flags.DEFINE_string(
    "write_reference", "", "FILE.npz to write the reference's statistics to, for others to use."
)
_FORCE = flags.DEFINE_bool(
    "force", False, "Take a --reference of another network, resize rule or size all the same."
)
_LABELS = flags.DEFINE_string(
    "labels", "data", "How classes of samples are drawn: as often as in the data, or uniform."
)
_RESIZE = flags.DEFINE_string(
    "resize", "pytorch", "How images come to Inception's size: pytorch, tensorflow or antialiased."
)
_DINO = flags.DEFINE_string("dino", "", "Folder with the weights of DINOv2, for fd_dino.")
_CLIP = flags.DEFINE_string(
    "clip",
    "",
    "Folder of a whole CLIP with its vocabulary, for the CLIP score of a model of texts.",
)
_NUM_TRAINING = flags.DEFINE_integer(
    "num_training", 0, "Training images that are searched for copies, the first ones; 0 = all."
)

_OF_SAMPLES = (_NUM_SAMPLES, _REFERENCE, _WRITE_REFERENCE, _FORCE, _LABELS, _RESIZE, _DINO)
_OF_COPIES = (_NUM_TRAINING,)
# What each kind of evaluation leaves to others.
FOREIGN = {
    "reconstruction": (
        *(_SEED, _SAMPLER, _STEPS, _SCALE, _SAMPLES, _CLIP),
        *_OF_SAMPLES,
        *_OF_COPIES,
    ),
    "condition": (_METRICS, _RESOLUTION, _SAMPLES, *_OF_SAMPLES, *_OF_COPIES),
    "likelihood": (
        *(_METRICS, _RESOLUTION, _SAMPLER, _SCALE, _SAMPLES, _CLIP),
        *_OF_SAMPLES,
        *_OF_COPIES,
    ),
    "memorisation": (_METRICS, _RESOLUTION, _CLIP, *_OF_SAMPLES),
    "samples": (_RESOLUTION, _CLIP, *_OF_COPIES),
}


def main() -> None:
    """Reads the flags, evaluates and writes."""
    for flag in (_NUM_IMAGES, _RESOLUTION, _BATCH_SIZE, _NUM_TRAINING):
        if flag.value < 0:
            raise UserError(f"--{flag.name} is {flag.value}, but must be at least 0")
    of = _kind()
    for flag in FOREIGN[of]:
        if flag.present:
            names = {kind: [other.name for other in FOREIGN[kind]] for kind in FOREIGN}
            others = " or ".join(kind for kind in FOREIGN if flag.name not in names[kind])
            raise UserError(f"--{flag.name} is of --of={others}: leave it out here")
    if not _WORKDIR.value and not (of == "samples" and _SAMPLES.value):
        raise UserError("no workdir given: use --workdir=runs/quickstart")
    if not _WORKDIR.value and not _OUT.value:
        raise UserError("no workdir given: say by --out where to write")
    from ldm_jax.workdir import read_config

    cli.use_compilation_cache()
    root = pathlib.Path(_WORKDIR.value) if _WORKDIR.value else None
    if root is not None:
        read_config(root)  # before a folder is made in what is no workdir
    out = pathlib.Path(_OUT.value or root / "evaluation")
    with cli.writing(out):
        out.mkdir(parents=True, exist_ok=True)  # before the work, which may take long
    kinds = {
        "reconstruction": _reconstruction,
        "condition": _condition,
        "likelihood": _likelihood,
        "samples": _samples,
        "memorisation": _memorisation,
    }
    written = kinds[of](root, out)
    print(f"{written} in {out}")


def _kind() -> str:
    """What is evaluated, by --of or the metrics alone."""
    from ldm_jax.config import METRICS

    given = set(_METRICS.value or ())
    if _OF.value is None:
        other = sorted(given - set(SAMPLE_METRICS))
        known = (*SAMPLE_METRICS, *METRICS)
        if unknown := [name for name in other if name not in known]:
            raise UserError(f"unknown metric '{unknown[0]}': choose from {', '.join(known)}")
        if given and other and len(other) < len(given):
            raise UserError(
                f"--metrics={','.join(_METRICS.value)}: {', '.join(other)} and the others are of "
                "different things; choose what to evaluate by --of=samples or --of=reconstruction"
            )
        return "samples" if given and not other else "reconstruction"
    if _OF.value not in FOREIGN:
        raise UserError(f"--of={_OF.value}: choose from {', '.join(FOREIGN)}")
    return _OF.value


def _reconstruction(root: pathlib.Path, out: pathlib.Path) -> str:
    """Evaluates the first stage; says what was written."""
    from ldm_jax import images
    from ldm_jax.config import METRICS
    from ldm_jax.records import evaluate_first_stage, write_record

    found, record = evaluate_first_stage(
        root,
        source=_SOURCE.value,
        split=_SPLIT.value,
        num_images=_NUM_IMAGES.value,
        metrics=METRICS if _METRICS.value is None else _METRICS.value,
        resolution=_RESOLUTION.value,
        batch_size=_BATCH_SIZE.value,
    )
    print(evaluation_tables.table(record))
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
        clip=_CLIP.value,
    )
    record, sheet = evaluate_conditions(root, request)
    print(evaluation_tables.condition_table(record))
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
    print(evaluation_tables.likelihood_table(record))
    if distributed.is_main():
        with cli.writing(out):
            write_record(out / "metrics.json", {"likelihood": record})
    return "metrics.json is"


def _memorisation(root: pathlib.Path, out: pathlib.Path) -> str:
    """Looks for copies of training images; says what was written."""
    from ldm_jax import images
    from ldm_jax.memorisation import Request, evaluate_memorisation
    from ldm_jax.records import write_record

    request = Request(
        samples=_SAMPLES.value,
        source=_SOURCE.value,
        split=_SPLIT.value,
        num_images=_NUM_IMAGES.value,
        num_training=_NUM_TRAINING.value,
        seed=_SEED.value,
        sampler=_SAMPLER.value,
        steps=_STEPS.value,
        guidance_scale=_SCALE.value,
        batch_size=_BATCH_SIZE.value or None,
    )
    record, sheet = evaluate_memorisation(root, request)
    print(evaluation_tables.memorisation_table(record))
    if distributed.is_main():
        with cli.writing(out):
            images.save_png(out / "memorisation.png", sheet)
            write_record(out / "metrics.json", {"memorisation": record})
    return "metrics.json and memorisation.png are"


def _samples(root: pathlib.Path | None, out: pathlib.Path) -> str:
    """Evaluates samples against real images; says what was written."""
    from ldm_jax.records import add_to_readme, write_record
    from ldm_jax.sample_metrics import Request, evaluate_samples, section_of

    request = Request(
        num_samples=_NUM_SAMPLES.value,
        samples=_SAMPLES.value,
        reference=_REFERENCE.value,
        write_reference=_WRITE_REFERENCE.value,
        force=_FORCE.value,
        source=_SOURCE.value,
        split=_SPLIT.value,
        num_images=_NUM_IMAGES.value,
        labels=_LABELS.value,
        resize=_RESIZE.value,
        dino=_DINO.value,
        seed=_SEED.value,
        sampler=_SAMPLER.value,
        steps=_STEPS.value,
        guidance_scale=_SCALE.value,
        batch_size=_BATCH_SIZE.value or None,
    )
    if _METRICS.value is not None:
        request = request._replace(metrics=_METRICS.value)
    record = evaluate_samples(root, out, request)
    if _NUM_SAMPLES.value == 0:
        return f"{_WRITE_REFERENCE.value} is written; what it was made of is"
    if distributed.is_main():
        print(evaluation_tables.samples_table(record))
        with cli.writing(out):
            write_record(out / "metrics.json", {section_of(_SAMPLES.value): record})
            if root is not None:
                add_to_readme(root, evaluation_tables.samples_line(record))
    return "metrics.json and pictures are"


if __name__ == "__main__":
    cli.run(main)
