"""Writes the reference values of the image encoders: small random weights and what they give.

python tests/golden_towers/make.py

It needs PyTorch and transformers (5.23 was used), which the tests themselves do not: each folder
is a model as `save_pretrained` writes it, beside outputs.npz.
"""

import os
import pathlib
import shutil

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, Dinov2Config, Dinov2Model

ROOT = pathlib.Path(__file__).parent
DINO = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=70, patch_size=14
)
CLIP_TEXT = dict(hidden_size=12, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
CLIP_TEXT |= dict(vocab_size=60, max_position_embeddings=8, eos_token_id=59, bos_token_id=58)
CLIP_VISION = dict(hidden_size=16, intermediate_size=40, num_hidden_layers=2, patch_size=14)
CLIP_VISION |= dict(num_attention_heads=4, image_size=56)


def randomize(model: torch.nn.Module) -> None:
    """Weights under which every part counts."""
    draw = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=draw)
        if "norm" in name and name.endswith("weight"):
            weight.data = 1 + 0.3 * noise
        elif "lambda" in name:
            weight.data = 0.5 + 0.2 * noise
        elif weight.ndim == 2 and "embedding" not in name and "token" not in name:
            weight.data = noise * weight.shape[1] ** -0.5
        elif weight.ndim == 4:
            weight.data = noise * weight[0].numel() ** -0.5
        else:
            weight.data = 0.3 * noise
    model.eval()


def save(model: torch.nn.Module, name: str, **arrays: np.ndarray | torch.Tensor) -> None:
    folder = ROOT / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    found = {key: np.asarray(array) for key, array in arrays.items()}
    np.savez_compressed(folder / "outputs.npz", **found)


def with_offset(model: Dinov2Model) -> None:
    """Interpolates positions as the original DINOv2 does, by a factor a little too large."""

    def interpolate(embeddings: torch.Tensor, height: int, width: int) -> torch.Tensor:
        table = model.embeddings.position_embeddings
        side = round((table.shape[1] - 1) ** 0.5)
        grid = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        factors = tuple((pixels // 14 + 0.1) / side for pixels in (height, width))
        grid = torch.nn.functional.interpolate(grid, scale_factor=factors, mode="bicubic")
        return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    model.embeddings.interpolate_pos_encoding = interpolate


def dino(name: str, pictures: np.ndarray, **changes: bool) -> None:
    model = Dinov2Model(Dinov2Config(**DINO, **changes))
    randomize(model)
    draw = torch.Generator().manual_seed(1)
    shapes = {"pixels": (1, 3, 70, 70), "wide": (1, 3, 42, 98)}
    # Rounded, so that the files are small.
    found = {key: torch.randn(x, generator=draw).mul(4).round() / 4 for key, x in shapes.items()}
    found |= {f"of_{key}": model(x).pooler_output for key, x in found.items()}
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    resized = [Image.fromarray(x).resize((224, 224), Image.Resampling.BICUBIC) for x in pictures]
    levels = np.stack([(np.asarray(x) / 255 - mean) / std for x in resized])
    given = torch.tensor(levels.transpose(0, 3, 1, 2), dtype=torch.float32)
    with_offset(model)
    save(model, name, **found, pictures=pictures, features=model(given).pooler_output)


def clip(name: str, pictures: np.ndarray, act: str) -> None:
    config = CLIPConfig(
        text_config=CLIP_TEXT | {"hidden_act": act},
        vision_config=CLIP_VISION | {"hidden_act": act},
        projection_dim=20,
    )
    model = CLIPModel(config)
    randomize(model)
    process = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=56)
    given = process([Image.fromarray(x) for x in pictures], return_tensors="pt")["pixel_values"]
    tokens = torch.tensor([[58, 5, 7, 59, 59, 59, 59, 59], [58, 3, 3, 40, 17, 2, 8, 59]])
    found = model(input_ids=tokens, pixel_values=given)
    images = model.visual_projection(model.vision_model(given).pooler_output)
    texts = model.text_projection(model.text_model(tokens).pooler_output)
    cosines = found.logits_per_image / model.logit_scale.exp()
    save(
        model,
        name,
        pictures=pictures,
        features=images,
        tokens=tokens,
        texts=texts,
        cosines=cosines,
    )


def main() -> None:
    """Writes all folders beside this file."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    smooth = np.random.RandomState(0).randint(0, 256, (2, 6, 8, 3)).astype(np.uint8)
    enlarge = lambda x, size: np.asarray(Image.fromarray(x).resize(size))  # noqa: E731
    pictures = np.stack([enlarge(x, (40, 32)) for x in smooth])
    with torch.no_grad():
        dino("dino", pictures)
        dino("dino_gated", pictures[:1], use_swiglu_ffn=True)
        clip("clip", np.stack([enlarge(x, (100, 75)) for x in smooth]), "quick_gelu")


if __name__ == "__main__":
    main()
