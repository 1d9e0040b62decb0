"""Names and layouts of the original code's state dicts (CompVis `latent-diffusion`), both ways.

A table per network lists (their names, our path, kind); either direction only reads the table. A
conversion is strict: every weight of either side is used exactly once, with the right shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ldm_jax.denoisers.unet import UNet
from ldm_jax.errors import UserError
from ldm_jax.types import Condition

StateDict = Mapping[str, np.ndarray]
Path = tuple[str, ...]

LABEL_EMBEDDING = "label_emb.weight"


class Row(NamedTuple):
    """One weight of ours: several names of theirs are joined along their outputs."""

    theirs: tuple[str, ...]
    ours: Path
    kind: str


class Layer(NamedTuple):
    """Their name, or names, of one of our layers inside a block and the kind of its kernel."""

    theirs: str | tuple[str, ...]
    kind: str = "same"


# How a kernel of theirs becomes ours, and back. Ours has the outputs last: (..., in, out).
TO_OURS = {
    "same": lambda w: w,
    "linear": lambda w: w.transpose(1, 0),
    "conv1d": lambda w: w[..., 0].transpose(1, 0),
    "conv1x1": lambda w: w[..., 0, 0].transpose(1, 0),
    "conv": lambda w: w.transpose(2, 3, 1, 0),
}
TO_THEIRS = {
    "same": lambda w: w,
    "linear": lambda w: w.transpose(1, 0),
    "conv1d": lambda w: w.transpose(1, 0)[..., None],
    "conv1x1": lambda w: w.transpose(1, 0)[..., None, None],
    "conv": lambda w: w.transpose(3, 2, 0, 1),
}
# Leaves of a layer; the last stands alone.
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}

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


def within(ours: str, theirs: str, layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """Puts the layers of a block under its path ('a/b') and its name ('a.b'), if these are set."""
    found = {}
    for path, layer in layers.items():
        names = (layer.theirs,) if isinstance(layer.theirs, str) else layer.theirs
        names = tuple(f"{theirs}.{name}".strip(".") for name in names)
        found[f"{ours}/{path}".strip("/")] = Layer(names, layer.kind)
    return found


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


def make_table(layers: Mapping[str, Layer], paths: Iterable[Path]) -> list[Row]:
    """Looks up each of our parameters among the layers: a row for every path.

    A layer of which we have no parameters (a skip that is an identity, say) gives no row.
    """
    rows = []
    for path in paths:
        if "/".join(path) in layers:  # a parameter that is not inside a layer
            layer, suffix, kind = layers["/".join(path)], "", "same"
        else:
            layer, suffix = layers["/".join(path[:-1])], f".{LEAVES[path[-1]]}"
            kind = layer.kind if path[-1] == "kernel" else "same"
        rows.append(Row(tuple(name + suffix for name in layer.theirs), path, kind))
    return rows


def to_flax(state_dict: StateDict, table: list[Row], abstract: Mapping[Path, Any]) -> dict:
    """Their weights as a tree of ours, float32.

    Args:
        state_dict: their names and weights; all of them are used.
        table: a row for each of our parameters.
        abstract: our paths and anything with the `shape` that is needed there.

    Raises:
        UserError: names are missing, unexpected or of the wrong shape; lists them.
    """
    known = {name for row in table for name in row.theirs}
    missing = sorted(known - state_dict.keys())
    unexpected = sorted(state_dict.keys() - known)
    flat, wrong = {}, []
    for row in table:
        if any(name in missing for name in row.theirs):
            continue
        weight = _join(row, [np.asarray(state_dict[name]) for name in row.theirs])
        want = abstract[row.ours].shape
        if weight is None or weight.shape != want:
            shapes = ", ".join(f"{name} {np.shape(state_dict[name])}" for name in row.theirs)
            wrong.append(f"{shapes} (does not give {want})")
        else:
            flat[row.ours] = weight.astype(np.float32, copy=False)
    problems = {"missing": missing, "unexpected": unexpected, "of the wrong shape": wrong}
    if any(problems.values()):
        found = "; ".join(f"{_listed(names)} {what}" for what, names in problems.items() if names)
        raise UserError(f"these weights do not fit the model: {found}; check the model's config")
    return unflatten_dict(flat)


def _join(row: Row, weights: list[np.ndarray]) -> np.ndarray | None:
    """Transforms and joins the weights of a row; None where a weight has the wrong rank."""
    ranks = {"linear": 2, "conv1d": 3, "conv1x1": 4, "conv": 4}
    if any(w.ndim != ranks.get(row.kind, w.ndim) for w in weights):
        return None
    # A 1x1 kernel that is none would lose elements without a sound.
    if row.kind in ("conv1d", "conv1x1") and any(set(w.shape[2:]) != {1} for w in weights):
        return None
    weights = [TO_OURS[row.kind](w) for w in weights]
    if len(weights) == 1:
        return weights[0]
    if len({w.shape for w in weights}) > 1:
        return None
    return np.concatenate(weights, axis=-1)


def _listed(names: list[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def from_flax(params: Mapping[str, Any], table: list[Row]) -> dict[str, np.ndarray]:
    """Our tree as their names and weights: the inverse of `to_flax`, keeping the data type.

    The arrays are views in their layout and need not be contiguous in memory.
    """
    flat, state_dict = flatten_dict(params), {}
    for row in table:
        weights = np.split(np.asarray(flat[row.ours]), len(row.theirs), axis=-1)
        for name, weight in zip(row.theirs, weights, strict=True):
            state_dict[name] = TO_THEIRS[row.kind](weight)
    return state_dict


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
    abstract = flatten_dict(_abstract_unet(state_dict, module))
    return to_flax(state_dict, make_table(unet_layers(module), abstract), abstract)


def unet_from_flax(params: Mapping[str, Any], module: UNet) -> dict[str, np.ndarray]:
    """The params of `module` under the names of their UNetModel."""
    return from_flax(params, make_table(unet_layers(module), flatten_dict(params)))


def first_stage_to_flax(state_dict: StateDict, module: nn.Module) -> dict:
    """Weights of their AutoencoderKL or VQModel, without `loss.*`, as the params of `module`.

    Raises:
        UserError: names are missing, unexpected or of the wrong shape; lists them.
    """
    size = module.patch * 2 ** (len(module.mult) - 1)
    images, keys = jnp.zeros((1, size, size, 3)), jax.random.split(jax.random.key(0), 1)
    abstract = flatten_dict(jax.eval_shape(module.init, keys[0], images, keys)["params"])
    return to_flax(state_dict, make_table(first_stage_layers(module), abstract), abstract)


def first_stage_from_flax(params: Mapping[str, Any], module: nn.Module) -> dict[str, np.ndarray]:
    """The params of `module` under the names of their AutoencoderKL or VQModel."""
    return from_flax(params, make_table(first_stage_layers(module), flatten_dict(params)))


def _abstract_unet(state_dict: StateDict, module: UNet) -> dict:
    """Shapes of the params of `module` for the inputs that the weights were made for."""
    size = 2 ** (len(module.mult) - 1)
    conv_in = np.shape(state_dict.get("input_blocks.0.0.weight", ()))
    channels = conv_in[1] if len(conv_in) == 4 else module.out_channels
    cond = Condition()
    if module.cross_attention:
        projections = [np.shape(w) for n, w in state_dict.items() if re.search(r"attn2\.to_k", n)]
        context_dim = projections[0][-1] if projections and projections[0] else 1
        cond = Condition(context=jnp.zeros((1, 1, context_dim)))
    x_t, t = jnp.zeros((1, size, size, channels)), jnp.zeros((1,))
    return jax.eval_shape(module.init, jax.random.key(0), x_t, t, cond)["params"]
