"""The keys of `diffusers`' configurations, and what may stand there.

A key of theirs is used (with the default of their class), fixed (only the values that our networks
stand for are taken) or of no importance for a network's output; any other is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ldm_jax.convert.tables import listed, short
from ldm_jax.errors import UserError

Given = Mapping[str, Any]
MOST = 2**24  # of any number here; what a network can have, the check of our config knows

# Fixed keys with the values that may stand there; the first is the one that we write.
UNET_FIXED = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "freq_shift": (0,),
    "flip_sin_to_cos": (True,),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (1,),
    "act_fn": ("silu", "swish"),
    "norm_num_groups": (32,),
    "norm_eps": (1e-5,),
    "class_embed_type": (None,),
}
PLAIN_FIXED = UNET_FIXED | {"mid_block_type": ("UNetMidBlock2D",), "add_attention": (True,)}
CROSS_FIXED = UNET_FIXED | {
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "only_cross_attention": (False,),
    "mid_block_only_cross_attention": (None, False),
    "dual_cross_attention": (False,),
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "num_attention_heads": (None,),
    "addition_embed_type": (None,),
    "addition_time_embed_dim": (None,),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "projection_class_embeddings_input_dim": (None,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "cross_attention_norm": (None,),
}
UNET_USED = {
    "sample_size": None,
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "dropout": 0.0,
    "resnet_time_scale_shift": "default",
    "time_embedding_dim": None,
    "num_class_embeds": None,
}
PLAIN_USED = UNET_USED | {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (224, 448, 672, 896),
    "down_block_types": ("DownBlock2D",) + ("AttnDownBlock2D",) * 3,
    "up_block_types": ("AttnUpBlock2D",) * 3 + ("UpBlock2D",),
    "downsample_type": "conv",
    "upsample_type": "conv",
    "attn_norm_num_groups": None,
}
CROSS_USED = UNET_USED | {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "use_linear_projection": False,
}
UNETS = {
    "UNet2DModel": (PLAIN_FIXED, PLAIN_USED, "Attn"),
    "UNet2DConditionModel": (CROSS_FIXED, CROSS_USED, "CrossAttn"),
}
UNET_IGNORED = ("num_train_timesteps", "upcast_attention", "addition_embed_type_num_heads")

FIRST_STAGE_FIXED = {
    "in_channels": (3,),
    "out_channels": (3,),
    "act_fn": ("silu", "swish"),
}
FIRST_STAGE_USED = {
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "sample_size": 32,
    "mid_block_add_attention": True,
}
FIRST_STAGES = {
    "AutoencoderKL": (
        FIRST_STAGE_FIXED
        | {
            "use_quant_conv": (True,),
            "use_post_quant_conv": (True,),
            "latents_mean": (None,),
            "latents_std": (None,),
        },
        FIRST_STAGE_USED | {"latent_channels": 4, "scaling_factor": 0.18215, "shift_factor": None},
    ),
    "VQModel": (
        FIRST_STAGE_FIXED | {"norm_type": ("group",), "lookup_from_codebook": (False,)},
        # Where no factor is written, the pipelines of the time did not scale the latents either;
        # the default of their class came later.
        FIRST_STAGE_USED
        | {
            "latent_channels": 3,
            "scaling_factor": 1.0,
            "num_vq_embeddings": 256,
            "vq_embed_dim": None,
        },
    ),
}

SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
# Ours, the class that is written for it, and the others that it is the nearest to.
SCHEDULERS = {
    "ddim": ("DDIMScheduler",),
    "ddpm": ("DDPMScheduler",),
    "plms": ("PNDMScheduler",),
    "euler": ("EulerDiscreteScheduler", "LMSDiscreteScheduler"),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler",),
    "heun": ("HeunDiscreteScheduler",),
    "deis": ("DEISMultistepScheduler",),
    "unipc": ("UniPCMultistepScheduler",),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"),
}
# Those that can move the betas so that the last time step is pure noise.
ZERO_SNR = ("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler")
ZERO_SNR += ("EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler")
SCHEDULER_FIXED = {
    "trained_betas": (None,),
    "use_flow_sigmas": (False,),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "thresholding": (False,),
    "algorithm_type": ("dpmsolver++", "dpmsolver", "deis"),
}
# The only scheduler of straight paths that one of our samplers follows.
FLOW = "FlowMatchEulerDiscreteScheduler"
FLOW_FIXED = {
    "shift": (1.0,),  # of the levels that are visited, which no spacing of ours does
    "use_dynamic_shifting": (False,),
    "shift_terminal": (None,),
    "invert_sigmas": (False,),
    "use_karras_sigmas": (False,),  # of sigma, not of sigma / alpha as ours
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "stochastic_sampling": (False,),
}


def settle(given: Given, fixed: Given, used: Given, ignored: Sequence[str]) -> dict[str, Any]:
    """Returns the used keys with their values or defaults.

    Raises:
        UserError: a fixed key has another value, or there is an unknown key.
    """
    name = given["_class_name"]
    for key, value in given.items():
        if key in fixed and value not in fixed[key]:
            refuse(name, key, value, repr(fixed[key][0]))
        known = key in fixed or key in used or key in ignored or key.startswith("_")
        if not known and value not in (None, False):
            raise UserError(
                f"the {name} has the unknown setting {listed([key])}={short(value)}: refused"
            )
    return {key: given.get(key, default) for key, default in used.items()}


def refuse(name: str, key: str, value: Any, want: str) -> NoReturn:
    """Raises UserError: a key of class `name` has a value that is not what we `want`."""
    raise UserError(f"the {name} has {key}={short(value)}, but here it can only be {want}")


def choose(name: str, c: Given, key: str, choices: Mapping[str, Any]) -> Any:
    """Looks up the value of a key; raises UserError if it is none of the choices."""
    if c[key] not in choices:
        refuse(name, key, c[key], " or ".join(map(repr, choices)))
    return choices[c[key]]


def inverse(mapping: Mapping[str, str]) -> dict[str, str]:
    """Keys by values."""
    return {value: key for key, value in mapping.items()}


def number(name: str, c: Given, key: str, levels: Sequence[int] | None = None) -> int:
    """The whole number, 1 to `MOST`, of a key that may differ per level; `levels` must agree."""
    value = c[key]
    if isinstance(value, (list, tuple)):
        values = [value[level] for level in (range(len(value)) if levels is None else levels)]
        if len(set(map(str, values))) != 1:
            refuse(name, key, value, "the same for all levels")
        value = values[0]
    if type(value) is not int or not 1 <= value <= MOST:
        refuse(name, key, value, f"a whole number from 1 to {MOST}")
    return value
