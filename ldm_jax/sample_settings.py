"""The settings that an evaluation samples with, and what its record says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax import tensors
from ldm_jax.arguments import choose_scale
from ldm_jax.diffusion.samplers import nearest_eta
from ldm_jax.errors import UserError
from ldm_jax.pipeline import Pipeline

# Of samples that are made here: what images made elsewhere leave nothing to do for.
MADE_HERE = ("seed", "sampler", "steps", "guidance_scale", "batch_size")


class Request(Protocol):
    """What a user asks for; None is the config's own setting. See `Pipeline.sample`."""

    sampler: str | None
    steps: int | None
    guidance_scale: float | None


def sample_settings(
    config: ConfigDict, request: Request, condition: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The arguments of `Pipeline.sample` that follow from a request and the config's `sample`.

    Args:
        config: of the model.
        request: what the user asks for.
        condition: of the samples, or of one of them; None or {} has nothing to guide.

    Raises:
        UserError: an unknown sampler, or a guidance scale without anything to guide.
    """
    s = config.sample
    sampler = s.sampler if request.sampler is None else request.sampler
    return {
        "sampler": sampler,
        "steps": s.steps if request.steps is None else request.steps,
        "eta": nearest_eta(sampler, s.eta),
        "spacing": s.spacing,
        "guidance_scale": choose_scale(config, request.guidance_scale, condition),
    }


def described(
    pipe: Pipeline, seed: int, settings: Mapping[str, Any], weights: str = ""
) -> dict[str, Any]:
    """What a record says of samples: all that they follow from but for their conditions.

    Args:
        pipe: the model.
        seed: of the first sample.
        settings: of `sample_settings`.
        weights: what `weights_digest` gives of the model, where it is known already.
    """
    s, record = pipe.config.sample, {"seed": seed, **settings}
    if settings["guidance_scale"] != 1:
        record["guidance_rescale"] = s.guidance_rescale
        record["guidance_interval"] = list(s.guidance_interval)
    return record | {"checkpoint_step": pipe.step, "weights": weights or weights_digest(pipe)}


def weights_digest(pipe: Pipeline) -> str:
    """SHA-256, in hex, of all of a model's variables."""
    return tensors.digest(jax.tree.map(np.asarray, pipe.variables))


def refuse(request: Any, names: Sequence[str], reason: str) -> None:
    """Refuses fields of a request that have another value than their default.

    Args:
        request: a NamedTuple, of which each field has a default and is named as its flag.
        names: of fields that would do nothing here.
        reason: why they would not, as in '--NAME REASON'.

    Raises:
        UserError: one has.
    """
    defaults = type(request)._field_defaults
    for name in names:
        if getattr(request, name) != defaults[name]:
            raise UserError(f"--{name} {reason}: leave it out")
