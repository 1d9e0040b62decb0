"""Semantic synthesis of landscapes 512x512, on VQ-f4 latents.

python -m ldm_jax.train --config=configs/semantic_landscapes512.py

Source: the authors' semantic_synthesis512, fine-tuned from the 256x256 model. 215.23M parameters in
the UNet, 546 in the map's projection, 55.32M in the first stage. Batch 8 per device on 512x512
crops of 768; steps, days and figures are not published.

Training needs a source with a column of maps, such as `--config.data.source=scenes
--config.data.flip=False`.
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="folder:data/landscapes", fields=("segmentation",), resolution=512)
    base.use_first_stage(c, "vq_f4")
    c.denoiser.update(width=128, mult=(1, 4, 8), attn_downsample=(8, 16, 32), num_heads=8)
    c.conditioners = ("segmentation",)
    c.segmentation.update(num_classes=182, channels=3, stages=2)
    c.diffusion.update(schedule="scaled_linear", beta=(0.0015, 0.0205), loss="l1")
    c.train.update(batch_size=8, lr=8e-6)
    c.sample.update(steps=200, eta=0.0)
    return base.finish(c, arg)
