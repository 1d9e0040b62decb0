"""First stage on its own: vector-quantised, f=4, 8192 codes.

python -m ldm_jax.train --config=configs/autoencoder_vq_f4.py

Source: Rombach et al. 2022, Table 8; the authors' first_stage_models/vq-f4. 55.32M parameters.
Paper: R-FID 0.58, PSNR 27.43, SSIM 0.82 (ImageNet validation, 256x256) after 533,066 steps on
OpenImages, batch 8 per device; neither the number of devices nor the days are published. The
perceptual term needs `python -m ldm_jax.weights fetch lpips` first.
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="tfds:open_images_v4", resolution=256, crop="random")
    base.use_first_stage(c, "vq_f4")
    c.train.steps = 0  # no diffusion model
    return base.finish(c, arg)
