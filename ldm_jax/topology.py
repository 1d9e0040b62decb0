"""Slices of TPUs by name, and the published figures of their chips.

A slice need not be at hand: the TPU compiler, which comes with libtpu, describes any of them.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax

from ldm_jax.errors import UserError

GIB = 2**30


class Chip(NamedTuple):
    """Published figures of a chip; bytes are per second and in one direction.

    Attributes:
        name: such as 'v5e'.
        hbm: bytes of memory that the compiler lets a program use: what is published, less what it
            keeps for itself (said by libtpu 0.0.42 when a program is too large).
        peak: bfloat16 operations per second, a multiplication and an addition being two.
        hbm_bandwidth: bytes per second between memory and chip.
        link: bytes per second through one of the links to a neighbour, of which there are two for
            each axis of the torus.
        dcn: bytes per second of the network between slices, for each chip.
        axes: of the torus.
        wraps: an axis of a multiple of so many chips is closed to a ring; others are lines.
        clock: cycles per second: the peak over what the matrix units do in a cycle; 0 where the
            pages do not say what that is.
        bounds: chips of one host, along x, y and z.
    """

    name: str
    hbm: float
    peak: float
    hbm_bandwidth: float
    link: float
    dcn: float
    axes: int
    wraps: int
    clock: float = 0.0
    bounds: tuple[int, int, int] = (2, 2, 1)


# Google's pages of each generation, cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}: peak per chip,
# HBM bandwidth (v5e and v6e in the precise figures of earlier versions of the page), and ICI per
# chip, 2400, 1600, 4800 and 3200 Gbit/s, over 6, 4, 6 and 4 ports. DCN is the pod's 6.4 and 25.6
# Tbit/s over 256 chips (v5e, v6e), and 50 Gbit/s per chip (v5p; 200 Gbit/s per host of 4, as v4).
# Wrap-around: a whole axis of 16 (v5e, v6e), and slices of whole cubes of 4x4x4 (v4, v5p).
CHIPS = {
    "v4": Chip("v4", 30.75 * GIB, 275e12, 1200e9, 50e9, 6.25e9, 3, 4, clock=1.05e9),
    "v5e": Chip("v5e", 15.75 * GIB, 197e12, 819e9, 50e9, 3.125e9, 2, 16, clock=1.5e9),
    "v5p": Chip("v5p", 95.74 * GIB, 459e12, 2765e9, 100e9, 6.25e9, 3, 4, clock=1.75e9),
    "v6e": Chip("v6e", 31.25 * GIB, 918e12, 1640e9, 100e9, 12.5e9, 2, 16),
}
# What libtpu would ask the machine for. Its lock guards chips, and none are opened: others may
# compile, or train, at the same time.
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}
# v4 has two cores, which JAX uses as one.
CORES = {"v4": {"chip_config_name": "megacore"}}
FORMS = (
    "v5e:4x4 or v6e:16x16 (chips along two axes), v4:2x2x1 or v5p:4x4x4 (three), cpu:8 (as many "
    "stand-ins on this machine's processor), or local (the devices of this machine)"
)


class Slice(NamedTuple):
    """Devices to compile for.

    Attributes:
        name: as given.
        devices: may stand for what is not there.
        chip: None where there are no figures.
        shape: chips along each axis of the torus of one slice; () where there is none.
    """

    name: str
    devices: list[Any]
    chip: Chip | None = None
    shape: tuple[int, ...] = ()


def prepare(name: str) -> None:
    """Sets the environment for a topology; must come before JAX's first look at devices.

    Raises:
        UserError: as `open_slice` does.
    """
    kind, count = _parse(name)
    if kind == "local":
        return
    jax.config.update("jax_platforms", "cpu")
    if kind == "cpu":
        jax.config.update("jax_num_cpu_devices", count[0])
        return
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={name} needs the TPU compiler: pip install 'ldm_jax[tpu]' (no TPU needed)"
        )
    for variable, value in LIBTPU.items():
        os.environ.setdefault(variable, value)


def open_slice(name: str, slices: int = 1) -> Slice:
    """Returns the devices of a topology such as 'v5e:4x4', after `prepare`.

    slices: so many of them, joined by the network of the data centre.

    Raises:
        UserError: no such topology.
    """
    kind, shape = _parse(name)
    if kind in ("local", "cpu"):
        if slices != 1:
            raise UserError(f"--slices={slices} is of TPU slices, not of --topology={name}")
        devices = jax.devices() if kind == "local" else jax.devices("cpu")
        if kind == "cpu" and len(devices) < shape[0]:
            raise UserError(f"--topology={name}: only {len(devices)} stand-ins could be made")
        found = devices[0].device_kind if kind == "local" else ""
        chip = CHIPS.get(KINDS.get(found, ""))
        return Slice(name, devices[: shape[0]] if shape else devices, chip, _extent(devices))
    from jax.experimental import topologies

    chip, options = CHIPS[kind], dict(CORES.get(kind, {}))
    if math.prod(shape) < math.prod(chip.bounds):
        options["chips_per_host_bounds"] = (*shape, *(1,) * (3 - len(shape)))
    if slices > 1:
        options["num_slices"] = slices
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=name, **options
        ).devices
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(f"--topology={name}: {_reason(error)}; known forms are {FORMS}") from error
    return Slice(name, list(devices), chip, shape)


def _parse(name: str) -> tuple[str, tuple[int, ...]]:
    """-> its kind, and the numbers that follow."""
    if name == "local":
        return name, ()
    kind, _, rest = name.partition(":")
    axes = CHIPS[kind].axes if kind in CHIPS else 1
    number = r"[1-9]\d{0,3}"
    if kind not in (*CHIPS, "cpu") or not re.fullmatch(rf"{number}(x{number}){{{axes - 1}}}", rest):
        raise UserError(f"unknown --topology={name}: use {FORMS}")
    return kind, tuple(int(text) for text in rest.split("x"))


def _extent(devices: list[Any]) -> tuple[int, ...]:
    """Chips along each axis, of TPUs at hand."""
    coords = [getattr(device, "coords", None) for device in devices]
    if not coords or coords[0] is None:
        return ()
    return tuple(len(set(along)) for along in zip(*coords, strict=True))


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return re.sub(r"^[A-Z_]+: ", "", text).rstrip(".")
