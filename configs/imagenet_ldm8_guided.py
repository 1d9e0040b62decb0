"""LDM-8 for ImageNet 256x256 with the classifier that guides it: LDM-8-G.

python -m ldm_jax.train --config=configs/imagenet_ldm8_guided.py
python -m ldm_jax.sample --workdir=runs/imagenet_ldm8_guided --label=207 --classifier_scale=10

Source: Rombach et al. 2022, Tables 3, 10 and 18. Classifier scale 10, 506M parameters in all, FID
7.76, IS 209.52 (Table 10; 50k samples, DDIM 200 steps, eta 1, 4.8M steps); 8.11 and 190.43 after
2.9M. The classifier took 12 V100-days.

Of the classifier the paper says no more. The original code makes it of the UNet's own settings,
with attention as pooling: that has 111.60M parameters here, and 506M less the UNet's 395M is 111M.
How it was trained is not published: batch, learning rate and its decay are those of the classifier
of Dhariwal & Nichol 2021, weight decay the default of the original code, and the steps are what 12
V100-days hold, counted by operations beside the UNet's 79. The rest is imagenet_ldm8.py, and this
config has not been trained.
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
    c.classifier.update(width=256, mult=(1, 2, 4), attn_downsample=(1, 2, 4), head_dim=32)
    c.classifier.train.update(batch_size=256, steps=200_000, lr=3e-4, lr_decay="linear")
    c.classifier.train.weight_decay = 0.01
    c.sample.update(steps=200, eta=1.0)
    return base.finish(c, arg)
