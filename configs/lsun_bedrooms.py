"""LDM-4 for LSUN-Bedrooms 256x256, unconditional.

python -m ldm_jax.train --config=configs/lsun_bedrooms.py

Source: Rombach et al. 2022, Table 12; the authors' lsun_bedrooms-ldm-vq-4.yaml. 274.06M parameters
in the UNet, 55.32M in the first stage. Paper: FID 2.95, precision 0.66, recall 0.48 (Table 1; 50k
samples, DDIM 200 steps, eta 1) after 1.9M steps of batch 48 on one A100.
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="tfds:lsun/bedroom", resolution=256)
    base.use_first_stage(c, "vq_f4")
    c.denoiser.update(width=224, mult=(1, 2, 3, 4), attn_downsample=(2, 4, 8), head_dim=32)
    c.diffusion.update(schedule="scaled_linear", beta=(0.0015, 0.0195), predict="eps")
    c.train.update(batch_size=48, lr=9.6e-5, steps=1_900_000)
    c.sample.update(steps=200, eta=1.0)
    return base.finish(c, arg)
