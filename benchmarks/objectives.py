"""Trains one network with every objective and weighting at equal compute, and compares samples.

python -m benchmarks.objectives --out=runs/objectives
python -m benchmarks.objectives --out=runs/objectives --only=v,flow --seeds=1

All models share one first stage, the data, the network and the number of steps; a seed sets initial
weights, data order and noise. Samples are made without guidance by the same number of network
calls, with the same seeds and classes. Writes objectives.json and objectives.md into `--out`; what
is finished is not run again. Needs the extra [bench].
"""

from __future__ import annotations

import json
import pathlib

import numpy as np
from absl import flags

from benchmarks import quality
from ldm_jax import cli
from ldm_jax.errors import UserError

OUT = flags.DEFINE_string("out", "", "A folder for the runs and the results.")
ONLY = flags.DEFINE_list("only", [], "Names of variants. Default: all.")
SEEDS = flags.DEFINE_integer("seeds", 1, "Runs of each, with config.seed = 0, 1, ...")
STEPS = flags.DEFINE_integer("steps", 500, "Of training.")
COUNT = flags.DEFINE_integer("count", 512, "Samples of each.")
CALLS = 30  # of the network, for each sample

FLOW = {"diffusion.schedule": "flow", "diffusion.predict": "flow"}
RATIOS = {"diffusion.schedule": "log_snr", "diffusion.times": "log_normal"}
EDM = RATIOS | {
    "diffusion.predict": "edm",
    "diffusion.weighting": "edm",
    "diffusion.times_mean": -0.4,
}
VARIANTS: dict[str, dict[str, object]] = {
    "eps": {"diffusion.predict": "eps"},
    "x0": {"diffusion.predict": "x0"},
    "v": {},
    "eps, min_snr": {"diffusion.predict": "eps", "diffusion.weighting": "min_snr"},
    "v, min_snr": {"diffusion.weighting": "min_snr"},
    "v, soft_min_snr": {"diffusion.weighting": "soft_min_snr", "diffusion.snr_gamma": 4.0},
    "eps, p2": {"diffusion.predict": "eps", "diffusion.weighting": "p2"},
    "v, vlb": {"diffusion.weighting": "vlb"},
    "v, learned log-variance": {"diffusion.learn_log_variance": True},
    "flow": FLOW,
    "flow, logit_normal": FLOW | {"diffusion.times": "logit_normal"},
    "edm": EDM,
}


def folder(name: str, seed: int) -> str:
    """The name of a run's folder."""
    return name.replace(", ", "_").replace(" ", "_").replace("-", "_") + f"_{seed}"


def settings(changes: dict[str, object]) -> dict[str, object]:
    """How the samples of a model are made: `CALLS` steps of the first-order ODE solver."""
    continuous = changes.get("diffusion.schedule") in ("flow", "log_snr")
    sampler = "euler" if continuous else "ddim"
    spacing = "karras" if changes.get("diffusion.schedule") == "log_snr" else "trailing"
    return {"sampler": sampler, "spacing": spacing, "steps": CALLS, "eta": 0.0}


def measure(workdir: pathlib.Path, changes: dict[str, object]) -> dict[str, float]:
    """The distance of samples from the data, and the time that a training step took."""
    from ldm_jax.workdir import load

    pipe = load(workdir)
    real = quality.real_latents(pipe)
    made = pipe.sample(
        range(COUNT.value),
        quality.labels(COUNT.value),
        guidance_scale=1.0,
        decode=False,
        batch_size=128,
        **settings(changes),
    )
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [json.loads(line).get("images_per_second") for line in lines]
    return {
        "distance": quality.distance(made, quality.statistics(real)),
        "floor": quality.floor(real, COUNT.value),
        "variance": float(real.var(0).sum()),
        "images_per_second": float(np.median([rate for rate in rates if rate][1:])),
    }


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """The results as Markdown, best first."""
    some = next(iter(found.values()))[0]
    lines = [
        f"{STEPS.value} steps, {COUNT.value} samples of {CALLS} calls; real latents have "
        f"{some['floor']:.1f} between each other, and a variance of {some['variance']:.0f}.",
        "",
        "| objective | Frechet distance of latents | each seed |",
        "| --- | --- | --- |",
    ]
    rows = {name: [row["distance"] for row in rows] for name, rows in found.items()}
    for name, values in sorted(rows.items(), key=lambda row: np.mean(row[1])):
        each = ", ".join(f"{value:.1f}" for value in values)
        lines.append(f"| {name} | {np.mean(values):.1f} | {each} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Trains, samples, and writes the table."""
    if not OUT.value:
        raise UserError("give --out=FOLDER")
    names = [name for name in VARIANTS if not ONLY.value or folder(name, 0)[:-2] in ONLY.value]
    if not names:
        known = ", ".join(folder(name, 0)[:-2] for name in VARIANTS)
        raise UserError(f"--only={','.join(ONLY.value)}: choose from {known}")
    out = pathlib.Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    cli.use_compilation_cache()
    shared = quality.first_stage(out) | {"train.steps": STEPS.value}
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(SEEDS.value):
        for name in names:
            workdir, changes = out / folder(name, seed), VARIANTS[name]
            # The command line checks that the sampler of the config goes with the schedule.
            drawn = {f"sample.{key}": value for key, value in settings(changes).items()}
            quality.train(workdir, shared | drawn | changes | {"seed": seed})
            record = workdir / f"quality_{COUNT.value}.json"
            if not record.is_file():
                record.write_text(json.dumps(measure(workdir, changes)) + "\n", encoding="utf-8")
            found.setdefault(name, []).append(json.loads(record.read_text(encoding="utf-8")))
            (out / "objectives.md").write_text(table(found), encoding="utf-8")
    (out / "objectives.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    cli.run(main)
