"""Differences from PyTorch (`diffusers`) with the same random weights, a table row per model.

python -m benchmarks.parity --configs=celebahq,autoencoder_kl_f8 [--fraction=4]

Needs the extra [parity]. One network is in memory at a time, twice: once in PyTorch and once here,
float32 and one example each. `--fraction=4` takes a quarter of the sides of latents and images.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags
from diffusers.models.attention_processor import Attention
from diffusers.pipelines.latent_diffusion import pipeline_latent_diffusion as text_to_image
from ml_collections import ConfigDict
from transformers import CLIPTextConfig, CLIPTextModel

from ldm_jax import builders, fields
from ldm_jax import config as config_lib
from ldm_jax.conditioners.clip import ClipText
from ldm_jax.convert import diffusers_names as names
from ldm_jax.convert.diffusers_configs import write_first_stage, write_unet
from ldm_jax.convert.diffusers_parts import write_text
from ldm_jax.convert.text import text_to_flax
from ldm_jax.types import Condition

CONFIGS = flags.DEFINE_list("configs", ["celebahq"], "Names of files in configs/.")
FRACTION = flags.DEFINE_integer("fraction", 1, "Divides the sides of latents and images.")

COLUMNS = ("denoiser", "encode", "decode", "text encoder")
Result = tuple[float, float]  # largest absolute difference, root mean square


def main(_: list[str]) -> None:
    """Prints the table."""
    jax.config.update("jax_default_matmul_precision", "highest")
    print(f"| model | parameters | {' | '.join(COLUMNS)} |")
    print("| --- | --- |" + " --- |" * len(COLUMNS), flush=True)
    for name in CONFIGS.value:
        torch.manual_seed(0)
        config = importlib.import_module(f"configs.{name}").get_config()
        count, results = 0, {}
        if config.train.steps > 0:
            parameters, results["denoiser"] = compare_denoiser(config, FRACTION.value)
            count += parameters
        if config.first_stage.kind != "identity":
            parameters, *pair = compare_first_stage(config, FRACTION.value)
            results |= zip(("encode", "decode"), pair, strict=True)
            count += parameters
        if config.train.steps > 0 and "text" in config.conditioners:
            parameters, results["text encoder"] = compare_text_encoder(config)
            count += parameters
        shown = [
            f"{results[c][0]:.1e} ({results[c][1]:.2g})" if c in results else "" for c in COLUMNS
        ]
        print(f"| {name} | {count / 1e6:.2f}M | {' | '.join(shown)} |", flush=True)


def compare_denoiser(config: ConfigDict, fraction: int) -> tuple[int, Result]:
    """Number of parameters and difference of the UNet's output at the latents' size."""
    cond = condition(config)
    channels = config_lib.latent_channels(config)
    extra = 0 if cond.concat is None else cond.concat.shape[-1]
    width = 0 if cond.context is None else cond.context.shape[-1]
    unet = make_unet(config, channels + extra, width)
    module, weights = builders.build_denoiser(config), state_dict(unet)
    params = names.unet_to_flax(weights, module, channels + extra, width)

    factor = 2 ** (len(module.mult) - 1)
    side = max(factor, config_lib.latent_size(config) // fraction // factor * factor)
    x_t, t = normal(0, 1, side, side, channels + extra), np.array([487])
    given = {}
    if width:
        context = normal(1, *cond.context.shape)
        given["encoder_hidden_states"] = torch.from_numpy(context)
    with torch.no_grad():
        want = unet(tensor(x_t), torch.from_numpy(t), **given).sample
    del unet, weights
    cond = Condition(context=context if width else None)
    found = run(lambda p, x: module.apply({"params": p}, x, t, cond), params, x_t)
    return size(params), difference(found, want)


def make_unet(config: ConfigDict, in_channels: int, context_width: int) -> torch.nn.Module:
    """The UNet in PyTorch, random weights.

    UNet2DModel has heads of one width, which is not in all models: their number is set afterwards.
    """
    plain, heads = config.copy_and_resolve_references(), config.denoiser.num_heads
    patched = heads > 1 and not config.denoiser.cross_attention
    if patched:
        plain.denoiser.update(num_heads=0, head_dim=32)
    given = write_unet(plain, in_channels, context_width)
    kind = getattr(diffusers, given.pop("_class_name"))
    unet = random_weights(kind(**given))
    for module in unet.modules() if patched else ():
        if isinstance(module, Attention):
            module.heads = heads
    return unet


def compare_first_stage(config: ConfigDict, fraction: int) -> tuple[int, Result, Result]:
    """Number of parameters, differences of the moments of an image and of a decoded latent."""
    given = write_first_stage(config, 0.0, 1.0)
    first_stage = random_weights(getattr(diffusers, given.pop("_class_name"))(**given))
    module, weights = builders.build_first_stage(config), state_dict(first_stage)
    params = names.first_stage_to_flax(weights, module)
    factor, channels = config_lib.downsampling(config), config_lib.latent_channels(config)
    side = max(1, config_lib.latent_size(config) // fraction)
    images = normal(2, 1, factor * side, factor * side, 3)
    latents = normal(3, 1, side, side, channels)
    with torch.no_grad():
        encoded = first_stage.encode(tensor(images))
        kl = hasattr(encoded, "latent_dist")
        moments = encoded.latent_dist.parameters if kl else encoded.latents
        decoded = first_stage.decode(tensor(latents)).sample
    del first_stage, weights
    scale = {
        name: np.full(channels, value, np.float32) for name, value in (("shift", 0), ("scale", 1))
    }

    def apply(params: dict, x: jax.Array, method: str) -> jax.Array:
        return module.apply({"params": params, "latents": scale}, x, method=method)

    return (
        size(params),
        difference(run(lambda p, x: apply(p, x, "moments"), params, images), moments),
        difference(run(lambda p, x: apply(p, x, "decode"), params, latents), decoded),
    )


def compare_text_encoder(config: ConfigDict) -> tuple[int, Result]:
    """Number of parameters and difference of the context that a text gives."""
    module = builders.build_text_encoder(config)
    given = write_text(module)
    if isinstance(module, ClipText):
        encoder = CLIPTextModel(CLIPTextConfig(**given))
    else:
        encoder = text_to_image.LDMBertModel(text_to_image.LDMBertConfig(**given))
        del encoder.to_logits  # no part of what it returns
        encoder = encoder.model
    encoder = random_weights(encoder)
    prefix = "" if isinstance(module, ClipText) else "model."
    weights = {prefix + name: weight for name, weight in state_dict(encoder).items()}
    params = text_to_flax(weights, module, "hf")
    tokens = np.random.default_rng(4).integers(module.vocab_size, size=(1, module.length))
    with torch.no_grad():
        want = encoder(torch.from_numpy(tokens)).last_hidden_state
    del encoder, weights
    found = run(lambda p, x: module.apply({"params": p}, x, method="encode"), params, tokens)
    return size(params), difference(found, want)


def condition(config: ConfigDict) -> Condition:
    """Shapes of the condition of one example."""
    size, channels = config_lib.latent_size(config), config_lib.latent_channels(config)
    latents = jnp.zeros((1, size, size, channels))
    batch = fields.add_latents(fields.examples(config, 1), lambda images: latents)
    module = builders.build_conditioner(config)
    params = jax.eval_shape(module.init, jax.random.key(0), batch)
    return jax.eval_shape(module.apply, params, batch)


def random_weights(module: torch.nn.Module) -> torch.nn.Module:
    """Moves every weight a little, so that no layer is as it was initialised."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return module.eval()


def state_dict(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """The weights of a module by name, in its own memory."""
    return {name: weight.detach().numpy() for name, weight in module.state_dict().items()}


def run(apply: Callable, params: dict, x: np.ndarray) -> np.ndarray:
    """Calls a function of ours once, compiled."""
    params = jax.tree.map(np.asarray, params)  # some are reordered when they are read
    return np.asarray(jax.jit(apply)(params, x))


def difference(found: np.ndarray, want: Any) -> Result:
    """Compares (B, H, W, C) with a tensor (B, C, H, W), or both (B, L, D)."""
    want = want.numpy()
    want = want.transpose(0, 2, 3, 1) if want.ndim == 4 else want
    return float(np.abs(found - want).max()), float(np.sqrt(np.mean(want**2)))


def normal(seed: int, *shape: int) -> np.ndarray:
    """Standard normal values."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def tensor(array: np.ndarray) -> torch.Tensor:
    """(B, H, W, C) as a tensor (B, C, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def size(params: dict) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


if __name__ == "__main__":
    app.run(main)
