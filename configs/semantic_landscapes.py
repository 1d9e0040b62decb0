"""Semantic synthesis of landscapes 256x256, on VQ-f4 latents.

python -m ldm_jax.train --config=configs/semantic_landscapes.py

Source: Rombach et al. 2022, section 4.3.2 and Table 15; the authors' semantic_synthesis256. 215.23M
parameters in the UNet, 546 in the map's projection, 55.32M in the first stage. Trained 360k steps
of batch 48 on one A100; no figure of quality and no days are published. The paper's table says f=8,
its text and the released model f=4. The attention factors are the published ones, which this UNet
never reaches: only its middle has attention.

Training needs a source with a column of maps, such as `--config.data.source=scenes
--config.data.flip=False`.
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="folder:data/landscapes", fields=("segmentation",), resolution=256)
    base.use_first_stage(c, "vq_f4")
    c.denoiser.update(width=128, mult=(1, 4, 8), attn_downsample=(8, 16, 32), num_heads=8)
    c.conditioners = ("segmentation",)
    c.segmentation.update(num_classes=182, channels=3, stages=2)
    c.diffusion.update(schedule="scaled_linear", beta=(0.0015, 0.0205), loss="l1")
    c.train.update(batch_size=48, lr=4.8e-5, steps=360_000)
    c.sample.update(steps=200, eta=0.0)
    return base.finish(c, arg)
