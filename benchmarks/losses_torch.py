"""The loss of the first stages in PyTorch, by the formulas of the original code.

Images are (B, 3, H, W) in [-1, 1]. The names of the weights are those of torchvision's VGG16, of
the package lpips and of the original discriminator, as `ldm_jax.convert.losses` writes them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ldm_jax.first_stage.lpips import COLOUR_MEAN, COLOUR_STD, VGG16

LARGEST_WEIGHT = 1e4


class Head(nn.Module):
    """A linear head of LPIPS; its dropout is off, as in a validation of the original code."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


class LPIPS(nn.Module):
    """Perceptual distance with VGG16 (Zhang et al. 2018, v0.1): two batches of images -> (B,)."""

    def __init__(self) -> None:
        super().__init__()
        layers, channels, self.ends = [], 3, []
        for depth, features in VGG16:
            for _ in range(depth):
                layers += [nn.Conv2d(channels, features, 3, padding=1), nn.ReLU(inplace=True)]
                channels = features
            self.ends.append(len(layers) - 1)
            layers.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*layers[:-1])
        for i, (_, features) in enumerate(VGG16):
            self.add_module(f"lin{i}", Head(features))
        for name, values in (("shift", COLOUR_MEAN), ("scale", COLOUR_STD)):
            self.register_buffer(name, torch.tensor(values)[None, :, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        shares = []
        for i, (a, b) in enumerate(zip(self.blocks(images), self.blocks(others), strict=True)):
            difference = (unit_length(a) - unit_length(b)) ** 2
            shares.append(self.get_submodule(f"lin{i}")(difference).mean((1, 2, 3)))
        return sum(shares)

    def blocks(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The rectified output of each block."""
        h, found = (images - self.shift) / self.scale, []
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in self.ends:
                found.append(h)
        return found


def unit_length(features: torch.Tensor) -> torch.Tensor:
    """Features (B, C, H, W) divided by their length over the channels; zeros stay zeros.

    The values are the original's. Its root of zero has no derivative, so that an image with one
    place where no channel is active makes every weight NaN; here that place has no gradient.
    """
    squares = (features**2).sum(1, keepdim=True)
    active = squares > 0
    length = torch.where(active, torch.where(active, squares, 1.0).sqrt(), 0.0)
    return features / (length + 1e-10)


class PatchDiscriminator(nn.Module):
    """Logits of patches: (B, 3, H, W) -> (B, 1, h, w) (Isola et al. 2017)."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        main = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
        channels = width
        for i in range(1, layers + 1):
            features = width * min(2**i, 8)
            main += [
                nn.Conv2d(channels, features, 4, 2 if i < layers else 1, 1, bias=False),
                nn.BatchNorm2d(features),
                nn.LeakyReLU(0.2, inplace=True),
            ]
            channels = features
        self.main = nn.Sequential(*main, nn.Conv2d(channels, 1, 4, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.main(images)


def likelihood(
    images: torch.Tensor,
    reconstruction: torch.Tensor,
    *,
    kind: str,
    loss: str,
    perceptual: LPIPS | None,
    perceptual_weight: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The reconstruction term, a scalar, and metrics.

    The perceptual distance of an example is added to the error of each of its elements. 'kl' sums
    over an example's elements and averages over the batch, 'vq' averages over all elements.
    """
    difference = images - reconstruction
    error = difference.abs() if loss == "l1" else difference**2
    metrics = {"reconstruction_mae": difference.detach().abs().mean()}
    if perceptual is not None:
        distance = perceptual(images, reconstruction)
        error = error + perceptual_weight * distance[:, None, None, None]
        metrics |= {"perceptual": distance.mean(), "reconstruction_error": error.mean()}
    total = error.sum() / len(error) if kind == "kl" else error.mean()
    return total, metrics | {"reconstruction": total}


def adaptive_weight(
    reconstruction: torch.Tensor, adversarial: torch.Tensor, last_layer: torch.Tensor
) -> torch.Tensor:
    """Ratio of the two losses' gradients at the decoder's last kernel, in [0, 1e4]."""
    reference = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)[0]
    other = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0]
    return (reference.norm() / (other.norm() + 1e-4)).clamp(0.0, LARGEST_WEIGHT).detach()


def discriminator_loss(real: torch.Tensor, generated: torch.Tensor, loss: str) -> torch.Tensor:
    """The 'hinge' or 'vanilla' loss of logits, halved."""
    if loss == "hinge":
        return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + generated).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(generated).mean())
