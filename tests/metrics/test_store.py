"""Features that are kept in a folder: what is done is not done again."""

import numpy as np
import pytest

from ldm_jax.errors import UserError
from ldm_jax.metrics.store import FeatureStore, Kinds, bytes_needed, find_store, shared_kinds

KINDS = Kinds({"a.pool": 3, "a.logits": 2}, ("a.pool",), ("a.logits",))


def batch(count, seed=0):
    random = np.random.RandomState(seed)
    return {
        "a.pool": random.standard_normal((count, 3)).astype(np.float32),
        "a.logits": random.standard_normal((count, 2)).astype(np.float32),
    }


def test_a_store_goes_on_where_it_was_saved(tmp_path):
    first, second, lost = batch(5), batch(4, 1), batch(4, 2)
    store = FeatureStore(tmp_path / "s", {"seed": 1}, KINDS)
    store.add(first, 5)
    store.save()
    store.add(lost, 4)  # cut off before it is saved
    (tmp_path / "s" / "features_000000009.npz.7.tmp").write_bytes(b"half")
    store = FeatureStore(tmp_path / "s", {"seed": 1}, KINDS)
    assert store.done == 5
    store.add(second, 4)
    store.save()
    found = FeatureStore(tmp_path / "s", {"seed": 1}, KINDS).result()
    assert found.count == 9
    both = {name: np.concatenate([first[name], second[name]]) for name in first}
    np.testing.assert_array_equal(found.features["a.logits"], both["a.logits"])
    mean, covariance = found.statistics["a.pool"]
    pool = both["a.pool"].astype(np.float64)
    np.testing.assert_allclose(mean, pool.mean(0), rtol=1e-12)  # float64, another order
    np.testing.assert_allclose(covariance, np.cov(pool.T), rtol=1e-12)
    names = sorted(path.name for path in (tmp_path / "s").iterdir())
    assert names == ["features_000000005.npz", "features_000000009.npz", "statistics.npz"]


def test_another_origin_or_wish_begins_anew(tmp_path):
    for about, kinds in (({"seed": 2}, KINDS), ({"seed": 1}, KINDS._replace(kept=("a.pool",)))):
        store = FeatureStore(tmp_path, {"seed": 1}, KINDS)
        store.add(batch(5), 5)
        store.save()
        assert FeatureStore(tmp_path, {"seed": 1}, KINDS).done == 5
        assert FeatureStore(tmp_path, about, kinds).done == 0
        assert not list(tmp_path.iterdir())


def test_a_complete_store_serves_who_wants_less(tmp_path):
    place, kinds = find_store(tmp_path, {"seed": 1}, KINDS, 5)
    assert kinds == KINDS and not place.exists()
    store = FeatureStore(place, {"seed": 1}, KINDS)
    store.add(batch(5), 5)
    store.save()
    less = Kinds({"a.pool": 3}, ("a.pool",), ())
    assert find_store(tmp_path, {"seed": 1}, less, 5) == (place, KINDS)
    assert find_store(tmp_path, {"seed": 1}, KINDS, 5) == (place, KINDS)
    more = Kinds({"a.pool": 3}, (), ("a.pool",))
    for about, wanted, count in (({"seed": 1}, more, 5), ({"seed": 1}, less, 6), ({}, less, 5)):
        other, kinds = find_store(tmp_path, about, wanted, count)
        assert other != place and kinds == wanted
    (place / "statistics.npz").write_bytes(b"PK")
    assert find_store(tmp_path, {"seed": 1}, less, 5)[1] == less


def test_damaged_files_begin_anew(tmp_path):
    store = FeatureStore(tmp_path, {}, KINDS)
    store.add(batch(5), 5)
    store.save()
    (tmp_path / "features_000000005.npz").write_bytes(b"no archive")
    assert FeatureStore(tmp_path, {}, KINDS).done == 0
    store.save()
    (tmp_path / "statistics.npz").write_bytes(b"")
    assert FeatureStore(tmp_path, {}, KINDS).done == 0


def test_features_of_some_images_are_kept(tmp_path):
    store = FeatureStore(tmp_path, {}, KINDS)
    features = batch(4)
    store.add(features, 4, np.array([True, False, False, True]))
    found = store.result()
    np.testing.assert_array_equal(found.features["a.logits"], features["a.logits"][[0, 3]])
    np.testing.assert_allclose(  # float64, another order
        found.statistics["a.pool"].mean, features["a.pool"].mean(0, np.float64), rtol=1e-12
    )
    assert found.count == 4


def test_what_is_wanted_and_what_it_takes():
    outputs = {"a.pool": 3, "a.logits": 2, "a.spatial": 5}
    kinds = shared_kinds(outputs, ["a.pool"], ["a.logits", "a.pool"])
    assert kinds == Kinds({"a.pool": 3, "a.logits": 2}, ("a.pool",), ("a.pool", "a.logits"))
    # 50,000 images of Inception: two sums of 32 MiB, and 2 x 390 MiB of features.
    inception = Kinds({"pool": 2048}, ("pool",), ("pool",))
    need = bytes_needed(inception, 50_000, 50_000)
    assert 2 * 8 * 2048**2 + 8 * 2048 * 50_000 < need < 1.1e9


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file/store.*choose another --out"):
        FeatureStore(tmp_path / "file" / "store", {}, KINDS)
