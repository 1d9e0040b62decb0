"""LDM-4 for FFHQ 256x256, unconditional.

python -m ldm_jax.train --config=configs/ffhq.py

Source: Rombach et al. 2022, Table 12; the authors' ffhq-ldm-vq-4.yaml. 274.06M parameters
in the UNet, 55.32M in the first stage. Paper: FID 4.98, precision 0.73, recall 0.50 (Table 1; 50k
samples, DDIM 200 steps, eta 1) after 635k steps of batch 42 on one A100, 26 V100-days. There is no
FFHQ in tensorflow-datasets: put its images into the folder below, or name yours with
--config.data.source=folder:PATH.
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="folder:data/ffhq256", resolution=256)
    base.use_first_stage(c, "vq_f4")
    c.denoiser.update(width=224, mult=(1, 2, 3, 4), attn_downsample=(2, 4, 8), head_dim=32)
    c.diffusion.update(schedule="scaled_linear", beta=(0.0015, 0.0195), predict="eps")
    c.train.update(batch_size=42, lr=8.4e-5, steps=635_000)
    c.sample.update(steps=200, eta=1.0)
    return base.finish(c, arg)
