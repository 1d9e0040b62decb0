"""LDM-4 for ImageNet 256x256, class-conditional with classifier-free guidance: FID 3.60.

python -m ldm_jax.train --config=configs/imagenet_ldm4.py

Source: Rombach et al. 2022, Tables 3 and 15; the authors' cin256-v2.yaml. 400.92M parameters in
the UNet, 55.32M in the first stage. Paper: FID 3.60, IS 247.67 (50k samples, DDIM 250 steps,
guidance 1.5; 10.56 and 103.49 without) after 178k steps of batch 1200, 271 V100-days. The share of
dropped labels is not published; 0.1 is usual.
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="tfds:imagenet2012", fields=("label",), resolution=256)
    base.use_first_stage(c, "vq_f4")
    c.denoiser.update(width=192, mult=(1, 2, 3, 5), attn_downsample=(2, 4, 8), num_heads=1)
    c.denoiser.update(cross_attention=True)
    c.conditioners = ("label",)
    c.label.update(num_classes=1000, width=512, slot="context", null=True)
    c.diffusion.update(schedule="scaled_linear", beta=(0.0015, 0.0195), predict="eps")
    c.train.update(batch_size=1200, lr=1e-4, steps=178_000)
    c.cond_drop_rate = 0.1
    c.sample.update(steps=250, eta=0.0, guidance_scale=1.5)
    return base.finish(c, arg)
