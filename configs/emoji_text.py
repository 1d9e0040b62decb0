"""Text to image on composed scenes, 64x64: captions such as "a cat left of a bus".

python -m ldm_jax.train --config=configs/emoji_text.py
python -m ldm_jax.sample --workdir=runs/emoji_text --prompt='a cat left of a bus'

The text transformer is trained along, as in the paper. Its vocabulary, the words of all captions,
comes with the package.
"""

from ldm_jax import config as base
from ldm_jax.data import scenes_vocabulary as vocabulary


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="scenes", split="train[:90%]", fields=("tokens",), resolution=64)
    c.data.flip = False
    base.use_small_model(c)
    c.first_stage.eval.split = "train[90%:]"
    c.first_stage.stats_images = 2000
    c.first_stage.train.steps = 400
    c.conditioners = ("text",)
    c.text.update(encoder="bert", tokenizer=vocabulary.NAME, vocab_size=vocabulary.SIZE)
    c.text.update(width=128, mlp_width=512, depth=2, heads=4, length=vocabulary.LENGTH)
    c.text.update(null_tokens=vocabulary.NULL_TOKENS, pad_token=vocabulary.PAD_TOKEN)
    c.denoiser.update(cross_attention=True, attn_downsample=(1, 2))
    c.train.update(steps=1500, picture_every=750, checkpoint_every=500)
    c.ema_decay = 0.995
    c.cond_drop_rate = 0.1
    c.sample.guidance_scale = 2.0
    return base.finish(c, arg)
