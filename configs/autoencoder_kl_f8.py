"""First stage on its own: KL-regularised, f=8.

python -m ldm_jax.train --config=configs/autoencoder_kl_f8.py

Source: Rombach et al. 2022, Table 8; the authors' first_stage_models/kl-f8. 83.65M parameters.
Paper: R-FID 0.90, PSNR 24.19, SSIM 0.69 (ImageNet validation, 256x256) after 246,803 steps on
OpenImages, batch 4 per device; neither the number of devices nor the days are published. The
perceptual term needs `python -m ldm_jax.weights fetch lpips` first.
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="tfds:open_images_v4", resolution=256, crop="random")
    base.use_first_stage(c, "kl_f8")
    c.train.steps = 0  # no diffusion model
    return base.finish(c, arg)
