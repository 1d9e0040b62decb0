"""Emoji faces, 64x64, by class: both stages in under ten minutes on two CPU cores.

python -m ldm_jax.train --config=configs/quickstart.py

The 166 smileys of the embedded set, labelled by their 16 kinds, as KL latents of 8x8x8. docs/
quickstart.md says how each choice was made.
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="emoji", where="category=Smileys & Emotion", label="subcategory")
    c.data.update(fields=("label",), resolution=64, cache_latents=True)

    c.first_stage.update(kind="kl", width=64, mult=(1, 1), depth=1, patch=4, norm_groups=16)
    c.first_stage.update(mid_attn=False, z_channels=8, channels=8, log_variance=-6.0)
    c.first_stage.latent_scale = "channel"
    c.first_stage.perceptual_weight = 0.0  # an adversary needs more steps than there are
    c.first_stage.discriminator.weight = 0.0
    c.first_stage.train.update(batch_size=16, steps=300, optimizer="muon", lr=0.02)
    c.first_stage.train.update(warmup_steps=20, lr_decay="cosine", betas=(0.9, 0.99))
    c.first_stage.train.update(log_every=25, picture_every=100, checkpoint_every=100)

    c.denoiser.update(width=64, mult=(1, 2), depth=1, attn_downsample=(2,), head_dim=32)
    c.conditioners = ("label",)
    c.label.update(num_classes=16, width=256, slot="vector")
    c.diffusion.predict = "v"
    c.train.update(batch_size=32, steps=560, optimizer="muon", lr=0.02, betas=(0.9, 0.99))
    c.train.update(warmup_steps=20, lr_decay="cosine")
    c.train.update(log_every=50, picture_every=300, checkpoint_every=140)
    c.update(ema_decay=0.99, cond_drop_rate=0.1)

    c.sample.update(steps=50, eta=0.0, guidance_scale=2.0)
    c.sample.update(num_samples=48, batch_size=48, nearest=True)
    return base.finish(c, arg)
