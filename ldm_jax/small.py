"""A small model: both stages at 64x64 pixels in under ten minutes on two CPU cores."""

from __future__ import annotations

from ml_collections import ConfigDict


def use_small_model(config: ConfigDict) -> None:
    """Sets networks and training of both stages; docs/quickstart.md says how they were chosen.

    Latents are 8x8x8 at 64 pixels; the denoiser predicts v.
    """
    c = config.first_stage
    c.update(kind="kl", width=64, mult=(1, 1), depth=1, patch=4, norm_groups=16)
    c.update(mid_attn=False, z_channels=8, channels=8, log_variance=-6.0)
    c.latent_scale = "channel"
    c.perceptual_weight = 0.0  # an adversary needs more steps than there are
    c.discriminator.weight = 0.0
    c.train.update(batch_size=16, steps=300, optimizer="muon", lr=0.02)
    c.train.update(warmup_steps=20, lr_decay="cosine", betas=(0.9, 0.99))
    c.train.update(log_every=25, picture_every=100, checkpoint_every=100)

    config.denoiser.update(width=64, depth=1, head_dim=32)
    if config.denoiser.kind == "unet":
        config.denoiser.update(mult=(1, 2), attn_downsample=(2,))
    config.diffusion.predict = "v"
    config.train.update(batch_size=32, steps=560, optimizer="muon", lr=0.02, betas=(0.9, 0.99))
    config.train.update(warmup_steps=20, lr_decay="cosine")
    config.train.update(log_every=50, picture_every=300, checkpoint_every=140)
    config.ema_decay = 0.99
    config.sample.update(steps=50, eta=0.0, num_samples=48, batch_size=48)
