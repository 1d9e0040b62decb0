"""Emoji faces, 64x64, by class, with today's choices: a transformer (DiT) and rectified flow.

python -m ldm_jax.train --config=configs/emoji_dit.py

Data, first stage and optimiser are those of quickstart.py, the diffusion stage is imagenet_dit.py's
at a small size: 4.16M parameters in the transformer, one token per latent.
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="emoji", where="category=Smileys & Emotion", label="subcategory")
    c.data.update(fields=("label",), resolution=64, cache_latents=True)
    c.denoiser.kind = "dit"
    base.use_small_model(c)
    c.denoiser.update(width=192, depth=6, head_dim=32)
    c.denoiser.dit.update(patch=1, positions="rotary", mlp="swiglu", qk_norm=True)
    c.conditioners = ("label",)
    c.label.update(num_classes=16, width=192, slot="vector")
    c.diffusion.update(schedule="flow", predict="flow", times="logit_normal")
    c.cond_drop_rate = 0.1
    c.sample.update(sampler="euler", spacing="trailing", guidance_scale=2.0, nearest=True)
    return base.finish(c, arg)
