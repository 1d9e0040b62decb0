"""Makes a model of any averaging width, out of the averages that a run has stored on its way.

python -m ldm_jax.train --config=configs/quickstart.py --workdir=runs/wide \\
  --config.ema_snapshots.stds='(0.05, 0.1)' --config.ema_snapshots.every=70
python -m ldm_jax.ema --workdir=runs/wide --std=0.15
python -m ldm_jax.sample --workdir=runs/wide/ema/std_0.15_step_0000560

--std is a power function's relative width: how far back the averaged updates lie around their mean,
as a standard deviation, over all updates. What it makes can be sampled from, exported and tuned.
--decay takes one of config.ema_snapshots.decays as it was stored.
"""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

from absl import flags

from ldm_jax import cli
from ldm_jax.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ml_collections import ConfigDict

    from ldm_jax.training.snapshots import Snapshot

_WORKDIR = flags.DEFINE_string("workdir", "", "Workdir of a training run with averages.")
_STD = flags.DEFINE_float("std", None, "Relative width to make, e.g. 0.1.")
_DECAY = flags.DEFINE_float("decay", None, "Instead of a width: a decay that was stored.")
_STEP = flags.DEFINE_integer("step", None, "Step at which it ends. Default: the last one stored.")
_OUT = flags.DEFINE_string(
    "out", None, "Folder to write. Default: <workdir>/ema/std_<std>_step_<step>."
)

# Of a profile's norm: how far the best mix may be off. With more, the width means little.
TOLERANCE = 0.1


def main() -> None:
    """Reads the flags, finds the weights of the mix, prints how good it is, and writes."""
    if not _WORKDIR.value:
        raise UserError("no workdir given: use --workdir=runs/quickstart")
    if (_STD.value is None) == (_DECAY.value is None):
        raise UserError("give one of --std=0.1 and --decay=0.999")
    from ldm_jax import workdir as files
    from ldm_jax.training.ema import Profile
    from ldm_jax.training.snapshots import find_snapshots

    root = pathlib.Path(_WORKDIR.value)
    config = files.read_config(root)
    kind = "decay" if _STD.value is None else "std"
    target = Profile(kind, _DECAY.value if _STD.value is None else _STD.value)
    folder = root / files.AVERAGES
    stored = [s for s in find_snapshots(folder) if s.profile.kind == kind]
    if not stored:
        example = "(0.05, 0.1)" if kind == "std" else "(0.999,)"
        raise UserError(
            f"no averages of a {kind} in {folder}: train with --config.ema_snapshots.{kind}s="
            f"'{example}'"
        )
    step = _choose_step(stored)
    used = [s for s in stored if s.step <= step]
    weigh = _of_decay if kind == "decay" else _of_std
    weights = weigh(used, target.value, step)
    out = pathlib.Path(_OUT.value or folder / f"{target.name}_step_{step:07d}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is no empty folder: choose another --out")
    with cli.writing(out):
        _write(root, config, used, weights, step, out)
    print(f"wrote {out}; sample: python -m ldm_jax.sample --workdir={out}")


def _choose_step(stored: Sequence[Snapshot]) -> int:
    """The step asked for, or the last one.

    Raises:
        UserError: nothing was stored at that step.
    """
    steps = sorted({s.step for s in stored})
    if _STEP.value is None or _STEP.value in steps:
        return steps[-1] if _STEP.value is None else _STEP.value
    nearest = min(steps, key=lambda step: abs(step - _STEP.value))
    raise UserError(
        f"nothing was stored at --step={_STEP.value}: the nearest is {nearest}, of {len(steps)} "
        f"from {steps[0]} to {steps[-1]}"
    )


def _of_decay(used: Sequence[Snapshot], decay: float, step: int) -> list[float]:
    """Weight 1 for the average of that decay and step.

    Raises:
        UserError: it was not stored.
    """
    weights = [float((s.step, s.profile.value) == (step, decay)) for s in used]
    if not any(weights):
        known = ", ".join(str(s.profile.value) for s in used if s.step == step)
        raise UserError(f"the decay {decay} was not stored at step {step}, but {known}")
    return weights


def _of_std(used: Sequence[Snapshot], std: float, step: int) -> list[float]:
    """Weights of the mix that has the width asked for; prints how close its profile comes.

    Raises:
        UserError: there is no such width, or no mix comes close.
    """
    from ldm_jax.training import posthoc

    steps, stds = [s.step for s in used], [s.profile.value for s in used]
    found = posthoc.mix(steps, stds, step, [std])
    weights, residual = found.weights[0], found.residual[0]
    count, widths = sum(weights != 0), ", ".join(map(str, sorted(set(stds))))
    if residual > TOLERANCE:
        ranges = posthoc.expressible(steps, stds, step, TOLERANCE)
        known = " and ".join(f"{low:.3g} to {high:.3g}" for low, high in ranges)
        raise UserError(
            f"--std={std} at step {step} is out of reach of the {len(used)} averages of "
            f"width {widths}: the profile would be {residual:.0%} off; they give {known}"
        )
    print(
        f"width {std} at step {step} of {count} averages of width {widths} from step "
        f"{steps[0]} on: the profile is {residual:.3%} off"
    )
    return list(weights)


def _write(
    root: pathlib.Path,
    config: ConfigDict,
    used: Sequence[Snapshot],
    weights: Sequence[float],
    step: int,
    out: pathlib.Path,
) -> None:
    """Writes the mix and what else belongs to a model as a folder that `ldm_jax.load` reads."""
    import jax

    from ldm_jax import config as config_lib
    from ldm_jax import workdir as files
    from ldm_jax.classifier_files import open_classifier
    from ldm_jax.convert.export import export_safetensors
    from ldm_jax.convert.model import Model
    from ldm_jax.training.ema import averaged_parts
    from ldm_jax.training.snapshots import open_mix
    from ldm_jax.training.steps import diffusion_functions

    frozen = config_lib.frozen_parts(config)
    params = jax.eval_shape(diffusion_functions(config)[0], jax.random.key(0)).params
    parts = open_mix(used, weights, averaged_parts(params, frozen))
    if frozen:  # they are the same at every step
        conditioner = files.open_weights(root, config)[1]["conditioner"]
        parts["conditioner"] |= {name: conditioner[name] for name in frozen}
    parts["first_stage"] = files.open_first_stage(root, config)
    parts |= open_classifier(root, config)
    tokenizer = files.tokenizer_folder(root, config)
    export_safetensors(Model(config, parts, tokenizer, files.read_labels(root), step), out)


if __name__ == "__main__":
    cli.run(main)
