"""Label maps and masks that a user gives to sampling."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data.condition_files import read_image, read_label_map, read_mask

from .helpers import ROTATED, noise, orientation, refuses, write


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_label_maps_keep_their_numbers(tmp_path, dtype):
    classes = np.arange(12, dtype=dtype).reshape(3, 4) * (1 if dtype == np.uint8 else 100)
    read = read_label_map(write(tmp_path / "a.png", classes), 1101, (3, 4))
    assert read.dtype == np.int32
    np.testing.assert_array_equal(read, classes)


def test_palette_and_one_bit_label_maps(tmp_path):
    indices = np.array([[0, 1], [2, 1]], np.uint8)
    palette = Image.fromarray(indices).convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 255, 0, 0])  # two classes of one colour
    path = write(tmp_path / "a.png", palette, transparency=0)
    np.testing.assert_array_equal(read_label_map(path, 3, (2, 2)), indices)
    bits = write(tmp_path / "b.png", Image.fromarray(indices == 1))
    np.testing.assert_array_equal(read_label_map(bits, 2, (2, 2)), indices == 1)


@pytest.mark.parametrize("depth", [2, 4])
def test_packed_grey_is_not_spread(tmp_path, depth):
    # One row of two pixels, 1 and 3, as optimisers of PNG files write it.
    packed = 1 << (8 - depth) | 3 << (8 - 2 * depth)
    header = struct.pack(">IIBBBBB", 2, 1, depth, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes([0, packed]))), (b"IEND", b""))
    path = tmp_path / "a.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
    )
    assert read_label_map(path, 4, (1, 2)).tolist() == [[1, 3]]


@pytest.mark.parametrize("factor", [2, 3])
def test_label_maps_are_resized_by_whole_factors(tmp_path, factor):
    classes = noise(12, 18, 1)[..., 0]
    path = write(tmp_path / "a.png", classes)
    large = read_label_map(path, 256, (12 * factor, 18 * factor))
    np.testing.assert_array_equal(large, classes.repeat(factor, 0).repeat(factor, 1))
    small = (12 // factor, 18 // factor)
    expected = Image.fromarray(classes).resize(small[::-1], Image.Resampling.NEAREST)
    np.testing.assert_array_equal(read_label_map(path, 256, small), np.asarray(expected))


def test_label_maps_are_turned_by_their_exif(tmp_path):
    classes = np.array([[0, 1, 2], [3, 4, 5]], np.uint8)
    for mode in ("L", "P"):
        path = write(
            tmp_path / f"{mode}.png",
            Image.fromarray(classes).convert(mode),
            exif=orientation(ROTATED),
        )
        np.testing.assert_array_equal(read_label_map(path, 6, (3, 2)), np.rot90(classes, -1))


def test_bad_label_maps_are_refused(tmp_path):
    classes = np.zeros((4, 6), np.uint8)
    classes[1, 2] = classes[3, 0] = 255
    path = write(tmp_path / "a.png", classes)
    refuses(
        r"a\.png has the unknown class 255 at row 1, column 2 \(from 0\): the model knows 0 to 7",
        *(read_label_map, path, 8, (4, 6)),
    )
    for size in ((4, 4), (6, 9), (8, 6), (3, 5)):
        refuses(
            rf"has 6x4 pixels, but must have {size[1]}x{size[0]}", read_label_map, path, 256, size
        )
    rgb = write(tmp_path / "rgb.png", noise(4, 6))
    refuses(
        r"rgb\.png is of colours \(RGB\).* save the class numbers", read_label_map, rgb, 8, (4, 6)
    )
    grey_alpha = write(tmp_path / "la.png", Image.new("LA", (6, 4)))
    refuses("is grey with transparency", read_label_map, grey_alpha, 8, (4, 6))
    jpeg = write(tmp_path / "a.jpg", classes)
    refuses("is a JPEG file: save", read_label_map, jpeg, 8, (4, 6))
    path.write_bytes(path.read_bytes()[:45])
    refuses(r"cannot decode the label map .*a\.png", read_label_map, path, 8, (4, 6))


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "I;16", "P"])
def test_masks_of_every_kind_agree(tmp_path, mode):
    hole = np.zeros((8, 8), bool)
    hole[2:4, 1:6] = True
    if mode == "I;16":
        image = Image.fromarray(np.where(hole, 65535, 0).astype(np.uint16))
    else:
        image = Image.fromarray(hole).convert(mode)
    mask = read_mask(write(tmp_path / "a.png", image), (8, 8))
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, hole)


def test_mask_threshold_and_transparency(tmp_path):
    greys = np.array([[0, 127, 128, 255]], np.uint8)
    path = write(tmp_path / "a.png", greys)
    assert read_mask(path, (1, 4)).tolist() == [[False, False, True, True]]
    rgba = np.zeros((1, 2, 4), np.uint8)
    rgba[0, 0] = 255  # the other is transparent: not painted, so kept
    path = write(tmp_path / "b.png", rgba)
    assert read_mask(path, (1, 2)).tolist() == [[True, False]]


def test_masks_are_resized_by_the_nearest_pixel(tmp_path):
    greys = (noise(10, 15, 1)[..., 0] > 127).astype(np.uint8) * 255
    path = write(tmp_path / "a.png", greys)
    for size in ((4, 6), (24, 36)):
        expected = Image.fromarray(greys).resize(size[::-1], Image.Resampling.NEAREST)
        np.testing.assert_array_equal(read_mask(path, size), np.asarray(expected) == 255)


def test_masks_are_turned_by_their_exif(tmp_path):
    greys = np.array([[255, 0, 0], [0, 0, 0]], np.uint8)
    path = write(tmp_path / "a.png", greys, exif=orientation(ROTATED))
    np.testing.assert_array_equal(read_mask(path, (3, 2)), np.rot90(greys, -1) == 255)


def test_masks_of_inks_and_of_16_bits_that_are_turned(tmp_path):
    inks = Image.new("CMYK", (16, 8), (0, 0, 0, 255))
    inks.paste((0, 0, 0, 0), (0, 0, 8, 8))
    hole = np.arange(16) < 8
    mask = read_mask(write(tmp_path / "a.jpg", inks, quality=95), (8, 16))
    np.testing.assert_array_equal(mask, np.broadcast_to(hole, (8, 16)))
    deep = np.zeros((2, 3), np.uint16)
    deep[0, 0] = 65535
    path = write(tmp_path / "b.png", Image.fromarray(deep), exif=orientation(ROTATED))
    np.testing.assert_array_equal(read_mask(path, (3, 2)), np.rot90(deep, -1) == 65535)


def test_a_mask_is_cropped_like_its_image(tmp_path):
    hole = noise(20, 30, 1)[..., 0] > 127
    image = write(tmp_path / "a.png", np.repeat(hole[..., None], 3, -1).astype(np.uint8) * 255)
    mask = write(tmp_path / "b.png", hole)
    fitted = read_image(image, (20, 20))
    found = read_mask(mask, (20, 20), image_size=fitted.file_size)
    np.testing.assert_array_equal(found, fitted.pixels[..., 0] == 255)
    refuses("30x20 pixels, but the mask must have the ratio 1:1", read_mask, mask, (20, 20))
    refuses("the ratio 4:3 of 400x300", read_mask, mask, (20, 20), (300, 400))


def test_empty_and_full_masks_are_refused(tmp_path):
    greys = np.zeros((9, 9), np.uint8)
    path = write(tmp_path / "a.png", greys)
    refuses(r"a\.png has no hole at 9x9 pixels: white is", read_mask, path, (9, 9))
    greys[0, 0] = 255  # which the small mask misses
    refuses("no hole at 3x3", read_mask, write(path, greys), (3, 3))
    assert read_mask(path, (9, 9)).sum() == 1
    path = write(tmp_path / "b.png", 255 - 0 * greys)
    refuses(r"b\.png keeps nothing at 9x9 pixels: white is", read_mask, path, (9, 9))
