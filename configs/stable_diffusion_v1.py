"""Stable Diffusion v1: text-to-image 512x512 with CLIP ViT-L/14, on KL-f8 latents.

python -m ldm_jax.train --config=configs/stable_diffusion_v1.py --config.init_from=IMPORTED

Source: the authors' stable-diffusion v1-inference.yaml and model card. 859.52M parameters in the
UNet, 123.06M in the text encoder, 83.65M in the first stage. Trained on LAION-2B in stages, batch
2048 on 256 A100: v1-1 237k steps at 256 and 194k at 512, v1-2 515k more, v1-4 225k more from v1-2
with 10 % of the captions dropped. The text encoder is not trained: IMPORTED is a workdir with its
weights and tokenizer (docs/models.md).
"""

from ldm_jax import config as base


def get_config(arg=""):
    c = base.get_config()
    c.data.update(source="folder:data/captions", fields=("tokens",), resolution=512)
    base.use_first_stage(c, "kl_f8")
    c.first_stage.update(latent_scale="0.18215")
    c.denoiser.update(width=320, mult=(1, 2, 4, 4), attn_downsample=(1, 2, 4), num_heads=8)
    c.denoiser.update(cross_attention=True, remat="block")
    c.conditioners = ("text",)
    c.text.update(encoder="clip", vocab_size=49408, width=768, depth=12, heads=12)
    c.text.update(mlp_width=3072, length=77, activation="quick_gelu")
    c.text.update(null_tokens=(49406, 49407), pad_token=49407)
    c.diffusion.update(schedule="scaled_linear", beta=(0.00085, 0.0120), loss="l2")
    c.train.update(batch_size=2048, lr=1e-4, warmup_steps=10_000, steps=225_000)
    c.cond_drop_rate = 0.1
    c.sample.update(steps=50, eta=0.0, guidance_scale=7.5)
    return base.finish(c, arg)
