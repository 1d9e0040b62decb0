"""What lies in a folder of checkpoints: finding it, reading it, and telling what of it is damaged.

checkpoints/
  <step>/                        one item for each part of a state, as orbax stores it
    digests/metadata             the step, and shape, type and digest of every array (JSON)
  <step>.damaged/                was not what had been saved; a run has moved it aside
  <step>.orbax-checkpoint-tmp/   was not finished
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import pathlib
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from ldm_jax import distributed
from ldm_jax.errors import Unreachable, UserError
from ldm_jax.training.digests import Digest, digests, named_leaves

INDEX = "digests"  # the item with the digests
COMMITTED = "commit_success.txt"  # written last, before the folder gets its name
METADATA = "_CHECKPOINT_METADATA"
DAMAGED = ".damaged"
UNFINISHED = ".orbax-checkpoint-tmp"
# What the system says of a file that is not there; anything else may pass.
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
UNREACHABLE = "the file system did not give"


class Damaged(Exception):
    """A stored step is not what was saved: the message says what of it, and how."""


class Entry(NamedTuple):
    """What a checkpoint says of one of its arrays; `digest` as of `digests.Digest.text`."""

    shape: tuple[int, ...]
    dtype: str
    digest: str

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def stored_steps(directory: pathlib.Path) -> list[int]:
    """The steps that were stored, damaged or not, in order."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def leftovers(directory: pathlib.Path) -> list[pathlib.Path]:
    """Folders that writers which were killed have left behind."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if UNFINISHED in path.name)


def make_index(step: int, items: Mapping[str, Any], found: Mapping[str, Digest]) -> dict[str, Any]:
    """What is stored of a state's items and of their digests, as `digests(items)` gives them."""
    arrays = {
        name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "digest": found[name].text}
        for name, leaf in named_leaves(items).items()
    }
    return {"step": step, "arrays": arrays, "sha256": _sha256(step, arrays)}


def read_index(directory: pathlib.Path, step: int) -> dict[str, Entry]:
    """What a stored step says of its arrays, by `item/path`.

    Raises:
        Damaged: it was not committed, or does not say it any more.
    """
    folder = directory / str(step)
    if not folder.is_dir() or not any(folder.iterdir()):
        raise Damaged("its folder is empty")
    if not (folder / COMMITTED).is_file():
        raise Damaged(f"it was never committed: {COMMITTED} is missing")
    if not isinstance(_read_json(folder, METADATA).get("item_handlers"), dict):
        raise Damaged(f"{METADATA} does not name its items")
    index = _read_json(folder, f"{INDEX}/metadata")
    if index.get("sha256") != _sha256(index.get("step"), index.get("arrays")):
        raise Damaged(f"{INDEX}/metadata was changed")
    if index["step"] != step:
        raise Damaged(f"it is of step {index['step']}")
    for item in _items(index["arrays"]):
        _read_json(folder, f"{item}/_METADATA")  # orbax could do without, but who removed it?
    return {
        name: Entry(tuple(entry["shape"]), entry["dtype"], entry["digest"])
        for name, entry in index["arrays"].items()
    }


def read(directory: pathlib.Path, step: int, items: Mapping[str, Any]) -> dict[str, Any]:
    """Reads items of a stored step, laid out as their abstract leaves say; all hosts must call it.

    Raises:
        Damaged: on all hosts, if any of them could not read what was saved.
        UserError: other arrays were saved than are asked for.
    """
    with _together():
        index = read_index(directory, step)
    _check_fits(directory / str(step), index, items)
    # Orbax stores no empty trees; they stay as they are.
    wanted = {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}
    found = {}
    with _together():
        for name, tree in wanted.items():
            # Unlike a whole checkpoint's, an item's reader waits for no other host.
            with _reading(name), contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
                restore = ocp.args.StandardRestore(tree)
                folder = directory.absolute() / str(step) / name  # orbax takes no other
                found[name] = handler.restore(folder, args=restore)
    for line in _differences(index, found):
        raise Damaged(line)
    return dict(items) | found


def restore_newest(
    directory: pathlib.Path, items: Mapping[str, Any]
) -> tuple[int, dict[str, Any], list[int]]:
    """Reads items of the newest step that is not damaged, e.g. 'ema_params.denoiser'.

    Prints which steps are damaged, and how. All hosts must call it.

    Returns the step, its items, and the damaged steps.

    Raises:
        UserError: there is no such step, or other arrays were saved than are asked for.
    """
    directory, damage = pathlib.Path(directory), {}
    # The folder is looked at again each time: a run that goes on may have stored another step.
    while (step := newest_step(directory, damage)) is not None:
        try:
            found = read(directory, step, items)
        except Damaged as error:
            damage[step] = str(error)
            continue
        for number, reason in damage.items():
            print(
                f"checkpoint {directory / str(number)} is damaged: {reason}; going back to step "
                f"{step}",
                flush=True,
            )
        return step, found, list(damage)
    if not damage:
        raise UserError(f"no checkpoint in {directory}: train first")
    shown = "; ".join(f"step {number}: {reason}" for number, reason in list(damage.items())[:3])
    raise UserError(
        f"no good checkpoint is left in {directory}, all {len(damage)} are damaged ({shown}): put "
        "back a copy of one, or remove that folder to train from the start"
    )


def newest_step(directory: pathlib.Path, but: Container[int] = ()) -> int | None:
    """The newest stored step but for some, as process 0 sees it; all hosts must call it."""
    step = max((step for step in stored_steps(directory) if step not in but), default=-1)
    if distributed.in_use():
        step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
    return None if step < 0 else step


def set_aside(directory: pathlib.Path, step: int) -> pathlib.Path:
    """Renames a damaged step, so that it can be saved again; returns its new place."""
    place = directory / f"{step}{DAMAGED}"
    shutil.rmtree(place, ignore_errors=True)  # an earlier one
    (directory / str(step)).rename(place)
    return place


def verify(directory: pathlib.Path, step: int) -> tuple[int, list[str]]:
    """Reads all arrays of a stored step into the host's memory, item by item.

    Returns how many bytes they have, and what is damaged.
    """
    try:
        index = read_index(directory, step)
    except Damaged as error:
        return 0, [str(error)]
    size, damage = 0, []
    for item in _items(index):
        try:
            with _reading(item), contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
                folder = directory.absolute() / str(step) / item
                plain = lambda _: ocp.RestoreArgs(restore_type=np.ndarray)  # noqa: E731
                restore = jax.tree.map(plain, handler.metadata(folder).tree)
                arrays = handler.restore(folder, args=ocp.args.PyTreeRestore(restore_args=restore))
        except Damaged as error:
            damage.append(str(error))
            continue
        size += sum(array.nbytes for array in jax.tree.leaves(arrays))
        damage += _differences(index, {item: arrays})
    return size, damage


def _differences(index: Mapping[str, Entry], items: Mapping[str, Any]) -> list[str]:
    """What of some items is not as the index says."""
    arrays, lines = named_leaves(items), []
    for name, digest in digests(items).items():
        found = Entry(arrays[name].shape, str(arrays[name].dtype), digest.text)
        if name not in index:
            lines.append(f"{name} was not saved")
        elif found[:2] != index[name][:2]:
            lines.append(f"{name} is {found}, but was {index[name]} when it was saved")
        elif found != index[name]:
            lines.append(f"{name} does not have its digest")
    saved = [name for name in index if name.partition("/")[0] in items]
    return lines + [f"{name} is missing" for name in saved if name not in arrays]


def _check_fits(folder: pathlib.Path, index: Mapping[str, Entry], items: Mapping[str, Any]) -> None:
    """Raises UserError if a step holds other arrays than items have."""
    asked, reason = named_leaves(items), ""
    for name, leaf in asked.items():
        wanted = Entry(tuple(leaf.shape), str(np.dtype(leaf.dtype)), "")
        if name not in index:
            reason = f"it has no {name}"
        elif wanted[:2] != index[name][:2]:
            reason = f"{name} is {index[name]} there, not {wanted}"
        if reason:
            break
    parts = _items(asked)
    more = [name for name in index if name.partition("/")[0] in parts and name not in asked]
    if more and not reason:
        reason = f"it also has {more[0]}"
    if reason:
        raise UserError(f"checkpoint {folder} does not fit this config: {reason}")


def _items(names: Iterable[str]) -> list[str]:
    """The items that arrays belong to."""
    return list(dict.fromkeys(name.partition("/")[0] for name in names))


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """What one host finds damaged within, all do; all must enter."""
    try:
        with distributed.agreed():
            yield
    except Unreachable:
        raise
    except UserError as error:  # of another host
        if UNREACHABLE in str(error):
            raise
        raise Damaged(str(error)) from error


@contextlib.contextmanager
def _reading(item: str) -> Iterator[None]:
    """Whatever fails while an item is read is damage, but for a lack of memory."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        if isinstance(error, OSError):
            _check_reachable(error, item)
        text = " ".join(str(error).partition("See full TensorStore")[0].split())
        raise Damaged(f"{item} cannot be read ({text[:160] or type(error).__name__})") from error


def _check_reachable(error: OSError, what: pathlib.Path | str) -> None:
    """Raises Unreachable if an error is the file system's, and says nothing of a file."""
    if error.errno not in (None, *MISSING):
        raise Unreachable(
            f"{UNREACHABLE} {what} ({error.strerror}): the checkpoint may be good, so no older "
            "one is taken; start the same command again"
        ) from error


def _read_json(folder: pathlib.Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads((folder / name).read_bytes())
    except FileNotFoundError as error:
        raise Damaged(f"{name} is missing") from error
    except OSError as error:
        _check_reachable(error, folder / name)
        raise Damaged(f"{name} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise Damaged(f"{name} is cut off or was changed") from error
    if not isinstance(value, dict):
        raise Damaged(f"{name} was changed")
    return value


def _sha256(step: Any, arrays: Any) -> str:
    return hashlib.sha256(json.dumps([step, arrays], sort_keys=True).encode()).hexdigest()
