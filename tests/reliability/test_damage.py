"""Every file of a checkpoint, damaged in every way: then the one before is restored."""

import pytest

from benchmarks.reliability import damage


@pytest.mark.slow
def test_no_damage_is_restored(tmp_path):
    found = damage.measure(tmp_path)
    assert found["wrong"] == []
    assert found["trials"] > 2 * found["files"] > 20
    assert all(counts["fell_back"] for counts in found["kinds"].values())
