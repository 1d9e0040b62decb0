"""What `benchmarks.vs_pytorch` times, how both sides take turns, and the table of results."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.lockstep import SideFailed
from ldm_jax.errors import UserError


class Task(NamedTuple):
    """Something to time.

    Attributes:
        said: what it is.
        config: its name in configs/.
        work: of `WORKS` of both sides.
        times: examples for each of --batch_size; with guidance, the network sees each twice.
        large: only with --large.
    """

    said: str
    config: str
    work: str
    times: int = 1
    large: bool = False


TASKS = {
    "lsun_forward": Task("LSUN-Bedrooms UNet, forward", "lsun_bedrooms", "forward"),
    "lsun_train": Task("LSUN-Bedrooms UNet, training step", "lsun_bedrooms", "train"),
    "vq_f4_encode": Task("VQ-f4, encode", "autoencoder_vq_f4", "encode"),
    "vq_f4_decode": Task("VQ-f4, decode", "autoencoder_vq_f4", "decode"),
    "kl_f8_encode": Task("KL-f8, encode", "autoencoder_kl_f8", "encode"),
    "kl_f8_decode": Task("KL-f8, decode", "autoencoder_kl_f8", "decode"),
    "lsun_ddim": Task("LSUN-Bedrooms, DDIM with decoding", "lsun_bedrooms", "ddim"),
    "text2img_step": Task("text2img 1.45B, a guided step", "text2img_1p4b", "forward", 2, True),
}
VARIANTS = ("eager", "channels_last", "compile")

Start = Callable[[], contextlib.AbstractContextManager[Any]]


def compare(
    request: dict[str, Any],
    variants: list[str],
    rounds: int,
    start_ours: Start,
    start_theirs: Start,
) -> dict[str, Any]:
    """Times one task on both sides.

    Returns 'ours' and 'theirs', seconds of each turn, 'variant', the fastest of PyTorch,
    'variants', seconds of each of several, alone, or why it failed, and what both sides say.

    Raises:
        UserError: a side failed, or the networks are not of one size.
    """
    name = f"{request['config']}, {request['work']}"
    with start_ours() as ours:
        try:
            said = ours.prepare(request)
        except SideFailed as error:
            raise UserError(f"{name}: {error}") from error
        asked, found = request | {"peer": said.pop("peer")}, {}
        best = variants[0]
        if len(variants) > 1:
            found = {variant: alone(asked, variant, start_theirs) for variant in variants}
            worked = [variant for variant in variants if not isinstance(found[variant], str)]
            best = min(worked or variants[:1], key=found.get)
        with start_theirs() as theirs:
            try:
                answer = theirs.prepare(asked | {"variant": best})
            except SideFailed as error:
                raise UserError(f"{name}: PyTorch failed: {error}") from error
            if answer["parameters"] != said["parameters"]:
                raise UserError(
                    f"{name}: PyTorch's networks have {answer['parameters']} weights, "
                    f"ours {said['parameters']}"
                )
            turns = [(ours.seconds(), theirs.seconds()) for _ in range(rounds)]
    return {
        "ours": [pair[0] for pair in turns],
        "theirs": [pair[1] for pair in turns],
        "variant": best,
        "variants": found,
        "parameters": said["parameters"],
        "flops": said["flops"],
        "peak": said["peak"],
        "first_seconds": {"ours": said["first_seconds"], "theirs": answer["first_seconds"]},
        "about": {
            "device": said["device"],
            "versions": [said["version"], answer["version"]],
            "torch_threads": answer["threads"],
        },
    }


def alone(request: dict[str, Any], variant: str, start: Start) -> float | str:
    """Seconds of a variant of PyTorch while nothing else works, or why it failed."""
    with start() as side:
        try:
            side.prepare(request | {"variant": variant})
            return min(side.seconds() for _ in range(2))
        except SideFailed as error:
            print(f"  {variant}: {error}", flush=True)
            return str(error)


def table(results: dict[str, dict[str, Any]], settings: dict[str, Any]) -> str:
    """Results as Markdown: medians in ms, with the least and the largest, and their ratio."""
    about = next(iter(results.values()))["about"]
    size = ", smoke sizes" if settings["tiny"] else ""
    lines = [
        f"{settings['machine']}, {settings['processors']} processors, {about['device']}; "
        f"{'; '.join(about['versions'])}; {settings['dtype']}, batch {settings['batch_size']}"
        f"{size}. "
        f"Medians (least to largest) of {settings['rounds']} turns, ms; ratio: ours / PyTorch.",
        "",
        "| work | weights | ours | PyTorch | its fastest | ratio | MFU ours | MFU PyTorch |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in results.items():
        medians = [statistics.median(found[side]) for side in ("ours", "theirs")]
        cells = [
            f"{1e3 * median:.4g} ({1e3 * min(found[side]):.4g} to {1e3 * max(found[side]):.4g})"
            for median, side in zip(medians, ("ours", "theirs"), strict=True)
        ]
        shares = [found["flops"] / median / found["peak"] for median in medians]
        steps = f", {settings['steps']} steps" if TASKS[name].work == "ddim" else ""
        lines.append(
            f"| {TASKS[name].said}{steps} | {found['parameters'] / 1e6:.2f}M | {cells[0]} "
            f"| {cells[1]} | {found['variant']} | {medians[0] / medians[1]:.2f} "
            f"| {shares[0]:.0%} | {shares[1]:.0%} |"
        )
    return "\n".join(lines) + "\n"


def chosen_tasks(only: list[str], large: bool) -> list[str]:
    """Names of what is to be timed.

    Raises:
        UserError: an unknown name, or a large task without --large.
    """
    for name in only:
        if name not in TASKS:
            raise UserError(f"--only: no task '{name}': choose from {', '.join(TASKS)}")
        if TASKS[name].large and not large:
            raise UserError(f"--only={name} takes much memory: add --large to run it")
    return only or [name for name, task in TASKS.items() if large or not task.large]


def check_torch(python: str) -> None:
    """Raises UserError unless that Python has PyTorch and diffusers."""
    try:
        done = subprocess.run([python, "-c", "import torch, diffusers"], capture_output=True)
    except OSError as error:
        raise UserError(f"--torch_python={python}: {error.strerror}") from error
    if done.returncode:
        raise UserError(
            f"{python} has no torch and diffusers: pip install -e '.[bench]', or name another "
            "environment's by --torch_python"
        )
