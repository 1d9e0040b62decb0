"""Configurations of `diffusers`' networks as blocks of our config, and back."""

from __future__ import annotations

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ldm_jax import config as config_lib
from ldm_jax.convert.diffusers_keys import (
    FIRST_STAGES,
    UNET_IGNORED,
    UNETS,
    Given,
    choose,
    number,
    refuse,
    settle,
)
from ldm_jax.convert.tables import listed
from ldm_jax.errors import UserError


class UnetFacts(NamedTuple):
    """A UNet's config: the block `denoiser` of ours, and what stands elsewhere in ours.

    Attributes:
        denoiser: what differs from the default.
        in_channels: of `x_t` and of the maps that are joined to it.
        out_channels: of the latents.
        side: of the latents it was made for, or None.
        context_width: channels of a token of the context; 0 without cross-attention.
        classes: rows of the class embedding that is added to the time embedding; 0 for none.
        linear: the projections of the transformers are stored as linear layers.
    """

    denoiser: dict[str, Any]
    in_channels: int
    out_channels: int
    side: int | None
    context_width: int
    classes: int
    linear: bool


class FirstStageFacts(NamedTuple):
    """A first stage's config: the block `first_stage` of ours, and what stands elsewhere.

    Attributes:
        first_stage: what differs from the default.
        side: of the images it was made for, or None.
        shift: of the latents.
        scale: of the latents.
    """

    first_stage: dict[str, Any]
    side: int | None
    shift: float
    scale: float


def read_unet(given: Given) -> UnetFacts:
    """Reads the config of a UNet2DModel or UNet2DConditionModel.

    Raises:
        UserError: a key has a value, or is one, that our UNet has no counterpart for.
    """
    name = given["_class_name"]
    fixed, used, kind = UNETS[name]
    c = settle(given, fixed, used, UNET_IGNORED)
    width, mult = _widths(name, c)
    attn, resample = _joints(name, c, len(mult), kind)
    norms = {"default": False, "scale_shift": True}
    block = dict(
        width=width,
        mult=mult,
        depth=number(name, c, "layers_per_block"),
        attn_downsample=tuple(2**level for level in attn),
        cross_attention=kind == "CrossAttn",
        scale_shift=choose(name, c, "resnet_time_scale_shift", norms),
        resblock_resample=resample == "resnet",
        dropout=float(c["dropout"]),
    )
    if c["time_embedding_dim"] not in (None, 4 * width):
        refuse(name, "time_embedding_dim", c["time_embedding_dim"], f"{4 * width}")
    context_width = 0
    if kind == "CrossAttn":
        used_levels = sorted({*attn, len(mult) - 1})
        block |= _cross_heads(name, c, width, {level: mult[level] for level in used_levels})
        depth = number(name, c, "transformer_layers_per_block", used_levels)
        block["transformer_depth"] = depth
        context_width = number(name, c, "cross_attention_dim", used_levels)
    else:
        # Without a number, scale_shift leaves the attention of the middle without normalisation.
        if c["attn_norm_num_groups"] not in ((32,) if block["scale_shift"] else (None, 32)):
            refuse(name, "attn_norm_num_groups", c["attn_norm_num_groups"], "32")
        if c["attention_head_dim"] is None:
            block["num_heads"] = 1
        else:
            block["head_dim"] = number(name, c, "attention_head_dim")
    return UnetFacts(
        block,
        number(name, c, "in_channels"),
        number(name, c, "out_channels"),
        _side(name, c),
        context_width,
        number(name, c, "num_class_embeds") if c["num_class_embeds"] else 0,
        bool(c.get("use_linear_projection")),
    )


def write_unet(
    config: ConfigDict, in_channels: int, context_width: int = 0, classes: int = 0
) -> dict[str, Any]:
    """The config of the UNet2DModel or UNet2DConditionModel that a config's denoiser is.

    Args:
        config: a whole config of ours.
        in_channels: of `x_t` and of the maps that are joined to it.
        context_width: channels of a token of the context; unused without cross-attention.
        classes: rows of the class embedding that is added to the time embedding; 0 for none.

    Raises:
        UserError: no class of diffusers can express it.
    """
    d, levels = config.denoiser, len(config.denoiser.mult)
    name = "UNet2DConditionModel" if d.cross_attention else "UNet2DModel"
    fixed, _, kind = UNETS[name]
    attn = [level for level in range(levels) if 2**level in d.attn_downsample]
    if not d.conv_resample and not d.resblock_resample and levels > 1:
        raise UserError(
            "diffusers has no UNet with config.denoiser.conv_resample=False: export to another "
            "format"
        )
    # A block with cross-attention is always left by a convolution.
    if d.cross_attention and d.resblock_resample and attn and levels > 1:
        raise UserError(
            "diffusers has no UNet with both config.denoiser.cross_attention and "
            "config.denoiser.resblock_resample: export to another format"
        )
    plain = "ResnetDownsampleBlock2D" if d.resblock_resample else "DownBlock2D"
    down = [f"{kind}DownBlock2D" if level in attn else plain for level in range(levels)]
    widths = [d.width * mult for mult in d.mult]
    given = {key: values[0] for key, values in fixed.items()} | dict(
        _class_name=name,
        sample_size=config_lib.latent_size(config),
        in_channels=in_channels,
        out_channels=config_lib.latent_channels(config),
        block_out_channels=widths,
        down_block_types=down,
        up_block_types=[
            block.replace("Downsample", "Upsample").replace("Down", "Up")
            for block in reversed(down)
        ],
        layers_per_block=d.depth,
        dropout=d.dropout,
        resnet_time_scale_shift="scale_shift" if d.scale_shift else "default",
        num_class_embeds=classes or None,
    )
    if d.cross_attention:
        return given | dict(
            # What they call so is the number of heads.
            attention_head_dim=d.num_heads or [max(1, width // d.head_dim) for width in widths],
            cross_attention_dim=context_width,
            transformer_layers_per_block=d.transformer_depth,
            use_linear_projection=False,
        )
    resample = "resnet" if d.resblock_resample else "conv"
    return given | dict(
        attention_head_dim=_head_dim(d, {widths[level] for level in (*attn, levels - 1)}),
        attn_norm_num_groups=32,
        downsample_type=resample,
        upsample_type=resample,
    )


def read_first_stage(given: Given) -> FirstStageFacts:
    """Reads the config of an AutoencoderKL or VQModel.

    Raises:
        UserError: a key has a value, or is one, that ours have no counterpart for.
    """
    name = given["_class_name"]
    fixed, used = FIRST_STAGES[name]
    c = settle(given, fixed, used, ("force_upcast",))
    width, mult = _widths(name, c)
    blocks = {}
    for key, plain in (("down_block_types", "DownEncoder"), ("up_block_types", "UpDecoder")):
        kinds = {f"{plain}Block2D": False, f"Attn{plain}Block2D": True}
        blocks[key] = _block_kinds(name, c, key, len(mult), kinds)
    down = blocks["down_block_types"]
    if down != blocks["up_block_types"][::-1]:
        refuse(name, "up_block_types", c["up_block_types"], "the mirror image of down_block_types")
    block = dict(
        kind="kl" if name == "AutoencoderKL" else "vq",
        width=width,
        mult=mult,
        depth=number(name, c, "layers_per_block"),
        attn_downsample=tuple(2**level for level, attn in enumerate(down) if attn),
        mid_attn=bool(c["mid_block_add_attention"]),
        norm_groups=number(name, c, "norm_num_groups"),
        z_channels=number(name, c, "latent_channels"),
        channels=number(name, c, "latent_channels"),
    )
    if name == "VQModel":
        block["codes"] = number(name, c, "num_vq_embeddings")
        if c["vq_embed_dim"] is not None:
            block["channels"] = number(name, c, "vq_embed_dim")
    scale, shift = float(c["scaling_factor"]), float(c.get("shift_factor") or 0)
    return FirstStageFacts(block, _side(name, c), shift, scale)


def write_first_stage(config: ConfigDict, shift: float, scale: float) -> dict[str, Any]:
    """The config of the AutoencoderKL or VQModel that a config's first stage is.

    Raises:
        UserError: no class of diffusers can express it.
    """
    f = config.first_stage
    name = {"kl": "AutoencoderKL", "vq": "VQModel"}.get(f.kind)
    if name is None:
        raise UserError(
            f"diffusers has no first stage of kind '{f.kind}': export to another format"
        )
    fixed, _ = FIRST_STAGES[name]
    if f.patch != 1:
        raise UserError(
            f"diffusers has no first stage with config.first_stage.patch={f.patch}: export to "
            "another format"
        )
    if f.kind == "kl" and f.z_channels != f.channels:
        raise UserError(
            f"diffusers' AutoencoderKL has as many z_channels as channels, but config.first_stage "
            f"has {f.z_channels} and {f.channels}: export to another format"
        )
    if f.kind == "vq" and shift:
        raise UserError(
            f"diffusers' VQModel has no place for the shift {shift} of the latents: export to "
            "another format"
        )
    levels = range(len(f.mult))
    down = [2**level in f.attn_downsample for level in levels]
    given = {key: values[0] for key, values in fixed.items()} | dict(
        _class_name=name,
        down_block_types=["Attn" * attn + "DownEncoderBlock2D" for attn in down],
        up_block_types=["Attn" * attn + "UpDecoderBlock2D" for attn in reversed(down)],
        block_out_channels=[f.width * mult for mult in f.mult],
        layers_per_block=f.depth,
        latent_channels=f.z_channels,
        norm_num_groups=f.norm_groups,
        sample_size=config.data.resolution,
        scaling_factor=scale,
        mid_block_add_attention=f.mid_attn,
    )
    if f.kind == "vq":
        return given | dict(num_vq_embeddings=f.codes, vq_embed_dim=f.channels)
    return given | dict(shift_factor=shift or None)


def _widths(name: str, c: Given) -> tuple[int, tuple[int, ...]]:
    """The width of the first level and the multipliers of all."""
    channels = c["block_out_channels"]
    if (
        not channels
        or len(channels) > config_lib.MOST_LEVELS
        or not all(type(x) is int and x > 0 for x in channels)
    ):
        refuse(name, "block_out_channels", channels, f"1 to {config_lib.MOST_LEVELS} whole numbers")
    if any(count % channels[0] for count in channels):
        refuse(name, "block_out_channels", channels, "multiples of the first")
    return channels[0], tuple(count // channels[0] for count in channels)


def _side(name: str, c: Given) -> int | None:
    """The side of the square that a network was made for, where that is known."""
    size = c["sample_size"]
    if isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if size is not None and (type(size) is not int or size < 1):
        refuse(name, "sample_size", size, "the side of a square")
    return size


def _block_kinds(name: str, c: Given, key: str, count: int, kinds: dict[str, Any]) -> list[Any]:
    """Looks up each type in a list of blocks."""
    if len(c[key]) != count:
        refuse(name, key, c[key], f"{count} types, one for each of block_out_channels")
    # The first releases had names with a prefix.
    blocks = [str(block).removeprefix("UNetRes") for block in c[key]]
    for block in blocks:
        if block not in kinds:
            refuse(name, key, block, f"{' or '.join(kinds)}")
    return [kinds[block] for block in blocks]


def _joints(name: str, c: Given, count: int, kind: str) -> tuple[list[int], str]:
    """Levels of a UNet that have attention, and what joins the levels: 'conv' or 'resnet'."""
    levels, joints = {}, set()
    for way in ("Down", "Up"):
        kinds = {
            f"{way}Block2D": (False, "conv"),
            f"{kind}{way}Block2D": (True, c.get(f"{way.lower()}sample_type", "conv")),
            f"Resnet{way}sampleBlock2D": (False, "resnet"),
        }
        found = _block_kinds(name, c, f"{way.lower()}_block_types", count, kinds)
        joints |= {joint for _, joint in found[:-1]}  # nothing leads on from the last block
        attn = [has for has, _ in found]
        levels[way] = attn if way == "Down" else attn[::-1]
    if levels["Down"] != levels["Up"]:
        refuse(name, "up_block_types", c["up_block_types"], "the mirror image of down_block_types")
    if len(joints) > 1 or joints - {"conv", "resnet"}:
        shown = listed(sorted(map(str, joints)))
        raise UserError(
            f"the {name} joins its levels by {shown} (block types, downsample_type, "
            "upsample_type), but here it can only be all conv or all resnet"
        )
    return [i for i, has in enumerate(levels["Down"]) if has], (joints or {"conv"}).pop()


def _cross_heads(name: str, c: Given, width: int, mult: dict[int, int]) -> dict[str, int]:
    """Heads of a UNet2DConditionModel; what it calls attention_head_dim is their number."""
    given = c["attention_head_dim"]
    counts = [given[level] if isinstance(given, (list, tuple)) else given for level in mult]
    if not all(type(count) is int and count > 0 for count in counts):
        refuse(name, "attention_head_dim", given, "whole numbers")
    if len(set(counts)) == 1:
        return {"num_heads": counts[0]}
    sizes = [width * m / count for m, count in zip(mult.values(), counts, strict=True)]
    if len(set(sizes)) > 1:
        refuse(name, "attention_head_dim", given, "one number of heads, or heads of one width")
    return {"head_dim": int(sizes[0])}


def _head_dim(denoiser: ConfigDict, widths: set[int]) -> int | None:
    """The width of a head for a UNet2DModel, which has one for all levels; None is one head."""
    if not denoiser.num_heads:
        return denoiser.head_dim
    if denoiser.num_heads == 1:
        return None
    if len(widths) > 1:
        raise UserError(
            f"diffusers' UNet2DModel has heads of one width, but config.denoiser.num_heads="
            f"{denoiser.num_heads} makes them differ from level to level: export to another format"
        )
    return widths.pop() // denoiser.num_heads
