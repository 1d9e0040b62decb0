"""Latent diffusion models in JAX: training of both stages, and sampling.

pipe = ldm_jax.load("runs/quickstart")
images = pipe.sample(seeds=[0, 1, 2])
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm_jax.pipeline import Pipeline

__version__ = "0.1.0"
__all__ = ["load"]


def load(workdir: str | os.PathLike[str]) -> Pipeline:
    """Loads a trained workdir as a `Pipeline`; see `ldm_jax.workdir.load`."""
    from ldm_jax import workdir as workdir_lib  # jax is imported when it is needed

    return workdir_lib.load(workdir)
