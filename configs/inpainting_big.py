"""Inpainting 256x256, the big model, on VQ-f4 latents without attention.

python -m ldm_jax.train --config=configs/inpainting_big.py

Source: Rombach et al. 2022, section 4.5 and Table 7; the authors' inpainting_big/config.yaml.
387.25M parameters in the UNet, 53.22M in the first stage. Paper: FID 1.50, LPIPS 0.137 (Places, all
masks, 512 crops, DDIM 50 steps, eta 0) after half an epoch of fine-tuning at 512; 2.40 and 0.142
without it. On 8 V100; steps and days are not published. The learning rate is the published
multiplier times base times batch.
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="tfds:places365_small", fields=("masked_image", "mask"))
    c.data.update(resolution=256)
    base.use_first_stage(c, "vq_f4_noattn")
    c.denoiser.update(width=256, mult=(1, 2, 3, 4), attn_downsample=(2, 4, 8), num_heads=8)
    c.denoiser.update(resblock_resample=True)
    c.conditioners = ("inpainting",)
    c.diffusion.update(schedule="scaled_linear", beta=(0.0015, 0.0205), loss="l1")
    c.train.update(batch_size=128, lr=1.28e-5, warmup_steps=1000, lr_decay="cosine")
    c.train.update(lr_start=0.01, lr_end=0.001, decay_steps=50_000)
    c.sample.update(steps=50, eta=0.0)
    return base.finish(c, arg)
