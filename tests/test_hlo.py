"""Exchanges, loops and cycles are read from the text of compiled programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ldm_jax import hlo

MESH = {"data": 2, "fsdp": 4, "tensor": 1}

# Forms that the CPU, GPU and TPU compilers print, cut down to what is read.
PROGRAM = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %gathered = f32[32,4]{1,0:T(8,128)} all-gather(%part), channel_id=1, replica_groups=[2,4]<=[8], \
dimensions={0}, use_global_device_ids=true, backend_config={"estimated_cycles":"100"}
  ROOT %out = (s32[], f32[8,4]{1,0}) tuple(%next, %part)
}

%condition (state: (s32[], f32[8,4])) -> pred[] {
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %limit = s32[]{:T(128)} constant(10)
  ROOT %go = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%all-reduce-scatter (x: bf16[64]) -> bf16[16] {
  %whole = bf16[64]{0} all-reduce(%x), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, \
to_apply=%add
  ROOT %mine = bf16[16]{0} dynamic-slice(%whole, %place), dynamic_slice_sizes={16}
}

%fused_computation.1 (x: f32[4]) -> (f32[4], f32[8]) {
  %begin = f32[8]{0} all-gather(%x), channel_id=3, replica_groups=mesh['axis_0'=4,'axis_1'=2], \
device_ids=([2,4]T(1,0)) {'axis_1'}, dimensions={0}
  ROOT %start = (f32[4]{0}, f32[8]{0}) custom-call(%begin), \
custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.2 (x: f32[4]) -> f32[8] {
  ROOT %middle = f32[8]{0} all-gather(%x), channel_id=3, \
replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %loop = (s32[], f32[8,4]{1,0}) while(%init), condition=%condition, body=%body
  %part = bf16[16]{0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter
  %a = (f32[4]{0}, f32[8]{0}) fusion(%z), kind=kCustom, calls=%fused_computation.1
  %b = f32[8]{0} fusion(%z), kind=kCustom, calls=%async_collective_fusion.2
  %sums = (f32[3]{0}, f32[]) all-reduce(%p, %q), channel_id=4, replica_groups={}, to_apply=%add
  %ring = (f32[6]{0}, f32[6]{0}, u32[], u32[]) collective-permute-start(%r), channel_id=5, \
source_target_pairs={{0,4},{4,0}}
  %rung = f32[6]{0} collective-permute-done(%ring)
  %scattered = f32[2]{0} reduce-scatter(%s), channel_id=6, replica_groups=[4,2]<=[2,4]T(1,0), \
dimensions={0}, to_apply=%add
  %swapped = f32[4,2]{1,0} all-to-all(%t), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}
  %alone = f32[7]{0} all-reduce(%u), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  ROOT %result = f32[8,4]{1,0} copy(%v), backend_config={"estimated_cycles":"7"}
}
"""


def test_each_exchange_is_counted_once_with_its_bytes_and_axes():
    found = [
        (each.kind, each.bytes, each.count, hlo.crossed_axes(each.groups, MESH))
        for each in hlo.collectives(PROGRAM)
    ]
    assert sorted(found) == sorted(
        [
            ("all-gather", 32 * 4 * 4, 10, ("fsdp",)),  # in the loop
            ("reduce-scatter", 64 * 2, 1, ("fsdp",)),  # a fusion of a sum
            ("all-gather", 8 * 4, 1, ("data",)),  # asynchronous, in two fusions
            ("all-reduce", 4 * 4, 1, ("data", "fsdp")),  # a tuple, over all devices
            ("collective-permute", 6 * 4, 1, ("data",)),  # start and done
            ("reduce-scatter", 2 * 2 * 4, 1, ("data",)),  # the result is one of two parts
            ("all-to-all", 8 * 4, 1, ("fsdp",)),
        ]
    )
    assert all(each.known for each in hlo.collectives(PROGRAM))


def test_cycles_count_loops_as_often_as_they_run():
    assert hlo.cycles(PROGRAM) == 10 * 100 + 7


def test_a_loop_of_unknown_length_is_said_so():
    program = PROGRAM.replace("direction=LT", "direction=NE")
    (gathered,) = [each for each in hlo.collectives(program) if each.bytes == 512]
    assert (gathered.count, gathered.known) == (1, False)
    told = program.replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}'
    )
    (gathered,) = [each for each in hlo.collectives(told) if each.bytes == 512]
    assert (gathered.count, gathered.known) == (3, True)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", ((0, 1), (2, 3))),
        ("replica_groups={}", ()),
    ],
)
def test_groups_of_devices(text, groups):
    assert hlo._groups(text) == groups


@pytest.mark.parametrize(
    ("shape", "size"),
    [("bf16[2,3]{1,0:T(8,128)(2,1)S(1)}", 12), ("pred[]", 1), ("s4[8]", 4), ("f8e4m3fn[5]", 5)],
)
def test_bytes_of_types(shape, size):
    assert hlo.bytes_of(shape) == size


def test_a_real_program_of_this_jax():
    """Weights are gathered in each turn of a scan; the text is that of the compiler at hand."""
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def chain(weights, x):
        gather = NamedSharding(mesh, PartitionSpec())
        step = lambda x, w: (jnp.sin(x @ jax.lax.with_sharding_constraint(w, gather)), None)  # noqa: E731
        return jax.lax.scan(step, x, weights)[0].sum()

    weights = jax.ShapeDtypeStruct(
        (5, 64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    )
    x = jax.ShapeDtypeStruct(
        (8, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data"))
    )
    found = hlo.collectives(jax.jit(chain).lower(weights, x).compile().as_text())
    gathered = [each for each in found if each.kind == "all-gather"]
    assert sum(each.count * each.bytes for each in gathered) == 5 * 64 * 64 * 4
    assert {hlo.crossed_axes(each.groups, dict(mesh.shape)) for each in gathered} == {("fsdp",)}
    summed = [each for each in found if each.kind == "all-reduce"]
    assert [(each.bytes, each.count) for each in summed] == [(4, 1)]
