"""Says early that a run goes wrong, and what to do about it.

Of a first stage, from the averages of an interval of steps:

- The discriminator wins: its loss is nearly 0, so it tells reconstructions from images without
  fail, and what the decoder learns from it no longer says which way is better. Lower
  `discriminator.weight`, let it start later or learn alone for a while (`start`, `warmup`), let the
  adversarial term rise slowly (`ramp`) or hold its logits together (`lecam`).
- The adaptive weight is at its upper limit: the discriminator hardly has a gradient left, and what
  there is of it, noise, is blown up to the size of the reconstruction's. The same helps.
- Codes die: hardly any are in use, and unused ones never get a gradient. Start them again at
  latents (`codebook.reset`), or let the codebook follow the latents (`codebook.rule=ema`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from ldm_jax.first_stage.losses import LARGEST_WEIGHT

Scalars = Mapping[str, float]
# The discriminator's loss at logits of 0, which say nothing.
UNDECIDED = {"hinge": 1.0, "vanilla": math.log(2)}
# The share of it at which it has won. With the hinge, logits are then 0.1 short of their margins on
# average; with the vanilla loss, the right answer is given a probability of exp(-0.07) = 93 %. In a
# healthy training the share is above one half.
WON = 0.1
# The share of the limit that the mean weight has if nearly all steps are at it. A discriminator
# that has just begun to learn may be there for a while.
AT_LIMIT = 0.95
FEW_CODES = 0.1


def first_stage_alarms(scalars: Scalars, config: ConfigDict) -> dict[str, str]:
    """Returns a message for each thing that is wrong, by its name; {} if all is well.

    Args:
        scalars: averages of what the step measures; of these, where they exist,
            'adversarial_factor', 'discriminator', 'adaptive_weight' and 'codes_alive'.
        config: of the run.
    """
    d, found = config.first_stage.discriminator, {}
    if scalars.get("adversarial_factor", 0.0) > 0:
        loss, weight = scalars["discriminator"], scalars["adaptive_weight"]
        limit = d.weight * LARGEST_WEIGHT
        if loss < WON * UNDECIDED[d.loss]:
            found["discriminator"] = (
                f"the discriminator wins (its loss is {loss:.2g}, {UNDECIDED[d.loss]:.2g} when "
                "undecided): lower config.first_stage.discriminator.weight, or set its warmup, "
                "ramp or lecam"
            )
        if weight >= AT_LIMIT * limit:
            found["adaptive_weight"] = (
                f"the adaptive weight ({weight:.4g}) is at its limit ({limit:.4g}), as the "
                "discriminator hardly has a gradient: set config.first_stage.discriminator.lecam, "
                "warmup or ramp, or a later start"
            )
    if scalars.get("codes_alive", 1.0) < FEW_CODES:
        found["codes"] = (
            f"codes die ({scalars['codes_alive']:.1%} are in use): set "
            "config.first_stage.codebook.reset=0.05, or config.first_stage.codebook.rule=ema"
        )
    return found


class Alarms:
    """Passes on what a function finds wrong, once: when it begins, not while it lasts.

    Args:
        stage: whose metrics these are, as shown.
        find: scalars -> messages by name, such as `first_stage_alarms`.
        say: shows a line.
    """

    def __init__(
        self, stage: str, find: Callable[[Scalars], dict[str, str]], say: Callable[[str], None]
    ) -> None:
        self._stage, self._find, self._say = stage, find, say
        self._on: set[str] = set()

    def check(self, step: int, scalars: Scalars) -> int:
        """Says what is newly wrong at a step, and returns how many things are wrong."""
        found = self._find(scalars)
        for name in found.keys() - self._on:
            self._say(f"warning: {self._stage}, step {step}: {found[name]}")
        self._on = set(found)
        return len(found)
