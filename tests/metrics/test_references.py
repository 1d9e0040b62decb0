"""References are what their images say, and files of other networks are refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from ldm_jax.errors import UserError
from ldm_jax.metrics.features import make_extractor
from ldm_jax.metrics.image_archive import open_images
from ldm_jax.metrics.references import (
    fingerprint,
    from_features,
    load_reference,
    save_reference,
)

RNG = np.random.RandomState(0)
IMAGES = RNG.randint(0, 256, (21, 6, 6, 3)).astype(np.uint8)


def apply(_, images):
    means = images.astype(jnp.float32).mean((1, 2))
    return {"pool": means, "spatial": images[:, 0, 0, :2].astype(jnp.float32)}


MESH = Mesh(np.array(jax.devices()[:1]), ("data",))
EXTRACTOR = make_extractor(
    "inception", "a" * 64, "tensorflow", {"pool": 3, "spatial": 2}, apply, {}, MESH
)


def features(size: int = 8):
    for start in range(0, len(IMAGES), size):
        yield EXTRACTOR.extract(IMAGES[start : start + size])


def make(keep: bool = True):
    return from_features(features(), EXTRACTOR, resolution=6, origin="random images", keep=keep)


def check_statistics(reference) -> None:
    pool, corners = IMAGES.mean((1, 2)), IMAGES[:, 0, 0, :2]
    # Means in float32, statistics in float64.
    np.testing.assert_allclose(reference.mean, pool.mean(0), rtol=1e-6)
    np.testing.assert_allclose(reference.covariance, np.cov(pool, rowvar=False), rtol=1e-4)
    np.testing.assert_allclose(reference.spatial.mean, corners.mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        reference.spatial.covariance, np.cov(corners, rowvar=False), rtol=1e-12
    )


def test_statistics_of_features():
    reference = make()
    check_statistics(reference)
    np.testing.assert_allclose(reference.features, IMAGES.mean((1, 2)), rtol=1e-6)
    assert (reference.count, reference.resolution, reference.network) == (21, 6, "inception")
    assert (reference.digest, reference.resize) == ("a" * 64, "tensorflow")
    assert make(keep=False).features is None
    # What is said of the images counts, and sums of other batches are the same reference.
    parts = [
        from_features(features(size), EXTRACTOR, resolution=6, origin="", made_of="ab")
        for size in (8, 21)
    ]
    assert fingerprint(parts[0]) == fingerprint(parts[1]._replace(mean=parts[1].mean + 1e-9))
    assert fingerprint(parts[0]) != fingerprint(parts[0]._replace(made_of="cd"))
    assert fingerprint(parts[0]) != fingerprint(parts[0]._replace(digest="b" * 64))
    assert fingerprint(reference) == fingerprint(make(keep=False))
    assert fingerprint(reference) != fingerprint(reference._replace(spatial=None))


def test_written_and_read(tmp_path):
    path, reference = tmp_path / "new" / "reference.npz", make()._replace(width=9, made_of="ab")
    save_reference(path, reference)
    found = load_reference(path, EXTRACTOR, features=True, spatial=True)
    jax.tree.map(np.testing.assert_array_equal, found, reference)
    assert [p.name for p in path.parent.iterdir()] == ["reference.npz"]
    with np.load(path) as file:  # as the other codes read it
        np.testing.assert_array_equal(file["mu"], reference.mean)
        np.testing.assert_array_equal(file["sigma_s"], reference.spatial.covariance)
    bare = reference._replace(features=None, spatial=None)
    save_reference(path, bare)
    jax.tree.map(np.testing.assert_array_equal, load_reference(path, EXTRACTOR), bare)


def test_another_network_is_refused_unless_forced(tmp_path):
    path = tmp_path / "reference.npz"
    save_reference(path, make())
    for other, message in [
        (EXTRACTOR._replace(digest="b" * 64), "other weights.*aaaaaaaaaaaa, here bbbbbbbbbbbb"),
        (EXTRACTOR._replace(resize="pytorch", digest="b" * 64), "resize rule 'tensorflow'"),
        (EXTRACTOR._replace(name="dino"), "network 'inception'.*of 'dino'"),
    ]:
        with pytest.raises(UserError, match=message):
            load_reference(path, other)
        assert load_reference(path, other, force=True).digest == "a" * 64
    narrow = EXTRACTOR._replace(outputs={"pool": 2048})
    with pytest.raises(UserError, match="has 2048 such features"):  # no force makes them fit
        load_reference(path, narrow, force=True)


def statistics_file(path, spatial=True, images=None):
    reference = make()
    arrays = {"mu": reference.mean, "sigma": reference.covariance}
    if spatial:
        arrays |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.covariance}
    if images is not None:
        arrays["arr_0"] = images
    np.savez(path, **arrays)
    return path


def test_file_of_the_adm_suite(tmp_path):
    path = statistics_file(tmp_path / "VIRTUAL.npz", images=IMAGES[:9])
    found = load_reference(path, EXTRACTOR, features=True, spatial=True)
    check_statistics(found)  # of all images, not of the few that lie beside them
    np.testing.assert_allclose(found.features, IMAGES[:9].mean((1, 2)), rtol=1e-6)
    assert (found.count, found.digest, found.resize) == (0, "", "tensorflow")
    assert found.size == (6, 6) and found.made_of == ""
    assert load_reference(path, EXTRACTOR).features is None  # not extracted in vain
    with pytest.raises(UserError, match=r"resize rule 'tensorflow', but.*with 'pytorch'"):
        load_reference(path, EXTRACTOR._replace(resize="pytorch"))


def test_file_of_pytorch_fid(tmp_path):
    path = statistics_file(tmp_path / "stats.npz", spatial=False)
    for resize in ("pytorch", "tensorflow"):  # it does not say which
        found = load_reference(path, EXTRACTOR._replace(resize=resize))
        np.testing.assert_array_equal(found.mean, make().mean)
        assert (found.digest, found.resize, found.count, found.spatial) == ("", "", 0, None)
    with pytest.raises(UserError, match="statistics only, but KID"):
        load_reference(path, EXTRACTOR, features=True)
    with pytest.raises(UserError, match="sFID needs"):
        load_reference(path, EXTRACTOR, spatial=True)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_file_of_images(tmp_path, save):
    path = tmp_path / "images.npz"
    save(path, IMAGES, np.arange(len(IMAGES)))  # with labels, as the ADM suite's samples
    found = load_reference(path, EXTRACTOR, features=True)
    check_statistics(found)
    assert (found.count, found.digest, found.size) == (21, "a" * 64, (6, 6))
    other = tmp_path / "other.npz"
    save(other, IMAGES[::-1])
    digests = [fingerprint(load_reference(name, EXTRACTOR)) for name in (path, other, path)]
    assert digests[0] == digests[2] != digests[1]
    assert len(found.features) == 21


def test_images_of_a_file_piece_by_piece(tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, IMAGES)
    images = open_images(path)
    assert images.shape == IMAGES.shape
    parts = list(images.batches(8, start=3))
    assert [len(part) for part in parts] == [8, 8, 2]
    np.testing.assert_array_equal(np.concatenate(parts), IMAGES[3:])
    assert open_images(statistics_file(tmp_path / "none.npz")) is None


def test_damaged_images_are_refused(tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, IMAGES)
    images, data = open_images(path), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"images\.npz is damaged"):
        list(images.batches())


def test_files_that_are_no_reference(tmp_path):
    path = tmp_path / "file.npz"

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            load_reference(path, EXTRACTOR)

    refused("no reference at")
    path.write_bytes(b"no archive")
    refused("cannot be read as .npz")
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    refused("single array")
    np.savez(path, weights=np.zeros(3))
    refused("it has weights, but neither statistics")
    np.savez(path, mu=np.zeros(3))
    refused("no covariance")
    np.savez(path, mu=np.zeros(3), sigma=np.eye(4))
    refused(r"mean \(3,\) and a covariance \(4, 4\)")
    np.savez(path, mu=np.zeros(3), sigma=np.full((3, 3), np.nan))
    refused("not finite")
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3), about=json.dumps({"count": 3}))
    refused("does not say what it is of")
    np.savez(path, IMAGES[..., :1])
    refused("file.npz: .*grey images")
    np.savez(path, IMAGES.astype(np.float32))
    refused("file.npz: .*uint8")
    ragged = np.empty(2, object)
    ragged[:] = [IMAGES[0], IMAGES[0, :3]]
    np.savez(path, ragged)
    refused("images of several sizes")
    statistics_file(path)
    path.write_bytes(path.read_bytes()[:-40])
    refused("cannot be read as .npz")


def test_too_few_images_and_bad_names(tmp_path):
    with pytest.raises(UserError, match="of one image need at least 2 images, got 1"):
        from_features([EXTRACTOR.extract(IMAGES[:1])], EXTRACTOR, resolution=6, origin="one image")
    with pytest.raises(UserError, match="at least 2 images, got 0"):
        from_features([], EXTRACTOR, resolution=6, origin="nothing")
    with pytest.raises(UserError, match="needs the output 'pool'"):
        from_features([], EXTRACTOR._replace(outputs={"logits": 3}), resolution=6, origin="")
    with pytest.raises(UserError, match=r"must end in \.npz"):
        save_reference(tmp_path / "reference", make())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_reference(tmp_path / "file" / "reference.npz", make())
