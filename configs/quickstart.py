"""Emoji faces, 64x64, by class: both stages in under ten minutes on two CPU cores.

python -m ldm_jax.train --config=configs/quickstart.py
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="emoji", where="category=Smileys & Emotion", label="subcategory")
    c.data.update(fields=("label",), resolution=64, cache_latents=True)
    c.first_stage.update(kind="kl", width=32, mult=(1, 2, 2, 4), depth=1, mid_attn=False)
    c.first_stage.update(z_channels=8, channels=8, latent_scale="channel")
    c.first_stage.train.update(
        batch_size=32, steps=400, lr=1e-3, warmup_steps=50, betas=(0.9, 0.99)
    )
    c.first_stage.train.update(log_every=50, picture_every=200, checkpoint_every=200, grad_clip=1.0)
    c.denoiser.update(width=64, mult=(1, 2), depth=2, attn_downsample=(1, 2), head_dim=32)
    c.conditioners = ("label",)
    c.label.update(num_classes=16, width=256, slot="vector")
    c.diffusion.update(predict="v")
    c.train.update(batch_size=64, steps=1000, lr=5e-4, warmup_steps=100, grad_clip=1.0)
    c.train.update(log_every=50, picture_every=250, checkpoint_every=250)
    c.update(ema_decay=0.995, cond_drop_rate=0.1)
    c.sample.update(
        steps=50, eta=0.0, guidance_scale=2.0, num_samples=48, batch_size=48, nearest=True
    )
    return base.finish(c, arg)
