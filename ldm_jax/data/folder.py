"""Lists an image folder: its files, their metadata and their splits."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib

from ldm_jax.errors import UserError

METADATA = "metadata.jsonl"
SPLITS = ("train", "val", "test")
SUFFIXES = frozenset(
    ".avif .bmp .gif .jfif .jpeg .jpg .pbm .pgm .png .ppm .tga .tif .tiff .webp".split()
)


def list_folder(root: pathlib.Path) -> tuple[list[str], dict[str, list], list[str]]:
    """Finds the images below `root`: (names, columns, splits), each with one entry per image.

    Names are paths relative to `root`, with forward slashes. Where a directory holds a
    metadata.jsonl (one JSON object per line: 'file_name', relative to that directory, and any
    columns), the images below it are those it lists. Where nothing is listed the first
    sub-directory gives the column 'label', if all images are in sub-directories.

    Some columns have a meaning of their own:
        'text': a caption, or a list of them.
        'boxes': [{'label': name or number, 'bbox': [left, top, width, height]}, ...] in pixels of
            the file; checked by `number_boxes`.
        'segmentation': the file name, relative to that directory, of a map of classes, a PNG as
            `read_classes` reads it. Such files are no images of the set.

    If every image is below train/, val/ or test/, these are the splits (and are no labels);
    otherwise all is 'train'.
    """
    if not root.is_dir():
        raise UserError(f"the image folder {root} does not exist")
    files, described = _walk(root)
    rows: list[tuple[str, dict]] = []
    for directory in described:
        rows += _read_metadata(root, directory)
    maps = {os.path.normpath(row["segmentation"]) for _, row in rows if row.get("segmentation")}
    rows += [
        (file, {})
        for file in files
        if not _is_below(file, described) and os.path.normpath(file) not in maps
    ]
    if not rows:
        raise UserError(f"the folder {root} has no images ({', '.join(sorted(SUFFIXES))})")

    names = [name for name, _ in rows]
    parts = [name.split("/") for name in names]
    splits = ["train"] * len(names)
    if all(len(part) > 1 and part[0] in SPLITS for part in parts):
        splits = [part[0] for part in parts]
        parts = [part[1:] for part in parts]
    columns = _columns([values for _, values in rows])
    if not described and all(len(part) > 1 for part in parts):
        columns["label"] = [part[0] for part in parts]
    columns["file_name"] = names
    return names, columns, splits


def fingerprint(root: pathlib.Path) -> str:
    """Tells whether the files that `list_folder` reads, or only looks at, are others than before.

    It is made of their names, sizes and times of change; that of a folder that is not there is one
    without files.
    """
    files, described = _walk(root)
    said = hashlib.sha256()
    for name in (*files, *(f"{directory}/{METADATA}" for directory in described)):
        stat = (root / name).stat()
        said.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return said.hexdigest()


def _walk(root: pathlib.Path) -> tuple[list[str], list[str]]:
    """The image files below `root` and the directories with a metadata file, sorted."""
    files, described, seen = [], [], set()
    for directory, subdirectories, names in os.walk(root, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen:  # a symbolic link back to where the walk has been
            subdirectories.clear()
            continue
        seen.add(real)
        subdirectories[:] = sorted(name for name in subdirectories if name[0] != ".")
        relative = pathlib.Path(directory).relative_to(root)
        if METADATA in names:
            described.append(relative.as_posix())
        files += [
            (relative / name).as_posix()
            for name in names
            if name[0] != "." and pathlib.PurePath(name).suffix.lower() in SUFFIXES
        ]
    return sorted(files), sorted(described)


def _read_metadata(root: pathlib.Path, directory: str) -> list[tuple[str, dict]]:
    """The rows (path relative to `root`, columns) of one metadata file."""
    path = root / directory / METADATA
    rows = []
    for number, row in enumerate(read_jsonl(path.read_bytes(), str(path)), 1):
        if row is None:
            continue
        here = pathlib.PurePath(directory)
        name = (here / row.pop("file_name")).as_posix()
        wanted = [name]
        if row.get("segmentation") is not None:
            if not isinstance(row["segmentation"], str):
                raise UserError(f"'segmentation' in line {number} of {path} is no name of a file")
            row["segmentation"] = (here / row["segmentation"]).as_posix()
            wanted.append(row["segmentation"])
        for file in wanted:
            if not (root / file).is_file():
                raise UserError(
                    f"line {number} of {path} names a file that is missing: {root / file}"
                )
        rows.append((name, row))
    return rows


def read_jsonl(data: bytes, title: str) -> list[dict | None]:
    """Parses a metadata.jsonl: one dict with a 'file_name' per line, None for an empty line."""
    rows: list[dict | None] = []
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            rows.append(None)
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # also what is not UTF-8
            raise UserError(f"line {number} of {title} is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise UserError(f"line {number} of {title} is not a JSON object with a 'file_name'")
        rows.append(row)
    return rows


def _is_below(file: str, directories: list[str]) -> bool:
    above = pathlib.PurePosixPath(file).parents
    return any(pathlib.PurePosixPath(directory) in above for directory in directories)


def _columns(rows: list[dict]) -> dict[str, list]:
    keys = dict.fromkeys(key for row in rows for key in row)  # in order of appearance
    return {key: [row.get(key) for row in rows] for key in keys}
