"""What lies where in a tar shard of the WebDataset layout: read once, and kept as an index.

A shard is a plain tar. Members whose names agree up to the first dot of the file name are one
example: `a/000.jpg`, `a/000.txt`, `a/000.json` and `a/000.cls`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import tarfile
from typing import Any, BinaryIO

from ldm_jax.errors import UserError

IMAGES = ("jpg", "jpeg", "png", "webp")  # the first of them that an example has is its image
METADATA = ("txt", "json", "cls")
INDEX = ".index.json"  # added to the name of a shard
VERSION = 1
_BLOCK = 512  # bytes, of which a tar has a whole number
_NOT_COLUMNS = ("image", "segmentation", "file_name")  # they mean something else in a source
_COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"\xfd7zXZ": "unxz",
    b"BZh": "bunzip2",
    b"\x04\x22\x4d\x18": "unlz4",
}


@dataclasses.dataclass
class ShardIndex:
    """The examples of a shard in the order of their images; all lists have one entry for each.

    Attributes:
        names: of the images, as in the shard.
        offsets: bytes before the content of each image.
        sizes: bytes of the content.
        columns: metadata, None where an example has no value: 'text' of .txt, 'label' of .cls (a
            number where it is one) and the keys of .json, in this order where two give the same.
    """

    names: list[str]
    offsets: list[int]
    sizes: list[int]
    columns: dict[str, list]


def open_index(shard: pathlib.Path) -> ShardIndex:
    """The index of a shard: the one that was kept, if it is of this very file, or a new one.

    It is kept beside the shard or, where that cannot be written, in ~/.cache/ldm_jax/tar; where
    neither can be, it is made again each time. It counts for a file of its size and time of change.

    Raises:
        UserError: no such file, a compressed or damaged one, or an example without an image.
    """
    try:
        stat = shard.stat()
        said = {"version": VERSION, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        beside = shard.with_name(shard.name + INDEX)
        digest = hashlib.sha256(os.fsencode(shard.resolve())).hexdigest()[:16]
        elsewhere = pathlib.Path("~", ".cache", "ldm_jax", "tar", digest + INDEX).expanduser()
        for path in (beside, elsewhere):
            kept = _read(path, said)
            if kept is not None:
                return kept
        index = _make(shard)
    except OSError as error:
        raise UserError(
            f"cannot read the shard {shard} ({error.strerror or error}): check the name in "
            "config.data.source, or fetch it again"
        ) from error
    text = json.dumps(said | dataclasses.asdict(index), ensure_ascii=False)
    for path in (beside, elsewhere):
        if _write(path, text):
            break
    return index


def _read(path: pathlib.Path, said: dict[str, int]) -> ShardIndex | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if any(kept.pop(name) != value for name, value in said.items()):
            return None
        return ShardIndex(**kept)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # none yet, or not one of ours


def _write(path: pathlib.Path, text: str) -> bool:
    # Several processes may do this at the same time: each file appears whole.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        return False
    return True


def _make(shard: pathlib.Path) -> ShardIndex:
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    with open(shard, "rb") as file:
        _refuse_compressed(file, shard)
        for member in _members(file, shard):
            folder, slash, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            suffix = suffix.lower()
            if not member.isreg() or not stem or suffix not in (*IMAGES, *METADATA):
                continue  # folders, hidden files, and what no model reads
            group = groups.setdefault(folder + slash + stem, {})
            if suffix in group:
                raise UserError(
                    f"the shard {shard} holds '{member.name}' twice: write it again with one"
                )
            group[suffix] = member
        index = ShardIndex([], [], [], {})
        rows = []
        for key, group in groups.items():
            image = next((group[suffix] for suffix in IMAGES if suffix in group), None)
            if image is None:
                raise UserError(
                    f"'{key}' in the shard {shard} has {', '.join(sorted(group))}, but no image "
                    f"({', '.join(IMAGES)}): write the shard again without it"
                )
            index.names.append(image.name)
            index.offsets.append(image.offset_data)
            index.sizes.append(image.size)
            rows.append(_metadata(file, shard, group))
    if not rows:
        raise UserError(
            f"the shard {shard} has no images ({', '.join(IMAGES)}): leave it out of "
            "config.data.source"
        )
    keys = dict.fromkeys(key for row in rows for key in row)  # in order of appearance
    index.columns = {key: [row.get(key) for row in rows] for key in keys}
    return index


def _refuse_compressed(file: BinaryIO, shard: pathlib.Path) -> None:
    start = file.read(8)
    file.seek(0)
    for magic, command in _COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(
                f"the shard {shard} is compressed, so its images cannot be read in any order: "
                f"decompress it ({command}); its images are compressed already"
            )


def _members(file: BinaryIO, shard: pathlib.Path) -> list[tarfile.TarInfo]:
    """The members of a whole, plain tar; only their headers are read."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            members, end = tar.getmembers(), tar.offset
    except tarfile.TarError as error:
        raise UserError(
            f"the shard {shard} is no tar file, or was cut off ({error}): fetch or write it again"
        ) from error
    # tarfile takes a damaged header, or the end of the file, for the end of the archive.
    file.seek(end)
    if file.read(_BLOCK) != bytes(_BLOCK):
        raise UserError(
            f"the shard {shard} is damaged or was cut off at byte {end}, where its end should be "
            "marked: fetch or write it again"
        )
    return members


def _metadata(
    file: BinaryIO, shard: pathlib.Path, group: dict[str, tarfile.TarInfo]
) -> dict[str, Any]:
    """The columns of one example."""
    row: dict[str, Any] = {}
    for suffix in ("json", "cls", "txt"):
        if suffix not in group:
            continue
        member = group[suffix]
        file.seek(member.offset_data)
        try:
            text = file.read(member.size).decode("utf-8")
            if suffix == "json":
                values = json.loads(text)
                if not isinstance(values, dict):
                    raise ValueError("no JSON object")
                row |= {key: x for key, x in values.items() if key not in _NOT_COLUMNS}
            elif suffix == "txt":
                row["text"] = text.strip()
            else:
                row["label"] = int(text) if text.strip().isdecimal() else text.strip()
        except ValueError as error:  # also what is not UTF-8
            raise UserError(
                f"cannot read '{member.name}' in the shard {shard} ({error}): write it again with "
                "text in UTF-8, or without it"
            ) from error
    return row
