"""On what a figure was measured, and the settings under which runs at toy size are compared."""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform
import re
from importlib import metadata
from typing import Any

# As tests/conftest.py sets them: of toy shapes, compilation is what takes time. What is computed
# depends on them, in the last bit, and on the number of devices, which share a pool of threads.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
DEVICES = 8
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(DEVICES),
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    # Every program, however small: a run that starts again compiles nothing.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def prepare(cache: pathlib.Path) -> None:
    """Sets this process up as the tests are, with compiled programs in the folder `cache`; to be
    called before JAX is imported."""
    os.environ |= ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    if XLA_FLAGS not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}".strip()


def processor() -> tuple[str, str]:
    """The processor's model, and a digest of the instructions that it has."""
    model, instructions = platform.processor() or platform.machine(), ""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            text = file.read()
    except OSError:  # not Linux
        return model, ""
    if found := re.search(r"model name\s*: (.*)", text):
        model = found[1].strip()
    if found := re.search(r"(?:flags|Features)\s*: (.*)", text):
        instructions = " ".join(sorted(found[1].split()))
    return model, hashlib.sha256(instructions.encode()).hexdigest()[:12]


def kind() -> dict[str, Any]:
    """What has to be the same for two machines to compute the same bits."""
    import jax

    model, instructions = processor()
    return {
        "processor": model,
        "instructions": instructions,
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "devices": len(jax.devices()),
        "xla_flags": " ".join(sorted(os.environ.get("XLA_FLAGS", "").split())),
        "jax": metadata.version("jax"),
        "jaxlib": metadata.version("jaxlib"),
    }
