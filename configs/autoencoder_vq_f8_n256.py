"""First stage on its own: vector-quantised, f=8, 256 codes.

python -m ldm_jax.train --config=configs/autoencoder_vq_f8_n256.py

Source: Rombach et al. 2022, Table 8; the authors' first_stage_models/vq-f8-n256. 67.65M parameters.
Paper: R-FID 1.49, PSNR 22.35, SSIM 0.62 (ImageNet validation, 256x256) after 1,608,649 steps on
OpenImages, batch 10 per device; neither the number of devices nor the days are published. The
perceptual term needs `python -m ldm_jax.weights fetch lpips` first.
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="tfds:open_images_v4", resolution=256, crop="random")
    c.first_stage.update(kind="vq", mult=(1, 2, 2, 4), attn_downsample=(8,), channels=4)
    c.first_stage.update(z_channels=4, codes=256)
    c.first_stage.discriminator.update(start=250_001, weight=0.75, layers=3)
    c.first_stage.train.update(batch_size=10, lr=4.5e-05, steps=1_608_649)
    c.train.steps = 0  # no diffusion model
    return base.finish(c, arg)
