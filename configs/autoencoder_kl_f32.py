"""First stage on its own: KL-regularised, f=32.

python -m ldm_jax.train --config=configs/autoencoder_kl_f32.py

Source: Rombach et al. 2022, Table 8; the authors' first_stage_models/kl-f32. 103.88M parameters.
Paper: R-FID 2.04, PSNR 22.27, SSIM 0.61 (ImageNet validation, 256x256) after 406,763 steps on
OpenImages, batch 6 per device; neither the number of devices nor the days are published. The
perceptual term needs `python -m ldm_jax.weights fetch lpips` first.
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="tfds:open_images_v4", resolution=256, crop="random")
    base.use_first_stage(c, "kl_f32")
    c.train.steps = 0  # no diffusion model
    return base.finish(c, arg)
