"""LDM-8 for ImageNet 256x256, class-conditional, without a null class.

python -m ldm_jax.train --config=configs/imagenet_ldm8.py

Source: Rombach et al. 2022, Tables 10 and 13; the authors' cin-ldm-vq-f8.yaml. 394.98M parameters
in the UNet, 67.72M in the first stage. Paper: FID 15.51, IS 79.03 (Table 10; 50k samples, DDIM 200
steps, eta 1) after 4.8M steps of batch 64 on one A100; 17.41 after 2.9M, 79 V100-days.
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="tfds:imagenet2012", fields=("label",), resolution=256)
    base.use_first_stage(c, "vq_f8")
    c.denoiser.update(width=256, mult=(1, 2, 4), attn_downsample=(1, 2, 4), head_dim=32)
    c.denoiser.update(cross_attention=True)
    c.conditioners = ("label",)
    c.label.update(num_classes=1000, width=512, slot="context", null=False)
    c.diffusion.update(schedule="scaled_linear", beta=(0.0015, 0.0195), predict="eps")
    c.train.update(batch_size=64, lr=6.4e-5, steps=4_800_000)
    c.sample.update(steps=200, eta=1.0)
    return base.finish(c, arg)
