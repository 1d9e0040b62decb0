"""Configurations of the other parts of a pipeline of `diffusers`, and of the whole as our config.

A part is 'first_stage', 'unet', 'text' or 'scheduler'; a network on its own is the only part.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from ml_collections import ConfigDict

from ldm_jax import config as config_lib
from ldm_jax.conditioners.clip import ClipText
from ldm_jax.conditioners.text import TextTransformer
from ldm_jax.convert.diffusers_configs import read_first_stage, read_unet
from ldm_jax.convert.diffusers_keys import (
    FIRST_STAGES,
    FLOW,
    FLOW_FIXED,
    PREDICTIONS,
    SCHEDULER_FIXED,
    SCHEDULERS,
    SCHEDULES,
    UNETS,
    ZERO_SNR,
    Given,
    choose,
    inverse,
    number,
    refuse,
)
from ldm_jax.convert.model import use_conditioners
from ldm_jax.convert.tables import short
from ldm_jax.convert.text import text_module
from ldm_jax.diffusion.samplers import SAMPLERS
from ldm_jax.errors import UserError

Parts = dict[str, dict[str, Any]]

SUPER_RESOLUTION = "LDMSuperResolutionPipeline"
HEAD_DIM = TextTransformer.head_dim  # no key of our config
OPEN = ("dpmpp", "deis", "unipc")  # whose 'linspace' is our 'linspace_open'


def read_scheduler(given: Given) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a scheduler's config: what differs in the blocks `diffusion` and `sample` of ours.

    The noise process is theirs; the sampler is the nearest, as the order of a solver (3 of deis and
    unipc) only says how fast its steps converge.

    Raises:
        UserError: another noise process than ours.
    """
    name = given["_class_name"]
    ours = next((sampler for sampler, names in SCHEDULERS.items() if name in names), None)
    if ours is None and name != FLOW:
        known = ", ".join([*(names[0] for names in SCHEDULERS.values()), FLOW])
        raise UserError(f"the scheduler {short(name)} has no counterpart here: choose from {known}")
    for key, values in (FLOW_FIXED if name == FLOW else SCHEDULER_FIXED).items():
        if given.get(key) not in (None, *values):
            refuse(name, key, given[key], repr(values[0]))
    if str(given.get("variance_type")).startswith("learned"):
        refuse(name, "variance_type", given["variance_type"], "fixed")
    if name == FLOW:
        steps = number(name, {"num_train_timesteps": 1000} | dict(given), "num_train_timesteps")
        diffusion = dict(schedule="flow", predict="flow", steps=steps)
        return diffusion, dict(sampler="euler", spacing="linspace", eta=0.0)
    if given.get("rescale_betas_zero_snr") and name not in ZERO_SNR:
        refuse(name, "rescale_betas_zero_snr", True, "False")
    ends = (0.00085, 0.012) if name == "HeunDiscreteScheduler" else (0.0001, 0.02)
    defaults = {"beta_schedule": "linear", "prediction_type": "epsilon", "beta_start": ends[0]}
    defaults |= {"beta_end": ends[1], "num_train_timesteps": 1000}
    defaults["timestep_spacing"] = "leading" if ours in ("ddim", "ddpm", "plms") else "linspace"
    c = defaults | dict(given)
    diffusion = dict(
        schedule=choose(name, c, "beta_schedule", inverse(SCHEDULES)),
        beta=(float(c["beta_start"]), float(c["beta_end"])),
        steps=number(name, c, "num_train_timesteps"),
        predict=choose(name, c, "prediction_type", inverse(PREDICTIONS)),
        zero_terminal_snr=bool(c.get("rescale_betas_zero_snr")),
    )
    if ours == "dpmpp_2m":
        orders = {2: "dpmpp_2m", 3: "dpmpp_3m"}
        ours = choose(name, {"solver_order": 2} | c, "solver_order", orders)
    spacing = "karras" if c.get("use_karras_sigmas") else c["timestep_spacing"]
    if spacing == "linspace" and ours.startswith(OPEN):
        spacing = "linspace_open"
    if spacing not in SAMPLERS[ours].spacings:
        spacing = "leading"
    # The pipelines sample with eta 0 where there is a choice.
    return diffusion, dict(sampler=ours, spacing=spacing, eta=SAMPLERS[ours].etas[0])


def write_scheduler(config: ConfigDict) -> dict[str, Any]:
    """The config of the scheduler that is nearest to a config's process and sampler.

    Raises:
        UserError: diffusers has no such noise schedule.
    """
    d, s = config.diffusion, config.sample
    if d.schedule == "flow":
        return _write_flow(config)
    if d.schedule not in SCHEDULES:
        raise UserError(
            f"diffusers has no noise schedule like config.diffusion.schedule='{d.schedule}': "
            "export to another format"
        )
    if d.predict not in PREDICTIONS:
        raise UserError(
            f"config.diffusion.predict='{d.predict}' cannot be exported to diffusers: export to "
            "another format"
        )
    sampler = s.sampler.removesuffix("_sde").replace("dpmpp_3m", "dpmpp_2m")
    if sampler not in SCHEDULERS or s.spacing in ("quad", "log_snr"):
        key = "spacing" if sampler in SCHEDULERS else "sampler"
        raise UserError(
            f"config.sample.{key}='{s[key]}' cannot be exported to diffusers: choose another"
        )
    name = SCHEDULERS[sampler][0]
    if d.zero_terminal_snr and name not in ZERO_SNR:
        raise UserError(
            f"diffusers' {name} knows no zero_terminal_snr: set config.sample.sampler to another "
            f"than '{s.sampler}', or export to another format"
        )
    given = dict(
        _class_name=name,
        num_train_timesteps=d.steps,
        beta_start=d.beta[0],
        beta_end=d.beta[1],
        beta_schedule=SCHEDULES[d.schedule],
        prediction_type=PREDICTIONS[d.predict],
        timestep_spacing="leading",
        steps_offset=1,
        trained_betas=None,
    )
    if s.spacing in ("linspace", "linspace_open", "trailing"):
        given |= dict(timestep_spacing=s.spacing.removesuffix("_open"), steps_offset=0)
    elif s.spacing == "karras":
        given |= dict(timestep_spacing="linspace", steps_offset=0, use_karras_sigmas=True)
    if d.zero_terminal_snr:
        given["rescale_betas_zero_snr"] = True
    if sampler in ("ddim", "ddpm"):
        given["clip_sample"] = False  # latents have no range
    if sampler in ("ddim", "plms"):
        given["set_alpha_to_one"] = False  # the last step ends at the first time step
    if sampler == "plms":
        given["skip_prk_steps"] = True
    if sampler in ("deis", "unipc"):
        given["solver_order"] = 3
    if sampler == "dpmpp_2m":
        given["solver_order"] = 3 if s.sampler.startswith("dpmpp_3m") else 2
        if s.sampler.endswith("_sde"):
            given["algorithm_type"] = "sde-dpmsolver++"
    return given


def _write_flow(config: ConfigDict) -> dict[str, Any]:
    """The scheduler of a flow; what times training draws does not concern it.

    Raises:
        UserError: it would not make the same steps.
    """
    d, s = config.diffusion, config.sample
    euler = s.sampler == "euler" or (s.sampler == "ddim" and s.eta == 0)  # the same on a flow
    for fits, key, want in (
        (d.predict == "flow", "diffusion.predict", "'flow'"),
        (euler, "sample.sampler", "'euler'"),
        (s.spacing == "linspace", "sample.spacing", "'linspace'"),
    ):
        if not fits:
            block, name = key.split(".")
            raise UserError(
                f"config.{key}='{config[block][name]}' cannot be exported to diffusers with "
                f"schedule 'flow': only {want} can"
            )
    return dict(_class_name=FLOW, num_train_timesteps=d.steps, shift=1.0)


def read_text(module: nn.Module) -> dict[str, Any]:
    """The block `text` of ours for a text encoder.

    Raises:
        UserError: it is no TextTransformer or ClipText, or its heads are not as wide as ours.
    """
    if not isinstance(module, (ClipText, TextTransformer)):
        raise UserError(f"a pipeline with a {type(module).__name__} cannot be imported")
    block = {
        name: getattr(module, name)
        for name in ("vocab_size", "width", "depth", "heads", "length", "null_tokens", "pad_token")
    }
    if isinstance(module, ClipText):
        rest = dict(encoder="clip", mlp_width=module.mlp_width, activation=module.activation)
        return block | rest
    if module.head_dim != HEAD_DIM:
        refuse("LDMBertModel", "head_dim", module.head_dim, f"{HEAD_DIM}")
    return block | dict(encoder="bert", mlp_width=4 * module.width, activation="gelu")


def write_text(module: ClipText | TextTransformer) -> dict[str, Any]:
    """The `config.json` of the CLIPTextModel or LDMBertModel that a text encoder is."""
    given = dict(vocab_size=module.vocab_size, max_position_embeddings=module.length)
    given |= dict(pad_token_id=module.pad_token)
    if isinstance(module, ClipText):
        return given | dict(
            architectures=["CLIPTextModel"],
            model_type="clip_text_model",
            hidden_size=module.width,
            intermediate_size=module.mlp_width,
            num_hidden_layers=module.depth,
            num_attention_heads=module.heads,
            hidden_act=module.activation,
            layer_norm_eps=1e-5,
            projection_dim=module.width,
            bos_token_id=module.vocab_size - 2,
            eos_token_id=module.vocab_size - 1,
        )
    return given | dict(
        architectures=["LDMBertModel"],
        model_type="ldmbert",
        d_model=module.width,
        encoder_ffn_dim=4 * module.width,
        encoder_layers=module.depth,
        encoder_attention_heads=module.heads,
        head_dim=module.head_dim,
        activation_function="gelu",
        scale_embedding=False,
    )


def derive(parts: Parts, pipeline: str) -> ConfigDict:
    """Our config, as far as parts and the class of the pipeline tell it; it is not checked.

    Raises:
        UserError: a setting that we have no counterpart for, or parts that do not fit each other.
    """
    c = config_lib.get_config()
    c.unlock()
    c.name = "imported"
    use_conditioners(c)
    c.sample.update(steps=50, eta=0.0)
    for part, known in (("first_stage", FIRST_STAGES), ("unet", UNETS)):
        name = parts.get(part, {}).get("_class_name")
        if part in parts and name not in known:
            raise UserError(f"no {part} is of class {short(name)}: choose from {', '.join(known)}")
    side = None
    if "first_stage" in parts:
        first_stage = read_first_stage(parts["first_stage"])
        c.first_stage.update(first_stage.first_stage)
        side = first_stage.side
    if "unet" not in parts:
        c.train.steps = 0
        multiple = config_lib.downsampling(c) * 2 ** (len(c.denoiser.mult) - 1)
        c.data.resolution = -(-(side or 256) // multiple) * multiple
        return c
    unet = read_unet(parts["unet"])
    c.denoiser.update(unet.denoiser)
    if "first_stage" not in parts:
        pixels = unet.out_channels == 3 and not unet.context_width
        c.first_stage.kind = "identity" if pixels else "kl"
        c.first_stage.update(channels=unet.out_channels, z_channels=unet.out_channels)
    if config_lib.latent_channels(c) != unet.out_channels:
        raise UserError(
            f"the UNet has out_channels={unet.out_channels}, but the latents have "
            f"{config_lib.latent_channels(c)}"
        )
    c.data.resolution = (unet.side or 64) * config_lib.downsampling(c)
    if "scheduler" in parts:
        diffusion, sample = read_scheduler(parts["scheduler"])
        c.diffusion.update(diffusion)
        c.sample.update(sample)
        c.sample.steps = min(c.sample.steps, c.diffusion.steps)
    if "text" in parts:
        c.text.update(read_text(text_module(parts["text"])))
    elif unet.context_width:
        c.text.update(width=unet.context_width, mlp_width=4 * unet.context_width)
    if unet.classes:
        c.label.update(num_classes=unet.classes, width=4 * c.denoiser.width)
        c.label.update(slot="vector", null=False)
    used = {
        "text": unet.context_width,
        "label": unet.classes,
        "low_res": pipeline == SUPER_RESOLUTION,
    }
    use_conditioners(c, *(name for name, use in used.items() if use))
    return c
