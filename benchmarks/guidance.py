"""Compares the kinds of guidance on one trained model at equal cost.

python -m benchmarks.objectives --out=runs/objectives --only=v
python -m benchmarks.guidance --runs=runs/objectives --out=runs/guidance

The model is the objective `v` of benchmarks.objectives; a weaker one (a quarter of its steps) and
a classifier of noisy latents are trained for it. Every kind gets as many steps as make the number
of network calls the same; the gradient of the classifier, half a network forth and back, is
counted as one. Quality is the Frechet distance of latents, obedience the share that a judge, fitted
to the real images, puts into the class asked for. Writes guidance.json, guidance.md and
guidance.png into `--out`. Needs the extra [bench].
"""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import numpy as np
from absl import flags

from benchmarks import quality
from ldm_jax import cli, images
from ldm_jax.errors import UserError

RUNS = flags.DEFINE_string("runs", "", "The folder of benchmarks.objectives, with v_0.")
OUT = flags.DEFINE_string("out", "", "A folder for the results.")
COUNT = flags.DEFINE_integer("count", 512, "Samples of each.")
CALLS = flags.DEFINE_integer("calls", 40, "Network calls for each sample.")
STEPS = 500  # that v_0 was trained
CLASSIFIER = {
    "classifier.width": 64,
    "classifier.mult": "(1, 2)",
    "classifier.depth": 1,
    "classifier.attn_downsample": "(2,)",
    "classifier.train.steps": 400,
    "classifier.train.batch_size": 64,
    "classifier.train.lr": 1e-3,
    "classifier.train.log_every": 100,
    "classifier.train.picture_every": 0,
}
INTERVAL = (0.2, 0.8)


def kinds() -> dict[str, tuple[float, dict[str, Any]]]:
    """Kind and strength -> (network calls of a step, settings)."""
    found: dict[str, tuple[float, dict[str, Any]]] = {"none": (1, {"guidance_scale": 1.0})}
    for scale in (1.5, 2.0, 3.0, 5.0):
        found[f"classifier-free {scale:g}"] = (2, {"guidance_scale": scale})
    for scale in (2.0, 3.0, 5.0):
        inside = 1 + INTERVAL[1] - INTERVAL[0]
        settings = {"guidance_scale": scale, "guidance_interval": INTERVAL}
        found[f"interval {scale:g}"] = (inside, settings)
    for scale in (3.0, 5.0):
        settings = {"guidance_scale": scale, "guidance_rescale": 0.7}
        found[f"rescaled {scale:g}"] = (2, settings)
    for scale in (1.5, 2.0, 3.0):
        found[f"autoguidance {scale:g}"] = (2, {"guidance_scale": scale, "weak": True})
    for scale in (1.0, 2.0, 4.0):
        settings = {"guidance_scale": 1.0, "classifier_scale": scale}
        found[f"classifier {scale:g}"] = (2, settings)
    return found


def models(out: pathlib.Path) -> tuple[Any, Any]:
    """The model with its classifier, and the weaker model."""
    from ldm_jax.workdir import load

    runs = pathlib.Path(RUNS.value)
    if not (runs / "v_0" / "checkpoints").is_dir():
        raise UserError(f"no trained v_0 in --runs={runs}: run benchmarks.objectives --only=v")
    shared = {"first_stage.weights": str(runs / "first_stage_alone")}
    shared |= {"first_stage.latent_scale": "stored", "seed": 0}
    weak, guided = out / "weak", out / "guided"
    quality.train(weak, shared | {"train.steps": STEPS // 4})
    if not (guided / "classifier" / "weights.safetensors").is_file():
        shutil.copytree(runs / "v_0", guided, dirs_exist_ok=True)
        (guided / "samples" / "final.png").unlink(missing_ok=True)
        changes = shared | CLASSIFIER | {"train.steps": STEPS}
        quality.train(guided, changes, flags=["--allow_config_change"])
    return load(guided), load(weak)


def table(found: dict[str, dict[str, float]], floor: float) -> str:
    """The results as Markdown."""
    lines = [
        f"{COUNT.value} samples of {CALLS.value} network calls each; as many real latents have "
        f"{floor:.1f}.",
        "",
        "| guidance | Frechet distance of latents | in their class |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {n} | {v['distance']:.1f} | {v['accuracy']:.1%} |" for n, v in found.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Trains what is missing, samples, measures, and writes table and plot."""
    if not RUNS.value or not OUT.value:
        raise UserError("give --runs=DIR and --out=FOLDER")
    from ldm_jax.condition_judges import load_judge, scores
    from ldm_jax.held_out import read_examples
    from ldm_jax.metrics.judge_networks import Classifier

    cli.use_compilation_cache()
    out = pathlib.Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    record = out / "guidance.json"
    pipe, weak = models(out)
    read = lambda: read_examples(pipe.config, out, "train", 4000)  # noqa: E731
    judge = load_judge(out, "label", pipe.config, read)
    real = quality.real_latents(pipe)
    target, floor = quality.statistics(real), quality.floor(real, COUNT.value)
    asked = quality.labels(COUNT.value)
    found = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    for name, (cost, settings) in kinds().items():
        if name in found:
            continue
        chosen = settings | ({"weak": weak} if settings.get("weak") else {})
        latents = pipe.sample(
            range(COUNT.value),
            asked,
            sampler="ddim",
            spacing="trailing",
            steps=round(CALLS.value / cost),
            eta=0.0,
            decode=False,
            batch_size=128,
            **chosen,
        )
        decoded = np.concatenate([np.asarray(pipe.decode(x)) for x in np.array_split(latents, 8)])
        pixels = images.to_uint8(decoded)
        hits = scores(Classifier, judge, pixels).argmax(-1) == np.asarray(asked["label"])
        found[name] = {
            "distance": quality.distance(latents, target),
            "accuracy": float(hits.mean()),
        }
        print(f"{name}: {found[name]}", flush=True)
        record.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (out / "guidance.md").write_text(table(found, floor), encoding="utf-8")
    print(table(found, floor))
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, values in found.items():
        kind = name.rsplit(" ", 1)[0]
        lines.setdefault(kind, []).append((100 * values["accuracy"], values["distance"]))
    quality.plot(
        out / "guidance.png",
        lines,
        "in their class, %",
        "Frechet distance of latents",
        logarithmic=False,
    )


if __name__ == "__main__":
    cli.run(main)
