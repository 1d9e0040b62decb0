"""Images and prompts that a user gives to sampling, and what holds for every file."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data import condition_files
from ldm_jax.data.condition_files import (
    read_image,
    read_label_map,
    read_layout,
    read_low_res,
    read_mask,
    read_prompts,
)
from ldm_jax.data.transforms import Draw, crop_resize

from .helpers import ROTATED, noise, orientation, refuses, write

NAMES = ("cat", "dog")


def test_an_image_of_the_size_is_untouched(tmp_path):
    pixels = noise(6, 9)
    path = write(tmp_path / "a.png", pixels)
    for read in (read_image, read_low_res):
        fitted = read(path, (6, 9))
        np.testing.assert_array_equal(fitted.pixels, pixels)
        assert fitted.file_size == (6, 9) and fitted.note == ""


@pytest.mark.parametrize("shape", [(40, 61), (61, 40), (33, 33), (7, 5)])
def test_images_are_fitted_as_training_does(tmp_path, shape):
    pixels = noise(*shape)
    fitted = read_image(write(tmp_path / "a.png", pixels), (16, 16))
    np.testing.assert_array_equal(fitted.pixels, crop_resize(pixels, (16, 16), Draw()))
    assert fitted.file_size == shape
    assert ("cropped" in fitted.note) == (shape[0] != shape[1])


def test_the_note_says_what_happened(tmp_path):
    path = write(tmp_path / "a.png", noise(20, 30))
    note = read_image(path, (10, 10)).note
    assert note == f"{path}: 30x20 pixels, cropped to its centred 20x20 and resized to 10x10"
    assert read_image(path, (20, 20)).note == f"{path}: 30x20 pixels, cropped to its centred 20x20"
    assert read_image(path, (10, 15)).note == f"{path}: 30x20 pixels, resized to 15x10"
    assert read_low_res(path, (10, 15)).note.endswith("resized to the model's 15x10")


def test_an_image_of_another_ratio_than_square(tmp_path):
    pixels = noise(20, 20)
    path = write(tmp_path / "a.png", pixels)
    np.testing.assert_array_equal(read_image(path, (10, 20)).pixels, pixels[5:15])
    np.testing.assert_array_equal(read_image(path, (20, 10)).pixels, pixels[:, 5:15])
    sliver = write(tmp_path / "b.png", noise(1, 50))
    assert read_image(sliver, (10, 20)).pixels.shape == (10, 20, 3)


def test_low_res_of_another_ratio_is_refused(tmp_path):
    path = write(tmp_path / "a.png", noise(20, 30))
    refuses(
        r"a\.png has 30x20 pixels, but the low-resolution image must have the ratio 1:1 of 16x16",
        *(read_low_res, path, (16, 16)),
    )
    refuses("the ratio 2:1 of 32x16", read_low_res, path, (16, 32))


@pytest.mark.parametrize("read", [read_image, read_low_res])
def test_uncommon_images(tmp_path, read):
    red = write(tmp_path / "a.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=95)
    pixels = read(red, (8, 8)).pixels.astype(int)
    assert np.abs(pixels - [255, 0, 0]).max() < 20  # JPEG's loss and the inks' conversion
    deep = write(tmp_path / "b.png", np.array([[0, 257], [32768, 65535]], np.uint16))
    np.testing.assert_array_equal(read(deep, (2, 2)).pixels[..., 1], [[0, 1], [128, 255]])
    palette = Image.fromarray(noise(2, 2)).quantize(4)
    path = write(tmp_path / "c.png", palette)
    np.testing.assert_array_equal(read(path, (2, 2)).pixels, np.asarray(palette.convert("RGB")))
    turned = write(tmp_path / "d.png", noise(2, 4), exif=orientation(ROTATED))
    fitted = read(turned, (4, 2))
    np.testing.assert_array_equal(fitted.pixels, np.rot90(noise(2, 4), -1))
    assert fitted.file_size == (4, 2)
    clear = write(tmp_path / "e.png", np.zeros((2, 2, 4), np.uint8))
    assert (read(clear, (2, 2)).pixels == 255).all()  # on white


def test_reading_twice_gives_the_same(tmp_path):
    path = write(tmp_path / "a.png", noise(30, 41))
    for read in (read_image, read_mask):
        size = (15, 15) if read is read_image else (60, 82)
        first, second = read(path, size), read(path, size)
        np.testing.assert_array_equal(first[0], second[0])


def test_prompts(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff a cat \r\n\r\nrot, grün\u2028blau\r \n\tlast".encode())
    assert read_prompts(path) == ["a cat", "rot, grün\u2028blau", "last"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a cat\n caf\xe9\n", r"a\.txt are not UTF-8 text: byte 0xe9 in line 2; save"),
        ("a cat".encode("utf-16"), "are not UTF-8 text: byte 0xff in line 1"),
        ("a cat".encode("utf-16-le"), "hold zero bytes"),
        (b" \n\n", r"a\.txt are empty"),
        (b"", "are empty"),
        (b"x\n" * 10_001, r"a\.txt has 10001 prompts, but at most 10000"),
    ],
)
def test_bad_prompts_are_refused(tmp_path, data, message):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    refuses(message, read_prompts, path)


def test_as_many_prompts_as_allowed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x\n" * 10_000)
    assert len(read_prompts(path)) == 10_000


READERS = [
    (read_layout, NAMES),
    (read_label_map, 3, (8, 8)),
    (read_mask, (8, 8)),
    (read_low_res, (8, 8)),
    (read_image, (8, 8)),
    (read_prompts,),
]


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader[0].__name__)
def test_files_that_cannot_be_read(tmp_path, monkeypatch, reader):
    function, *rest = reader
    refuses(r"cannot read .*missing\.png \(No such file", function, tmp_path / "missing.png", *rest)
    refuses(r"cannot read .* \(Is a directory\)", function, tmp_path, *rest)
    path = tmp_path / "a.png"
    path.write_bytes(b"\xff" * 100)
    refuses(r"a\.png", function, path, *rest)
    monkeypatch.setattr(condition_files, "IMAGE_BYTES", 2**20)
    monkeypatch.setattr(condition_files, "TEXT_BYTES", 2**20)
    path.write_bytes(b" " * (2**20 + 1))
    refuses(r"a\.png has more than 1 MiB: give a smaller file", function, path, *rest)


@pytest.mark.parametrize("reader", READERS[1:5], ids=lambda reader: reader[0].__name__)
def test_decompression_bombs_are_refused(tmp_path, reader):
    function, *rest = reader
    path = write(tmp_path / "a.png", np.zeros((8, 8), np.uint8))
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 20_000, 20_000)  # its header's width and height
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)
    refuses(r"a\.png .*((at most|more than) 100000000|decompression bomb)", function, path, *rest)
