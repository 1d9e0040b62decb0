"""How much memory sampling takes at most, told before it runs."""

from __future__ import annotations

import math
from typing import Any

import jax
from ml_collections import ConfigDict

from ldm_jax import config as config_lib
from ldm_jax import memory
from ldm_jax.first_stage.tiled import Memory
from ldm_jax.nn.attend import logits_in_memory
from ldm_jax.nn.attention import head_count

# Bytes per pixel on the host, as uint8: of all images in parts, joined, pasted and in a grid; and
# of the one that is decoded in tiles, as float32 and in between.
RESULTS, DECODED = 4 * 3, 3 * 12


def attention_bytes(config: ConfigDict, size: tuple[int, int], batch: int) -> int:
    """Bytes of the largest matrix of attention weights in denoiser and first stage, float32.

    It is that of all tokens, or of tiles where they are many, for each head and each of `batch`
    images of `size` = (height, width) pixels. The matrix products of CPUs keep one that the
    compiler does not count (measured with jax 0.10.2: 1.0 of them).
    """
    d, f = config.denoiser, config.first_stage
    latents = math.prod(size) // config_lib.downsampling(config) ** 2
    if d.kind == "dit":
        heads = head_count(d.width, d.num_heads, 0 if d.num_heads else d.head_dim)
        lengths = {"text": config.text.length, "layout": config.layout.length, "label": 1}
        told = sum(lengths.get(name, 0) for name in config.conditioners)  # if it is attended to
        largest = 4 * batch * heads * (latents // d.dit.patch**2 + told) ** 2
    else:
        largest = _largest_matrix(d, latents, d.num_heads, batch)
    if f.kind != "identity":
        for level in range(len(f.mult)):
            if 2**level in f.attn_downsample or (f.mid_attn and level == len(f.mult) - 1):
                pixels = math.prod(size) // (f.patch * 2**level) ** 2
                largest = max(largest, 4 * logits_in_memory(pixels, batch))
    return largest


def classifier_attention_bytes(config: ConfigDict, size: tuple[int, int], batch: int) -> int:
    """The same of the classifier, whose gradient also needs that of the matrix."""
    latents = math.prod(size) // config_lib.downsampling(config) ** 2
    return 2 * _largest_matrix(config.classifier, latents, 0, batch)


def _largest_matrix(network: ConfigDict, latents: int, num_heads: int, batch: int) -> int:
    """Bytes of the largest matrix of a network of levels on so many latents per image."""
    largest = 0
    for level, mult in enumerate(network.mult):
        if 2**level in network.attn_downsample or level == len(network.mult) - 1:  # the middle
            heads = head_count(
                mult * network.width, num_heads, 0 if num_heads else network.head_dim
            )
            largest = max(largest, 4 * logits_in_memory(latents // 4**level, batch * heads))
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
    seen: int = 1,
    weak: ConfigDict | None = None,
) -> Memory:
    """Bytes that sampling takes at most, with what decodes in tiles left out.

    Args:
        config: of the model.
        variables: of all networks.
        program: `Networks.generate`, compiled for one batch.
        inputs: of that batch.
        count: of all images.
        size: (height, width) of the images.
        tile: side of the tiles in pixels, or None.
        seen: how often the network sees each image in a call, under several conditions.
        weak: config of the weaker model that guides it.
    """
    devices, batch = jax.local_device_count(), len(inputs["seeds"])
    arguments = sum(x.nbytes for x in jax.tree.leaves(inputs))
    if memory.free_on_device() is None:  # all devices share the memory of the host
        part = size if tile is None else tuple(min(side, tile) for side in size)
        largest = devices * memory.program_bytes(program) + arguments
        uncounted = [attention_bytes(config, part, seen * batch)]
        uncounted += [] if weak is None else [attention_bytes(weak, part, batch)]
        if inputs["label"] is not None:
            uncounted.append(classifier_attention_bytes(config, part, batch))
        largest += sum(uncounted)  # the networks may run at the same time
    else:
        largest = memory.program_bytes(program) + arguments // devices
    canvas = math.prod(size) * (RESULTS * count + DECODED)
    weights = sum(x.nbytes for x in jax.tree.leaves(variables))
    return Memory(weights=weights, tile=largest, canvas=canvas)
