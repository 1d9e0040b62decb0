"""The training step of a first stage in PyTorch, as in the original code.

The network is `diffusers`' AutoencoderKL or VQModel; images are (B, 3, H, W) in [-1, 1]. What the
original code computes without using it, LPIPS in the discriminator's turn, is left out.
"""

from __future__ import annotations

import diffusers
import jax
import numpy as np
import torch
from ml_collections import ConfigDict

from benchmarks import losses_torch as losses
from ldm_jax import builders, images, judges
from ldm_jax.convert.diffusers_configs import write_first_stage
from ldm_jax.convert.diffusers_names import first_stage_from_flax, first_stage_to_flax
from ldm_jax.convert.losses import discriminator_from_flax, lpips_from_flax
from ldm_jax.training.state import TrainState

# A step takes 6 to 10% less time on a CPU than with contiguous memory.
LAYOUT = dict(memory_format=torch.channels_last)
Metrics = dict[str, float]


class Trainer:
    """The networks in PyTorch, their optimisers, and the step of the original code."""

    def __init__(self, config: ConfigDict, state: TrainState) -> None:
        self.config, c = config.first_stage, config.first_stage
        self.module = builders.build_first_stage(config)
        given = write_first_stage(config, 0.0, 1.0)
        weights = first_stage_from_flax(state.params["first_stage"], self.module)
        self.model = loaded(getattr(diffusers, given.pop("_class_name"))(**given), weights)
        self.optimizer = adamw(self.model, c.train)
        self.lpips, self.discriminator = None, None
        if c.perceptual_weight > 0:
            weights = lpips_from_flax({"params": judges.perceptual_weights(config)["lpips"]})
            self.lpips = loaded(losses.LPIPS(), weights).eval()
        discriminator = builders.build_discriminator(config)
        if discriminator is not None:
            variables = {
                "params": state.params["discriminator"],
                "batch_stats": state.stats["discriminator"],
            }
            weights = discriminator_from_flax(variables, discriminator)
            network = losses.PatchDiscriminator(discriminator.width, discriminator.layers)
            self.discriminator = loaded(network, weights)
            self.discriminator_optimizer = adamw(self.discriminator, c.train)

    def step(self, step: int, image: np.ndarray, noise: torch.Tensor, lr: float) -> Metrics:
        """Updates the autoencoder, then the discriminator, and returns metrics.

        Args:
            step: updates done.
            image: (B, H, W, 3) uint8.
            noise: of the posterior in both reconstructions, (2, B, C, h, w).
            lr: learning rate of both.
        """
        real = torch.from_numpy(images.to_float(image)).permute(0, 3, 1, 2)
        d = self.config.discriminator
        factor = d.factor if step >= d.start else 0.0
        metrics = self._update_autoencoder(real, noise[0], lr, factor)
        if self.discriminator is not None:
            metrics |= self._update_discriminator(real, noise[1], lr, factor)
        values = {name: float(torch.as_tensor(value).detach()) for name, value in metrics.items()}
        return values | {"learning_rate": lr}

    def variables(self) -> dict:
        """The first stage's variables for `ldm_jax`, with latents that are not scaled."""
        weights = {name: w.detach().numpy() for name, w in self.model.state_dict().items()}
        params = jax.tree.map(np.asarray, first_stage_to_flax(weights, self.module))
        ones = np.ones(self.module.channels, np.float32)
        return {"params": params, "latents": {"shift": 0 * ones, "scale": ones}}

    def _update_autoencoder(
        self, real: torch.Tensor, noise: torch.Tensor, lr: float, factor: float
    ) -> dict[str, torch.Tensor]:
        c = self.config
        reconstruction, term, metrics = self._autoencode(real, noise)
        loss, more = losses.likelihood(
            real,
            reconstruction,
            kind=c.kind,
            loss=c.loss,
            perceptual=self.lpips,
            perceptual_weight=c.perceptual_weight,
        )
        metrics |= more
        if self.discriminator is not None:
            self.discriminator.requires_grad_(False)
            adversarial = -self.discriminator(reconstruction).mean()
            last_layer = self.model.decoder.conv_out.weight
            weight = losses.adaptive_weight(loss, adversarial, last_layer) * c.discriminator.weight
            loss = loss + weight * factor * adversarial
            metrics |= {"adversarial": adversarial, "adaptive_weight": weight}
            metrics["adversarial_factor"] = factor
        loss = loss + term
        norm = self._update(self.model, self.optimizer, loss, lr)
        return metrics | {"loss": loss, "grad_norm": norm}

    def _update_discriminator(
        self, real: torch.Tensor, noise: torch.Tensor, lr: float, factor: float
    ) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            reconstruction = self._autoencode(real, noise)[0]
        self.discriminator.requires_grad_(True)
        logits, generated = self.discriminator(real), self.discriminator(reconstruction)
        loss = losses.discriminator_loss(logits, generated, self.config.discriminator.loss)
        norm = self._update(self.discriminator, self.discriminator_optimizer, factor * loss, lr)
        return {
            "discriminator": loss,
            "discriminator_grad_norm": norm,
            "logits_real": logits.mean(),
            "logits_generated": generated.mean(),
        }

    def _autoencode(
        self, image: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """-> reconstruction, weighted term of the bottleneck, metrics."""
        c, encoded = self.config, self.model.encode(image)
        if c.kind == "kl":
            posterior = encoded.latent_dist
            z = posterior.mean + posterior.std * noise
            kl = posterior.kl().mean()
            metrics = {"kl": kl, "kl_per_element": kl / z[0].numel()}
            return self.model.decode(z).sample, c.kl_weight * kl, metrics
        # Its distances are rounded more coarsely than ours, as are the original code's: of a new
        # codebook about one latent in a hundred gets an entry that is not quite the nearest.
        z, codebook, (_, _, codes) = self.model.quantize(encoded.latents)
        decoded = self.model.decode(z, force_not_quantize=True).sample
        share = torch.bincount(codes, minlength=c.codes) / len(codes)
        metrics = {
            "codebook": codebook,
            "code_usage": (share > 0).float().mean(),
            "code_perplexity": torch.special.entr(share).sum().exp(),
        }
        return decoded, c.codebook_weight * codebook, metrics

    def _update(
        self,
        network: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: torch.Tensor,
        lr: float,
    ) -> torch.Tensor:
        """One update; returns the norm of the gradient before it is clipped."""
        optimizer.zero_grad()
        loss.backward()
        limit = self.config.train.grad_clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), limit)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        return norm


def loaded(network: torch.nn.Module, weights: dict) -> torch.nn.Module:
    """Gives a network all its weights, and their layout in memory."""
    network.load_state_dict({name: torch.tensor(np.asarray(w)) for name, w in weights.items()})
    return network.train().to(**LAYOUT)


def adamw(network: torch.nn.Module, block: ConfigDict) -> torch.optim.AdamW:
    """The optimiser of a network; without weight decay it is Adam, as the original code has it."""
    return torch.optim.AdamW(
        network.parameters(), block.lr, tuple(block.betas), weight_decay=block.weight_decay
    )
