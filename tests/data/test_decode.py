import errno
import io
import pathlib
import struct
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, features

from ldm_jax.data.decode import MOST_PIXELS, Limits, decode_image, image_size
from ldm_jax.errors import Unreachable, UserError


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def ramp(height=6, width=9, channels=3) -> np.ndarray:
    return np.arange(height * width * channels, dtype=np.uint8).reshape(height, width, channels)


def test_rgb_png_is_exact_from_bytes_and_path(tmp_path):
    data = encode(Image.fromarray(ramp()))
    path = tmp_path / "a.png"
    path.write_bytes(data)
    for file in (data, path, str(path)):
        image = decode_image(file, "a")
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, ramp())


def test_grey_bilevel_and_palette_become_rgb():
    grey = ramp(4, 5, 1)[..., 0]
    image = decode_image(encode(Image.fromarray(grey)), "a")
    np.testing.assert_array_equal(image, np.stack([grey] * 3, -1))
    bits = Image.fromarray((grey > 9).astype(np.uint8) * 255).convert("1")
    np.testing.assert_array_equal(
        decode_image(encode(bits), "a")[..., 1], (grey > 9).astype(np.uint8) * 255
    )
    palette = Image.fromarray(ramp(2, 2)).quantize(4)
    np.testing.assert_array_equal(
        decode_image(encode(palette), "a"), np.asarray(palette.convert("RGB"))
    )


def test_16_bit_grey_is_scaled_not_clipped():
    grey = np.array([[0, 257, 32768, 65535]], np.uint16)
    image = decode_image(encode(Image.fromarray(grey)), "a")
    np.testing.assert_array_equal(image[0, :, 0], [0, 1, 128, 255])
    tiff = decode_image(encode(Image.fromarray(grey), "TIFF"), "a")
    np.testing.assert_array_equal(tiff, image)


@pytest.mark.parametrize("background", [(255, 255, 255), (10, 20, 30)])
def test_alpha_is_composited(background):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0] = 200
    rgba[0, :, 3] = [0, 128, 255]
    image = decode_image(encode(Image.fromarray(rgba)), "a", background)
    weight = np.array([0, 128, 255])[:, None] / 255
    expected = weight * np.array([200, 0, 0]) + (1 - weight) * np.array(background)
    assert np.abs(image[0] - expected).max() <= 1
    np.testing.assert_array_equal(image[0, 0], background)


def test_grey_with_alpha_and_transparent_palette():
    la = np.array([[[0, 0], [0, 255]]], np.uint8)
    image = decode_image(encode(Image.fromarray(la, "LA")), "a", (9, 9, 9))
    np.testing.assert_array_equal(image[0, :, 0], [9, 0])
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0])
    image = decode_image(encode(palette, transparency=0), "a", (9, 9, 9))
    np.testing.assert_array_equal(image[0], [[9, 9, 9], [0, 255, 0]])


def test_cmyk_jpeg_becomes_rgb():
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # red
    image = decode_image(encode(cmyk, "JPEG", quality=95), "a")
    assert image.shape == (8, 8, 3)
    assert image[4, 4, 0] > 240 and image[4, 4, 1] < 20 and image[4, 4, 2] < 20


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    image = decode_image(encode(Image.fromarray(ramp(4, 7)), exif=exif), "a")
    np.testing.assert_array_equal(image, np.rot90(ramp(4, 7), -1))


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode_image(data, "a")[0, 0], [255, 0, 0])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        encode(Image.fromarray(ramp(40, 40)))[:-200],
        encode(Image.fromarray(ramp(40, 40)), "JPEG")[:300],
        encode(Image.fromarray(np.ones((3, 3), np.float32)), "TIFF"),
        b"P6 0 4 255\n",
    ],
    ids=["empty", "text", "cut png", "cut jpeg", "float", "no pixels"],
)
def test_what_cannot_be_decoded_is_a_user_error_with_the_name(data):
    with pytest.raises(UserError, match=r"shelf/picture\.png.*remove it$") as caught:
        decode_image(data, "shelf/picture.png")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_a_user_error(tmp_path: pathlib.Path):
    with pytest.raises(UserError, match="gone"):
        decode_image(tmp_path / "gone.png", "gone.png")


def bomb(side):
    """A PNG that says it is large, in 67 bytes."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # see the next test
@pytest.mark.parametrize("side", [10_001, 13_300, 60_000])
def test_a_decompression_bomb_is_refused_by_its_header(side):
    for function in (decode_image, image_size):
        tracemalloc.start()
        with pytest.raises(UserError, match=r"big\.png \(it has .* pixels") as caught:
            function(bomb(side), "big.png")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert "100000000" in str(caught.value)
        assert peak < 10**6
    assert MOST_PIXELS == 178_956_970  # as checks.py has it, which imports no Pillow


def test_pillow_does_not_warn_of_what_may_be():
    """In a process of its own: pytest puts its own filters in place."""
    code = (
        "import sys; from ldm_jax.data.decode import image_size, Limits\n"
        "print(image_size(sys.stdin.buffer.read(), 'a', Limits(max_pixels=170_000_000)))"
    )
    done = subprocess.run([sys.executable, "-c", code], input=bomb(13_000), capture_output=True)
    assert (done.stdout, done.stderr) == (b"(13000, 13000)\n", b"")


def test_limits_hold_for_both_ways_of_reading():
    data = encode(Image.fromarray(ramp(6, 9)))
    for function in (decode_image, image_size):
        function(data, "a", limits=Limits(6, 54))
        with pytest.raises(UserError, match=r"a \(it has 9x6 pixels.* at least 7\): repair"):
            function(data, "a", limits=Limits(min_side=7))
        with pytest.raises(UserError, match=r"a \(it has 9x6 pixels, but at most 53 may be\)"):
            function(data, "a", limits=Limits(max_pixels=53))


@pytest.mark.parametrize("name", ["a.jpg", "a.txt", "a"])
def test_the_content_says_what_a_file_is(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(encode(Image.fromarray(ramp())))
    np.testing.assert_array_equal(decode_image(path, name), ramp())


def test_programs_are_not_started_to_read_a_picture(tmp_path):
    encapsulated = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with pytest.raises(UserError, match="cannot identify"):
        decode_image(encapsulated, "a.png")


@pytest.mark.parametrize("kind", ["AVIF", "BMP", "GIF", "JPEG", "PPM", "TGA", "TIFF", "WEBP"])
def test_every_kind_that_a_folder_lists_is_read(kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    assert decode_image(encode(Image.new("RGB", (9, 8)), kind), "a").shape == (8, 9, 3)


def test_what_the_file_system_does_not_give_is_not_called_an_image(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(Unreachable, match=r"cannot read the image a\.png \(.*Input/output error"):
        decode_image(tmp_path / "a.png", "a.png")
