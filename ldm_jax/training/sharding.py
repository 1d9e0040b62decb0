"""Where arrays lie: batches split over the devices, everything else on each of them."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ldm_jax.errors import UserError


def make_mesh() -> Mesh:
    """Returns the mesh of all devices of all hosts, with the one axis 'data'."""
    # Explicit axes, the default, refuse convolutions.
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(batch_size: int, mesh: Mesh, key: str) -> None:
    """Refuses a batch that cannot be split evenly.

    Raises:
        UserError: the mesh does not divide `batch_size`, named by its config `key`.
    """
    count = mesh.size
    if batch_size % count:
        raise UserError(
            f"config.{key} is {batch_size}, which {count} devices do not divide: "
            f"try {max(count, batch_size // count * count)}"
        )
