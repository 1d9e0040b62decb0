"""Scaled dot-product attention by the fastest way that the machine and the shapes allow.

| path  | where it is chosen | memory |
| ----- | --- | --- |
| plain | everything else | all weights, (B, heads, T, S) |
| tiled | T * S >= `LONG` and none of the below: CPUs, float32 on GPUs | linear in T + S |
| flash | T * S >= `LONG` on TPUs: a Pallas kernel | linear |
| cudnn | 16-bit types on CUDA GPUs from Ampere on | linear; with a mask, one (B, T, S) bias |

All give the plain formula, with the softmax in float32 and the output in the type of `v`.

A program is for the platform of the devices of the mesh in context (`with jax.set_mesh(mesh):`), so
a host without TPUs can compile for them, and for the default backend outside of any. Nobody but the
mesh can divide the kernel of TPUs over devices: outside of a mesh it is chosen on one device only.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ldm_jax.errors import UserError
from ldm_jax.nn.attend_tiled import attend_tiled, tile_side
from ldm_jax.nn.attend_tpu import attend_tpu
from ldm_jax.types import Array

# Logits of one head of one example. From here on tiles take 0.4 to 1.1 of the time of the plain
# formula on 2 CPU cores, forward and backward (benchmarks/attention.py); below, they can be slower.
LONG = 1024 * 1024
# What cuDNN's kernels take in both directions and on every generation of GPUs.
CUDNN_TYPES = (jnp.bfloat16, jnp.float16)
CUDNN_CAPABILITY, CUDNN_HEAD_DIM, CUDNN_LENGTH = 8.0, 128, 64
PATHS = ("plain", "tiled", "flash", "cudnn")


class Target(NamedTuple):
    """What a program is traced for.

    Attributes:
        platform: 'cpu', 'gpu' or 'tpu'.
        capability: CUDA compute capability of the GPU at hand; 0 without one.
        unknown_mesh: there are several devices, and no mesh says how arrays lie on them.
    """

    platform: str
    capability: float = 0.0
    unknown_mesh: bool = False


def attend(
    q: Array, k: Array, v: Array, mask: Array | None = None, *, path: str | None = None
) -> Array:
    """Scaled dot-product attention with the softmax in float32.

    q (B, T, heads, D), k and v (B, S, heads, D), mask (B, S) or (B or 1, T, S) bool or None, True
    where a key may be attended to -> (B, T, heads, D). A query that may attend to no key attends
    to all alike. Only the plain path has a forward-mode derivative.

    Args:
        path: one of `PATHS`; None lets `choose_path` decide.

    Raises:
        UserError: the path is unknown, or does not take the shapes or the type.
    """
    if path is None:
        path = choose_path(q, k, mask, current_target())
    if path == "plain":
        return attend_plain(q, k, v, mask)
    if path == "tiled":
        return attend_tiled(q, k, v, mask)
    if path not in PATHS:
        raise UserError(f"attention path {path!r} is none of {', '.join(PATHS)}")
    if mask is not None:
        q, mask = all_if_none(q, mask)
    if path == "cudnn":
        return _attend_cudnn(q, k, v, mask)
    if mask is not None and mask.ndim != 2:
        raise UserError("attention path 'flash' takes no mask per query: use 'tiled' or 'plain'")
    return attend_tpu(q, k, v, mask)


def current_target() -> Target:
    """The target of a program that is traced now, from the mesh in context or the backend."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.abstract_device is not None:
        platform = mesh.abstract_device.platform
    else:
        platform = jax.default_backend()
    capability = 0.0
    if platform == jax.default_backend() == "gpu":
        capability = _cuda_capability(jax.local_devices()[0])
    return Target(platform, capability, mesh.empty and jax.device_count() > 1)


def choose_path(q: Array, k: Array, mask: Array | None, target: Target) -> str:
    """The path for q (B, T, heads, D) and k (B, S, heads, D); only shapes and types are read."""
    (_, t, _, dim), s = q.shape, k.shape[1]
    long = t * s >= LONG
    if target.platform == "gpu" and target.capability >= CUDNN_CAPABILITY:
        fits = dim <= CUDNN_HEAD_DIM and dim % 8 == 0 and min(t, s) >= CUDNN_LENGTH
        if fits and q.dtype in CUDNN_TYPES:
            return "cudnn"
    if target.platform == "tpu" and long and not target.unknown_mesh:
        if (mask is None or mask.ndim == 2) and q.dtype in (jnp.bfloat16, jnp.float32):
            return "flash"
    return "tiled" if long else "plain"


def logits_in_memory(tokens: int, rows: int) -> int:
    """float32 logits that self-attention of so many tokens holds on a CPU; `rows` = B * heads."""
    side = tile_side(tokens, rows) if tokens**2 >= LONG else tokens
    return rows * side**2


def attend_plain(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """The formula itself, with all weights in memory; shapes as in `attend`."""
    # With the heads in front, the forward pass takes less than half the time on CPUs that it takes
    # with them between; other backends choose their own layout.
    q, k, v = (tokens.transpose(0, 2, 1, 3) for tokens in (q, k, v))
    scale = q.shape[-1] ** -0.5
    logits = jnp.einsum("bntd,bnsd->bnts", q * scale, k, preferred_element_type=jnp.float32)
    if mask is not None:
        mask = mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bnts,bnsd->bntd", weights, v).transpose(0, 2, 1, 3)


def all_if_none(q: Array, mask: Array) -> tuple[Array, Array]:
    """Lets a query that may attend to no key attend to all, and makes it zero, so to all alike.

    Kernels would count their padding among the keys of such a query.
    """
    some = mask.any(-1, keepdims=True)
    rows = some if mask.ndim == 3 else some[:, None]
    return jnp.where(rows[..., None], q, jnp.zeros_like(q)), mask | ~some


def _attend_cudnn(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    if mask is None:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    *tokens, mask = cudnn_inputs(q, k, v, mask)
    out = jax.nn.dot_product_attention(*tokens, mask=mask, implementation="cudnn")
    return out[:, : q.shape[1]]


def cudnn_inputs(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, Array, Array, Array]:
    """Inputs of even lengths, and the mask as (B or 1, 1, T, S), as cuDNN's gradients need them."""
    rows, keys = q.shape[1] + q.shape[1] % 2, k.shape[1] + k.shape[1] % 2
    mask = mask[:, None] if mask.ndim == 2 else mask
    mask = jnp.broadcast_to(mask, (mask.shape[0], q.shape[1], k.shape[1]))
    mask = jnp.pad(mask, ((0, 0), (0, rows - mask.shape[1]), (0, 0)), mode="edge")
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, keys - mask.shape[2])))
    q, k, v = (
        jnp.pad(tokens, ((0, 0), (0, length - tokens.shape[1]), (0, 0), (0, 0)))
        for tokens, length in ((q, rows), (k, keys), (v, keys))
    )
    return q, k, v, mask[:, None]


def _cuda_capability(device: jax.Device) -> float:
    """Compute capability such as 9.0; 0 of GPUs that are not CUDA's."""
    try:
        return float(getattr(device, "compute_capability", "0"))
    except ValueError:  # AMD's 'gfx942'
        return 0.0
