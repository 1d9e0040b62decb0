"""LDM-8 for LSUN-Churches 256x256, unconditional, on KL-f8 latents.

python -m ldm_jax.train --config=configs/lsun_churches.py

Source: Rombach et al. 2022, Table 12; the authors' lsun_churches-ldm-kl-8.yaml. 294.97M parameters
in the UNet, 83.65M in the first stage. Paper: FID 4.02, precision 0.64, recall 0.52 (Table 1; 50k
samples, DDIM 200 steps) after 500k steps of batch 96 on one A100, 18 V100-days.
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="tfds:lsun/church_outdoor", resolution=256)
    base.use_first_stage(c, "kl_f8")
    c.first_stage.update(latent_scale="first_batch")
    c.denoiser.update(width=192, mult=(1, 2, 2, 4, 4), attn_downsample=(1, 2, 4, 8), num_heads=8)
    c.denoiser.update(scale_shift=True, resblock_resample=True)
    c.diffusion.update(schedule="scaled_linear", beta=(0.0015, 0.0155), predict="eps", loss="l1")
    c.train.update(batch_size=96, lr=5e-5, warmup_steps=10_000, steps=500_000)
    c.sample.update(steps=200, eta=0.0)
    return base.finish(c, arg)
