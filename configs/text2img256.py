"""Text-to-image 256x256 with a text transformer, on VQ-f4 latents.

python -m ldm_jax.train --config=configs/text2img256.py --config.text.tokenizer=FOLDER

Source: the authors' text2img256/config.yaml. 403.62M parameters in the UNet, 147.9M in the used
part of the text transformer, 55.32M in the first stage. Reported with the released model: FID
16.79, IS 13.89 (COCO, DDIM 100 steps, eta 0). Batch 28 per device; steps, hardware and days are not
published. FOLDER holds BERT's vocab.txt (docs/models.md). Of COCO's five captions per image one is
drawn each time. For those in a metadata.jsonl beside your images: `--config.data.source=folder:PATH
--config.data.caption=text`.
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="tfds:coco_captions", caption="captions/text", fields=("tokens",))
    c.data.resolution = 256
    base.use_first_stage(c, "vq_f4")
    c.denoiser.update(width=192, mult=(1, 2, 3, 5), attn_downsample=(2, 4, 8), head_dim=32)
    c.denoiser.update(cross_attention=True)
    c.conditioners = ("text",)
    c.text.update(encoder="bert", width=640, mlp_width=2560, depth=32, length=77)
    c.diffusion.update(schedule="scaled_linear", beta=(0.0015, 0.0195), loss="l2")
    c.train.update(batch_size=28, lr=5.6e-5)
    c.cond_drop_rate = 0.1
    c.sample.update(steps=100, eta=0.0, guidance_scale=5.0)
    return base.finish(c, arg)
