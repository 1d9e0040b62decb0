"""Compares all samplers on one trained model by the number of network calls.

python -m benchmarks.objectives --out=runs/objectives --only=v
python -m benchmarks.samplers --workdir=runs/objectives/v_0 --out=runs/samplers

Every sampler runs with even steps and with those of Karras et al. 2022, from the same seeds and
classes, without guidance; a sampler is told as many steps as make the number of calls. The Frechet
distance to the data ends at what the model has learnt. How exactly it is sampled shows in a second
table: the root mean square difference of latents from those that Heun makes in 200 steps of
the same noise, for samplers of the ODE. Writes samplers.json, samplers.md, samplers.png and
samplers_error.png into `--out`; what is finished is not run again. Needs the extra [bench].
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
from absl import flags

from benchmarks import quality
from ldm_jax import cli
from ldm_jax.diffusion.samplers import SAMPLERS
from ldm_jax.errors import UserError

WORKDIR = flags.DEFINE_string("workdir", "", "A class-conditional model of benchmarks.objectives.")
OUT = flags.DEFINE_string("out", "", "A folder for the results.")
COUNT = flags.DEFINE_integer("count", 512, "Samples of each.")
CALLS = flags.DEFINE_list("calls", ["5", "10", "20", "40"], "Numbers of network calls.")
SPACINGS = ("trailing", "karras")
COMPARED = 128  # samples of which errors are measured
Values = dict[str, float]  # by the number of calls
EXACT = {"sampler": "heun", "spacing": "karras", "steps": 200}


def steps_for(sampler: str, calls: int) -> int | None:
    """The steps that take so many network calls, or None if no number does."""
    if sampler == "plms":
        return calls - 1
    if sampler in ("heun", "flow_heun"):
        return calls // 2 + 1 if calls % 2 else calls // 2
    return calls


def variants(schedule: str) -> list[tuple[str, str]]:
    """(sampler, spacing) of all that make sense for a schedule, and the paper's own."""
    names = [name for name in SAMPLERS if name != "flow_heun" or schedule == "flow"]
    pairs = [(n, s) for n in names for s in SPACINGS if s in SAMPLERS[n].spacings]
    return [("ddim", "leading"), *pairs]  # the paper's


def sample(pipe: Any, sampler: str, spacing: str, steps: int, count: int) -> np.ndarray:
    """Latents (count, h, w, C) of the first seeds."""
    return pipe.sample(
        range(count),
        {"label": quality.labels(COUNT.value)["label"][:count]},
        sampler=sampler,
        steps=steps,
        spacing=spacing,
        eta=0.0 if sampler == "ddim" else None,
        guidance_scale=1.0,
        decode=False,
        batch_size=128,
    )


def best_spacings(found: dict[str, Values]) -> dict[str, tuple[str, Values]]:
    """Of each sampler the spacing that is better over all calls, best sampler first."""
    best: dict[str, tuple[str, Values]] = {}
    for key, values in found.items():
        sampler, spacing = key.split(" ")
        if sampler not in best or sum(values.values()) < sum(best[sampler][1].values()):
            best[sampler] = (spacing, values)
    return dict(sorted(best.items(), key=lambda row: sum(row[1][1].values())))


def table(found: dict[str, Values], calls: list[int], digits: int) -> str:
    """Samplers with their better spacing as Markdown."""
    lines = [
        "| sampler | spacing | " + " | ".join(f"{n} calls" for n in calls) + " |",
        "| --- | --- |" + " --- |" * len(calls),
    ]
    for sampler, (spacing, values) in best_spacings(found).items():
        shown = " | ".join(f"{values[str(n)]:.{digits}f}" for n in calls)
        lines.append(f"| `{sampler}` | `{spacing}` | {shown} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Samples, measures, and writes tables and plots."""
    if not WORKDIR.value or not OUT.value:
        raise UserError("give --workdir=DIR and --out=FOLDER")
    from ldm_jax.workdir import load

    cli.use_compilation_cache()
    out, calls = pathlib.Path(OUT.value), [int(n) for n in CALLS.value]
    out.mkdir(parents=True, exist_ok=True)
    pipe, record = load(WORKDIR.value), out / "samplers.json"
    real = quality.real_latents(pipe)
    target, floor = quality.statistics(real), quality.floor(real, COUNT.value)
    found = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    distances, errors = found.setdefault("distance", {}), found.setdefault("error", {})
    exact = sample(pipe, **EXACT, count=COMPARED)
    for sampler, spacing in variants(pipe.config.diffusion.schedule):
        key, ode = f"{sampler} {spacing}", SAMPLERS[sampler].etas[0] == 0
        for n in calls:
            values = distances.setdefault(key, {})
            if str(n) not in values:
                made = sample(pipe, sampler, spacing, steps_for(sampler, n), COUNT.value)
                values[str(n)] = quality.distance(made, target)
                print(f"{key} {n}: distance {values[str(n)]:.1f}", flush=True)
            if ode and str(n) not in errors.setdefault(key, {}):
                made = sample(pipe, sampler, spacing, steps_for(sampler, n), COMPARED)
                errors[key][str(n)] = float(np.sqrt(np.square(made - exact).mean()))
                print(f"{key} {n}: error {errors[key][str(n)]:.4f}", flush=True)
            record.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    text = (
        f"{COUNT.value} samples of each; as many real latents have {floor:.1f}.\n\n"
        f"{table(distances, calls, 1)}\nThe first {COMPARED} samples against "
        f"{EXACT['steps']} steps of {EXACT['sampler']}:\n\n{table(errors, calls, 3)}"
    )
    (out / "samplers.md").write_text(text, encoding="utf-8")
    print(text)
    for name, values, label in (
        ("samplers", distances, "Frechet distance of latents"),
        ("samplers_error", errors, "root mean square error of latents"),
    ):
        lines = {
            sampler: [(n, chosen[str(n)]) for n in calls]
            for sampler, (_, chosen) in best_spacings(values).items()
        }
        quality.plot(out / f"{name}.png", lines, "network calls", label)


if __name__ == "__main__":
    cli.run(main)
