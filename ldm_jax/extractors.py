"""Feature networks from their weights on disk: Inception-v3."""

from __future__ import annotations

import os
from collections.abc import Sequence

from jax.sharding import Mesh

from ldm_jax.errors import UserError
from ldm_jax.metrics.features import Extractor, inception_extractor
from ldm_jax.weights import load_inception

KINDS = ("inception",)


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
        kind: 'inception'.
        mesh: its devices of this process are used.
        resize: how images come to the network's size; see `prepare_inception`.
        path: of the weights; '' is where `python -m ldm_jax.weights fetch inception` puts them.
        outputs: the features that are wanted; see `inception_extractor`.

    Raises:
        UserError: no such network, rule or output, or no weights; says how to get them.
    """
    if kind not in KINDS:
        raise UserError(f"unknown feature network '{kind}': choose one of {', '.join(KINDS)}")
    return inception_extractor(load_inception(path), resize=resize, mesh=mesh, outputs=outputs)
