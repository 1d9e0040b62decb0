"""What a compiled program exchanges between devices, read from the text of its optimised HLO."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16, "token": 0}
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPCODE = re.compile(r"\s([a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


class Instruction(NamedTuple):
    """A line of a computation: its result's name and type, what it does, and all the rest."""

    name: str
    shape: str
    opcode: str
    rest: str


class Collective(NamedTuple):
    """An exchange between devices.

    Attributes:
        kind: of `KINDS`.
        bytes: of the whole array: after it was gathered, or before it is scattered.
        groups: devices that exchange with each other, by their places in the mesh; of a permute,
            pairs of source and target. () is all devices.
        count: how often a call of the program makes it.
        known: False where `count` lacks a factor, a loop of unknown length.
    """

    kind: str
    bytes: float
    groups: tuple[tuple[int, ...], ...]
    count: int = 1
    known: bool = True


def collectives(text: str) -> list[Collective]:
    """The exchanges of a program, each as often as it is made.

    Bodies of loops count as often as they run. Of an exchange that is split into a start, what runs
    meanwhile, and an end, only one counts.
    """
    called, entry = parse(text)
    found: list[Collective] = []
    seen: set[tuple[str, str]] = set()
    for computation, count, known in _walk(called, entry):
        for line in called[computation]:
            kind = line.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            fused = computation.startswith(("async_collective_fusion", "fused_computation"))
            channel = re.search(r"\bchannel_id=(\d+)", line.rest)
            if fused and channel:  # all three parts of an asynchronous fusion hold it
                if (kind, channel[1]) in seen:
                    continue
                seen.add((kind, channel[1]))
            groups = _groups(line.rest)
            if groups and max(map(len, groups)) < 2:
                continue
            size = _payload(line, groups)
            # On TPUs, a scattered sum is a fusion of the sum and of the choice of a part.
            if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            found.append(Collective(kind, size, groups, count, known))
    return found


def cycles(text: str) -> int:
    """Cycles of all kernels, one after the other, as the TPU compiler estimates them; 0 elsewhere.

    Loops count as often as they run.
    """
    computations, entry = parse(text)
    fused = {
        name
        for lines in computations.values()
        for line in lines
        if line.opcode == "fusion"
        for name in _CALLED.findall(line.rest)
    }
    total = 0
    for name, count, _ in _walk(computations, entry):
        if name not in fused:
            for line in computations[name]:
                said = re.search(r'"estimated_cycles":"(\d+)"', line.rest)
                total += count * int(said[1]) if said else 0
    return total


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation, and the name of the one that is called first."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
            continue
        match = _INSTRUCTION.match(line)
        if not match or current is None:
            continue
        opcode = _OPCODE.search(match[2])
        if opcode:
            shape, rest = match[2][: opcode.start()], match[2][opcode.end() - 1 :]
            current.append(Instruction(match[1], shape, opcode[1], rest))
    return computations, entry


def _walk(
    computations: dict[str, list[Instruction]], entry: str
) -> Iterator[tuple[str, int, bool]]:
    """Each computation as often as it is called from another place: its name, how often that place
    runs, and whether this is known."""
    waiting = [(entry, 1, True)] if entry else []
    while waiting:
        name, count, known = waiting.pop()
        yield name, count, known
        for line in computations[name]:
            times: int | None = 1
            if line.opcode == "while":
                times = trip_count(line, computations)
            names = _CALLED.findall(line.rest)
            for branches in _BRANCHES.findall(line.rest):
                names += [branch.strip().lstrip("%") for branch in branches.split(",")]
            for called in names:
                if called in computations:
                    waiting.append((called, count * (times or 1), known and times is not None))


def trip_count(line: Instruction, computations: dict[str, list[Instruction]]) -> int | None:
    """How often the body of a while loop runs; None where that cannot be read.

    The compiler says it, or the condition compares a counter, which `lax.scan` and `fori_loop`
    start at 0, to a constant.
    """
    said = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line.rest)
    if said:
        return int(said[1])
    condition = re.search(r"\bcondition=%?([\w.\-]+)", line.rest)
    lines = computations.get(condition[1], []) if condition else []
    constants = {}
    for each in lines:
        value = re.match(r"\((\d+)\)", each.rest)
        if each.opcode == "constant" and value:
            constants[each.name] = int(value[1])
    for each in lines:
        if each.opcode == "compare" and "direction=LT" in each.rest:
            limits = [constants[name] for name in _operands(each.rest) if name in constants]
            if len(limits) == 1:
                return limits[0]
    # The comparison may be in a fusion, which the constant is given to.
    if len(constants) == 1 and any(each.opcode == "fusion" for each in lines):
        return next(iter(constants.values()))
    return None


def _operands(rest: str) -> list[str]:
    inside = rest[1 : rest.index(")")]
    return [part.split()[-1].lstrip("%") for part in inside.split(",") if part.strip()]


def _payload(line: Instruction, groups: tuple[tuple[int, ...], ...]) -> float:
    """Bytes of the whole array of a collective."""
    shape = line.shape
    if line.opcode in ("all-gather-start", "collective-permute-start"):
        shape = _elements(shape)[1]  # (operands, results, ...)
    size = bytes_of(shape)
    if line.opcode.startswith("reduce-scatter"):
        size *= len(groups[0]) if groups else 1
    return size


def _elements(shape: str) -> list[str]:
    """The elements of a tuple's type, at its top."""
    parts, depth = [""], 0
    for char in shape.strip()[1:-1]:
        depth += (char in "({[") - (char in ")}]")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def bytes_of(shape: str) -> float:
    """Bytes of a type such as 'bf16[2,3]{1,0}' or a tuple of such, without padding."""
    total = 0.0
    for name, sides in _ARRAY.findall(shape):
        if name in BYTES or re.fullmatch(r"[a-z]+\d.*", name):
            bits = re.search(r"\d+", name)
            width = BYTES[name] if name in BYTES else int(bits[0]) / 8
            total += width * math.prod(int(side) for side in sides.split(",") if side)
    return total


def _groups(rest: str) -> tuple[tuple[int, ...], ...]:
    """The devices that exchange with each other; () is all."""
    pairs = re.search(r"source_target_pairs=\{((?:\{[\d,]*\},?)*)\}", rest)
    if pairs:
        return _listed(pairs[1])
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", rest)
    if listed:
        return _listed(listed[1])
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        ids = _iota(iota[2], iota[3]).reshape(_numbers(iota[1]))
        return tuple(tuple(row) for row in ids.tolist())
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
        r"\s*\{([^}]*)\}",
        rest,
    )
    return _by_axes(*named.groups()) if named else ()


def _by_axes(
    axes: str, devices: str | None, order: str | None, chosen: str
) -> tuple[tuple[int, ...], ...]:
    """Groups that differ along some axes of a mesh, as in

    mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, where ':(m)k' behind an axis' name means the
    k places that are left of it after its first m parts.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    parts = {name: [size] for name, size in sizes.items()}
    picked = set()
    for name, before, length in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen):
        if length:
            first, middle = int(before), int(length)
            parts[name] = [first, middle, sizes[name] // (first * middle)]
            picked.add((name, 1))
        else:
            picked.add((name, 0))
    places = [(name, i) for name in sizes for i in range(len(parts[name]))]
    shape = [parts[name][i] for name, i in places]
    count = math.prod(shape)
    ids = _iota(devices, order) if devices else np.arange(count)
    ids = ids.reshape(shape)
    inside = [axis for axis, place in enumerate(places) if place in picked]
    outside = [axis for axis in range(len(places)) if axis not in inside]
    width = math.prod(shape[axis] for axis in inside)
    rows = ids.transpose(outside + inside).reshape(-1, width)
    return tuple(tuple(row) for row in rows.tolist())


def _iota(sides: str, order: str | None) -> np.ndarray:
    shape = _numbers(sides)
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose(_numbers(order)) if order else ids).reshape(-1)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def _listed(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(_numbers(group) for group in re.findall(r"\{([\d,]*)\}", text))


def crossed_axes(groups: tuple[tuple[int, ...], ...], mesh: dict[str, int]) -> tuple[str, ...]:
    """The axes of a mesh, as name -> size, along which the members of groups differ."""
    names, shape = list(mesh), tuple(mesh.values())
    if not groups:
        return tuple(name for name in names if mesh[name] > 1)
    members = [np.unravel_index(np.asarray(group), shape) for group in groups]
    return tuple(
        name
        for axis, name in enumerate(names)
        if any(len(set(places[axis].tolist())) > 1 for places in members)
    )
