"""First stage on its own: vector-quantised, f=16, 16384 codes.

python -m ldm_jax.train --config=configs/autoencoder_vq_f16.py

Source: Rombach et al. 2022, Table 8; the authors' first_stage_models/vq-f16. 69.59M parameters.
Paper: R-FID 5.15, PSNR 20.83, SSIM 0.54 (ImageNet validation, 256x256) after 1,101,166 steps on
OpenImages, batch 14 per device; neither the number of devices nor the days are published. The
perceptual term needs `python -m ldm_jax.weights fetch lpips` first.
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="tfds:open_images_v4", resolution=256, crop="random")
    c.first_stage.update(kind="vq", mult=(1, 1, 2, 2, 4), attn_downsample=(16,), channels=8)
    c.first_stage.update(z_channels=8, codes=16384)
    c.first_stage.discriminator.update(start=250_001, weight=0.75, layers=2)
    c.first_stage.train.update(batch_size=14, lr=6.3e-05, steps=1_101_166)
    c.train.steps = 0  # no diffusion model
    return base.finish(c, arg)
