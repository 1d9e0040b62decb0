"""First stage on its own: vector-quantised, f=8, 16384 codes.

python -m ldm_jax.train --config=configs/autoencoder_vq_f8.py

Source: Rombach et al. 2022, Table 8; the authors' first_stage_models/vq-f8. 67.72M parameters.
Paper: R-FID 1.14, PSNR 23.07, SSIM 0.65 (ImageNet validation, 256x256) after 971,043 steps on
OpenImages, batch 10 per device; neither the number of devices nor the days are published. The
perceptual term needs `python -m ldm_jax.weights fetch lpips` first.
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="tfds:open_images_v4", resolution=256, crop="random")
    c.first_stage.update(kind="vq", mult=(1, 2, 2, 4), attn_downsample=(8,), channels=4)
    c.first_stage.update(z_channels=4, codes=16384)
    c.first_stage.discriminator.update(start=1, weight=0.6, layers=2)
    c.first_stage.train.update(batch_size=10, lr=4.5e-05, steps=971_043)
    c.train.steps = 0  # no diffusion model
    return base.finish(c, arg)
