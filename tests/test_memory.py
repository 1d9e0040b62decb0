import os
import types

import jax
import jax.numpy as jnp
import pytest

from ldm_jax import memory


def test_a_program_takes_its_results_and_what_lies_between():
    n = 256

    def apply(x):
        return jnp.sort(jnp.sort(x, axis=0), axis=1)  # not one loop: the first result must be kept

    program = jax.jit(apply).lower(jax.ShapeDtypeStruct((n, n), jnp.float32)).compile()
    taken = memory.program_bytes(program) - memory.SCRATCH_BYTES
    assert 4 * n * n <= taken <= 4 * (4 * n * n)


def test_free_memory_is_part_of_what_there_is():
    free = memory.free_on_host()
    if free is None:
        pytest.skip("this system does not say")
    assert 0 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("stats", "free"), [(None, None), ({}, None), ({"bytes_limit": 9, "bytes_in_use": 2}, 7)]
)
def test_only_accelerators_have_memory_of_their_own(monkeypatch, stats, free):
    device = types.SimpleNamespace(memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert memory.free_on_device() == free
