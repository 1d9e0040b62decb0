"""First stage on its own: vector-quantised, f=4, 8192 codes, no attention.

python -m ldm_jax.train --config=configs/autoencoder_vq_f4_noattn.py

Source: Rombach et al. 2022, Table 8; the authors' first_stage_models/vq-f4-noattn. 53.22M
parameters. Paper: R-FID 1.06, PSNR 25.21, SSIM 0.76 (ImageNet validation, 256x256) after 658,131
steps on OpenImages, batch 8 per device; neither the number of devices nor the days are published.
The perceptual term needs `python -m ldm_jax.weights fetch lpips` first.
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="tfds:open_images_v4", resolution=256, crop="random")
    base.use_first_stage(c, "vq_f4_noattn")
    c.train.steps = 0  # no diffusion model
    return base.finish(c, arg)
