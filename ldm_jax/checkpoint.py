"""Looks after the checkpoints and weights that a run has stored.

python -m ldm_jax.checkpoint list --workdir=DIR
python -m ldm_jax.checkpoint verify --workdir=DIR
python -m ldm_jax.checkpoint prune --workdir=DIR --keep=N [--dry_run]

`list` shows each stage's stored steps, and the files of weights: size, date, and whether a step is
complete, without reading its arrays. `verify` reads every array, compares it with the digest that
was stored with it, and says how fast; the exit code is 1 if anything is damaged. `prune` reads the
steps of each stage from the newest on until N of them are good, and deletes all others, damaged and
unfinished ones as well; where no step is good it deletes nothing. It refuses while a run trains
there; `list` and `verify` may be used then. None of them takes an accelerator.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator

from absl import flags

from ldm_jax import cli
from ldm_jax.errors import UserError

COMMAND = "python -m ldm_jax.checkpoint"
USAGE = f"say what to do: {COMMAND} list|verify|prune --workdir=DIR"
STAGES = {"first stage": "first_stage", "diffusion": ".", "classifier": "classifier"}


def list_stored(workdir: pathlib.Path) -> int:
    """Prints what is stored."""
    from ldm_jax.training import checkpoint_files as files

    for stage, directory in _stages(workdir):
        print(f"{stage}: {directory}")
        print(f"  {'step':>10}  {'bytes':>18}  {'stored':<16}  complete")
        for step in files.stored_steps(directory):
            try:
                complete = f"yes, {len(files.read_index(directory, step))} arrays"
            except files.Damaged as error:
                complete = f"NO: {error}"
            print(_row(f"{step}", directory / str(step), complete))
        for path in _useless(directory):
            step, moved = path.name.partition(".")[0], path.name.endswith(files.DAMAGED)
            remark = "no, damaged and moved aside" if moved else "no, not finished yet, or ever"
            print(_row(step, path, remark))
    if paths := _weights(workdir):
        print("files of weights:")
        for path in paths:
            print(_row("", path, str(path.relative_to(workdir))))
    return cli.EXIT_OK


def verify(workdir: pathlib.Path) -> int:
    """Reads everything that is stored; returns the exit code."""
    from ldm_jax import tensors
    from ldm_jax.training import checkpoint_files as files

    broken = 0
    for stage, directory in _stages(workdir):
        for step in files.stored_steps(directory):
            start = time.perf_counter()
            size, damage = files.verify(directory, step)
            _report(f"{stage}, step {step}", size, time.perf_counter() - start, damage)
            broken += bool(damage)
    for path in _weights(workdir):
        start, size, damage, known = time.perf_counter(), 0, [], True
        try:
            size, known = tensors.check_file(path)
        except UserError as error:
            damage = [str(error)]
        what = f"{path.relative_to(workdir)}{'' if known else ', which has no checksums,'}"
        _report(what, size, time.perf_counter() - start, damage)
        broken += bool(damage)
    print(f"{broken} damaged" if broken else "nothing is damaged")
    return cli.EXIT_USER_ERROR if broken else cli.EXIT_OK


def prune(workdir: pathlib.Path, keep: int, dry_run: bool = False) -> int:
    """Deletes all but the `keep` newest good steps of each stage; prints which.

    dry_run: deletes nothing.
    """
    from ldm_jax.training import checkpoint_files as files

    word = "would delete" if dry_run else "deleted"
    for stage, directory in _stages(workdir):
        good, others = [], {}
        for step in reversed(files.stored_steps(directory)):
            if len(good) == keep:
                others[step] = "older"
                continue
            damage = files.verify(directory, step)[1]
            if damage:
                others[step] = f"damaged: {damage[0]}"
            else:
                good.append(step)
        if not good:
            print(f"{stage}: no step is good; nothing is deleted")
            continue
        print(f"{stage}: keeping {', '.join(map(str, sorted(good)))}")
        paths = {directory / str(step): why for step, why in others.items()}
        for path, why in (paths | dict.fromkeys(_useless(directory), "of no use")).items():
            if not dry_run:
                shutil.rmtree(path)
            print(f"{stage}: {word} {path} ({why})")
    return cli.EXIT_OK


def _stages(workdir: pathlib.Path) -> Iterator[tuple[str, pathlib.Path]]:
    """Stages that have checkpoints, and the folders of these.

    Raises:
        UserError: nothing is stored there.
    """
    found = {name: workdir / folder / "checkpoints" for name, folder in STAGES.items()}
    found = {name: path for name, path in found.items() if path.is_dir()}
    if not found and not _weights(workdir):
        raise UserError(f"no checkpoints and no weights in {workdir}: check --workdir")
    yield from found.items()


def _weights(workdir: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in workdir.rglob("*.safetensors") if path.is_file())


def _useless(directory: pathlib.Path) -> list[pathlib.Path]:
    """Folders that nothing reads: damaged ones that a run moved aside, and unfinished ones."""
    from ldm_jax.training import checkpoint_files as files

    moved = [path for path in directory.iterdir() if path.name.endswith(files.DAMAGED)]
    return sorted(moved) + files.leftovers(directory)


def _row(name: str, path: pathlib.Path, remark: str) -> str:
    stored = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
    inside = [path, *path.rglob("*")] if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in inside if file.is_file())
    return f"  {name:>10}  {size:>18,}  {stored}  {remark}"


def _report(what: str, size: int, seconds: float, damage: list[str]) -> None:
    speed = f"{size / 1e9:.3f} GB in {seconds:.2f} s, {size / 1e9 / seconds:.2f} GB/s"
    print(f"{what}: {'DAMAGED' if damage else 'good'} ({speed})")
    for line in damage:
        print(f"  {line}")


def _run(action: str) -> int:
    if not flags.FLAGS.workdir:
        raise UserError(f"no workdir given: {COMMAND} {action} --workdir=DIR")
    workdir = pathlib.Path(flags.FLAGS.workdir)
    if not workdir.is_dir():
        raise UserError(f"{workdir} is no folder: check --workdir")
    # Whatever this reads lies in the host's memory; a run may have the accelerators.
    os.environ["JAX_PLATFORMS"] = "cpu"
    if action != "prune":
        return {"list": list_stored, "verify": verify}[action](workdir)
    keep, dry_run = flags.FLAGS.keep, flags.FLAGS.dry_run
    if keep is None or keep < 1:
        raise UserError("say how many steps of each stage to keep, at least 1: --keep=3")
    if dry_run:
        return prune(workdir, keep, dry_run)
    from ldm_jax import lock

    with lock.hold(workdir), cli.writing(workdir):
        return prune(workdir, keep)


def _refuse() -> None:
    raise UserError(USAGE)


def main() -> None:
    """Runs `list`, `verify` or `prune`."""
    # Not on import: other commands have flags of these names.
    flags.DEFINE_string("workdir", "", "Folder of the run.")
    flags.DEFINE_integer("keep", None, "prune: how many good steps of each stage stay.")
    flags.DEFINE_bool("dry_run", False, "prune: only say what would be deleted.")
    action = (*sys.argv[1:2], "")[0]
    if action in ("list", "verify", "prune"):
        cli.run(lambda: _run(action), sys.argv[:1] + sys.argv[2:])
    cli.run(_refuse, sys.argv if {"--help", "-h"} & set(sys.argv) else sys.argv[:1])


if __name__ == "__main__":
    main()
