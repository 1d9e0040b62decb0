"""A whole page of a run: one HTML file that asks nothing of a network."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Container, Mapping, Sequence
from typing import Any

from ldm_jax.config import flatten, get_config
from ldm_jax.page.figures import find_figure, record_section, stage_curves
from ldm_jax.page.html import Markup, duration, join, number, pairs, size, table, tag, text
from ldm_jax.page.photos import Shown, gallery, spread
from ldm_jax.page.read import Picture, Run, Stage
from ldm_jax.page.style import CSS

# The browser itself refuses whatever is not in the page.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def make_page(run: Run, made: str, price_per_hour: float | None = None) -> str:
    """The page as text.

    Args:
        run: what is told.
        made: when, in words.
        price_per_hour: of the machine; None leaves the cost out.
    """
    name = str(run.config.get("name") or run.workdir.name or run.workdir)
    sections = {
        "training": ("Training", _training(run)),
        "samples": ("Samples over time", _samples(run)),
        "reconstructions": ("Reconstructions", _reconstructions(run)),
        "evaluation": ("Evaluation", _evaluation(run)),
        "times": ("Time and cost", _times(run, price_per_hour)),
        "config": ("Config", _config(run.config)),
    }
    sections = {key: part for key, part in sections.items() if part[1]}
    body = [
        tag("header", tag("h1", name), tag("p", _summary(run.config), class_="sub")),
        tag(
            "main",
            _tiles(run, price_per_hour),
            tag("nav", *(tag("a", title, href=f"#{key}") for key, (title, _) in sections.items())),
            *(tag("p", warning, class_="warn") for warning in _warnings(run)),
            *(
                tag("section", tag("h2", title), part, id=key)
                for key, (title, part) in sections.items()
            ),
        ),
        tag("footer", f"{run.workdir}, {made}"),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="Content-Security-Policy" content="{text(POLICY)}">'
        f"{tag('title', name)}<style>{CSS}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{join(body)}</body></html>\n'


def _summary(c: Mapping[str, Any]) -> str:
    """What the model is, in one line."""
    parts = [
        f"{c.get('data.source')} ({c.get('data.split')}), {c.get('data.resolution')} pixels",
        f"first stage {c.get('first_stage.kind')}",
    ]
    if c.get("train.steps"):
        conditions = ", ".join(map(str, c.get("conditioners") or ()))
        parts += [
            f"denoiser {c.get('denoiser.kind')}",
            f"predicts {c.get('diffusion.predict')} ({c.get('diffusion.schedule')})",
            f"conditions: {conditions}" if conditions else "unconditional",
        ]
    return "; ".join(parts)


def _warnings(run: Run) -> list[str]:
    found = list(run.notes)
    if run.bad_images:
        found.append(f"{run.bad_images:,} images could not be read (bad_images.txt).")
    for stage in run.stages:
        if stage.rollbacks:
            times = "once" if stage.rollbacks == 1 else f"{stage.rollbacks} times"
            found.append(f"The {stage.name} went back to an older checkpoint {times}.")
        if stage.steps < stage.planned:
            found.append(f"The {stage.name} is at step {stage.steps:,} of {stage.planned:,}.")
    return found


# -- what one looks for first ----------------------------------------------------------------------


def _tiles(run: Run, price: float | None) -> Markup | None:
    main = next((s for s in run.stages if s.name == "diffusion"), *run.stages[:1] or [None])
    found = [*_quality(run), *(_of_stage(main) if main else [])]
    if seconds := _seconds(run):
        found.append((duration(seconds), "of training"))
        if price is not None:
            found.append((f"{_cost(run, price):,.2f}", f"cost, at {price:g} an hour"))
    tiles = [tag("div", tag("b", big), tag("span", words), class_="tile") for big, words in found]
    return tag("div", *tiles, class_="tiles") if tiles else None


def _quality(run: Run) -> list[tuple[str, str]]:
    found = []
    measured = [
        (row["fid"], row["step"])
        for stage in run.stages
        for row in stage.rows
        if math.isfinite(row.get("fid", math.nan))
    ]
    if (fid := find_figure(run.record.get("samples"), "fid")) is not None:
        count = run.record["samples"].get("num_samples")
        found.append(
            (number(fid), f"FID of {number(count)} samples" if count else "FID of samples")
        )
    elif measured:
        best, step = min(measured)
        count = number(run.config.get("train.fid_samples"))
        found.append((number(best), f"best FID of {count} samples, at step {step:,}"))
    for key, words in (("psnr", "PSNR of reconstructions, dB"), ("rfid", "rFID")):
        if (value := find_figure(run.record.get("reconstruction"), key)) is not None:
            found.append((number(value), words))
    return found


def _of_stage(stage: Stage) -> list[tuple[str, str]]:
    found = [(f"{stage.steps:,}", f"steps of {stage.batch_size} images, {stage.name}")]
    if speeds := [row["images_per_second"] for row in stage.rows if "images_per_second" in row]:
        found.append((number(statistics.median(speeds), 3), f"images/s, {stage.name}"))
    if stage.parameters:
        found.append((_millions(stage.parameters), f"parameters, {stage.name}"))
    return found


def _seconds(run: Run) -> float:
    return sum(stage.seconds for stage in run.stages)


def _cost(run: Run, price: float) -> float:
    return _seconds(run) / 3600 * price


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


# -- sections --------------------------------------------------------------------------------------


def _training(run: Run) -> Markup | None:
    parts = []
    for stage in run.stages:
        known = f", {_millions(stage.parameters)} parameters" if stage.parameters else ""
        words = f"{stage.steps:,} steps of {stage.batch_size} images{known}"
        title = stage.name[:1].upper() + stage.name[1:]
        parts += [tag("h3", title, tag("span", words, class_="sub")), stage_curves(stage)]
    return join(parts) if parts else None


def _samples(run: Run) -> Markup | None:
    if not run.samples and not run.nearest:
        return None
    shown, more = _sequence(run.samples)
    c = run.config
    words = (
        "The same seeds and conditions each time, by the averaged weights: "
        f"{c.get('sample.sampler')}, {c.get('sample.steps')} steps, guidance "
        f"{number(c.get('sample.guidance_scale'))}. {more}"
    )
    parts = [tag("p", words, class_="sub"), gallery(shown, "samples")]
    if run.nearest:
        near = Shown(run.nearest, "End", "each sample above its nearest training image")
        parts += [
            tag("h3", "Nearest training images"),
            gallery([near], "nearest", "samples", wide=True),
        ]
    return join(parts)


def _reconstructions(run: Run) -> Markup | None:
    if not run.reconstructions:
        return None
    shown, more = _sequence(run.reconstructions)
    words = (
        "Images, below them their reconstructions, and below these the differences, amplified "
        f"around mid-grey. {more}"
    )
    return join([tag("p", words, class_="sub"), gallery(shown, "reconstructions", wide=True)])


def _sequence(pictures: Sequence[Picture]) -> tuple[list[Shown], str]:
    """Some of a sequence of pictures, and what is to be said if there are more."""
    chosen = spread(pictures)
    shown = [Shown(p.path, "End" if p.step is None else f"Step {p.step:,}") for p in chosen]
    more = f"{len(chosen)} of {len(pictures)} pictures." if len(chosen) < len(pictures) else ""
    return shown, more


def _evaluation(run: Run) -> Markup | None:
    if not run.record and not run.pictures:
        return None
    parts = [record_section(run.record)]
    if run.pictures:
        shown = [Shown(path, name.replace("_", " ")) for name, path in run.pictures.items()]
        parts += [tag("h3", "Pictures"), gallery(shown, "evaluation", wide=True)]
    return join(parts)


def _times(run: Run, price: float | None) -> Markup | None:
    parts = []
    if run.stages:
        head = ["", "steps", "images seen", "time", "of it steps", "share", "starts"]
        words = (
            "Time is that from the first to the last line of the training's log, over all starts: "
            "with compiling, pictures, checkpoints and measurements on the way; without opening "
            "and encoding the data, and without evaluations afterwards."
        )
        parts += [table(head, map(_time_row, run.stages)), tag("p", words, class_="note")]
    if price is not None and (seconds := _seconds(run)):
        words = f"{duration(seconds)} at {price:g} an hour: "
        parts.append(tag("p", words, tag("b", f"{_cost(run, price):,.2f}")))
    parts += _machines(run.starts)
    return join(parts) if parts else None


def _time_row(stage: Stage) -> list[str]:
    whole, steps = stage.seconds, stage.step_seconds
    return [
        stage.name,
        number(stage.steps),
        number(stage.steps * stage.batch_size),
        duration(whole) if whole else "-",
        duration(steps) if steps else "-",
        f"{min(1.0, steps / whole):.0%}" if whole and steps else "-",
        number(stage.starts) if stage.starts else "-",
    ]


def _machines(starts: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """Each machine that training ran on, with when it was started there."""
    machines: dict[str, list[str]] = {}
    for start in starts:
        machine = json.dumps({key: value for key, value in start.items() if key != "time"})
        machines.setdefault(machine, []).append(str(start.get("time", "")))
    parts = []
    for machine, times in machines.items():
        shown = {key.replace("_", " "): value for key, value in json.loads(machine).items()}
        if memory := shown.pop("memory bytes", None):
            shown["memory of a host"] = size(memory)
        shown["started"] = times[0]
        if len(times) > 1:
            shown["started"] = f"{len(times)} times, {times[0]} to {times[-1]}"
        parts += [tag("h3", "Machine"), pairs(shown)]
    return parts


def _config(config: Mapping[str, Any]) -> Markup:
    """What differs from the default, then all keys, block by block."""
    default = flatten(get_config())
    changed = {key: x for key, x in config.items() if key not in default or x != default[key]}
    changed.pop("name", None)
    blocks: dict[str, dict[str, Any]] = {}
    for key, value in config.items():
        blocks.setdefault(key.partition(".")[0] if "." in key else "", {})[key] = value
    unknown = ", ".join(key for key in config if key not in default)
    words = f"{len(changed)} of {len(config)} keys differ from the default."
    everything = [
        join([tag("h3", name) if name else None, _keys(keys, changed)])
        for name, keys in blocks.items()
    ]
    return join(
        [
            tag("p", words, class_="sub"),
            tag("p", f"This version does not know {unknown}.", class_="warn") if unknown else None,
            _keys(changed),
            tag("details", tag("summary", "All keys"), *everything),
        ]
    )


def _keys(values: Mapping[str, Any], marked: Container[str] = ()) -> Markup:
    lines = [
        tag(
            "div",
            tag("dt", key),
            tag("dd", json.dumps(value, ensure_ascii=False)),
            class_="changed" if key in marked else None,
        )
        for key, value in values.items()
    ]
    return tag("dl", *lines, class_="config")
