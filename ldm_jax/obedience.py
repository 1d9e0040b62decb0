"""Samples a workdir's model under conditions of held-out data, and records how well they obey."""

from __future__ import annotations

import functools
import pathlib
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ldm_jax import condition_judges as judging
from ldm_jax import condition_sheet
from ldm_jax import workdir as files
from ldm_jax.condition_figures import (
    Context,
    Figures,
    Task,
    condition_inputs,
    conditional_tasks,
    guided_tasks,
)
from ldm_jax.errors import UserError
from ldm_jax.extractors import load_clip
from ldm_jax.held_out import Examples, choose_data, count_trained, read_examples
from ldm_jax.metrics.consistency import derangement
from ldm_jax.perceptual import load_perceptual
from ldm_jax.pipeline import Pipeline
from ldm_jax.sample_settings import described, sample_settings

NUM_IMAGES = 256  # unless one says otherwise


class Request(NamedTuple):
    """What the user asks for; None or '' is the workdir's own setting.

    Attributes:
        source: of the data; the judges are then fitted to its split 'train'.
        split: the held-out part of the data.
        num_images: how many conditions; 0 = 256, or all if there are fewer.
        seed: sample i comes from seed + i; the sheet has two more, from seed + N + i and 2 N + i.
        sampler: see `Pipeline.sample`, as for `steps` and `guidance_scale`.
        batch_size: images at a time; never changes one.
        clip: folder of a CLIP, for the CLIP score of a model of texts; '' leaves that out.
    """

    source: str = ""
    split: str = ""
    num_images: int = 0
    seed: int = 0
    sampler: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    batch_size: int | None = None
    clip: str = ""


def evaluate_conditions(
    workdir: pathlib.Path, request: Request
) -> tuple[dict[str, Any], np.ndarray]:
    """Samples under conditions of held-out data and measures how well these are obeyed.

    Returns the record that JSON can hold and the contact sheet, (H, W, 3) uint8.

    Raises:
        UserError: no model there that can sample, no such data, or too few for its figures.
    """
    pipe = files.load(workdir)
    if "denoiser" not in pipe.variables:
        raise UserError(
            f"{workdir} has a first stage and no denoiser, so there is nothing to sample: train "
            "one, or use --of=reconstruction"
        )
    clip = None
    if request.clip and "text" not in pipe.config.conditioners:
        raise UserError("--clip is for models of texts, which this is not: leave it out")
    if request.clip:
        clip = load_clip(request.clip, pipe.mesh)  # before the judges, which take a while
    config, split = choose_data(pipe.config, request.source, request.split)
    notes, own = [], config.data.source == pipe.config.data.source
    # Other data may number their classes otherwise.
    names = None if own else pipe.label_names
    held = read_examples(config, workdir, split, request.num_images or NUM_IMAGES, names)
    _check_count(config, held, split)
    seen = count_trained(config, held.names, split)  # by the judges; by the model, if it is its own
    if own and seen:
        notes.append(
            f"{seen} of the {len(held.names)} conditions are of training images: --split or "
            "config.first_stage.eval.split may name a part that is held out"
        )
    if seen:
        notes.append(
            "judges are fitted to some of these real images: the figures of 'real' are no ceiling"
        )
    trained: list[Examples] = []

    def read() -> Examples:
        if not trained:  # judges of several conditions see the same images
            train, crops = config.data.split, "layout" in config.conditioners
            reduce = functools.partial(judging.reduced, whole=crops)
            trained.append(
                read_examples(config, workdir, train, judging.IMAGES, names, reduce=reduce)
            )
        return trained[0]

    judges: dict[str, judging.Judge] = {}

    def judge(kind: str) -> judging.Judge:
        if kind not in judges:
            judges[kind] = judging.load_judge(workdir / "evaluation", kind, config, read)
        return judges[kind]

    lpips, note = load_perceptual(config)
    uses_lpips = {"low_res", "inpainting"} & set(config.conditioners) or not config.conditioners
    notes += [note] if note and uses_lpips else []
    for line in notes:
        print(f"note: {line}")
    context = Context(config, held, judge, lpips, clip)
    condition = condition_inputs(pipe.config, held).get("condition")
    settings = sample_settings(pipe.config, request, condition)
    figures, sheet = _measure_all(pipe, context, request, settings)
    record = {
        "figures": figures,
        "num_images": len(held.images),
        "source": config.data.source,
        "split": split,
        "where": config.data.where,
        **described(pipe, request.seed, settings),
        "judges": {
            kind: {name: found[name] for name in ("held_out", "images")}
            for kind, found in judges.items()
        },
        "notes": notes,
    }
    if clip:
        record["clip"] = clip.images.digest
    return record, sheet


def _check_count(config: ConfigDict, held: Examples, split: str) -> None:
    least = judging.CANDIDATES if "text" in config.conditioners else 2
    if len(held.images) < least:
        raise UserError(
            f"{len(held.images)} conditions are too few (--num_images, --split={split}): this "
            f"model needs at least {least}"
            + (", since a caption is to be found among so many" if least > 2 else "")
        )


def _measure_all(
    pipe: Pipeline, context: Context, request: Request, settings: dict[str, Any]
) -> tuple[Figures, np.ndarray]:
    """Samples and measures every task of the model, and makes the contact sheet."""
    count = len(context.held.images)
    other, shown = derangement(count), condition_sheet.choose_rows(context.held)
    tasks = conditional_tasks(context) or guided_tasks(context)
    figures, rows = {}, []

    def sample(task: Task, chosen: np.ndarray, seed: int) -> np.ndarray:
        inputs = {name: _take(value, chosen) for name, value in task.inputs.items()}
        return pipe.sample(
            (seed + chosen).tolist(),
            batch_size=request.batch_size,
            **inputs,
            **(settings | task.settings),
        )

    for i, task in enumerate(tasks):
        made = sample(task, np.arange(count), request.seed)
        for part in task.figures:
            figures |= part(made, other)
        part = shown[i :: len(tasks)] or shown[:1]
        more = [sample(task, np.asarray(part), request.seed + k * count) for k in (1, 2)]
        conditions = task.pictures(part)
        for place, row in enumerate(part):
            examples = [made[row], more[0][place], more[1][place]]
            rows.append([*conditions[place], context.held.images[row], *examples])
    return figures, condition_sheet.make_sheet(rows)


def _take(value: Any, rows: np.ndarray) -> Any:
    return {k: x[rows] for k, x in value.items()} if isinstance(value, dict) else value[rows]
