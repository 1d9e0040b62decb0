"""Names in a config become parts: the one place that knows both."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from ldm_jax import config as config_lib
from ldm_jax.conditioners.clip import ClipText
from ldm_jax.conditioners.compose import Compose
from ldm_jax.conditioners.inpainting import Inpainting
from ldm_jax.conditioners.label import LabelEmbedder
from ldm_jax.conditioners.low_res import LowRes
from ldm_jax.conditioners.noise_level import NoiseLevel
from ldm_jax.conditioners.segmentation import SpatialRescaler
from ldm_jax.conditioners.sentence import SentenceEncoder
from ldm_jax.conditioners.text import TextTransformer
from ldm_jax.denoisers.classifier import NoisyClassifier
from ldm_jax.denoisers.dit import DiT
from ldm_jax.denoisers.unet import UNet
from ldm_jax.diffusion.continuous import Flow, LogSNR
from ldm_jax.diffusion.objective import Objective, make_loss, make_objective
from ldm_jax.diffusion.schedule import Process, make_schedule
from ldm_jax.diffusion.times import Times
from ldm_jax.diffusion.weighting import Weighting
from ldm_jax.first_stage.discriminator import PatchDiscriminator
from ldm_jax.first_stage.fsq import FSQModel
from ldm_jax.first_stage.identity import Identity
from ldm_jax.first_stage.kl import AutoencoderKL
from ldm_jax.first_stage.vq import VQModel
from ldm_jax.types import Array


def build_first_stage(config: ConfigDict) -> nn.Module:
    """Returns the module that maps images to latents and back."""
    c = config.first_stage
    if c.kind == "identity":
        return Identity()
    shared = dict(
        width=c.width,
        mult=tuple(c.mult),
        depth=c.depth,
        attn_downsample=tuple(c.attn_downsample),
        mid_attn=c.mid_attn,
        patch=c.patch,
        norm_groups=c.norm_groups,
        z_channels=c.z_channels,
        channels=c.channels,
        dropout=c.dropout,
        dtype=jnp.dtype(c.train.dtype),
    )
    if c.kind == "vq":
        trained = c.codebook.rule == "gradient"
        return VQModel(codes=c.codes, trained_codebook=trained, **shared)
    if c.kind == "fsq":
        return FSQModel(levels=tuple(c.levels), **shared)
    return AutoencoderKL(log_variance=c.log_variance, **shared)


def build_discriminator(config: ConfigDict) -> PatchDiscriminator | None:
    """Returns the network that tells images from reconstructions; None where there is none."""
    c = config.first_stage.discriminator
    if c.weight == 0 or config.first_stage.kind == "identity":
        return None
    dtype = jnp.dtype(config.first_stage.train.dtype)
    return PatchDiscriminator(width=c.width, layers=c.layers, dtype=dtype)


def build_denoiser(config: ConfigDict) -> nn.Module:
    """Returns the network (x_t, t, condition) -> raw output of the shape of x_t."""
    c = config.denoiser
    shared = dict(
        width=c.width,
        out_channels=config_lib.latent_channels(config),
        depth=c.depth,
        num_heads=c.num_heads,
        head_dim=0 if c.num_heads else c.head_dim,
        dropout=c.dropout,
        dtype=jnp.dtype(config.train.dtype),
        remat=c.remat,
    )
    if c.kind == "dit":
        return DiT(**c.dit.to_dict(), **shared)
    return UNet(
        mult=tuple(c.mult),
        attn_downsample=tuple(c.attn_downsample),
        cross_attention=c.cross_attention,
        transformer_depth=c.transformer_depth,
        scale_shift=c.scale_shift,
        resblock_resample=c.resblock_resample,
        conv_resample=c.conv_resample,
        split_qkv_first=c.split_qkv_first,
        **shared,
    )


def build_classifier(config: ConfigDict) -> NoisyClassifier:
    """Returns the network (z_t, t) -> logits of the classes, whose gradient can guide sampling."""
    c = config.classifier
    return NoisyClassifier(
        num_classes=config.label.num_classes,
        width=c.width,
        mult=tuple(c.mult),
        depth=c.depth,
        attn_downsample=tuple(c.attn_downsample),
        head_dim=c.head_dim,
        side=config_lib.latent_size(config),
        dropout=c.dropout,
        dtype=jnp.dtype(c.train.dtype),
    )


def build_conditioner(config: ConfigDict) -> nn.Module:
    """Returns the module batch -> Condition; without conditioners, the empty Condition."""
    none = config.layout.vocab_size - 1
    blocks = {
        "label": lambda: LabelEmbedder(
            num_classes=config.label.num_classes,
            width=config.label.width,
            slot=config.label.slot,
            null_label=config.label.null,
        ),
        "text": lambda: build_text_encoder(config),
        "layout": lambda: TextTransformer(
            vocab_size=config.layout.vocab_size,
            width=config.layout.width,
            depth=config.layout.depth,
            length=config.layout.length,
            field="boxes",
            # The empty layout: no box, and no crop.
            null_tokens=(none,) * config.layout.length if config.layout.null else (),
            pad_token=none,
            dtype=jnp.dtype(config.train.dtype),
        ),
        "segmentation": lambda: SpatialRescaler(
            num_classes=config.segmentation.num_classes,
            channels=config.segmentation.channels,
            stages=config.segmentation.stages,
        ),
        "low_res": lambda: LowRes(config.data.low_res.factor, config_lib.downsampling(config)),
        "noise_level": lambda: NoiseLevel(config.denoiser.width, config_lib.vector_width(config)),
        "inpainting": Inpainting,
    }
    return Compose(parts=tuple(blocks[name]() for name in config.conditioners))


def build_text_encoder(config: ConfigDict) -> nn.Module:
    """Returns the module that turns the tokens of captions into a context."""
    c = config.text
    shared = dict(
        vocab_size=c.vocab_size,
        width=c.width,
        depth=c.depth,
        heads=c.heads,
        length=c.length,
        null_tokens=tuple(c.null_tokens),
        pad_token=c.pad_token,
        dtype=jnp.dtype(config.train.dtype),
    )
    if c.encoder == "clip":
        return ClipText(mlp_width=c.mlp_width, activation=c.activation, **shared)
    if c.encoder == "sentence":
        return SentenceEncoder(mlp_width=c.mlp_width, **shared)
    return TextTransformer(**shared)


def build_schedule(config: ConfigDict) -> Process:
    """Returns the forward process."""
    c = config.diffusion
    if c.schedule == "flow":
        return Flow(c.steps)
    if c.schedule == "log_snr":
        return LogSNR(tuple(c.ratios), c.steps)
    return make_schedule(c.schedule, tuple(c.beta), c.steps, c.zero_terminal_snr)


def build_objective(
    config: ConfigDict, process: Process, log_variance: float | Array = 0.0
) -> Objective:
    """Returns the training objective of the denoiser; `log_variance` is that of `make_loss`."""
    c = config.diffusion
    loss_at = make_loss(
        process,
        predict=c.predict,
        loss=c.loss,
        log_variance=log_variance,
        weighting=Weighting(c.weighting, c.snr_gamma, tuple(c.p2)),
        sigma_data=c.sigma_data,
        huber_delta=c.huber_delta,
    )
    return make_objective(
        process, loss_at, Times(c.times, c.times_mean, c.times_std, c.times_shift)
    )
