"""PyTorch's side of `benchmarks.vs_pytorch`; imports only torch and diffusers.

Variants: eager, channels_last (the layout of the weights and of what they are applied to), and
compile (torch.compile, with that layout).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import torch

from benchmarks import lockstep

Tensor = torch.Tensor
# As fast as our side on GPUs, where both round the factors of float32 products to TF32.
torch.set_float32_matmul_precision("high")
torch.backends.cudnn.allow_tf32 = True
torch.backends.cudnn.benchmark = True


def prepare(request: dict[str, Any]) -> tuple[Callable, Callable, dict[str, Any]]:
    """Builds what a request asks for.

    request: 'work' (of WORKS), 'variant', 'device' (cpu or gpu) and 'peer', what our side says.

    Returns what starts a call, what waits for it, and 'parameters', 'threads' and 'version'.
    """
    torch.manual_seed(0)
    builder = Builder(request)
    call, networks = WORKS[request["work"]](builder)
    count = sum(weight.numel() for network in networks for weight in network.parameters())
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    said = {"parameters": count, "threads": torch.get_num_threads(), "version": versions}
    return call, builder.wait, said


class Builder:
    """Networks and tensors in the layout and type of a request."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.peer, self.variant = request["peer"], request["variant"]
        self.device = torch.device("cuda" if request["device"] == "gpu" else "cpu")
        self.dtype = getattr(torch, self.peer["dtype"])
        last = self.variant != "eager"
        self.layout = torch.channels_last if last else torch.contiguous_format

    def network(self, part: str, trained: bool = False) -> torch.nn.Module:
        """A network of diffusers; one that is trained keeps its weights in float32."""
        given = dict(self.peer[part])
        network = getattr(diffusers, given.pop("_class_name"))(**given)
        network = network.to(self.device, memory_format=self.layout)
        if trained:
            return network.train()
        return network.to(dtype=self.dtype).eval().requires_grad_(False)

    def randn(self, shape: list[int], dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal values; maps in the layout."""
        values = torch.randn(shape, device=self.device, dtype=dtype or self.dtype)
        return values.to(memory_format=self.layout) if len(shape) == 4 else values

    def times(self, batch_size: int) -> Tensor:
        """Random times of examples."""
        return torch.randint(self.peer["schedule"]["steps"], (batch_size,), device=self.device)

    def alpha_bar(self) -> Tensor:
        """Of the scaled linear schedule, (T,) float32."""
        low, high = (beta**0.5 for beta in self.peer["schedule"]["beta"])
        beta = torch.linspace(low, high, self.peer["schedule"]["steps"], dtype=torch.float64) ** 2
        return torch.cumprod(1 - beta, 0).float().to(self.device)

    def compiled(self, function: Callable) -> Callable:
        """A function, compiled in the variant that does so."""
        return torch.compile(function) if self.variant == "compile" else function

    def wait(self) -> None:
        """Returns when all work is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def forward(b: Builder) -> tuple[Callable, list]:
    """The UNet, once."""
    unet, shape = b.network("unet"), b.peer["shape"]
    x, t, (length, width) = b.randn(shape), b.times(shape[0]), b.peer["context"]
    given = {"encoder_hidden_states": b.randn([shape[0], length, width])} if width else {}
    return without_gradients(b.compiled(unet), x, t, **given), [unet]


def train(b: Builder) -> tuple[Callable, list]:
    """A step of training on latents: noise, forward, backward, AdamW and the moving average."""
    unet, shape, p = b.network("unet", trained=True), b.peer["shape"], b.peer
    weights = list(unet.parameters())
    averages = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(
        weights, p["lr"], tuple(p["betas"]), weight_decay=p["weight_decay"], fused=True
    )
    apply, z = b.compiled(unet), b.randn(shape, torch.float32)
    alpha_bar, low = b.alpha_bar(), b.dtype != torch.float32

    def step() -> None:
        t, noise = b.times(shape[0]), b.randn(shape, torch.float32)
        a = alpha_bar[t][:, None, None, None]
        x_t = a.sqrt() * z + (1 - a).sqrt() * noise
        with torch.autocast(b.device.type, b.dtype, enabled=low):
            eps = apply(x_t, t).sample
        loss = torch.nn.functional.mse_loss(eps.float(), noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - p["ema_decay"])

    return step, [unet]


def encode(b: Builder) -> tuple[Callable, list]:
    """Images to moments, or to latents before the codebook."""
    first_stage = b.network("first_stage")

    def run(x: Tensor) -> Tensor:
        encoded = first_stage.encode(x)
        return encoded.latent_dist.parameters if "latent_dist" in encoded else encoded.latents

    return without_gradients(b.compiled(run), b.randn(b.peer["shape"])), [first_stage]


def decode(b: Builder) -> tuple[Callable, list]:
    """Latents to images, through the codebook, where there is one."""
    first_stage = b.network("first_stage")
    run = b.compiled(lambda z: first_stage.decode(z).sample)
    return without_gradients(run, b.randn(b.peer["shape"])), [first_stage]


def ddim(b: Builder) -> tuple[Callable, list]:
    """Sampling from noise to pixels, decoded."""
    unet, first_stage = b.network("unet"), b.network("first_stage")
    schedule = b.peer["schedule"]
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=schedule["steps"],
        beta_start=schedule["beta"][0],
        beta_end=schedule["beta"][1],
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
    )
    scheduler.set_timesteps(b.peer["steps"])
    apply, pixels = b.compiled(unet), b.compiled(lambda z: first_stage.decode(z).sample)

    def sample() -> Tensor:
        x = b.randn(b.peer["shape"])
        for t in scheduler.timesteps:
            x = scheduler.step(apply(x, t).sample, t, x).prev_sample
        return ((pixels(x).float() * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)

    return without_gradients(sample), [unet, first_stage]


WORKS = {"forward": forward, "train": train, "encode": encode, "decode": decode, "ddim": ddim}


def without_gradients(function: Callable, *args: Any, **settings: Any) -> Callable:
    """The call of a function of which nothing is kept for gradients."""
    return torch.inference_mode()(functools.partial(function, *args, **settings))


if __name__ == "__main__":
    lockstep.serve(prepare)
