import json
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
from ldm_jax.errors import UserError

NAMES = ("cat", "dog", "Smileys & Emotion")
ROTATED = 6  # EXIF: turn by 90 degrees clockwise to show


def write(path, content, **options):
    """Writes an array or a Pillow image; the suffix says how."""
    image = content if isinstance(content, Image.Image) else Image.fromarray(content)
    image.save(path, **options)
    return path


def write_json(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def orientation(number):
    exif = Image.Exif()
    exif[274] = number
    return exif


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def refuses(message, function, *arguments):
    """The function raises a UserError of one line that matches."""
    with pytest.raises(UserError, match=message) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)


# Layouts


def test_layout_in_shares_and_in_pixels(tmp_path):
    shares = write_json(
        tmp_path / "a.json",
        [
            {"label": "dog", "bbox": [0.25, 0.5, 0.5, 0.25]},
            {"category_id": 0, "bbox": [0, 0, 1, 1], "area": 1, "iscrowd": 0},
        ],
    )
    expected = [(1, 0.25, 0.5, 0.75, 0.75), (0, 0, 0, 1, 1)]
    assert read_layout(shares, NAMES) == expected
    entries = [{"category": "dog", "bbox": [16, 16, 32, 8]}, {"label": 0, "bbox": [0, 0, 64, 32]}]
    for key in ("boxes", "annotations"):
        pixels = {"width": 64, "height": 32, key: entries}
        assert read_layout(write_json(tmp_path / "b.json", pixels), NAMES, 2) == expected
    no_size = {"boxes": json.loads(shares.read_text())}
    assert read_layout(write_json(tmp_path / "c.json", no_size), NAMES) == expected


def test_layout_is_clipped_to_the_image(tmp_path):
    content = {"width": 10, "height": 10, "boxes": [{"label": 0, "bbox": [-5, 5, 30, 30]}]}
    assert read_layout(write_json(tmp_path / "a.json", content), NAMES) == [(0, 0, 0.5, 1, 1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", r"a\.json is not JSON: .* in line 1, column 3"),
        ("[" * 100_000, r"a\.json is not JSON"),
        ("3", r"a\.json must be a list of boxes"),
        ({"boxs": []}, "must be a list of boxes, or have one called 'boxes'"),
        ([], r"a\.json has no boxes"),
        ({"width": 5, "boxes": [1]}, "a width and a height above 0, or neither"),
        ({"width": 5, "height": 0, "boxes": [1]}, "a width and a height above 0, or neither"),
        ({"images": [], "annotations": []}, "is a whole COCO file"),
        ([7], "box 0 of .* must be an object"),
        ([{"label": 0}], "box 0 of .* four numbers"),
        ([{"label": 0, "bbox": [0, 0, 1]}], "four numbers"),
        ([{"label": 0, "bbox": [0, 0, 1, "1"]}], "four numbers"),
        ([{"label": 0, "bbox": [0, 0, 1, True]}], "four numbers"),
        ('[{"label": 0, "bbox": [0, 0, NaN, 1]}]', "four numbers"),
        ('[{"label": 0, "bbox": [0, 0, 1, 1' + "0" * 400 + "]}]", "four numbers"),
        ([{"label": 0, "bbox": [10, 10, 50, 50]}], 'is not in shares .* write {"width": '),
        ([{"label": 0, "bbox": [0, 0, -0.5, 1]}], r"a\.json: box 0 .* has no area"),
        ([{"label": 0, "bbox": [0, 0, 0.5, 0]}], r"a\.json: box 0 .* has no area"),
        ([{"label": 0, "bbox": [1, 0, 0.5, 1]}], r"a\.json: box 0 .* is outside the image"),
        ([{"bbox": [0, 0, 1, 1]}], "box 0 of .* has no class"),
        ([{"label": 3, "bbox": [0, 0, 1, 1]}], "has the label 3: choose from 0 to 2"),
        ([{"category_id": -1, "bbox": [0, 0, 1, 1]}], "has the category_id -1"),
        (
            [{"label": "Dgo", "bbox": [0, 0, 1, 1]}],
            r"\(did you mean 'dog'\?\): the model knows cat, dog, Sm",
        ),
        (
            [{"label": "smileys & emotions", "bbox": [0, 0, 1, 1]}],
            "did you mean 'Smileys & Emotion'",
        ),
        ([{"label": "qqq", "bbox": [0, 0, 1, 1]}], 'unknown label "qqq": the model knows cat'),
        ([{"label": None, "bbox": [0, 0, 1, 1]}], "unknown label null"),
        ([{"label": 0, "bbox": [0, 0, 1, 1]}] * 4, "has 4 boxes, .* at most 3: remove 1"),
    ],
    ids=range(27),
)
def test_bad_layouts_are_refused(tmp_path, content, message):
    refuses(message, read_layout, write_json(tmp_path / "a.json", content), NAMES, 3)


def test_the_message_lists_only_some_of_many_classes(tmp_path):
    path = write_json(tmp_path / "a.json", [{"label": "x", "bbox": [0, 0, 1, 1]}])
    refuses(r"knows class0, .*, class19, \.\.\. \(600 in all\)$", read_layout, path, MANY)


MANY = [f"class{i}" for i in range(600)]


# Label maps


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


# Masks


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


# Images


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
    np.testing.assert_array_equal(fitted.pixels, crop_resize(pixels, 16, Draw()))
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


# Prompts


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


# Every file


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
def test_decompression_bombs_are_refused(tmp_path, monkeypatch, reader):
    function, *rest = reader
    path = write(tmp_path / "a.png", np.zeros((8, 8), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    refuses(r"a\.png .*decompression bomb", function, path, *rest)
