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
    base.use_first_stage(c, "vq_f8_n256")
    c.train.steps = 0  # no diffusion model
    return base.finish(c, arg)
