"""First stage on its own: KL-regularised, f=16.

python -m ldm_jax.train --config=configs/autoencoder_kl_f16.py

Source: Rombach et al. 2022, Table 8; the authors' first_stage_models/kl-f16. 69.61M parameters.
Paper: R-FID 0.87, PSNR 24.08, SSIM 0.68 (ImageNet validation, 256x256) after 442,998 steps on
OpenImages, batch 6 per device; neither the number of devices nor the days are published. The
perceptual term needs `python -m ldm_jax.weights fetch lpips` first.
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="tfds:open_images_v4", resolution=256, crop="random")
    c.first_stage.update(kind="kl", mult=(1, 1, 2, 2, 4), attn_downsample=(16,), channels=16)
    c.first_stage.update(z_channels=16)
    c.first_stage.discriminator.update(start=50_001, weight=0.5, layers=3)
    c.first_stage.train.update(batch_size=6, lr=2.7e-05, steps=442_998)
    c.train.steps = 0  # no diffusion model
    return base.finish(c, arg)
