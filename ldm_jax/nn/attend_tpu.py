"""Attention on TPUs by the flash kernel that comes with JAX, for any length and width.

The kernel wants lengths that are multiples of its blocks and heads up to 128 wide or multiples
of it, and cannot be divided over devices by the compiler: inputs are padded, and with a mesh in
context each device runs the kernel on its examples and heads.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention as flash
from jax.sharding import AxisType, PartitionSpec

from ldm_jax.types import Array

LANES = 128
BLOCKS = (512, 384, 256, 128)
# Of a block of tokens of one head, in bytes: the backward pass holds some ten of them.
BLOCK_BYTES = 2**20
HEADS_AXIS = "tensor"  # of the mesh, over which heads are divided; all others divide examples


def attend_tpu(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """The same as `ldm_jax.nn.attend.attend`; first derivatives only.

    `mask` is (B, S) and has at least one key for each example.
    """
    arguments = (q, k, v) if mask is None else (q, k, v, mask)
    mesh = jax.sharding.get_abstract_mesh()
    # Axes that a surrounding `shard_map` has divided already are left alone.
    axes = {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    }
    if not axes:
        return _kernel(*arguments)
    examples, heads = _division(axes, q.shape[0], q.shape[2])
    tokens = PartitionSpec(examples, None, heads)
    specs = (tokens, tokens, tokens, PartitionSpec(examples))[: len(arguments)]
    # The check does not know what the results of a kernel vary over.
    kernel = jax.shard_map(
        _kernel, in_specs=specs, out_specs=tokens, axis_names=set(axes), check_vma=False
    )
    return kernel(*arguments)


def _division(
    axes: dict[str, int], batch: int, heads: int
) -> tuple[tuple[str, ...] | None, str | None]:
    """Axes that examples and heads are divided over; None where the axes do not divide them."""
    examples = tuple(name for name in axes if name != HEADS_AXIS)
    divided = batch % math.prod(axes[name] for name in examples) == 0
    split_heads = heads % axes.get(HEADS_AXIS, heads + 1) == 0
    return examples if divided else None, HEADS_AXIS if split_heads else None


def _kernel(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """One device's share, padded to what the kernel takes; shapes as in `attend_tpu`."""
    (batch, t, _, dim), s = q.shape, k.shape[1]
    wide = dim if dim <= LANES else -(-dim // LANES) * LANES
    t_padded, s_padded = (-(-length // LANES) * LANES for length in (t, s))
    segments = None
    if mask is not None or s_padded > s:
        mask = jnp.ones((batch, s), bool) if mask is None else mask
        keys = jnp.pad(mask, ((0, 0), (0, s_padded - s))).astype(jnp.int32)
        segments = flash.SegmentIds(jnp.ones((batch, t_padded), jnp.int32), keys)
    q, k, v = (
        jnp.pad(
            tokens.transpose(0, 2, 1, 3),
            ((0, 0), (0, 0), (0, length - tokens.shape[1]), (0, wide - dim)),
        )
        for tokens, length in ((q, t_padded), (k, s_padded), (v, s_padded))
    )
    block = functools.partial(_block, width=max(wide, LANES) * q.dtype.itemsize)
    out = flash.flash_attention(
        q,
        k,
        v,
        segment_ids=segments,
        sm_scale=dim**-0.5,
        block_sizes=_block_sizes(block(t_padded), block(s_padded)),
    )
    return out[:, :, :t, :dim].transpose(0, 2, 1, 3)


def _block(length: int, width: int) -> int:
    """The largest block that divides `length`, of tokens of `width` bytes."""
    fits = (b for b in BLOCKS if length % b == 0 and b * width <= BLOCK_BYTES)
    return next(fits, LANES)


def _block_sizes(t: int, s: int) -> flash.BlockSizes:
    return flash.BlockSizes(
        block_b=1,
        block_q=t,
        block_k_major=s,
        block_k=s,
        block_q_major_dkv=t,
        block_q_dkv=t,
        block_k_major_dkv=s,
        block_k_dkv=s,
        block_q_dq=t,
        block_k_major_dq=s,
        block_k_dq=s,
    )
