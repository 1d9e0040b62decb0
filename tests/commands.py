"""Runs the command lines as a user does: in a process of their own."""

import os
import subprocess
import sys

import jax


def command(module: str, *args: str, check: bool = True) -> subprocess.CompletedProcess:
    # From another directory, and with one device, unlike the test process.
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    return subprocess.run(
        [sys.executable, "-m", f"ldm_jax.{module}", *args],
        check=check,
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
    )
