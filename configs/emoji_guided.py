"""Emoji faces, 64x64, by class, with a classifier of noisy latents for guidance.

python -m ldm_jax.train --config=configs/emoji_guided.py
python -m ldm_jax.sample --workdir=runs/emoji_guided --label=cat-face --classifier_scale=2 \\
  --guidance_scale=1

Without the last flag classifier-free guidance of 2.0, the config's, acts beside the classifier.
The model is quickstart.py's; a run of that gets the classifier by this config and
--workdir=runs/quickstart --allow_config_change. It has 1.32M parameters and takes less than two
minutes of CPU time. In the end it is right for 92, 79, 40 and 15 % of the training images in the
quarters of the time range, from little noise to much; it has seen all 166.
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="emoji", where="category=Smileys & Emotion", label="subcategory")
    c.data.update(fields=("label",), resolution=64, cache_latents=True)
    base.use_small_model(c)
    c.conditioners = ("label",)
    c.label.update(num_classes=16, width=256, slot="vector")
    c.cond_drop_rate = 0.1
    c.classifier.update(width=64, mult=(1, 2), depth=1, attn_downsample=(2,), dropout=0.1)
    c.classifier.train.update(batch_size=64, steps=300, lr=1e-3, lr_decay="cosine")
    c.classifier.train.update(warmup_steps=20, log_every=25, checkpoint_every=100)
    c.sample.update(guidance_scale=2.0, nearest=True)
    return base.finish(c, arg)
