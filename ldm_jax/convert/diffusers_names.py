"""Names of the networks in the state dicts of `diffusers`.

Their levels are numbered in the order of execution, so ours, which are numbered by resolution, run
backwards on the way up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ldm_jax.convert.compvis import (  # whose names diffusers has kept in these
    BOTTLENECK,
    TRANSFORMER_BLOCK,
    abstract_first_stage,
    abstract_unet,
)
from ldm_jax.convert.tables import Layer, StateDict, from_flax, make_table, to_flax, within
from ldm_jax.denoisers.unet import UNet
from ldm_jax.nn.attention import head_count
from ldm_jax.tensors import LazyArray

CLASS_EMBEDDING = "class_embedding.weight"

ENDS = {
    "conv_in": Layer("conv_in", "conv"),
    "norm_out": Layer("conv_norm_out"),
    "conv_out": Layer("conv_out", "conv"),
}
TIME_EMBEDDING = {
    "time_embed/dense_0": Layer("time_embedding.linear_1", "linear"),
    "time_embed/dense_1": Layer("time_embedding.linear_2", "linear"),
}
RES = {
    "norm_0": Layer("norm1"),
    "conv_0": Layer("conv1", "conv"),
    "time": Layer("time_emb_proj", "linear"),
    "norm_1": Layer("norm2"),
    "conv_1": Layer("conv2", "conv"),
    "skip": Layer("conv_shortcut", "conv1x1"),
}
RESAMPLE = {"conv": Layer("conv", "conv")}
ATTENTION = {
    "norm": Layer("group_norm"),
    "qkv": Layer(("to_q", "to_k", "to_v"), "linear"),
    "out": Layer("to_out.0", "linear"),
}
# Attention without a context had other names in the first releases.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OLD_NAME = re.compile(rf"(\.attentions\.\d+)\.({'|'.join(OLD_NAMES)})\.")


def transformer_layers(depth: int, linear: bool) -> dict[str, Layer]:
    """The layers of a spatial transformer with `depth` blocks.

    `linear`: its projections are stored as linear layers, not as 1x1 convolutions.
    """
    kind = "linear" if linear else "conv1x1"
    layers = {
        "norm": Layer("norm"),
        "proj_in": Layer("proj_in", kind),
        "proj_out": Layer("proj_out", kind),
    }
    for i in range(depth):
        layers |= within(f"block_{i}", f"transformer_blocks.{i}", TRANSFORMER_BLOCK)
    return layers


def level_layers(
    levels: int, depth: int, attention: Mapping[str, Layer], resample: Mapping[str, Layer], way: str
) -> dict[str, Layer]:
    """Our path to their layer for all that the levels on the way 'down' or 'up' may have."""
    layers = {}
    for level in range(levels):
        ours, theirs = f"down_{level}", f"down_blocks.{level}"
        if way == "up":
            ours, theirs = f"up_{level}", f"up_blocks.{levels - 1 - level}"
        for i in range(depth + (way == "up")):
            layers |= within(f"{ours}_res_{i}", f"{theirs}.resnets.{i}", RES)
            layers |= within(f"{ours}_attn_{i}", f"{theirs}.attentions.{i}", attention)
        layers |= within(f"{ours}_resample", f"{theirs}.{way}samplers.0", resample)
    return layers


def middle_layers(attention: Mapping[str, Layer]) -> dict[str, Layer]:
    """The layers of the middle."""
    layers = within("mid_attn", "mid_block.attentions.0", attention)
    for i in range(2):
        layers |= within(f"mid_res_{i}", f"mid_block.resnets.{i}", RES)
    return layers


def unet_layers(module: UNet, linear: bool = False) -> dict[str, Layer]:
    """Our path to their layer for all that a UNet of these fields may have."""
    attention = ATTENTION
    if module.cross_attention:
        attention = transformer_layers(module.transformer_depth, linear)
    resample = RES if module.resblock_resample else RESAMPLE
    layers = within("", "", ENDS | TIME_EMBEDDING) | middle_layers(attention)
    for way in ("down", "up"):
        layers |= level_layers(len(module.mult), module.depth, attention, resample, way)
    return layers


def first_stage_layers(module: nn.Module) -> dict[str, Layer]:
    """Our path to their layer for all that an AutoencoderKL or VQModel of these fields may have."""
    layers = within("", "", BOTTLENECK)
    for side, way in (("encoder", "down"), ("decoder", "up")):
        levels = level_layers(len(module.mult), module.depth, ATTENTION, RESAMPLE, way)
        layers |= within(side, side, ENDS | levels | middle_layers(ATTENTION))
    return layers


def unet_to_flax(
    state_dict: StateDict, module: UNet, in_channels: int, context_width: int, linear: bool = False
) -> dict:
    """Weights of their UNet2DModel or UNet2DConditionModel as the params of `module`.

    Args:
        state_dict: without the class embedding, which is a conditioner of ours.
        module: with `cross_attention` for a UNet2DConditionModel.
        in_channels: of `x_t` and of the maps that are joined to it.
        context_width: channels of a token of the context; unused without `cross_attention`.
        linear: their `use_linear_projection`.

    Raises:
        UserError: names are missing, unexpected or of the wrong shape; lists them.
    """
    abstract = abstract_unet(module, in_channels, context_width)
    table = make_table(unet_layers(module, linear), abstract)
    return reorder_qkv(to_flax(_renamed(state_dict), table, abstract), module, to_ours=True)


def unet_from_flax(params: Mapping[str, Any], module: UNet) -> dict[str, Any]:
    """The params of `module` under the names of their UNet2DModel or UNet2DConditionModel."""
    table = make_table(unet_layers(module), flatten_dict(params))
    return from_flax(reorder_qkv(params, module, to_ours=False), table)


def first_stage_to_flax(state_dict: StateDict, module: nn.Module) -> dict:
    """Weights of their AutoencoderKL or VQModel as the params of `module`.

    Raises:
        UserError: names are missing, unexpected or of the wrong shape; lists them.
    """
    abstract = abstract_first_stage(module)
    table = make_table(first_stage_layers(module), abstract)
    return to_flax(_renamed(state_dict), table, abstract)


def first_stage_from_flax(params: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """The params of `module` under the names of their AutoencoderKL or VQModel."""
    return from_flax(params, make_table(first_stage_layers(module), flatten_dict(params)))


def reorder_qkv(params: Mapping[str, Any], module: UNet, to_ours: bool) -> dict:
    """Reorders the outputs of the fused q, k and v projections, one weight at a time when read.

    Joined as theirs they are ordered (q/k/v, head, channel), which is ours only with
    `split_qkv_first`; otherwise ours are (head, q/k/v, channel).
    """
    if module.split_qkv_first:
        return dict(params)
    flat = flatten_dict(params)
    for path, leaf in flat.items():
        if "qkv" in path:
            heads = head_count(leaf.shape[-1] // 3, module.num_heads, module.head_dim)
            split = (3, heads, -1) if to_ours else (heads, 3, -1)
            flat[path] = _reordered(leaf, split)
    return unflatten_dict(flat)


def _reordered(leaf: Any, split: tuple[int, int, int]) -> LazyArray:
    """Swaps the first two of the three axes that the last axis of a leaf is made of."""

    def read() -> np.ndarray:
        values = np.asarray(leaf)
        swapped = values.reshape(*values.shape[:-1], *split).swapaxes(-3, -2)
        return np.ascontiguousarray(swapped).reshape(values.shape)

    return LazyArray(tuple(leaf.shape), np.dtype(leaf.dtype), read)


def _renamed(state_dict: StateDict) -> dict[str, Any]:
    """The state dict with today's names."""
    rename = lambda match: f"{match[1]}.{OLD_NAMES[match[2]]}."  # noqa: E731
    return {OLD_NAME.sub(rename, name): weight for name, weight in state_dict.items()}
