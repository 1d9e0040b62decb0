"""Estimates follow from the published figures by hand; operations are counted before compiling."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import topology
from ldm_jax.errors import UserError
from ldm_jax.flops import count_flops
from ldm_jax.hlo import Collective
from ldm_jax.roofline import estimate, exchange_seconds, links

V5E, V5P = topology.CHIPS["v5e"], topology.CHIPS["v5p"]


def piece_of(chip, shape, slices=1):
    """Stand-ins for the chips of slices, slice by slice, the last axis fastest."""
    devices = [
        types.SimpleNamespace(coords=tuple(int(i) for i in place), slice_index=number)
        for number in range(slices)
        for place in np.argwhere(np.ones(shape))
    ]
    return topology.Slice("", devices, chip, shape)


def seconds(kind, size, groups, piece):
    return exchange_seconds(Collective(kind, size, groups), piece, piece.devices)


def test_open_and_closed_axes_and_both_axes():
    line, ring = piece_of(V5E, (4, 4)), piece_of(V5E, (16, 2))
    row, column = line.devices[:4], ring.devices[::2]
    assert links(row, line.shape, V5E) == 1
    assert links(line.devices, line.shape, V5E) == 2  # two open axes
    assert links(column, ring.shape, V5E) == 2  # 16 chips close the ring
    assert links(column[:8], ring.shape, V5E) == 1  # half of it does not
    cube, slab = piece_of(V5P, (4, 4, 4)), piece_of(V5P, (2, 4, 4))
    assert links(cube.devices, cube.shape, V5P) == 6
    assert links(slab.devices, slab.shape, V5P) == 3


def test_seconds_of_exchanges_by_hand():
    piece = piece_of(V5E, (2, 2))
    # 3/4 of 1 GB through two links of 50 GB/s; a sum twice.
    assert seconds("all-gather", 1e9, (), piece) == pytest.approx(0.75 / 100)
    assert seconds("reduce-scatter", 1e9, (), piece) == pytest.approx(0.75 / 100)
    assert seconds("all-reduce", 1e9, (), piece) == pytest.approx(1.5 / 100)
    # Half of it through one.
    assert seconds("all-gather", 1e9, ((0, 1), (2, 3)), piece) == pytest.approx(0.5 / 50)
    assert seconds("collective-permute", 1e9, ((0, 1),), piece) == pytest.approx(1 / 50)


def test_seconds_between_slices_by_hand():
    piece = piece_of(V5E, (2, 2), slices=2)
    within, between = 2 * 0.75 / 100, 2 * 0.5 * (1 / 4) / 3.125
    assert seconds("all-reduce", 1e9, (), piece) == pytest.approx(within + between)
    assert seconds("all-gather", 1e9, ((0, 4),), piece) == pytest.approx(0.5 / 3.125)


def test_the_estimate_by_hand():
    found = estimate(V5E, 197e12, 819e9 / 2, [(Collective("all-reduce", 1.0, (), count=3), 0.1)])
    assert found == pytest.approx((1.0, 0.5, 0.3))
    assert (found.limit, found.overlapped, found.serial) == ("compute", 1.0, pytest.approx(1.8))


def counted(function, *shapes, loops=True):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return count_flops(jax.make_jaxpr(function)(*arguments), loops)


def test_operations_of_products_loops_and_branches():
    product = 2 * 3 * 4 * 5
    assert counted(lambda a, b: a @ b, (3, 4), (4, 5)) == product
    assert counted(lambda a, b: jnp.einsum("nij,njk->nik", a, b), (7, 3, 4), (7, 4, 5)) == (
        7 * product
    )
    loop = lambda x, w: jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0].sum()  # noqa: E731
    assert counted(loop, (3, 4), (6, 4, 4)) == 6 * 2 * 3 * 4 * 4
    assert counted(loop, (3, 4), (6, 4, 4), loops=False) == 2 * 3 * 4 * 4
    assert counted(jax.grad(loop, argnums=(0, 1)), (3, 4), (6, 4, 4)) == 3 * 6 * 2 * 3 * 4 * 4
    again = jax.value_and_grad(jax.checkpoint(loop), argnums=(0, 1))
    assert counted(again, (3, 4), (6, 4, 4)) == 4 * 6 * 2 * 3 * 4 * 4
    branch = lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: (a @ b) @ (b.T @ b))  # noqa: E731
    assert counted(branch, (3, 4), (4, 5)) == product + 2 * 5 * 4 * 5 + 2 * 3 * 5 * 5


def test_what_nobody_reads_does_not_count():
    def grad_only(a, b):
        value, pull = jax.vjp(jax.jit(lambda a: a @ b), a)
        return pull(jnp.ones_like(value))

    assert counted(grad_only, (3, 4), (4, 5)) == 2 * 3 * 4 * 5
    unread = lambda a, b: jax.lax.scan(lambda c, x: (c, x @ b), 0.0, a)[0]  # noqa: E731
    assert counted(unread, (7, 3, 4), (4, 5)) == 0


@pytest.mark.parametrize("stride", [1, 2])
def test_operations_of_convolutions_and_their_gradients(stride):
    def conv(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    shapes, side = ((2, 8, 8, 3), (3, 3, 3, 5)), 8 // stride
    forward = 2 * 2 * side**2 * 5 * 9 * 3
    assert counted(conv, *shapes) == forward
    by_both = jax.grad(lambda *arguments: jnp.sin(conv(*arguments)).sum(), argnums=(0, 1))
    assert counted(by_both, *shapes) == 3 * forward


@pytest.mark.parametrize(
    "name", ["v5e", "v5e:4", "v5e:4x4x4", "v5p:4x4", "v9:2x2", "cpu", "cpu:0", "v5e:4x-4", ""]
)
def test_unknown_topologies_are_told_the_known_forms(name):
    with pytest.raises(UserError, match=r"unknown --topology.*v5e:4x4.*v4:2x2x1.*cpu:8.*local"):
        topology.open_slice(name)


def test_a_missing_tpu_compiler_is_named(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'ldm_jax\[tpu\]'"):
        topology.prepare("v5e:4x4")


def test_stand_ins_and_devices_at_hand():
    assert len(topology.open_slice("cpu:4").devices) == 4
    assert topology.open_slice("cpu:4").chip is None
    assert topology.open_slice("local").devices == jax.devices()
    with pytest.raises(UserError, match="only 8 stand-ins"):
        topology.open_slice("cpu:64")
    with pytest.raises(UserError, match="--slices=2"):
        topology.open_slice("local", slices=2)
