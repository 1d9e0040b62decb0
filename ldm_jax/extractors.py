"""Feature networks from their weights on disk: Inception-v3, DINOv2 and CLIP."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ldm_jax.conditioners.clip import ClipText
from ldm_jax.convert.vision import load_clip_texts, load_tower
from ldm_jax.data.tokenizers import load_tokenizer
from ldm_jax.errors import UserError
from ldm_jax.metrics.features import Extractor, inception_extractor
from ldm_jax.metrics.vit import tower_extractor
from ldm_jax.types import Array
from ldm_jax.weights import load_inception

KINDS = ("inception", "dino", "clip")
_TEXTS = 64  # captions at a time


class Clip(NamedTuple):
    """Both halves of a CLIP.

    Attributes:
        images: gives the embeddings of images as 'pool'.
        texts: N captions -> their embeddings (N, width) float32, of no unit length either.
    """

    images: Extractor
    texts: Callable[[Sequence[str]], np.ndarray]


def load_extractor(
    kind: str,
    *,
    mesh: Mesh,
    resize: str = "pytorch",
    path: str | os.PathLike[str] = "",
    outputs: Sequence[str] = ("pool", "logits", "spatial"),
) -> Extractor:
    """Makes an extractor of the weights on disk.

    Args:
        kind: 'inception', 'dino' or 'clip'.
        mesh: its devices of this process are used.
        resize: how images come to Inception's size; see `prepare_inception`. The other networks
            have one way each, as published; see `prepare_pixels`.
        path: of the weights; '' is where `python -m ldm_jax.weights fetch inception` puts them. Of
            the others a folder, which must be given; see `ldm_jax.convert.vision`.
        outputs: the features of Inception that are wanted; see `inception_extractor`. The others
            give 'pool': of 'dino' the class token, of 'clip' the image's embedding.

    Raises:
        UserError: no such network, rule or output, or no weights; says how to get them.
    """
    if kind not in KINDS:
        raise UserError(f"unknown feature network '{kind}': choose one of {', '.join(KINDS)}")
    if kind == "inception":
        return inception_extractor(load_inception(path), resize=resize, mesh=mesh, outputs=outputs)
    if not path:
        raise UserError(f"no weights of '{kind}' are fetched: give their folder, --{kind}=PATH")
    return tower_extractor(load_tower(kind, path), mesh)


def load_clip(path: str | os.PathLike[str], mesh: Mesh) -> Clip:
    """Both halves of a CLIP with its tokenizer.

    Args:
        path: folder of a whole CLIP, with its vocabulary; see `ldm_jax.convert.vision` and
            `load_tokenizer`.
        mesh: its devices of this process are used for images; texts take one.

    Raises:
        UserError: it is none, or not whole.
    """
    extractor, half = load_extractor("clip", mesh=mesh, path=path), load_clip_texts(path)
    tokenizer = load_tokenizer("clip", path, half.module.length)
    params, projection = jax.device_put((half.params, half.projection))

    @jax.jit
    def embed(params: dict, projection: Array, tokens: Array) -> Array:
        pooled = half.module.apply({"params": params}, tokens, method=ClipText.pooled)
        return pooled @ projection

    def texts(captions: Sequence[str]) -> np.ndarray:
        found = []
        for start in range(0, len(captions), _TEXTS):
            part = list(captions[start : start + _TEXTS])
            tokens = tokenizer(part + [""] * (_TEXTS - len(part)))  # one program for any number
            with jax.default_matmul_precision("highest"):
                found.append(np.asarray(embed(params, projection, tokens))[: len(part)])
        return np.concatenate(found)

    return Clip(extractor, texts)
