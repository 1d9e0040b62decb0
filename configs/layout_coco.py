"""Layout-to-image 256x256 on COCO, on VQ-f8 latents, trained from scratch.

python -m ldm_jax.train --config=configs/layout_coco.py

Source: Rombach et al. 2022, Tables 9 and 15 (no weights were released). 312M parameters in the
UNet, 59M in the box transformer, 67.72M in the first stage; the paper says 345M. Paper: FID 42.06
(2048 images, DDIM 100 steps) after 170k steps of batch 48 on one A100; days, beta and loss are not
published, those of the OpenImages model are used.

The 80 classes of COCO; crowds are left out. Other boxes: `--config.data.source=folder:PATH`, or
`--config.data.source=scenes --config.data.flip=False` for composed scenes.
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="tfds:coco/2017", fields=("boxes",), resolution=256)
    base.use_first_stage(c, "vq_f8")
    c.denoiser.update(width=192, mult=(1, 2, 4), attn_downsample=(1, 2, 4), num_heads=1)
    c.denoiser.update(cross_attention=True, transformer_depth=2, dropout=0.1)
    c.conditioners = ("layout",)
    c.layout.update(vocab_size=8192, width=512, depth=16, length=92)
    c.diffusion.update(schedule="scaled_linear", beta=(0.0015, 0.0205), loss="l1")
    c.train.update(batch_size=48, lr=4.8e-5, steps=170_000)
    c.sample.update(steps=100, eta=0.0)
    return base.finish(c, arg)
