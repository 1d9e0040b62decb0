"""First stage on its own: KL-regularised, f=2.

python -m ldm_jax.train --config=configs/autoencoder_kl_f2.py

Source: Rombach et al. 2022, Table 8, which gives factor, channels and codes; no weights and no
other settings are published. The rest is that of f=4 with one level less. 13.31M parameters. Paper:
R-FID 0.086, PSNR 32.47, SSIM 0.93 (ImageNet validation, 256x256). The perceptual term needs `python
-m ldm_jax.weights fetch lpips` first.
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="tfds:open_images_v4", resolution=256, crop="random")
    base.use_first_stage(c, "kl_f2")
    c.train.steps = 0  # no diffusion model
    return base.finish(c, arg)
