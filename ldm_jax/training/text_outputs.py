"""The outputs of a text encoder that is not trained, made once for each caption."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ldm_jax import builders
from ldm_jax import config as config_lib
from ldm_jax.data.latents_index import TEXT_CONTEXT, TEXT_MASK
from ldm_jax.errors import UserError
from ldm_jax.training.sharding import batch_sharding, replicated
from ldm_jax.types import Condition

Embed = Callable[[np.ndarray], dict[str, np.ndarray]]  # tokens (B, L) -> outputs (B, ...)


def text_embedder(
    config: ConfigDict, params: Any, mesh: Mesh, batch_size: int
) -> tuple[Embed, dict[str, np.ndarray]]:
    """Returns what runs a frozen text encoder, and its output for the empty caption, if any.

    Args:
        config: of the model.
        params: of the encoder.
        mesh: the devices.
        batch_size: captions at a time.

    Returns:
        tokens (B, L) -> {'text_context': (B, L, D) float32, and 'text_mask': (B, L) bool where the
        encoder gives a mask}; and the same of one caption.
    """
    module, size = builders.build_text_encoder(config), -(-batch_size // mesh.size) * mesh.size
    everywhere, split = replicated(mesh), batch_sharding(mesh)

    def apply(params: Any, tokens: jax.Array) -> Condition:
        return module.apply({"params": params}, {"tokens": tokens})

    compiled = jax.jit(apply, in_shardings=(everywhere, split))
    params = jax.device_put(params, everywhere)

    def embed(tokens: np.ndarray) -> dict[str, np.ndarray]:
        parts = []
        for start in range(0, len(tokens), size):
            some = tokens[start : start + size]
            found = _slots(compiled(params, padded(some, size)))
            parts.append({name: np.asarray(x)[: len(some)] for name, x in found.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    null = {}
    if config.text.null_tokens:
        null = _slots(module.apply({"params": params}, 1, method="null"))
    return embed, jax.tree.map(np.asarray, null)


def _slots(cond: Condition) -> dict[str, Any]:
    found = {TEXT_CONTEXT: cond.context, TEXT_MASK: cond.context_mask}
    return {name: value for name, value in found.items() if value is not None}


def frozen_text_part(config: ConfigDict) -> str:
    """The name, among the conditioner's params, of the text encoder that is not trained.

    Raises:
        UserError: there is none.
    """
    parts = config_lib.frozen_parts(config)
    if not parts:
        raise UserError(
            "--text_embeddings needs a text encoder that is not trained: config.conditioners with "
            "'text', and config.text.encoder clip or sentence"
        )
    return parts[0]


def padded(array: np.ndarray, unit: int) -> np.ndarray:
    """Repeats the last row until `unit` divides the number of rows."""
    return np.pad(array, ((0, -len(array) % unit), *((0, 0),) * (array.ndim - 1)), mode="edge")
