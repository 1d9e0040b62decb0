"""Measures samples against real images, and records what was measured with what."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from ldm_jax import distributed, extractors, image_origins, memory
from ldm_jax import workdir as files
from ldm_jax.errors import UserError
from ldm_jax.held_out import open_examples
from ldm_jax.image_features import Origin, collect, foresee
from ldm_jax.metrics.features import Extractor
from ldm_jax.metrics.references import Reference, digest_of, fingerprint
from ldm_jax.metrics.sets import (
    DEFAULT,
    METRICS,
    SENSIBLE,
    check_counts,
    kinds_of,
    measure,
    needed_of,
)
from ldm_jax.pipeline import Pipeline
from ldm_jax.sample_references import open_references, write_references
from ldm_jax.sample_settings import MADE_HERE, described, refuse, sample_settings
from ldm_jax.training.sharding import make_mesh

NUM_SAMPLES = 50_000  # as published
LABELS = ("data", "uniform")


class Request(NamedTuple):
    """What the user asks for; None or '' is the workdir's own setting.

    Attributes:
        metrics: some of `METRICS`.
        num_samples: how many; None = 50,000, or all that `samples` has. 0 makes a reference only.
        samples: a folder or an .npz file of images made elsewhere; '' samples the workdir's model.
        reference: a folder of real images, or an .npz file of statistics or of images; '' = the
            data, as training sees them.
        write_reference: an .npz file that is made of the reference.
        force: whether a reference of another network, resize rule or size is taken all the same.
        source: of the data, which the reference and the conditions are of.
        split: of the data; '' = what the model was trained on.
        num_images: real images of the reference, drawn evenly; 0 = all.
        labels: how classes are drawn: 'data', as often as the data have them, or 'uniform'.
        resize: how images come to Inception's size; see `prepare_inception`.
        dino: where the weights of DINOv2 are.
        seed: sample i comes from seed + i.
        sampler: see `Pipeline.sample`, as for `steps` and `guidance_scale`.
        batch_size: samples at a time; never changes one.
    """

    metrics: Sequence[str] = DEFAULT
    num_samples: int | None = None
    samples: str = ""
    reference: str = ""
    write_reference: str = ""
    force: bool = False
    source: str = ""
    split: str = ""
    num_images: int = 0
    labels: str = "data"
    resize: str = "pytorch"
    dino: str = ""
    seed: int = 0
    sampler: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    batch_size: int | None = None


def evaluate_samples(
    workdir: pathlib.Path | None, out: pathlib.Path, request: Request
) -> dict[str, Any]:
    """Measures samples of a workdir's model, or images made elsewhere, against real images.

    Conditions are drawn from the data that the model was trained on, as published figures have it:
    sample i takes those of one of its examples, drawn by the seed, each example once before one
    comes again. So classes come as often as in the data, captions and maps as they are there. Many
    published figures of balanced data draw classes uniformly: `labels='uniform'`.

    Features, and sums of them, are kept below `out`/features, so that what was cut off goes on.

    Args:
        workdir: of the model; None where `request.samples` and `request.reference` are given.
        out: folder for what is kept, and for reference.png and samples.png; the picture of samples
            made elsewhere is foreign_samples.png.
        request: what to measure.

    Returns:
        a record that JSON can hold, on process 0; {} on others, or without samples.

    Raises:
        UserError: no such model, data or weights; too few images for a metric; a reference that
            does not fit.
    """
    begin = time.monotonic()
    _check(workdir, request)
    needed = needed_of(request.metrics)
    config = None if workdir is None else _data(files.read_config(workdir), request)
    pipe, samples, made = None, None, {}
    if request.samples:
        path = pathlib.Path(request.samples).expanduser()
        samples = image_origins.sample_files(path, request.num_samples or 0)
        mesh = make_mesh()
    elif request.num_samples == 0:
        mesh = make_mesh()
    else:
        pipe = _load(workdir)
        mesh = pipe.mesh
        samples, made = _sampled(workdir, pipe, config, request)
    networks = _networks(request, mesh)
    size = samples.size if samples else (config.data.resolution,) * 2
    with distributed.agreed():
        real = open_references(
            request.reference,
            {name: networks[name] for name in needed},
            needed,
            config=config,
            size=size,
            split=request.split,
            count=request.num_images,
            force=request.force,
        )
        if samples is not None:
            for name in request.metrics:
                check_counts(name, samples.count, real.count(METRICS[name].network))
        _check_memory(samples, real.sets(), networks, request)
    references = real.collect(out)
    if request.write_reference and distributed.is_main():
        write_references(request.write_reference, references)
    if samples is None:
        return {}
    kinds = kinds_of(request.metrics, networks)
    picture = out / f"{section_of(request.samples)}.png"
    found = collect(samples, networks, kinds, out / "features", picture)
    if found is None:
        return {}
    return {
        "metrics": measure(request.metrics, found, references),
        "num_samples": samples.count,
        "size": list(samples.size),
        "samples": samples.title,
        "samples_digest": digest_of({**samples.about, "count": samples.count}),
        **made,
        "networks": {
            name: {"digest": network.digest, "resize": network.resize}
            for name, network in networks.items()
        },
        "references": {name: _described(reference) for name, reference in references.items()},
        "notes": _notes(request, samples, references, networks, pipe),
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "seconds": round(time.monotonic() - begin, 1),
    }


def section_of(samples: str) -> str:
    """The section of a record for a model's samples, or else for `samples` made elsewhere."""
    return "foreign_samples" if samples else "samples"


# -- what is asked for --------------------------------------------------------------------------


def _check(workdir: pathlib.Path | None, request: Request) -> None:
    """Refuses what needs no look at any file."""
    for name in request.metrics:
        if name not in METRICS:
            raise UserError(f"unknown metric '{name}': choose from {', '.join(METRICS)}")
    if not request.metrics:
        raise UserError(f"no metric given: choose from {', '.join(METRICS)}")
    if request.labels not in LABELS:
        raise UserError(f"--labels={request.labels}: choose from {', '.join(LABELS)}")
    count = request.num_samples
    if count is not None and count < 0:
        raise UserError(f"--num_samples is {count}, but must be at least 0")
    if count == 0 and (not request.write_reference or request.samples):
        raise UserError("--num_samples=0 makes a reference only: give --write_reference=FILE.npz")
    referred = needed_of(request.metrics)
    if request.write_reference and not referred:
        raise UserError("--write_reference needs a metric that takes one, such as fid")
    if workdir is None and not (request.samples and (request.reference or not referred)):
        raise UserError(
            "no workdir given: use --workdir=runs/quickstart, or both --samples and --reference"
        )
    if request.samples:
        refuse(request, (*MADE_HERE, "labels"), "is of samples that are made here")
    elif count == 0:
        refuse(request, (*MADE_HERE, "labels"), "is of samples: --num_samples=0 makes none")
    if "dino" not in {METRICS[name].network for name in request.metrics}:
        refuse(request, ("dino",), "is of fd_dino, which is not among the --metrics")
    if not referred:
        refuse(request, ("reference", "num_images", "force"), "is of metrics such as fid")
    if request.samples or count == 0:
        _refuse_data(request)


def _refuse_data(request: Request) -> None:
    """Refuses to name data that give neither conditions nor, it may be, real images."""
    if request.reference.endswith(".npz"):
        refuse(request, ("source", "split"), "is of data, but --reference is a file")
    elif request.reference:  # which may have splits
        refuse(request, ("source",), "is of data, but --reference is a folder")
    elif not needed_of(request.metrics):
        refuse(request, ("source", "split"), "is of metrics such as fid")


def _load(workdir: pathlib.Path) -> Pipeline:
    pipe = files.load(workdir)
    for part in ("denoiser", "conditioner", "first_stage"):
        if part not in pipe.variables:
            raise UserError(
                f"{workdir} has no weights of its {part}, so there is nothing to sample: train or "
                "import the whole, or use --of=reconstruction"
            )
    return pipe


def _data(config: ConfigDict, request: Request) -> ConfigDict:
    """The config with the data that are asked for."""
    config = ConfigDict(config).copy_and_resolve_references()
    if request.source and request.source != config.data.source:
        config.data.update(source=request.source, where="", split="train")
    config.data.split = request.split or config.data.split
    return config


def _sampled(
    workdir: pathlib.Path, pipe: Pipeline, config: ConfigDict, request: Request
) -> tuple[Origin, dict[str, Any]]:
    """The samples of a model, and what the record says of them."""
    data = config.data
    conditions, drawn_from = image_origins.no_conditions, {}
    if request.labels == "uniform":
        conditions = image_origins.uniform_labels(config, request.seed)
        drawn_from = {"labels": "uniform"}
    elif config.conditioners:
        # Other data may number their classes otherwise.
        names = None if data.source == pipe.config.data.source else pipe.label_names
        try:
            reader = open_examples(config, workdir, data.split, names)
        except UserError as error:
            if tuple(config.conditioners) != ("label",):
                raise
            way_out = "or draw classes without data: --labels=uniform"
            raise UserError(f"{error}; {way_out}") from error
        conditions = image_origins.data_conditions(config, reader, request.seed)
        drawn_from = {name: data[name] for name in ("source", "split", "where")}
        drawn_from["examples"] = len(reader)
    if not drawn_from.get("source"):
        _refuse_data(request)
    condition = conditions(0, 1).get("condition")
    settings = sample_settings(pipe.config, request, condition)
    count = NUM_SAMPLES if request.num_samples is None else request.num_samples
    samples = image_origins.samples(
        pipe, conditions, count, request.seed, settings, drawn_from, request.batch_size
    )
    record = described(pipe, request.seed, settings, samples.about["weights"])
    return samples, record | {"conditions": drawn_from}


def _networks(request: Request, mesh: Mesh) -> dict[str, Extractor]:
    """Loads the networks of the metrics."""
    outputs: dict[str, list[str]] = {name: ["pool"] for name in needed_of(request.metrics)}
    for name in request.metrics:
        known = outputs.setdefault(METRICS[name].network, [])
        if METRICS[name].output not in known:
            known.append(METRICS[name].output)
    # DINOv2 has a size and a rule of its own.
    settings = {"inception": {"resize": request.resize}, "dino": {"path": request.dino}}
    if "dino" in outputs and not request.dino:
        raise UserError("fd_dino needs the weights of DINOv2: give their folder by --dino=PATH")
    return {
        name: extractors.load_extractor(name, mesh=mesh, outputs=wanted, **settings[name])
        for name, wanted in outputs.items()
    }


# -- what is refused, and what is said ----------------------------------------------------------


def _check_memory(
    samples: Origin | None,
    sets: list[Any],
    networks: Mapping[str, Extractor],
    request: Request,
) -> None:
    """Says what memory features take, and refuses more than is free."""
    if samples is not None:
        kinds = kinds_of(request.metrics, networks)
        sets = [("samples", samples.count, samples.count, kinds), *sets]
    text, need = foresee(sets)
    print(text, flush=True)
    free = memory.free_on_host()
    if distributed.is_main() and free is not None and need > free:
        raise UserError(f"{text}: ask for fewer by --num_samples or --num_images")


def _described(reference: Reference) -> dict[str, Any]:
    """What a record says of a reference."""
    kept = 0 if reference.features is None else len(reference.features)
    return {
        "origin": reference.origin,
        "images": reference.count or None,
        "features": kept,
        "size": list(reference.size) if reference.resolution else None,
        "network": reference.digest or None,
        "digest": fingerprint(reference),
    }


def _notes(
    request: Request,
    samples: Origin,
    references: Mapping[str, Reference],
    networks: Mapping[str, Extractor],
    pipe: Pipeline | None,
) -> list[str]:
    """What limits the figures."""
    notes, count = [], samples.count
    size = "x".join(map(str, samples.size))
    frechet = [name for name in request.metrics if METRICS[name].samples == "statistics"]
    if frechet and count < SENSIBLE:
        notes.append(
            f"{', '.join(frechet)} of {count:,} samples are biased upwards: {NUM_SAMPLES:,} are "
            f"customary, {SENSIBLE:,} the least that is sensible; compare with figures of as many"
        )
    for name, reference in references.items():
        if 0 < reference.count < SENSIBLE and frechet:
            notes.append(
                f"the reference has {reference.count:,} real images: figures of others have more"
            )
        if not reference.digest:
            notes.append(f"the reference does not say which weights of '{name}' made it")
        elif reference.digest != networks[name].digest:
            notes.append(f"forced: the reference is of other weights or another rule than '{name}'")
        if not reference.resolution:
            notes.append(
                f"the reference does not say of which size its images are: make sure of {size}"
            )
        elif reference.size != tuple(samples.size):
            theirs = "x".join(map(str, reference.size))
            notes.append(f"forced: the reference is of images of {theirs}, the samples of {size}")
    guided = {"low_res", "inpainting"} & set(pipe.config.conditioners) if pipe else ()
    if guided:
        notes.append("--of=condition compares such samples with the true images")
    return notes
