"""Starts the processes of a command as several hosts do: two devices each, on this machine."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time

import jax

CONFIG = """
from ldm_jax import config as config_lib

def get_config(arg=""):
    c = config_lib.get_config()
    c.data.update(source="emoji", resolution=8, fields=("label",), threads=1)
    c.first_stage.kind = "identity"
    c.denoiser.update(kind="dit", width=32, depth=1, num_heads=2)
    c.conditioners = ("label",)
    c.label.update(width=32, slot="vector")
    c.train.update(batch_size=8, steps=20, log_every=5, picture_every=0)
    c.ema_snapshots.update(decays=(0.9,), every=10)
    c.sample.update(steps=2, batch_size=8, num_samples=8)
    return c
"""
SECONDS = 900  # a machine may be slow


def free_port():
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(count, module, *arguments, folders=None, before=""):
    """Starts the processes of a command; one alone gets no flags.

    before: Python that each of them runs first, as it may have to be slow or to hang.
    """
    cache = jax.config.jax_compilation_cache_dir
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_COMPILATION_CACHE_DIR": cache}
    run = (
        f"import sys\n{before}\nfrom ldm_jax import cli, {module}\ncli.run({module}.main, sys.argv)"
    )
    program = ["-c", run] if before else ["-m", f"ldm_jax.{module}"]
    hosts = [f"--coordinator=localhost:{free_port()}", f"--num_processes={count}"]
    return [
        subprocess.Popen(
            [sys.executable, *program, *map(str, arguments)]
            + ([*hosts, f"--process_id={index}"] if count > 1 else []),
            cwd=folders[index] if folders else "/",
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def finish(processes, code=0):
    """Waits for all; returns (stdout, stderr) of each."""
    texts = []
    try:
        for process in processes:
            texts.append(process.communicate(timeout=SECONDS))
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code] * len(processes), texts
    return texts


def wait_for(path, text, process):
    end = time.monotonic() + SECONDS
    while not (path.exists() and text in path.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"no {text} in {path}"
        time.sleep(0.2)


def rows(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, lines)}
