"""Layout-to-image 256x256 on OpenImages, on VQ-f4 latents.

python -m ldm_jax.train --config=configs/layout_openimages.py

Source: Rombach et al. 2022, Tables 9 and 15; the authors' layout2img-openimages256. 246.28M
parameters in the UNet, 59M in the box transformer, 55.32M in the first stage. Paper: FID 32.02
(2048 images, DDIM 200 steps, eta 0) after 4.4M steps of batch 24 on one A100; days not published.

The 601 classes of OpenImages V4, which go by its codes, such as /m/011k07. Other boxes:
`--config.data.source=folder:PATH`, or `--config.data.source=scenes --config.data.flip=False` for
composed scenes.
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="tfds:open_images_v4", fields=("boxes",), resolution=256)
    base.use_first_stage(c, "vq_f4")
    c.denoiser.update(width=128, mult=(1, 2, 3, 4), attn_downsample=(2, 4, 8), head_dim=32)
    c.denoiser.update(cross_attention=True, transformer_depth=3)
    c.conditioners = ("layout",)
    c.layout.update(vocab_size=8192, width=512, depth=16, length=92)
    c.diffusion.update(schedule="scaled_linear", beta=(0.0015, 0.0205), loss="l1")
    c.train.update(batch_size=24, lr=4.8e-5, steps=4_400_000)
    c.sample.update(steps=200, eta=0.0)
    return base.finish(c, arg)
