"""On what a figure was measured, and the settings under which runs at toy size are compared."""

from __future__ import annotations

import hashlib
import os
import pathlib
import re
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


def kind() -> dict[str, Any]:
    """What has to be the same for two machines to compute the same bits."""
    import jaxlib

    from ldm_jax.machine import describe  # imports jax

    found = describe()
    names = ("processor", "processors", "device", "devices", "jax")
    return {name: found[name] for name in names} | {
        "jaxlib": jaxlib.__version__,
        "instructions": _instructions(),
        "xla_flags": " ".join(sorted(os.environ.get("XLA_FLAGS", "").split())),
    }


def _instructions() -> str:
    """A digest of what the processor says it can do; '' where the system does not tell."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r"(?:flags|Features)\s*: (.*)", text)
    names = " ".join(sorted(found[1].split())) if found else ""
    return hashlib.sha256(names.encode()).hexdigest()[:12]
