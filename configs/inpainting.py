"""Inpainting 256x256, the base model, on VQ-f4 latents.

python -m ldm_jax.train --config=configs/inpainting.py

Source: Rombach et al. 2022, Tables 6, 7 and 15 (no weights were released). 215.23M parameters in
the UNet, 55.32M in the first stage. Paper: FID 2.37, LPIPS 0.145 without and 2.15, 0.144 with
attention in the first stage (Places, all masks, 512 crops) after 360k steps of batch 128 on 8 V100,
6.66 to 7.04 hours per epoch. The paper's lr of 1e-6 may be before its scaling with the batch, which
is used here.
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="tfds:places365_small", fields=("masked_image", "mask"))
    c.data.update(resolution=256)
    base.use_first_stage(c, "vq_f4")
    c.denoiser.update(width=128, mult=(1, 4, 8), attn_downsample=(), num_heads=1)
    c.conditioners = ("inpainting",)
    c.diffusion.update(schedule="scaled_linear", beta=(0.0015, 0.0205), loss="l1")
    c.train.update(batch_size=128, lr=1.28e-4, steps=360_000)
    c.sample.update(steps=50, eta=0.0)
    return base.finish(c, arg)
