"""Samples images from a trained workdir: numbered PNGs, a grid and samples.json.

python -m ldm_jax.sample --workdir=runs/quickstart --num_samples=16
python -m ldm_jax.sample --workdir=runs/quickstart --label=cat-face --guidance_scale=3
python -m ldm_jax.sample --workdir=runs/text2img --prompt='a red teapot' --guidance_scale=5
python -m ldm_jax.sample --workdir=runs/text2img --prompt='a cat' --also='a red teapot:1.5'
python -m ldm_jax.sample --workdir=runs/layout --layout=boxes.json
python -m ldm_jax.sample --workdir=runs/any --image=photo.png --mask=hole.png
python -m ldm_jax.sample --workdir=runs/any --height=1024 --width=1024 --num_samples=1
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from absl import flags

from ldm_jax import cli, distributed, sample_inputs
from ldm_jax.errors import UserError

distributed.define_flags()
_WORKDIR = flags.DEFINE_string("workdir", "", "Workdir of a training run.")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 16, "How many images.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Images at a time; never changes an image.")
_SEED = flags.DEFINE_integer("seed", 0, "Image i comes from the seed SEED + i alone.")
_SAMPLER = flags.DEFINE_string(
    "sampler", None, "Such as ddim, dpmpp_2m, unipc, heun; docs/objectives.md has all."
)
_STEPS = flags.DEFINE_integer("steps", None, "Sampling steps per image.")
_ETA = flags.DEFINE_float("eta", None, "Of ddim: 0 = deterministic to 1 = ancestral noise.")
_SPACING = flags.DEFINE_string(
    "spacing", None, "Noise levels visited: leading, linspace, trailing, karras, log_snr, ..."
)
_SCALE = flags.DEFINE_float(
    "guidance_scale", None, "Classifier-free guidance, or see --autoguidance; 1 = off."
)
_RESCALE = flags.DEFINE_float(
    "guidance_rescale", None, "0 to 1: keeps guided images from saturating; 0.7 is usual."
)
_INTERVAL = flags.DEFINE_list(
    "guidance_interval",
    None,
    "Two shares of the time range, such as 0.2,0.8, between which there is guidance; elsewhere a "
    "step costs half.",
)
_OUT = flags.DEFINE_string("out", None, "Where to write. Default: <workdir>/samples/step_<step>.")
_GRID = flags.DEFINE_bool("grid", True, "Also write all images as one grid.png.")
flags.adopt_module_key_flags(sample_inputs)  # so that --help lists them

READABLE = ("label", "text")  # conditions that samples.json repeats
RECORDED = (
    "tile",
    "resample",
    "noise_level",
    "strength",
    "classifier_scale",
)  # and inputs, where they are given


def main() -> None:
    """Reads the flags, samples and writes."""
    if not _WORKDIR.value:
        raise UserError("no workdir given: use --workdir=runs/quickstart")
    if _NUM_SAMPLES.value < 1:
        raise UserError(f"--num_samples is {_NUM_SAMPLES.value}, but must be at least 1")
    from ldm_jax import images
    from ldm_jax.arguments import choose_scale
    from ldm_jax.diffusion.samplers import nearest_eta
    from ldm_jax.workdir import load

    cli.use_compilation_cache()
    pipe = load(_WORKDIR.value)
    seeds = list(range(_SEED.value, _SEED.value + _NUM_SAMPLES.value))
    inputs, pictures = sample_inputs.read_inputs(pipe, len(seeds))
    defaults = pipe.config.sample
    sampler = defaults.sampler if _SAMPLER.value is None else _SAMPLER.value
    settings = {
        "sampler": sampler,
        "steps": defaults.steps if _STEPS.value is None else _STEPS.value,
        "eta": nearest_eta(sampler, defaults.eta) if _ETA.value is None else _ETA.value,
        "guidance_scale": _SCALE.value,
        "spacing": defaults.spacing if _SPACING.value is None else _SPACING.value,
    }
    if _RESCALE.value is not None:
        settings["guidance_rescale"] = _RESCALE.value
    if _INTERVAL.value is not None:
        settings["guidance_interval"] = _interval(_INTERVAL.value)
    guided = (inputs.get(name) for name in ("condition", "negative", "weak"))
    scale = choose_scale(pipe.config, _SCALE.value, *guided)  # that is used
    condition = inputs["condition"] or {}
    shown = {name: _plain(value) for name, value in condition.items() if name in READABLE}
    out = pathlib.Path(
        _OUT.value or pathlib.Path(_WORKDIR.value) / "samples" / f"step_{pipe.step:07d}"
    )
    with cli.writing(out):
        out.mkdir(parents=True, exist_ok=True)  # before the work, which may take long
        pixels = pipe.sample(
            seeds,
            batch_size=_BATCH_SIZE.value,
            measured=sample_inputs.memory_check(pipe, inputs),
            **inputs,
            **settings,
        )
        extra = {name: inputs[name] for name in RECORDED if name in inputs}
        extra |= sample_inputs.recorded()
        if tuple(inputs["size"]) != pipe.check_size(None):
            extra["size"] = inputs["size"]
        record = {"checkpoint_step": pipe.step, **settings, **extra, "seeds": seeds}
        record |= {"guidance_scale": scale, "condition": shown}
        if not distributed.is_main():
            return
        images.save_numbered(out, pixels)
        for name, picture in pictures.items():
            images.save_png(out / f"{name}.png", picture)
        if _GRID.value:
            images.save_png(out / "grid.png", images.make_grid(pixels))
        (out / "samples.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{len(seeds)} images of step {pipe.step} in {out}")


def _interval(values: list[str]) -> tuple[float, float]:
    try:
        low, high = (float(value) for value in values)
    except ValueError:
        given = ",".join(values)
        raise UserError(f"--guidance_interval={given} must be two numbers, 0.2,0.8") from None
    return low, high


def _plain(value: Any) -> list:
    """A list that JSON can hold, of a list or an array."""
    return value.tolist() if hasattr(value, "tolist") else list(value)


if __name__ == "__main__":
    cli.run(main)
