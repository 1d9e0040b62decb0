"""Super-resolution x4 to 256x256 with bicubic downsampling, on VQ-f4 latents.

python -m ldm_jax.train --config=configs/sr_bicubic.py

Source: Rombach et al. 2022, Tables 5 and 15 (no weights were released). 113.6M parameters in the
UNet, 55.32M in the first stage. The paper's table lists no attention; with the blind model's, the
sum is its 169M. Paper: FID 2.8 (ImageNet validation, against its validation features; 4.8 against
training features), IS 166.3, PSNR 24.4, SSIM 0.69 (DDIM 100 steps) after 860k steps of batch 64 on
one A100.
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="tfds:imagenet2012", fields=("low_res",), resolution=256)
    base.use_first_stage(c, "vq_f4")
    c.denoiser.update(width=160, mult=(1, 2, 2, 4), attn_downsample=(8, 16), num_heads=1)
    c.conditioners = ("low_res",)
    c.diffusion.update(schedule="scaled_linear", beta=(0.0015, 0.0155), loss="l2")
    c.train.update(batch_size=64, lr=6.4e-5, steps=860_000)
    c.sample.update(steps=100, eta=1.0)
    return base.finish(c, arg)
