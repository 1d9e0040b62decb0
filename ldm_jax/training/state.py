"""What one training run carries from step to step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import optax

from ldm_jax.types import Array


@flax.struct.dataclass
class TrainState:
    """Everything a step reads and writes; the step number is also the whole state of the data.

    Attributes:
        step: () int32, updates done.
        params: trained weights, by part of the model.
        ema_params: moving average of some of them; {} where there is none, as in the paper's first
            stages.
        opt_state: of the optimiser.
        stats: other running statistics, by part: of batch normalisations, of a codebook's use and
            latents, of the discriminator's logits; {} where there are none.
        averages: of the denoiser and what is trained of the conditioner, by the name of a profile
            (`ema.Profile`); {} where there are none.
    """

    step: Array
    params: dict[str, Any]
    ema_params: dict[str, Any]
    opt_state: optax.OptState
    stats: dict[str, Any] = flax.struct.field(default_factory=dict)
    averages: dict[str, Any] = flax.struct.field(default_factory=dict)


Batch = dict[str, Array]
Metrics = dict[str, Array]
Step = Callable[[TrainState, Any, Batch, Array], tuple[TrainState, Metrics]]
Init = Callable[[Array], TrainState]
