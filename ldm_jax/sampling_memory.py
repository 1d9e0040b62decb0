"""How much memory sampling takes at most, told before it runs."""

from __future__ import annotations

import math
from typing import Any

import jax
from ml_collections import ConfigDict

from ldm_jax import config as config_lib
from ldm_jax import memory
from ldm_jax.first_stage.tiled import Memory
from ldm_jax.nn.attention import head_count

# Bytes per pixel on the host, as uint8: of all images in parts, joined, pasted and in a grid; and
# of the one that is decoded in tiles, as float32 and in between.
RESULTS, DECODED = 4 * 3, 3 * 12


def attention_bytes(config: ConfigDict, size: tuple[int, int], batch: int) -> int:
    """Bytes of the largest matrix of attention weights in denoiser and first stage, float32.

    It has the square of the number of tokens for each head and each of `batch` images of `size` =
    (height, width) pixels. The matrix products of CPUs keep one that the compiler does not count
    (measured with jax 0.10.2: 1.0 of them).
    """
    d, f = config.denoiser, config.first_stage
    latents = math.prod(size) // config_lib.downsampling(config) ** 2

    def matrix(pixels: int, heads: int) -> int:
        return 4 * batch * heads * pixels**2

    largest = 0
    for level, mult in enumerate(d.mult):
        if 2**level in d.attn_downsample or level == len(d.mult) - 1:  # the middle always has it
            heads = head_count(mult * d.width, d.num_heads, 0 if d.num_heads else d.head_dim)
            largest = max(largest, matrix(latents // 4**level, heads))
    if f.kind != "identity":
        for level in range(len(f.mult)):
            if 2**level in f.attn_downsample or (f.mid_attn and level == len(f.mult) - 1):
                largest = max(largest, matrix(math.prod(size) // (f.patch * 2**level) ** 2, 1))
    return largest


def sampling_memory(
    config: ConfigDict,
    variables: Any,
    program: jax.stages.Compiled,
    inputs: dict[str, Any],
    *,
    count: int,
    size: tuple[int, int],
    tile: int | None,
    guided: bool,
) -> Memory:
    """Bytes that sampling takes at most, with what decodes in tiles left out.

    Args:
        config: of the model.
        variables: of the model.
        program: `Networks.generate`, compiled for one batch.
        inputs: of that batch.
        count: of all images.
        size: (height, width) of the images.
        tile: side of the tiles in pixels, or None.
        guided: the network sees each image twice in a call.
    """
    devices, batch = jax.local_device_count(), len(inputs["seeds"])
    arguments = sum(x.nbytes for x in jax.tree.leaves(inputs))
    if memory.free_on_device() is None:  # all devices share the memory of the host
        seen = size if tile is None else tuple(min(side, tile) for side in size)
        largest = devices * memory.program_bytes(program) + arguments
        largest += attention_bytes(config, seen, 2 * batch if guided else batch)
    else:
        largest = memory.program_bytes(program) + arguments // devices
    canvas = math.prod(size) * (RESULTS * count + DECODED)
    weights = sum(x.nbytes for x in jax.tree.leaves(variables))
    return Memory(weights=weights, tile=largest, canvas=canvas)
