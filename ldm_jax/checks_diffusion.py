"""What the diffusion process of a config must obey; the rest is in `checks`."""

from __future__ import annotations

from ml_collections import ConfigDict

from ldm_jax.errors import UserError

CONTINUOUS = ("flow", "log_snr")  # schedules
CONTINUOUS_SPACINGS = ("leading", "linspace", "trailing", "karras", "log_snr")
_COUNTED = ("leading", "uniform", "quad", "linspace", "linspace_open", "trailing")
SPACINGS = (*_COUNTED, "karras", "log_snr")
SAMPLERS = ("ddim", "ddpm", "plms", "euler", "euler_ancestral", "heun", "flow_heun")
SAMPLERS += ("deis", "unipc", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "dpmpp_3m_sde")


def check_diffusion(c: ConfigDict) -> None:
    """Checks that schedule, parameterization, weighting, times and spacing go together.

    Raises:
        UserError: they do not; it names the key.
    """
    d = c.diffusion
    if not 0 < d.beta[0] <= d.beta[1] < 1:
        raise UserError(f"config.diffusion.beta is {d.beta}, but must be 0 < first <= last < 1")
    if not 0 < d.ratios[0] < d.ratios[1]:
        raise UserError(f"config.diffusion.ratios is {d.ratios}, but must be 0 < first < last")
    if not (d.p2[0] > 0 and d.p2[1] >= 0):
        raise UserError(f"config.diffusion.p2 is {d.p2}, but must be k above 0, gamma at least 0")
    continuous, drawn = d.schedule in CONTINUOUS, d.times != "uniform" or d.times_shift != 1
    if d.steps < 2 and (continuous or d.zero_terminal_snr):
        raise UserError(f"config.diffusion.steps is {d.steps}, but must be at least 2")
    if d.zero_terminal_snr and continuous:
        raise UserError(
            f"config.diffusion.zero_terminal_snr moves betas, and schedule='{d.schedule}' has none"
        )
    if d.predict == "eps" and (d.zero_terminal_snr or d.schedule == "flow"):
        cause = "zero_terminal_snr" if d.zero_terminal_snr else "schedule='flow'"
        raise UserError(
            f"config.diffusion.predict='eps' does not go with {cause}: the noise tells nothing of "
            "the image at the first step, which is pure noise; use v, x0, flow or edm"
        )
    if drawn and not continuous:
        raise UserError(
            f"config.diffusion.times and .times_shift are for schedules in continuous time: use "
            f"'uniform' and 1.0 with schedule='{d.schedule}'"
        )
    if drawn and d.weighting == "vlb":
        raise UserError(
            "config.diffusion.weighting='vlb' is the bound for uniform times only: set times to "
            "'uniform' and times_shift to 1.0"
        )
    if continuous and c.sample.spacing not in CONTINUOUS_SPACINGS:
        raise UserError(
            f"config.sample.spacing='{c.sample.spacing}' counts the time steps of a discrete "
            f"schedule: choose from {', '.join(CONTINUOUS_SPACINGS)}"
        )
