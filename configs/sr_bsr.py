"""Super-resolution x4 to 256x256 with a blind (BSR) degradation, on VQ-f4 latents.

python -m ldm_jax.train --config=configs/sr_bsr.py

Source: the authors' bsr_sr/config.yaml. 113.62M parameters in the UNet, 55.32M in the first stage.
Trained on OpenImages, batch 64 per device; steps, days and figures are not published.
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="tfds:open_images_v4", fields=("low_res",), resolution=256)
    base.use_first_stage(c, "vq_f4")
    c.denoiser.update(width=160, mult=(1, 2, 2, 4), attn_downsample=(8, 16), head_dim=32)
    c.conditioners = ("low_res",)
    c.diffusion.update(schedule="scaled_linear", beta=(0.0015, 0.0155), loss="l2")
    c.train.update(batch_size=64, lr=6.4e-5)
    c.sample.update(steps=100, eta=1.0)
    return base.finish(c, arg)
