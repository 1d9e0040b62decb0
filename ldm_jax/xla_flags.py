"""Options of the compiler that must be in the environment before jax first compiles."""

from __future__ import annotations

import importlib.metadata
import os

# On CPUs, XLA gives convolutions and products to a library (YNNPACK) which took 1.2 times as long
# for the UNet of LSUN-Bedrooms as what it did before (docs/performance.md).
YNN = "--xla_cpu_experimental_ynn_fusion_type"
# An unknown option ends the process. Every release that setup.py allows has been seen to have it.
RELEASES = ("0.10", "0.11", "0.12")


def prefer_eigen() -> None:
    """Keeps convolutions of CPUs in Eigen, unless XLA_FLAGS says otherwise.

    Does nothing once jax has compiled something, nor on accelerators.
    """
    given, release = os.environ.get("XLA_FLAGS", ""), importlib.metadata.version("jaxlib")
    if YNN not in given and ".".join(release.split(".")[:2]) in RELEASES:
        os.environ["XLA_FLAGS"] = f"{given} {YNN}=".strip()
