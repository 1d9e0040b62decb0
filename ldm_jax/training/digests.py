"""Digests of arrays: 64 bits by which a stored array is known to be the one that was saved.

Of the bits of element i, as an unsigned 32-bit number b_i, and a hash h_i of its place, a digest is
made of two sums modulo 2^32,

    sum_i f(b_i + h_i)    and    sum_i g(f(b_i + h_i)).

Both f and g are bijections of 32 bits (f is C. Wellons' "lowbias32"), so that one changed element
always changes both sums; any other damage goes unseen with a chance of about 2^-64. A sum has no
order: an array has the same digest however it is split over devices, and wherever it is computed.
It is no proof against an attacker.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from ldm_jax.distributed import in_use

GOLDEN = 0x9E3779B1  # odd, so that multiplying by it is a bijection
UINTS = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # by bytes of an element
CHUNK = 2**16  # elements that a host looks at at a time: they stay in its cache


class Digest(NamedTuple):
    """What is known of an array.

    Attributes:
        text: 16 hexadecimal digits.
        bad: elements that are infinite or no number.
    """

    text: str
    bad: int


def digests(tree: Any) -> dict[str, Digest]:
    """Digests of the leaves of a tree of arrays by their path, `name/name/...`.

    Arrays on accelerators are read where they are, each by one small program; those of CPUs by the
    host, which has nothing to compile. The leaves may be split over devices of several processes,
    all of which must call this, and all get the same.
    """
    leaves = named_leaves(tree)
    if all(_on_host(leaf) for leaf in leaves.values()):
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            rows = np.array(list(pool.map(host_sums, leaves.values())), np.uint32).reshape(-1, 3)
        if in_use():
            rows = _over_processes(rows)
    else:
        rows = np.array(jax.device_get([device_sums(x) for x in leaves.values()]))
    return {name: _digest(row) for name, row in zip(leaves, rows, strict=True)}


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their path, `name/name/...`."""
    found, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}
    if len(named) != len(found):
        raise ValueError("two leaves of the tree have the same path")
    return named


def digest_of(array: np.ndarray) -> Digest:
    """The digest of an array in the host's memory."""
    return _digest(host_sums(array))


def host_sums(array: Any) -> np.ndarray:
    """Both sums, and the number of non-finite elements, of what this process counts: (3,) uint32.

    array: NumPy's, or one of JAX's on CPUs, of which each part is counted by one process alone.
    """
    if not isinstance(array, jax.Array):
        array = np.asarray(array)
        return _host_sums(array, [range(size) for size in array.shape])
    total = np.zeros(3, np.uint32)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            pairs = zip(array.shape, shard.index, strict=True)
            places = [range(size)[part] for size, part in pairs]
            total += _host_sums(np.asarray(shard.data), places)
    return total


def device_sums(array: jax.Array) -> jax.Array:
    """As `host_sums`, of a whole array and computed where it lies: (3,) uint32 on each device."""
    mesh = getattr(array.sharding, "mesh", None)
    return _program(NamedSharding(mesh, PartitionSpec()) if mesh is not None else None)(array)


@functools.cache
def _program(everywhere: NamedSharding | None) -> Any:
    def sums(array: jax.Array) -> jax.Array:
        return _sums(jnp, array, [range(size) for size in array.shape])

    return jax.jit(sums, out_shardings=everywhere)


def _host_sums(array: np.ndarray, places: list[range]) -> np.ndarray:
    """Sums of an array piece by piece, of which `places` are the indices along each axis."""
    if array.size <= CHUNK:
        return _sums(np, np.asarray(array, order="C"), places)
    axis = next(i for i, size in enumerate(array.shape) if size > 1)
    rows = max(1, CHUNK * array.shape[axis] // array.size)
    total = np.zeros(3, np.uint32)
    for start in range(0, array.shape[axis], rows):
        part = slice(start, start + rows)
        piece = array[(slice(None),) * axis + (part,)]
        total += _host_sums(piece, [*places[:axis], places[axis][part], *places[axis + 1 :]])
    return total


def _sums(xp: Any, array: Any, places: list[range]) -> Any:
    """(3,) uint32 of an array at some places of a larger one; xp: numpy or jax.numpy."""
    if array.dtype == bool:
        array = array.astype(np.uint8)
    if not places:
        array, places = array.reshape(1), [range(1)]
    uint = UINTS[array.dtype.itemsize]
    bits = array.view(uint).astype(np.uint32)
    bad = xp.zeros((), np.uint32)
    if jnp.issubdtype(array.dtype, jnp.floating):
        # An exponent of ones alone: infinite, or no number.
        ones = np.array(np.inf, array.dtype).view(uint).astype(np.uint32)
        bad = xp.sum((bits & ones) == ones, dtype=np.uint32)
    for axis, place in enumerate(places):
        index = xp.arange(place.start, place.stop, dtype=np.uint32)
        hashes = _mix(index + np.uint32(GOLDEN * (axis + 1) % 2**32))
        bits = bits + xp.expand_dims(hashes, [i for i in range(len(places)) if i != axis])
    mixed = _mix(bits)
    other = (mixed ^ (mixed >> np.uint32(13))) * np.uint32(GOLDEN)
    return xp.stack([xp.sum(mixed, dtype=np.uint32), xp.sum(other, dtype=np.uint32), bad])


def _mix(bits: Any) -> Any:
    bits = (bits ^ (bits >> np.uint32(16))) * np.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> np.uint32(15))) * np.uint32(0x846CA68B)
    return bits ^ (bits >> np.uint32(16))


def _over_processes(sums: np.ndarray) -> np.ndarray:
    """Adds up what each process has counted; all must call it."""
    parts = multihost_utils.process_allgather(sums)
    return np.sum(parts, axis=0, dtype=np.uint32)


def _digest(sums: np.ndarray) -> Digest:
    return Digest(f"{sums[0]:08x}{sums[1]:08x}", int(sums[2]))


def _on_host(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array):
        return True
    return all(device.platform == "cpu" for device in leaf.sharding.device_set)
