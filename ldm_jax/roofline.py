"""How long a compiled program would take at least on a chip: an estimate from published figures.

A roofline (Williams et al. 2009) with three ceilings: operations, memory and exchange. Each is
taken to run at the published rate all the time, so what is measured is slower; compare estimates
with each other. If the three overlap fully, a step takes the longest of them, and if not at all,
their sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.hlo import Collective
from ldm_jax.topology import Chip, Slice


class Estimate(NamedTuple):
    """Seconds of a call on each chip, at the published rates.

    Attributes:
        compute: of the operations.
        memory: of the bytes moved between memory and chip.
        communication: of the exchanges.
    """

    compute: float
    memory: float
    communication: float

    @property
    def overlapped(self) -> float:
        """The longest, where all else happens meanwhile."""
        return max(self)

    @property
    def serial(self) -> float:
        """The sum, where nothing overlaps."""
        return sum(self)

    @property
    def limit(self) -> str:
        """What takes longest."""
        return self._fields[int(np.argmax(self))]


def estimate(
    chip: Chip,
    flops: float,
    moved: float,
    exchanges: Sequence[tuple[Collective, float]],
) -> Estimate:
    """Returns the estimate of one chip's share.

    flops, moved: operations, and bytes between memory and chip. exchanges: what is exchanged, and
    the seconds that it takes once.
    """
    communication = sum(each.count * seconds for each, seconds in exchanges)
    return Estimate(flops / chip.peak, moved / chip.hbm_bandwidth, communication)


def exchange_seconds(collective: Collective, piece: Slice, order: Sequence[Any]) -> float:
    """Seconds of an exchange that runs once, without the latency of its start.

    A gathering of V bytes from n chips brings each (n - 1) / n V through its links, and so does a
    scattering or a shuffle; a sum is both. Along a closed axis of the torus a chip has two links,
    and one along an open one, whose ends have no more. Over several slices, each chip of a slice
    has its part of V to exchange over the data centre's network.

    order: the devices in the order of the mesh.
    """
    group = collective.groups[0] if collective.groups else range(len(order))
    members = [order[place] for place in group]
    slices = len({getattr(device, "slice_index", None) for device in members})
    inside, chip = len(members) // slices, piece.chip
    if collective.kind == "collective-permute":
        return collective.bytes / (chip.dcn if slices > 1 else chip.link)
    times = 2 if collective.kind == "all-reduce" else 1
    seconds = 0.0
    if inside > 1:
        bandwidth = chip.link * links(members, piece.shape, chip)
        seconds += times * (inside - 1) / inside * collective.bytes / bandwidth
    if slices > 1:
        seconds += times * (slices - 1) / slices * collective.bytes / inside / chip.dcn
    return seconds


def links(members: Sequence[Any], shape: tuple[int, ...], chip: Chip) -> int:
    """Links that each member of a group of chips can use at the same time; at least 1."""
    coords = np.asarray([device.coords for device in members])
    whole_cubes = chip.axes == 2 or all(side % chip.wraps == 0 for side in shape)
    found = 0
    for axis, side in enumerate(shape):
        along = len(set(coords[:, axis].tolist()))
        if along > 1:
            closed = along == side and side % chip.wraps == 0 and whole_cubes
            found += 2 if closed else 1
    return max(1, found)
