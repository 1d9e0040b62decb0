"""Where arrays lie on a mesh of devices with the axes 'data', 'fsdp' and 'tensor'.

Batches are split over 'data' and 'fsdp'. Weights, their averages and the optimiser's state are
split over 'fsdp' and 'tensor', so that each device holds a part; what is too small, and everything
where both are 1, lies on every device. Programs are written for whole arrays and know none of this:
the compiler gathers weights where they are used and adds up gradients.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from ml_collections import ConfigDict

from ldm_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
SMALL = 2**14  # elements below which an array is not worth gathering: it lies on every device
# The parts of a model whose heads and hidden units 'tensor' splits, and their linear layers: of
# COLUMNS the outputs, of ROWS the inputs. Separate layers exchange nothing between the two; where
# q, k and v, or both halves of a gated MLP, are one kernel, the compiler moves activations.
TENSOR_PARTS = ("denoiser", "conditioner")
COLUMNS = re.compile(
    r"(^|/)(q|k|v|qkv|mlp_in|(image|context)_qkv/dense|cross_(q|kv)/dense|(image|context)_mlp/in)$"
)
ROWS = re.compile(r"(^|/)(out|mlp_out|(image|context|cross)_out|(image|context)_mlp/out)$")


def make_mesh(block: ConfigDict | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh of a config's block `mesh`; None has all devices in 'data'.

    devices: by default all devices of all hosts. Those of one host follow each other along the
    batch, so that each host feeds one contiguous part of it.

    Raises:
        UserError: the axes do not multiply to the number of devices.
    """
    ours, devices = devices is None, jax.devices() if devices is None else list(devices)
    shape = mesh_shape(block, len(devices))
    slices = 1 if block is None else block.dcn_data
    if slices > 1:
        grid = _hybrid(shape, slices, devices)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    rows = grid.reshape(-1, shape[2])
    order = sorted(range(len(rows)), key=lambda i: min(d.process_index for d in rows[i]))
    # Explicit axes, the default, refuse convolutions.
    mesh = Mesh(rows[order].reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)
    if ours and jax.process_count() > 1 and jax.default_backend() == "cpu":
        _connect(mesh)
    return mesh


def mesh_shape(block: ConfigDict | None, count: int) -> tuple[int, int, int]:
    """Sizes of the axes for `count` devices; raises UserError as `make_mesh` does."""
    sizes = [-1, 1, 1] if block is None else [block[name] for name in AXES]
    rest = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and count % rest == 0:
        sizes[sizes.index(-1)] = count // rest
    if math.prod(sizes) != count:
        shown = " x ".join(f"{name} {size}" for name, size in zip(AXES, sizes, strict=True))
        raise UserError(
            f"config.mesh is {shown}, but there are {count} devices: the axes must multiply to "
            "that; -1 is what is left"
        )
    if block is not None and sizes[0] % block.dcn_data:
        raise UserError(
            f"config.mesh.dcn_data is {block.dcn_data}, but must divide mesh.data, {sizes[0]}"
        )
    return tuple(sizes)


def _hybrid(shape: tuple[int, int, int], slices: int, devices: Sequence[Any]) -> np.ndarray:
    """Devices (data, fsdp, tensor) of several slices, where only 'data' leaves a slice."""
    within = (shape[0] // slices, *shape[1:])
    found = {getattr(device, "slice_index", None) for device in devices}
    by_process = len(found) != slices  # GPUs and CPUs: each process is a slice
    if by_process:
        found = {device.process_index for device in devices}
    if len(found) != slices:
        raise UserError(
            f"config.mesh.dcn_data is {slices}, but must be the number of slices, or of hosts "
            f"where there are none, {len(found)}"
        )
    return mesh_utils.create_hybrid_device_mesh(
        within, (slices, 1, 1), devices, process_is_granule=by_process
    )


@functools.cache
def _connect(mesh: Mesh) -> None:
    """Lets the processes of CPUs meet that will exchange arrays along any of the axes.

    Those that meet for the first time wait for each other for 30 seconds at most, by when not all
    may have compiled their program; later they wait as long as it takes.
    """
    multihost_utils.process_allgather(np.zeros(1, np.float32))  # they have met for this before
    split = PartitionSpec(AXES)
    sharding, zero = NamedSharding(mesh, split), np.zeros(1, np.float32)
    zeros = jax.make_array_from_callback((mesh.size,), sharding, lambda index: zero)
    axes = [name for name in AXES if mesh.shape[name] > 1]
    for count in range(1, len(axes) + 1):
        for names in itertools.combinations(axes, count):
            add = functools.partial(jax.lax.psum, axis_name=names)
            add = jax.shard_map(add, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
            jax.block_until_ready(jax.jit(add)(zeros))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis is split over 'data' and 'fsdp'."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_parts(mesh: Mesh) -> int:
    """Number of parts that a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def local_part(mesh: Mesh) -> tuple[int, int]:
    """Which part of a batch this process feeds: its index, and their number.

    Raises:
        UserError: hosts would feed parts that overlap.
    """
    count = batch_parts(mesh)
    slices = batch_sharding(mesh).addressable_devices_indices_map((count,)).values()
    rows = sorted({rows[0].indices(count)[:2] for rows in slices})
    start, stop = rows[0][0], rows[-1][1]
    size = stop - start
    if start % size or count % size:
        raise UserError(
            f"config.mesh.tensor is {mesh.shape['tensor']}: it must divide the devices of a host, "
            "or be a multiple of them"
        )
    return start // (stop - start), count // (stop - start)


def check_batch(batch_size: int, mesh: Mesh, key: str, accumulate: int = 1) -> None:
    """Refuses a batch that cannot be split evenly.

    Raises:
        UserError: `batch_size`, named by its config `key`, does not split into `accumulate`
            microbatches of an equal part for each place along 'data' and 'fsdp'.
    """
    parts = batch_parts(mesh)
    if batch_size % (parts * accumulate):
        unit = parts * accumulate
        what = f"{parts} {'devices' if parts == mesh.size else 'parts (mesh.data x mesh.fsdp)'}"
        what += f" times {accumulate} microbatches" if accumulate > 1 else ""
        raise UserError(
            f"config.{key} is {batch_size}, which {what} do not divide: "
            f"try {max(unit, batch_size // unit * unit)}"
        )


def bytes_per_device(tree: Any) -> int:
    """Bytes of a tree of arrays, abstract or not, that one device holds, without padding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def state_shardings(tree: Any, mesh: Mesh) -> Any:
    """How the leaves of a tree of weights, averages and moments lie on a mesh.

    Attention's heads and MLPs' hidden units of the denoiser and of text encoders are split over
    'tensor', by the names of their layers; of every array of at least `SMALL` elements, the largest
    other dimension that 'fsdp' divides is split over it. The tree may be abstract.
    """

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, _partition(_names(path), np.shape(leaf), mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _names(path: tuple) -> list[str]:
    return [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]


def _partition(names: list[str], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    axes: list[str | None] = [None] * len(shape)
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    if tensor > 1 and names and shape:
        place = _tensor_axis(names, len(shape))
        if place is not None and shape[place] % tensor == 0:
            axes[place] = "tensor"
    if fsdp > 1 and math.prod(shape) >= SMALL:
        fits = [i for i, n in enumerate(shape) if axes[i] is None and n % fsdp == 0]
        if fits:
            axes[max(fits, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*axes)


def _tensor_axis(names: list[str], ndim: int) -> int | None:
    """The axis of a kernel or bias that heads or hidden units lie on; None where there is none."""
    layer, leaf = "/".join(names[:-1]), names[-1]
    if not set(TENSOR_PARTS) & set(names):
        return None
    if COLUMNS.search(layer):
        return ndim - 1
    return ndim - 2 if ROWS.search(layer) and leaf == "kernel" else None


def put(tree: Any, shardings: Any) -> Any:
    """Lays a tree out as a sharding, or a tree of them, says; nothing is copied without need.

    Every process holds the whole of an array that does not lie on a device yet.
    """
    if isinstance(shardings, Sharding):
        shardings = jax.tree.map(lambda leaf: shardings, tree)

    def one(leaf: Any, sharding: Sharding) -> jax.Array:
        spread = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        if spread or sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        # Unlike device_put, it takes the processes' word that they hold the same.
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(one, tree, shardings)


def gather(tree: Any) -> Any:
    """Brings a tree of arrays to every host, as NumPy arrays; all processes must call it."""
    if all(_is_here(leaf) for leaf in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return jax.tree.map(
        lambda leaf: (
            np.asarray(leaf)
            if _is_here(leaf)
            else np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        ),
        tree,
    )


def _is_here(leaf: Any) -> bool:
    far = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    return not far or leaf.is_fully_replicated


def whole_batch(part: dict[str, np.ndarray], mesh: Mesh | None) -> dict[str, np.ndarray]:
    """Joins the parts (b, ...) of a batch that the processes hold to (B, ...), on every one."""
    if jax.process_count() == 1:
        return part
    move = functools.partial(jax.make_array_from_process_local_data, batch_sharding(mesh))
    return gather(jax.tree.map(move, part))


def on_mesh(mesh: Mesh, function: Callable) -> Callable:
    """The same function, called with the mesh in context, which kernels ask how arrays lie."""

    def call(*args: Any, **settings: Any) -> Any:
        with jax.set_mesh(mesh):
            return function(*args, **settings)

    return call
