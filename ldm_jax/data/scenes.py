"""Scenes of one to six emoji on a ground, with exact boxes, label maps and captions.

Nothing is stored: scene i of a split is a function of (seed, split, i), made from the cut-outs of
the embedded emoji set. Like the order of the data it uses the bits of Philox alone and, but for
gradients and colours, whole numbers, so that a layout is the same on every machine.

Train and test share no object: of each class an eighth of the names, those with the least SHA-256,
are for test. Both pictures of a "cat" are on the same side, and a test scene has test objects only.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import io
import zipfile
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from ldm_jax.data.boxes import Boxes
from ldm_jax.data.folder import METADATA, read_jsonl
from ldm_jax.data.order import uniforms_at
from ldm_jax.data.table import split_rows
from ldm_jax.errors import UserError

EMOJI = "assets/fluent_emoji_64.zip"
SPLITS = {"train": 20_000, "test": 2_000}  # scenes of each

# The classes are groups of the set's subcategories, in place of its nine categories: of those,
# "Objects", "Activities" and "Travel & Places" are alike in use and not in looks (a clock, a
# castle and a cloud are one category), so that neither a small model nor the classifier that
# judges it can tell them apart on objects that it has not seen.
CLASSES = {
    "animal": "animal-mammal animal-bird animal-amphibian animal-reptile animal-marine animal-bug",
    "building": "place-building place-religious",
    "face": "face-smiling face-affection face-tongue face-hand face-neutral-skeptical face-sleepy "
    "face-unwell face-hat face-glasses face-concerned face-negative",
    "food": "food-fruit food-vegetable food-prepared food-asian food-sweet",
    "plant": "plant-flower plant-other",
    "vehicle": "transport-ground transport-water transport-air",
}
GROUND = "ground"  # class 0 of a label map
MAX_OBJECTS = 6
MIN_RESOLUTION = 32
MAX_OCCLUSION = 0.25  # of an object's pixels

# In these subcategories, but parts of objects, signs or views; or pictures that fill a square.
_LEFT_OUT = frozenset(
    "paw prints,pig nose,feather,wing,spider web,microbe,brick,rock,wood,building construction,"
    "wedding,face in clouds,cooking,white flower,rosette,empty nest,nest with eggs,metro,"
    "bus stop,motorway,railway track,oil drum,fuel pump,wheel,horizontal traffic light,"
    "vertical traffic light,octagonal sign,construction sign,anchor,ring buoy,parachute,seat,"
    "satellite,airplane departure,airplane arriving,statue of liberty,bowl with spoon".split(",")
)
_UNCOUNTABLE = frozenset(
    "bacon,baguette bread,bread,broccoli,butter,canned food,coral,cooked rice,custard,garlic,"
    "green salad,oden,popcorn,shaved ice,spaghetti,sushi".split(",")
)
# What a caption says between the names of its objects.
RELATIONS = (("left of", "right of"), ("above", "below"))  # along x, along y
JOINING = (",", "and", *RELATIONS[0], *RELATIONS[1])
_TEST_SHARE = 8  # one name in eight
_OPAQUE = 128  # alpha from which a pixel belongs to the object, of 255
_FAINT = 32  # alpha below which pixels around the object are cut off
_STEPS = 32  # sizes are whole multiples of the resolution / 32, so that few are to be resized
_LARGEST, _SMALLEST = 0.7, 0.35  # longer side of one or two objects, as shares of the resolution
_CACHE_BYTES = 64 << 20  # of resized cut-outs, at most

# Uniform numbers of a scene, and their places.
_TRIES = 10
_PER_OBJECT = 4 + 2 * _TRIES
_HEAD, _GROUND = 4, 32
_BLOCKS = (_HEAD + _GROUND + MAX_OBJECTS * _PER_OBJECT) // 4


class Thing(NamedTuple):
    """An object: its name, its class and its picture (h, w, 4) uint8, RGBA, trimmed."""

    name: str
    label: int
    picture: np.ndarray


class CutOut(NamedTuple):
    """A resized object: its picture (h, w, 4) uint8, RGBA, where its alpha is at least 0.5 as a
    mask (h, w) bool, and the extent (x, y, width, height) of that mask.
    """

    picture: np.ndarray
    mask: np.ndarray
    extent: tuple[int, int, int, int]


class SceneSource:
    """Composed scenes; a `Source` that may be read from several threads.

    An example has
        'image': (R, R, 3) uint8.
        'boxes': a list of {'label': class, 'bbox': [x, y, width, height]} in pixels, whole numbers,
            in the order of drawing, the hindmost first. A box is the full extent of the object's
            alpha of at least 0.5, also where another object hides it; no object leaves the image.
        'segmentation': (R, R) int32, 0 for the ground, 1 + class of the topmost object whose alpha
            is at least 0.5. No object has more than `MAX_OCCLUSION` of its pixels hidden.
        'text': a caption such as "a cat left of a bus".
        'label': the class of the object with the largest box.

    Scenes must not be flipped after this: captions say left and right, and objects are already
    mirrored at random. `flippable` is False to say so.

    Args:
        split: 'train' or 'test'.
        indices: the scenes of the split that this source has, in its order; all by default.
        resolution: R.
        seed: of all scenes.

    Raises:
        UserError: the resolution is too small.
    """

    columns = ("boxes", "segmentation", "text", "label")
    label_names = tuple(CLASSES)
    segmentation_names = (GROUND, *CLASSES)
    segmentation_ground = 0
    num_labels = len(CLASSES)
    flippable = False

    def __init__(
        self,
        split: str = "train",
        indices: Sequence[int] | None = None,
        *,
        resolution: int = 64,
        seed: int = 0,
    ):
        if resolution < MIN_RESOLUTION:
            raise UserError(
                f"scenes need at least {MIN_RESOLUTION} pixels a side, not {resolution}"
            )
        self._split = split
        self._indices = range(SPLITS[split]) if indices is None else indices
        self._resolution = resolution
        # Hashed, so that scenes share no numbers with other uses of small seeds.
        self._seed = int.from_bytes(_digest(f"scenes {split} {seed}")[:8], "big")
        self.things = load_things()[split]

        # With its mask a cut-out has 5 bytes per pixel.
        @functools.lru_cache(maxsize=_CACHE_BYTES // int(5 * (_LARGEST * resolution) ** 2))
        def cut_out(thing: int, side: int) -> CutOut:
            return resize(self.things[thing].picture, side)

        self._cut_out = cut_out

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"scene {index} is out of range: there are {len(self)}")
        uniforms = uniforms_at(self._seed, self._indices[index] * _BLOCKS, _BLOCKS, 4).ravel()
        return compose(self.things, self._cut_out, uniforms, self._resolution)

    def name(self, index: int) -> str:
        return f"scene {self._indices[index]} of {self._split}"

    def image_size(self, index: int) -> tuple[int, int]:
        """Height and width of an image."""
        return (self._resolution,) * 2


def open_scenes(split: str = "train", *, resolution: int = 64, seed: int = 0) -> SceneSource:
    """Opens the scenes of a split: 'train', 'test' or a slice such as 'train[:90%]'.

    'train[90%:]' has new scenes of the objects that 'train[:90%]' shows, 'test' has new objects.

    Raises:
        UserError: there is no such split, or the resolution is too small.
    """
    places = [(name, i) for name, count in SPLITS.items() for i in range(count)]
    names = [f"{name} {i}" for name, i in places]
    rows = split_rows(names, [name for name, _ in places], split, "the set of scenes")
    indices = [places[row][1] for row in rows]
    return SceneSource(places[rows[0]][0], indices, resolution=resolution, seed=seed)


@functools.cache
def load_things() -> dict[str, tuple[Thing, ...]]:
    """The objects of each split, in the order of the emoji set; the pictures are read-only."""
    asset = importlib.resources.files("ldm_jax.data").joinpath(EMOJI)
    archive = zipfile.ZipFile(io.BytesIO(asset.read_bytes()))
    labels = {part: i for i, parts in enumerate(CLASSES.values()) for part in parts.split()}
    things = []
    for row in read_jsonl(archive.read(METADATA), EMOJI):
        words = row["text"].split()
        if row["subcategory"] not in labels or row["text"] in _LEFT_OUT:
            continue
        if len(words) > 3 or "and" in words:  # captions of six objects should stay short
            continue
        label = labels[row["subcategory"]]
        name = row["text"].removeprefix("oncoming ")
        if label == SceneSource.label_names.index("animal"):
            name = name.removesuffix(" face")  # "zebra face" and others show all of the animal
        image = Image.open(io.BytesIO(archive.read(row["file_name"]))).convert("RGBA")
        seen = image.getchannel("A").point(lambda alpha: 255 * (alpha >= _FAINT))
        things.append(Thing(name, label, np.asarray(image.crop(seen.getbbox()))))
    test = set()
    for label in range(len(CLASSES)):
        names = sorted({thing.name for thing in things if thing.label == label}, key=_digest)
        test.update(names[: -(-len(names) // _TEST_SHARE)])
    return {
        "train": tuple(thing for thing in things if thing.name not in test),
        "test": tuple(thing for thing in things if thing.name in test),
    }


def resize(picture: np.ndarray, side: int) -> CutOut:
    """Resizes (h, w, 4) uint8 so that its longer side is `side`, with an antialiased filter."""
    height, width, _ = picture.shape
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # Pillow weighs the colours by alpha, so that what is transparent does not shine through.
    resized = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
    mask = resized[..., 3] >= _OPAQUE
    columns, rows = np.flatnonzero(mask.any(0)).tolist(), np.flatnonzero(mask.any(1)).tolist()
    extent = columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1
    return CutOut(resized, mask, extent)


def compose(
    things: Sequence[Thing],
    cut_out: Callable[[int, int], CutOut],
    uniforms: np.ndarray,
    resolution: int,
) -> dict:
    """Makes the example that `SceneSource` describes.

    Objects are placed one on top of the other. An object that would hide too much of those below
    is moved, and left out if it finds no place; the first one always has a place.

    Args:
        things: the objects to choose from.
        cut_out: (place in `things`, longer side) -> the resized object.
        uniforms: (4 * _BLOCKS,) in [0, 1).
        resolution: R.
    """
    head, ground, each = np.split(uniforms, [_HEAD, _HEAD + _GROUND])
    each = each.reshape(MAX_OBJECTS, _PER_OBJECT)[: 1 + int(head[0] * MAX_OBJECTS)]
    shrink = (2 / max(len(each), 2)) ** 0.5  # the objects of a full scene cover about as much
    image = make_ground(resolution, ground)
    owner = np.full((resolution, resolution), -1)  # which of `chosen` is seen at a pixel
    chosen: list[Thing] = []
    boxes: Boxes = []
    visible = full = np.zeros(0, int)  # pixels of each of `chosen`
    for numbers in each:
        index = _choose(things, {thing.name for thing in chosen}, numbers[0], numbers[1])
        share = shrink * (_SMALLEST + (_LARGEST - _SMALLEST) * numbers[2])
        part = cut_out(index, round(share * _STEPS) * resolution // _STEPS)
        if numbers[3] < 0.5:
            part = _mirror(part)
        height, width = part.mask.shape
        room = (resolution - width + 1, resolution - height + 1)
        for x, y in (numbers[4:].reshape(_TRIES, 2) * room).astype(int).tolist():
            window = (slice(y, y + height), slice(x, x + width))
            hidden = np.bincount(owner[window][part.mask] + 1, minlength=len(chosen) + 1)[1:]
            if np.all(visible - hidden >= (1 - MAX_OCCLUSION) * full):
                break
        else:
            continue
        alpha = part.picture[..., 3:] * np.float32(1 / 255)
        image[window] += alpha * (part.picture[..., :3] - image[window])
        owner[window][part.mask] = len(chosen)
        size = int(part.mask.sum())
        visible, full = np.append(visible - hidden, size), np.append(full, size)
        chosen.append(things[index])
        left, top, *extent = part.extent
        boxes.append({"label": things[index].label, "bbox": [x + left, y + top, *extent]})
    classes = np.array([0, *(box["label"] + 1 for box in boxes)], np.int32)
    return {
        "image": (image + 0.5).astype(np.uint8),
        "boxes": boxes,
        "segmentation": classes[owner + 1],
        "text": caption([thing.name for thing in chosen], boxes, resolution, head[1]),
        "label": max(boxes, key=lambda box: box["bbox"][2] * box["bbox"][3])["label"],
    }


def make_ground(resolution: int, uniforms: np.ndarray) -> np.ndarray:
    """A plain, graded or textured ground in muted colours: (R, R, 3) float32 in [0, 255].

    Args:
        resolution: R.
        uniforms: (_GROUND,) in [0, 1).
    """
    kind, across, down, period = uniforms[:4]
    # A grey of 80 to 210 levels and at most 30 levels of colour.
    first, second = (
        80 + 130 * numbers[0] + 60 * (numbers[1:] - 0.5) for numbers in uniforms[4:12].reshape(2, 4)
    )
    x = np.arange(resolution)
    y = x[:, None]
    width = max(2, int(resolution / 16 * (1 + 2 * period)))  # of a stripe
    match int(kind * 5):
        case 0:  # plain
            blend = np.zeros((resolution, resolution))
        case 1:  # gradient
            blend = (across - 0.5) * x + (down - 0.5) * y
            blend = (blend - blend.min()) / max(np.ptp(blend), 1e-9)
        case 2:  # stripes
            step = ((1, 0), (0, 1), (1, 1), (1, -1))[int(across * 4)]
            blend = (step[0] * x + step[1] * y) // width % 2 * 0.5
        case 3:  # checks
            blend = (x // width + y // width) % 2 * 0.5
        case _:  # soft noise
            coarse = (uniforms[12:].reshape(4, 5) * 256).astype(np.uint8)
            fine = Image.fromarray(coarse).resize((resolution,) * 2, Image.Resampling.BICUBIC)
            blend = np.asarray(fine) / 255
    return (first + blend[..., None] * (second - first)).astype(np.float32)


def caption(names: Sequence[str], boxes: Boxes, resolution: int, uniform: float) -> str:
    """Says what a scene shows.

    One object is named. Of two, one of the relations that hold is told: left of, right of, above
    or below, where the centres of the boxes are at least R / 8 apart in that direction. More are
    listed from left to right.

    Args:
        names: the names of the objects, in the order of `boxes`.
        boxes: the boxes.
        resolution: R.
        uniform: number in [0, 1) that chooses among the relations.
    """
    centres = [(2 * x + w, 2 * y + h) for x, y, w, h in (box["bbox"] for box in boxes)]
    order = sorted(range(len(names)), key=lambda i: centres[i])
    phrases = [with_article(name) for name in names]
    listed = [phrases[i] for i in order]
    if len(names) == 1:
        return listed[0]
    if len(names) == 2:
        true = [
            f"{phrases[a]} {relation} {phrases[b]}"
            for a, b in ((0, 1), (1, 0))
            for axis, relations in enumerate(RELATIONS)
            for relation, sign in zip(relations, (1, -1), strict=True)
            if sign * (centres[b][axis] - centres[a][axis]) * 4 >= resolution
        ]
        if true:
            return true[int(uniform * len(true))]
    return f"{', '.join(listed[:-1])} and {listed[-1]}"


def with_article(name: str) -> str:
    """The name of an object as captions say it: "a cat", "an ant", "some grapes"."""
    plural = name.endswith("s") and not name.endswith(("us", "os", "ss"))
    if plural or name in _UNCOUNTABLE:
        return f"some {name}"
    spoken_as_consonant = name.startswith(("uni", "eur"))  # a unicorn, a european castle
    return f"{'an' if name[0] in 'aeiou' and not spoken_as_consonant else 'a'} {name}"


def flip_boxes(boxes: Boxes, width: int) -> Boxes:
    """The boxes after an image of this width was mirrored left to right; the order stays."""
    flipped = []
    for box in boxes:
        x, y, w, h = box["bbox"]
        flipped.append({**box, "bbox": [width - x - w, y, w, h]})
    return flipped


def _choose(things: Sequence[Thing], taken: set[str], label: float, which: float) -> int:
    """A thing with a new name: a class by one uniform number, then one of the class by another."""
    wanted = int(label * len(CLASSES))
    free = [i for i, thing in enumerate(things) if thing.name not in taken]
    # All classes are as frequent, though they differ in size; a small one may be used up.
    free = [i for i in free if things[i].label == wanted] or free
    return free[int(which * len(free))]


def _mirror(part: CutOut) -> CutOut:
    x, y, width, height = part.extent
    extent = (part.mask.shape[1] - x - width, y, width, height)
    return CutOut(part.picture[:, ::-1], part.mask[:, ::-1], extent)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
