"""Names of the networks in the original code's state dicts (CompVis `latent-diffusion`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from ldm_jax.convert.tables import (
    Layer,
    Path,
    Row,
    StateDict,
    from_flax,
    make_table,
    to_flax,
    within,
)
from ldm_jax.denoisers.unet import UNet
from ldm_jax.types import Condition

LABEL_EMBEDDING = "label_emb.weight"
LABEL_ROW = Row(("embedding.weight",), ("embedding",), "same")


UNET_RES = {
    "norm_0": Layer("in_layers.0"),
    "conv_0": Layer("in_layers.2", "conv"),
    "time": Layer("emb_layers.1", "linear"),
    "norm_1": Layer("out_layers.0"),
    "conv_1": Layer("out_layers.3", "conv"),
    "skip": Layer("skip_connection", "conv1x1"),
}
UNET_ATTENTION = {
    "norm": Layer("norm"),
    "qkv": Layer("qkv", "conv1d"),
    "out": Layer("proj_out", "conv1d"),
}
TRANSFORMER = {
    "norm": Layer("norm"),
    "proj_in": Layer("proj_in", "conv1x1"),
    "proj_out": Layer("proj_out", "conv1x1"),
}
TRANSFORMER_BLOCK = {
    **{f"norm_{i}": Layer(f"norm{i + 1}") for i in range(3)},
    **{
        f"{ours}/{name}": Layer(f"{theirs}.{layer}", "linear")
        for ours, theirs in (("self", "attn1"), ("cross", "attn2"))
        for name, layer in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0"))
    },
    "mlp_in": Layer("ff.net.0.proj", "linear"),
    "mlp_out": Layer("ff.net.2", "linear"),
}
UNET_ENDS = {
    "time_embed/dense_0": Layer("time_embed.0", "linear"),
    "time_embed/dense_1": Layer("time_embed.2", "linear"),
    "conv_in": Layer("input_blocks.0.0", "conv"),
    "norm_out": Layer("out.0"),
    "conv_out": Layer("out.2", "conv"),
}

AUTOENCODER_RES = {
    "norm_0": Layer("norm1"),
    "conv_0": Layer("conv1", "conv"),
    "norm_1": Layer("norm2"),
    "conv_1": Layer("conv2", "conv"),
    "skip": Layer("nin_shortcut", "conv1x1"),
}
AUTOENCODER_ATTENTION = {
    "norm": Layer("norm"),
    "qkv": Layer(("q", "k", "v"), "conv1x1"),
    "out": Layer("proj_out", "conv1x1"),
}
AUTOENCODER_ENDS = {
    "conv_in": Layer("conv_in", "conv"),
    "norm_out": Layer("norm_out"),
    "conv_out": Layer("conv_out", "conv"),
}
BOTTLENECK = {
    "quant_conv": Layer("quant_conv", "conv1x1"),
    "post_quant_conv": Layer("post_quant_conv", "conv1x1"),
    "codebook": Layer("quantize.embedding.weight"),
}


def transformer_layers(depth: int) -> dict[str, Layer]:
    """The layers of a SpatialTransformer with `depth` blocks."""
    layers = dict(TRANSFORMER)
    for i in range(depth):
        layers |= within(f"block_{i}", f"transformer_blocks.{i}", TRANSFORMER_BLOCK)
    return layers


def unet_layers(module: UNet) -> dict[str, Layer]:
    """Our path to their layer for all that a UNet of these fields may have.

    Their blocks are numbered in the order of execution, whatever they hold.
    """
    attention = UNET_ATTENTION
    if module.cross_attention:
        attention = transformer_layers(module.transformer_depth)
    down = UNET_RES if module.resblock_resample else {"conv": Layer("op", "conv")}
    up = UNET_RES if module.resblock_resample else {"conv": Layer("conv", "conv")}
    layers = within("", "", UNET_ENDS)

    number = 1
    for level in range(len(module.mult)):
        for i in range(module.depth):
            layers |= within(f"down_{level}_res_{i}", f"input_blocks.{number}.0", UNET_RES)
            layers |= within(f"down_{level}_attn_{i}", f"input_blocks.{number}.1", attention)
            number += 1
        layers |= within(f"down_{level}_resample", f"input_blocks.{number}.0", down)
        number += 1

    layers |= within("mid_res_0", "middle_block.0", UNET_RES)
    layers |= within("mid_attn", "middle_block.1", attention)
    layers |= within("mid_res_1", "middle_block.2", UNET_RES)

    number = 0
    for level in reversed(range(len(module.mult))):
        for i in range(module.depth + 1):
            layers |= within(f"up_{level}_res_{i}", f"output_blocks.{number}.0", UNET_RES)
            layers |= within(f"up_{level}_attn_{i}", f"output_blocks.{number}.1", attention)
            number += 1
        place = 2 if 2**level in module.attn_downsample else 1
        layers |= within(f"up_{level}_resample", f"output_blocks.{number - 1}.{place}", up)
    return layers


def first_stage_layers(module: nn.Module) -> dict[str, Layer]:
    """Our path to their layer for all that an AutoencoderKL or VQModel of these fields may have."""
    layers = within("", "", BOTTLENECK)
    for side, way, resample in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        layers |= within(side, side, AUTOENCODER_ENDS)
        for ours, theirs in (("mid_res_0", "mid.block_1"), ("mid_res_1", "mid.block_2")):
            layers |= within(f"{side}/{ours}", f"{side}.{theirs}", AUTOENCODER_RES)
        layers |= within(f"{side}/mid_attn", f"{side}.mid.attn_1", AUTOENCODER_ATTENTION)
        for level in range(len(module.mult)):
            ours, theirs = f"{side}/{way}_{level}", f"{side}.{way}.{level}"
            for i in range(module.depth + (way == "up")):
                layers |= within(f"{ours}_res_{i}", f"{theirs}.block.{i}", AUTOENCODER_RES)
                layers |= within(f"{ours}_attn_{i}", f"{theirs}.attn.{i}", AUTOENCODER_ATTENTION)
            layers |= within(
                f"{ours}_resample", f"{theirs}.{resample}", {"conv": Layer("conv", "conv")}
            )
    return layers


def split_label_embedding(state_dict: StateDict) -> tuple[dict, np.ndarray | None]:
    """Takes the class embedding (rows, 4 * width) out of the weights of their UNet.

    Ours is a conditioner for the slot `vector` and no part of the UNet. None if there is none.
    """
    rest = dict(state_dict)
    return rest, rest.pop(LABEL_EMBEDDING, None)


def unet_to_flax(state_dict: StateDict, module: UNet) -> dict:
    """Weights of their UNetModel, without `label_emb`, as the params of `module`.

    The input channels and the width of the context are those of the weights.

    Raises:
        UserError: names are missing, unexpected or of the wrong shape; lists them.
    """
    abstract = abstract_unet(module, *_inputs(state_dict, module))
    return to_flax(state_dict, make_table(unet_layers(module), abstract), abstract)


def unet_from_flax(params: Mapping[str, Any], module: UNet) -> dict[str, np.ndarray]:
    """The params of `module` under the names of their UNetModel."""
    return from_flax(params, make_table(unet_layers(module), flatten_dict(params)))


def first_stage_to_flax(state_dict: StateDict, module: nn.Module) -> dict:
    """Weights of their AutoencoderKL or VQModel, without `loss.*`, as the params of `module`.

    Raises:
        UserError: names are missing, unexpected or of the wrong shape; lists them.
    """
    abstract = abstract_first_stage(module)
    return to_flax(state_dict, make_table(first_stage_layers(module), abstract), abstract)


def first_stage_from_flax(params: Mapping[str, Any], module: nn.Module) -> dict[str, np.ndarray]:
    """The params of `module` under the names of their AutoencoderKL or VQModel."""
    return from_flax(params, make_table(first_stage_layers(module), flatten_dict(params)))


def abstract_array(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Stands for a float32 array where only its shape is of interest."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def abstract_first_stage(module: nn.Module) -> dict[Path, Any]:
    """Paths and shapes of the params of an autoencoder."""
    size = module.patch * 2 ** (len(module.mult) - 1)
    images, keys = abstract_array((1, size, size, 3)), jax.random.split(jax.random.key(0), 1)
    return flatten_dict(jax.eval_shape(module.init, keys[0], images, keys)["params"])


def abstract_unet(module: UNet, in_channels: int, context_width: int) -> dict[Path, Any]:
    """Paths and shapes of the params of a UNet.

    Args:
        module: of which they are.
        in_channels: of `x_t` and of the maps that are joined to it.
        context_width: channels of a token of the context; unused without `cross_attention`.
    """
    size = 2 ** (len(module.mult) - 1)
    x_t, t = abstract_array((1, size, size, in_channels)), abstract_array((1,))
    context = abstract_array((1, 1, context_width)) if module.cross_attention else None
    init = jax.eval_shape(module.init, jax.random.key(0), x_t, t, Condition(context=context))
    return flatten_dict(init["params"])


def _inputs(state_dict: StateDict, module: UNet) -> tuple[int, int]:
    """Input channels and width of the context that the weights of a UNet were made for."""
    conv_in = np.shape(state_dict.get("input_blocks.0.0.weight", ()))
    contexts = [np.shape(w) for n, w in state_dict.items() if re.search(r"attn2\.to_k", n)]
    channels = conv_in[1] if len(conv_in) == 4 else module.out_channels
    return channels, contexts[0][-1] if contexts and contexts[0] else 1
