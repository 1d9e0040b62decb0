import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import builders, memory, random
from ldm_jax import config as config_lib
from ldm_jax.errors import UserError
from ldm_jax.first_stage import tiled
from ldm_jax.pipeline import Pipeline

SIDES = [(7, 4), (8, 8), (9, 8), (13, 8), (64, 9), (101, 16), (128, 12), (5, 16)]
NOISE = np.random.RandomState(0)


@pytest.mark.parametrize(("side", "tile"), SIDES)
@pytest.mark.parametrize("scale", [1, 3])
def test_weights_add_up_to_one_and_fade_linearly(side, tile, scale):
    tile = min(side, tile)
    starts = tiled.starts(side, tile)
    assert starts[0] == 0 and starts[-1] == side - tile
    gaps = np.diff(starts)
    assert (gaps >= 1).all() and (gaps <= tile - tile // 4).all()
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1

    weights = tiled.fade(scale * starts, scale * tile)
    assert weights.dtype == np.float32 and weights.min() >= 0
    total, covered = np.zeros(scale * side), np.zeros(scale * side, int)
    for start, weight in zip(scale * starts, weights, strict=True):
        total[start : start + scale * tile] += weight
        covered[start : start + scale * tile] += 1
    np.testing.assert_allclose(total, 1, rtol=0, atol=1e-7)  # one rounding to float32 each
    for start, weight in zip(scale * starts, weights, strict=True):
        alone = covered[start : start + scale * tile] == 1
        assert (weight[alone] == 1).all()


def test_a_fade_is_a_straight_line():
    starts = np.array([0, 6])
    ramp = (np.arange(2) + 0.5) / 2
    want = np.ones((2, 8))
    want[0, 6:], want[1, :2] = 1 - ramp, ramp
    np.testing.assert_allclose(tiled.fade(starts, 8), want, rtol=0, atol=1e-7)


@pytest.mark.parametrize("size", [(17, 30), (12, 5), (3, 3)])
@pytest.mark.parametrize("scale", [(1, 1), (1, 3), (2, 1)])
def test_what_does_not_depend_on_the_tile_comes_back(size, scale):
    a, b = scale
    x = NOISE.uniform(-1, 1, (2, a * size[0], a * size[1], 3)).astype(np.float32)

    def whole(x):
        return x[:, ::a, ::a].repeat(b, 1).repeat(b, 2)

    # A sum of at most four products of two float32 weights.
    np.testing.assert_allclose(tiled.map_tiles(whole, x, 8, scale), whole(x), rtol=0, atol=5e-7)
    constant = tiled.map_tiles(lambda x: np.full_like(whole(x), 0.7), x, 8, scale)
    np.testing.assert_allclose(constant, 0.7, rtol=0, atol=5e-7)


def centred(x):
    """Depends on all of the tile, as group norms do; each image on its own."""
    return (x - x.mean((1, 2, 3), keepdims=True)).repeat(2, 1).repeat(2, 2)


def test_inside_a_tile_the_result_is_bit_equal_to_that_tile():
    x = NOISE.uniform(-1, 1, (1, 11, 20, 3)).astype(np.float32)
    out = tiled.map_tiles(centred, x, 8, (1, 2))
    rows, columns = tiled.starts(11, 8), tiled.starts(20, 8)
    assert (list(rows), list(columns)) == ([0, 3], [0, 6, 12])
    # Rows 3 to 7 and columns 6, 7, 12, 13 are shared.
    for row, alone_row in zip(rows, (slice(0, 3), slice(8, 11)), strict=True):
        for column, alone in zip(columns, (slice(0, 6), slice(8, 12), slice(14, 20)), strict=True):
            tile = centred(x[:, row : row + 8, column : column + 8])[0]
            place = tuple(slice(2 * s.start, 2 * s.stop) for s in (alone_row, alone))
            inside = tuple(
                slice(s.start - 2 * at, s.stop - 2 * at)
                for s, at in zip(place, (row, column), strict=True)
            )
            np.testing.assert_array_equal(out[0][place], tile[inside])
    shared = out[0, 6:16]
    assert not np.allclose(shared[:, :12], centred(x[:, :8, :8])[0][6:16, :12], atol=1e-3)


@pytest.mark.parametrize("size", [(8, 8), (3, 8), (5, 6)])
def test_one_tile_is_the_untiled_result(size):
    x = NOISE.uniform(-1, 1, (1, *size, 3)).astype(np.float32)
    np.testing.assert_array_equal(tiled.map_tiles(centred, x, 8, (1, 2)), centred(x))


def test_images_go_one_by_one_and_tiles_share_one_program():
    shapes = []

    @jax.jit
    def apply(x):
        shapes.append(x.shape)  # of a trace
        return centred(x)

    x, calls = NOISE.uniform(-1, 1, (2, 19, 13, 3)).astype(np.float32), []
    out = tiled.map_tiles(apply, x, 8, (1, 2), lambda *done: calls.append(done))
    assert shapes == [(1, 8, 8, 3)]
    assert calls == [(i, 12) for i in range(1, 13)]  # 2 images of 3 x 2 tiles
    for image, result in zip(x, out, strict=True):
        np.testing.assert_array_equal(tiled.map_tiles(apply, image[None], 8, (1, 2))[0], result)


@pytest.mark.parametrize(("tile", "near"), [(30, 32), (4, 32), (0, 32), (-8, 32), (100, 96)])
def test_tiles_that_do_not_work_are_refused(tile, near):
    with pytest.raises(UserError, match=f"tiles of {tile} pixels: .* of 8, .*try {near}"):
        tiled.check_tile(tile, 8)


def test_sides_that_do_not_work_are_refused():
    with pytest.raises(UserError, match=r"30x41 .* of 8: crop to 24x40 or pad to 32x48"):
        tiled.check_sides(30, 41, 8)
    with pytest.raises(UserError, match=r"4x40 .* of 8: pad to 8x40"):
        tiled.check_sides(4, 40, 8)


@pytest.mark.parametrize(
    ("host", "device", "fits"),
    [
        (None, None, True),  # a system that does not say
        (50, None, True),
        (49, None, False),
        (20, 30, True),
        (19, 30, False),
        (20, 29, False),
    ],
)
def test_what_does_not_fit_is_refused(monkeypatch, host, device, fits):
    monkeypatch.setattr(memory, "free_on_host", lambda: host)
    monkeypatch.setattr(memory, "free_on_device", lambda: device)
    need = tiled.Memory(weights=10, tile=30, canvas=20)
    if fits:
        need.check_fits("a.png", "use --tile=512")
    else:
        with pytest.raises(UserError, match=r"^a.png needs .* are free: use --tile=512$"):
            need.check_fits("a.png", "use --tile=512")


# -- through a pipeline ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    config = config_lib.get_config()
    config.first_stage.update(kind="kl", width=8, mult=(1, 1), depth=1, norm_groups=4)
    config.first_stage.update(z_channels=4, channels=4, attn_downsample=(), mid_attn=False)
    module, keys = builders.build_first_stage(config), random.example_keys(jax.random.key(0), 1)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)), keys)
    variables = jax.tree.map(lambda x: NOISE.uniform(-0.3, 0.3, x.shape).astype("f"), shapes)
    variables["latents"] = {"shift": np.full(4, 0.1, "f"), "scale": np.full(4, 2, "f")}
    return Pipeline(config, {"first_stage": variables}, step=0)


def test_a_pipeline_in_one_tile_is_the_whole(pipe):
    pixels = NOISE.randint(0, 256, (1, 16, 24, 3)).astype(np.uint8)
    latents = pipe.encode(pixels)
    assert latents.shape == (1, 8, 12, 4)
    np.testing.assert_array_equal(pipe.encode(pixels, tile=24), latents)
    np.testing.assert_array_equal(pipe.decode(latents, tile=24), pipe.decode(latents))


def test_a_pipeline_in_tiles(pipe):
    pixels = NOISE.randint(0, 256, (2, 26, 16, 3)).astype(np.uint8)
    latents = pipe.encode(pixels, tile=16)
    decoded = pipe.decode(latents, tile=16)
    assert latents.shape == (2, 13, 8, 4) and decoded.shape == pixels.shape
    assert decoded.dtype == np.float32 and np.abs(decoded).max() <= 1
    # Tiles begin at rows 0 and 5 of the latents, so that rows 0 to 4 and 8 to 12 have but one.
    for image in range(2):
        for top, alone in ((0, slice(0, 5)), (5, slice(8, 13))):
            one = slice(image, image + 1)
            tile = np.asarray(pipe.encode(pixels[one, 2 * top : 2 * top + 16]))[0]
            inside = slice(alone.start - top, alone.stop - top)
            np.testing.assert_array_equal(latents[image, alone], tile[inside])
            tile = np.asarray(pipe.decode(latents[one, top : top + 8]))[0]
            pair = (slice(2 * s.start, 2 * s.stop) for s in (alone, inside))
            np.testing.assert_array_equal(decoded[image, next(pair)], tile[next(pair)])


def test_memory_is_that_of_a_tile(pipe, monkeypatch):
    whole, tiles = pipe.memory(512, 256), pipe.memory(512, 256, tile=32)
    assert tiles.weights == whole.weights
    assert tiles.weights == sum(x.nbytes for x in jax.tree.leaves(pipe.variables))
    # uint8 in and out, float32 between, and latents of 4 channels.
    assert tiles.canvas == whole.canvas == 512 * 256 * 18 + 256 * 128 * 16
    features = 4 * 8  # bytes of the widest map per pixel, of which several are alive at once
    assert whole.tile > 2 * 512 * 256 * features
    assert tiles.tile < 100 * 32 * 32 * features + memory.SCRATCH_BYTES
    assert pipe.memory(1024, 1024, tile=32).tile == tiles.tile
    monkeypatch.setattr(memory, "held_by_process", lambda: 10**9)
    text = f"at most {1 + (whole.tile + whole.canvas) / 1e9:.2f} GB (1.00 now, one tile "
    assert whole.bound() == text + f"{whole.tile / 1e9:.2f}, canvas 0.00)"
    monkeypatch.setattr(memory, "free_on_device", lambda: 10**9)
    assert re.fullmatch(r"at most \S+ GB on the device and 1\.00 GB on the host", whole.bound())


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((1, 8, 8, 4), np.uint8), r"\(1, 8, 8, 4\), but must be \(B, H, W, 3\)"),
        (np.zeros((8, 8, 3), np.uint8), r"\(8, 8, 3\), but must be"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"\(0, 8, 8, 3\), but must be"),
        (np.zeros((1, 8, 8, 3), np.int64), "int64, but must be uint8, or float32"),
        (np.full((1, 8, 8, 3), np.nan), "NaN or infinite"),
        (np.full((1, 8, 8, 3), -np.inf, np.float32), "NaN or infinite"),
        (np.full((1, 8, 8, 3), 1e300), "NaN or infinite"),
        (np.zeros((1, 9, 8, 3), np.uint8), "9x8 .* multiples of 2: crop to 8x8 or pad to 10x8"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("tile", [None, 16])
def test_pixels_that_cannot_be_encoded_are_refused(pipe, pixels, message, tile):
    with pytest.raises(UserError, match=message):
        pipe.encode(pixels, tile)


@pytest.mark.parametrize("shape", [(4, 4, 4), (1, 4, 4, 3), (1, 0, 4, 4)])
@pytest.mark.parametrize("tile", [None, 16])
def test_latents_that_cannot_be_decoded_are_refused(pipe, shape, tile):
    with pytest.raises(UserError, match=r"must be \(B, h, w, 4\)"):
        pipe.decode(np.zeros(shape, np.float32), tile)


def test_a_tile_of_a_pipeline_is_checked(pipe):
    for call in (
        lambda: pipe.encode(np.zeros((1, 8, 8, 3), np.uint8), tile=15),
        lambda: pipe.decode(np.zeros((1, 4, 4, 4), np.float32), tile=15),
        lambda: pipe.memory(8, 8, tile=15),
    ):
        with pytest.raises(UserError, match="tiles of 15 pixels"):
            call()


def test_a_black_image_stays_finite(pipe):
    black = np.zeros((1, 16, 16, 3), np.uint8)
    assert np.isfinite(pipe.decode(pipe.encode(black, tile=16), tile=16)).all()
