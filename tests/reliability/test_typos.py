"""Misspelt keys and wrong types of config values are refused, in a file and as flags."""

from benchmarks.reliability import typos


def test_all_are_refused(tmp_path):
    found = typos.measure(tmp_path, everywhere=False)
    assert found["keys"] > 200 and found["tried"] > 5 * found["keys"]
    assert found["accepted"] == []


def test_misspelt_keys_are_no_keys_and_as_many_as_letters():
    known = typos.keys()
    for key in known:
        found = list(typos.misspelt(key))
        assert len(found) == len(key.rpartition(".")[2])
        assert not set(found) & set(known)
        assert all(sum(a != b for a, b in zip(key, other, strict=True)) == 1 for other in found)
