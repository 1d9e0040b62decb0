"""Text-to-image 256x256, 1.45B parameters, on KL-f8 latents.

python -m ldm_jax.train --config=configs/text2img_1p4b.py --config.text.tokenizer=FOLDER

Source: Rombach et al. 2022, Tables 2 and 15; the authors' txt2img-1p4B-eval.yaml. 872.30M
parameters in the UNet, 542.8M in the used part of the text transformer, 83.65M in the first stage.
Paper: FID 12.63, IS 30.29 (30k COCO captions, DDIM 250 steps, guidance 1.5; 23.31 and 20.03
without) after 390k steps of batch 680 on LAION-400M; the rate of dropped captions, hardware and
days are not published (the paper gives lr 1e-4, the YAML 5e-5). FOLDER holds BERT's vocab.txt
(docs/models.md). The source here is COCO's captions, for want of LAION's images; for those in a
metadata.jsonl beside your images: `--config.data.source=folder:PATH --config.data.caption=text`.
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="tfds:coco_captions", caption="captions/text", fields=("tokens",))
    c.data.resolution = 256
    base.use_first_stage(c, "kl_f8")
    c.first_stage.update(latent_scale="0.18215")
    c.denoiser.update(width=320, mult=(1, 2, 4, 4), attn_downsample=(1, 2, 4), num_heads=8)
    c.denoiser.update(cross_attention=True, remat="block")
    c.conditioners = ("text",)
    c.text.update(encoder="bert", width=1280, mlp_width=5120, depth=32, length=77)
    c.diffusion.update(schedule="scaled_linear", beta=(0.00085, 0.0120), loss="l2")
    c.train.update(batch_size=680, lr=1e-4, steps=390_000)
    c.cond_drop_rate = 0.1
    c.sample.update(steps=200, eta=0.0, guidance_scale=5.0)
    return base.finish(c, arg)
