import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ldm_jax import images


def noise(count, size=5, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


@pytest.mark.parametrize("xp", [np, jnp])
def test_float_and_back(xp):
    levels = xp.arange(256, dtype=np.uint8).reshape(16, 16)
    floats = images.to_float(levels)
    assert isinstance(floats, type(levels)) and floats.dtype == np.float32
    assert float(floats.min()) == -1 and float(floats.max()) == 1
    back = images.to_uint8(floats)
    assert isinstance(back, type(levels)) and back.dtype == np.uint8
    np.testing.assert_array_equal(back, levels)


@pytest.mark.parametrize("xp", [np, jnp])
def test_to_uint8_clips_and_rounds(xp):
    values = xp.asarray([-3.0, -1.0, 0.004, 1.0, 7.0], dtype=np.float32)
    np.testing.assert_array_equal(images.to_uint8(values), [0, 0, 128, 255, 255])
    half = images.to_uint8(xp.asarray([0.5], dtype=np.float16))  # computed in float32
    np.testing.assert_array_equal(half, [191])


def test_make_grid():
    tiles = noise(5, 4)
    grid = images.make_grid(tiles, columns=3, padding=2, fill=7)
    assert grid.shape == (2 * 6 + 2, 3 * 6 + 2, 3) and grid.dtype == np.uint8
    np.testing.assert_array_equal(grid[2:6, 2:6], tiles[0])
    np.testing.assert_array_equal(grid[2:6, 14:18], tiles[2])
    np.testing.assert_array_equal(grid[8:12, 8:12], tiles[4])
    assert (grid[8:12, 14:18] == 7).all() and (grid[:2] == 7).all()
    assert images.make_grid(noise(16, 4), padding=0).shape == (16, 16, 3)
    assert images.make_grid(noise(2, 4), columns=8, padding=0).shape == (4, 8, 3)


def test_pairs_grid_puts_the_neighbour_below():
    a, b = noise(3, 4, 1), noise(3, 4, 2)
    grid = images.pairs_grid(a, b, columns=3, padding=1)
    assert grid.shape == (10, 16, 3)
    np.testing.assert_array_equal(grid[1:5, 6:10], a[1])
    np.testing.assert_array_equal(grid[5:9, 6:10], b[1])


def test_reconstruction_grid_shows_the_amplified_signed_difference():
    a = np.full((2, 4, 4, 3), 100, np.uint8)
    b = a.copy()
    b[0, 0, 0] = [101, 90, 250]  # a level more, ten less, far more
    b[1] = 60
    grid = images.reconstruction_grid(a, b, columns=2, padding=1)
    assert grid.shape == (3 * 4 + 2, 2 * 4 + 3, 3) and grid.dtype == np.uint8
    np.testing.assert_array_equal(grid[1:5, 1:5], a[0])
    np.testing.assert_array_equal(grid[5:9, 1:5], b[0])
    np.testing.assert_array_equal(grid[9, 1], [132, 88, 255])
    np.testing.assert_array_equal(grid[10:13, 1:5], 128)
    np.testing.assert_array_equal(grid[9:13, 6:10], 0)  # 40 levels less


def test_save_png_makes_directories_and_leaves_no_other_file(tmp_path):
    image = noise(1)[0]
    path = tmp_path / "deep" / "er" / "x.png"
    images.save_png(path, image)
    images.save_png(str(path), image)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), image)
    assert [p.name for p in path.parent.iterdir()] == ["x.png"]


def test_a_failed_save_keeps_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    images.save_png(path, noise(1)[0])
    before = path.read_bytes()

    def fail(self, file, **options):
        open(file, "wb").write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="no space"):
        images.save_png(path, noise(1, seed=1)[0])
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_save_numbered(tmp_path):
    batch = noise(3)
    paths = images.save_numbered(tmp_path, batch, start=9)
    assert [path.name for path in paths] == ["000009.png", "000010.png", "000011.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(paths[2])), batch[2])


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_nearest_agrees_with_the_definition(chunk):
    samples, references = noise(10, seed=1), noise(30, seed=2)
    difference = samples[:, None].astype(float) - references[None]
    distances = np.sqrt((difference**2).mean(axis=(2, 3, 4)))
    indices, found = images.nearest(samples, references, chunk=chunk)
    np.testing.assert_array_equal(indices, distances.argmin(axis=1))
    np.testing.assert_allclose(found, distances.min(axis=1), rtol=1e-12)


def test_nearest_finds_copies_exactly():
    references = noise(40, 32)
    indices, distances = images.nearest(references[[31, 4]], references, chunk=16)
    np.testing.assert_array_equal(indices, [31, 4])
    np.testing.assert_array_equal(distances, [0.0, 0.0])
    almost = references[[7]].copy()
    almost[0, 0, 0, 0] ^= 1
    _, distance = images.nearest(almost, references)
    assert distance[0] == pytest.approx(np.sqrt(1 / almost[0].size))
