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
    base.use_first_stage(c, "vq_f16")
    c.train.steps = 0  # no diffusion model
    return base.finish(c, arg)
