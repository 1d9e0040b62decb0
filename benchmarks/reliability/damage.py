"""Checkpoints that were damaged on disk: each file of one, in each way that a disk knows."""

from __future__ import annotations

import contextlib
import io
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.reliability import resume, toys
from ldm_jax.training.checkpoint import Checkpoints, abstract_like
from ldm_jax.training.sharding import gather, make_mesh, state_shardings
from ldm_jax.training.steps import diffusion_functions


def flip(path: pathlib.Path) -> None:
    """One bit, in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: pathlib.Path) -> None:
    """The second half is gone, as when a disk was full."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: pathlib.Path) -> None:
    """Nothing is left but the name."""
    path.write_bytes(b"")


def remove(path: pathlib.Path) -> None:
    """Not even the name."""
    path.unlink()


DAMAGES: dict[str, Callable[[pathlib.Path], None]] = {
    "one bit flipped": flip,
    "cut in half": cut,
    "emptied": empty,
    "removed": remove,
}


def _clear(folder: pathlib.Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def measure(out: pathlib.Path, every: int = 1) -> dict[str, Any]:
    """Damages the newest of a run's checkpoints, one file at a time, and restores.

    Either the checkpoint before is restored and a message names both, or what is restored is, bit
    for bit, what was saved (of a file that says nothing about the state).

    Args:
        out: a folder for the run.
        every: only every n-th of the trials.

    Returns:
        'trials', how many of them 'fell_back' or were 'harmless', by the kind of damage, and
        'wrong', a line for each that did neither.
    """
    config, workdir = toys.toy("dit", 4), out / "run"
    resume.train(config, workdir, devices=1)
    abstract = jax.eval_shape(diffusion_functions(config)[0], jax.random.key(0))
    split = state_shardings(abstract, make_mesh(None, jax.devices()[:1]))
    abstract = abstract_like(abstract, split)

    def read(step: int | None, folder: pathlib.Path) -> tuple[Any, str]:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            checkpoints = Checkpoints(folder)
            state = gather(checkpoints.restore(abstract, step))
            checkpoints.close()
        return state, said.getvalue()

    good = workdir / "checkpoints"
    states = {step: read(step, good)[0] for step in (2, 4)}
    files = sorted(p.relative_to(good) for p in (good / "4").rglob("*") if p.is_file())
    trials = [(kind, damage, file) for kind, damage in DAMAGES.items() for file in files]
    trials = [*trials[::every], ("a folder without files", _clear, pathlib.Path("4"))]
    found: dict[str, dict[str, int]] = {}
    wrong = []
    for number, (kind, damage, file) in enumerate(trials):
        folder = out / "damaged" / str(number)
        shutil.copytree(good, folder)
        same_length = (good / file).is_file() and not (good / file).stat().st_size
        if same_length and damage is not remove:
            continue  # an empty file has nothing to lose
        damage(folder / file)
        counts = found.setdefault(kind, {"fell_back": 0, "harmless": 0})
        try:
            state, said = read(None, folder)
        except Exception as error:  # whatever it is, the run is lost
            wrong.append(f"{file} {kind}: {type(error).__name__}: {error}"[:300])
            continue
        finally:
            shutil.rmtree(folder)
        step = int(state.step)
        named = step == 4 or ("4" in said and "2" in said)
        if resume.differences(state, states[step]) or not named:
            wrong.append(f"{file} {kind}: step {step}, {said.strip()[:200]!r}")
        else:
            counts["harmless" if step == 4 else "fell_back"] += 1
    total = sum(sum(counts.values()) for counts in found.values()) + len(wrong)
    return {"trials": total, "files": len(files), "kinds": found, "wrong": wrong}
