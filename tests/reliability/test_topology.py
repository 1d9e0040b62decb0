"""A run that goes on with another number of devices; of processes, see test_distributed.py."""

import pytest

from benchmarks.reliability import topology


@pytest.mark.slow  # tests/training/test_meshes.py has a quick one
@pytest.mark.parametrize("split", topology.MESHES)
@pytest.mark.parametrize("name", ["unet", "dit"])
def test_it_sees_the_same_data_and_learns_the_same(name, split, tmp_path):
    found = topology.measure(name, tmp_path, split=split)
    assert set(found) == {1, 2, 4}
    for moved in found.values():
        assert moved["unequal"] == {} and moved["examples_equal"]
        # 20 updates amplify the rounding of sums in another order; as promised to users.
        assert moved["apart"] <= 1e-5
