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
    base.use_first_stage(c, "vq_f8")
    c.train.steps = 0  # no diffusion model
    return base.finish(c, arg)
