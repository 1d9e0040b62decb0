"""Judges of samples: small networks fitted to the real images of a run, and kept beside it.

Large images are judged at a reduced size: see `judged_size`.
"""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from ml_collections import ConfigDict
from PIL import Image

from ldm_jax.data.draws import Uniforms
from ldm_jax.data.layout import Box, decode_layout, slots
from ldm_jax.errors import UserError
from ldm_jax.held_out import Examples, fingerprint
from ldm_jax.metrics import consistency
from ldm_jax.metrics import judge_networks as networks

# 'params', and 'held_out' and 'images': its score on real images that it was not fitted to, and how
# many it was fitted to; also 'classes', or 'words' of the text judge.
Judge: TypeAlias = dict[str, Any]

VERSION = 2  # of the judges: to be raised with every change of what they are or learn
STEPS = {"label": 600, "text": 600, "layout": 600, "segmentation": 400}
IMAGES = 4000  # of the training split are shown to a judge, at most
CANDIDATES = 50  # captions that the right one is found among
SIDE = 64  # pixels that a judge sees of larger images
_WORDS = 4000  # known to the text judge, at most
_BATCH_SIZE = {"segmentation": 32}
_BACKGROUND, _TRIES = 21, 10  # stream of random numbers; places tried for a crop of the background


def load_judge(
    folder: pathlib.Path, kind: str, config: ConfigDict, read: Callable[[], Examples]
) -> Judge:
    """Returns a judge: the one in `folder`, or one that is fitted now and stored there.

    Args:
        folder: where judges are kept.
        kind: 'label', 'text', 'layout' or 'segmentation'.
        config: of the run; the judge follows from its data.
        read: reads the real images; called only if there is no such judge yet.
    """
    path = folder / f"judge_{kind}_{_digest(kind, config)}.msgpack"
    try:
        return serialization.msgpack_restore(path.read_bytes())
    except (OSError, ValueError):
        pass  # none yet, or cut off while it was written
    examples = read()
    print(f"fitting a judge ({kind}) to {len(examples.images)} real images", flush=True)
    judge = FITTED[kind](examples, config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(serialization.msgpack_serialize(judge))
    except OSError as error:
        print(f"note: the judge is not kept: cannot write {path} ({error.strerror})")
    return judge


def _digest(kind: str, config: ConfigDict) -> str:
    names = ("source", "split", "where", "label", "caption", "resolution", "crop", "flip")
    said = {name: config.data[name] for name in names}
    said |= {"kind": kind, "version": VERSION, "steps": STEPS[kind], "images": IMAGES}
    said |= {"classes": [config.label.num_classes, config.segmentation.num_classes]}
    said |= {"layout": [config.layout.length, config.layout.vocab_size]}
    if files := fingerprint(config.data.source):  # other images there make another judge
        said |= {"files": files}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


# -- what judges see --------------------------------------------------------------------------


def judged_size(images: np.ndarray) -> np.ndarray:
    """Images (B, H, W, 3) uint8 of a multiple of 64 pixels a side, at 64; others as they are."""
    block = _block(images)
    return images if block == 1 else np.round(consistency.block_means(images, block)).astype("u1")


def judged_maps(maps: np.ndarray) -> np.ndarray:
    """The maps (B, H, W) of such images, at the same size: the class in the middle of a square."""
    block = _block(maps)
    return maps[:, block // 2 :: block, block // 2 :: block]


def _block(x: np.ndarray) -> int:
    return (
        math.gcd(x.shape[1], x.shape[2]) // SIDE if not any(s % SIDE for s in x.shape[1:3]) else 1
    )


def reduced(arrays: dict[str, np.ndarray], whole: bool = False) -> dict[str, np.ndarray]:
    """What the judges are fitted to of the arrays (B, ...) of examples: images and maps as they see
    them, or `whole` images for crops of them.
    """
    kept = {name: arrays[name] for name in ("label", "boxes", "tokens") if name in arrays}
    kept["image"] = arrays["image"] if whole else judged_size(arrays["image"])
    if "segmentation" in arrays:
        kept["segmentation"] = judged_maps(arrays["segmentation"])
    return kept


def visible_boxes(tokens: np.ndarray, vocab_size: int) -> list[Box]:
    """The boxes in layout tokens (L,), relative to what the model sees and clipped to it."""
    boxes, crop = decode_layout(tokens, vocab_size), (0.0, 0.0, 1.0, 1.0)
    if len(tokens) > 3 * slots(len(tokens)):  # the last two are the corners of the crop
        side = math.isqrt(vocab_size)
        crop = [n / (side - 1) for t in tokens[-2:].tolist() for n in (t % side, t // side)]
    wide, high, found = crop[2] - crop[0], crop[3] - crop[1], []
    for label, *edges in boxes:
        x0, x1 = (min(max((x - crop[0]) / wide, 0.0), 1.0) for x in edges[::2])
        y0, y1 = (min(max((y - crop[1]) / high, 0.0), 1.0) for y in edges[1::2])
        if x1 > x0 and y1 > y0:
            found.append((label, x0, y0, x1, y1))
    return found


def crops(images: np.ndarray, edges: Sequence[Sequence[consistency.Edges]]) -> np.ndarray:
    """What lies in the boxes of each of (B, H, W, 3) uint8, one after the other: (n, 32, 32, 3)."""
    height, width, found = *images.shape[1:3], []
    for pixels, boxes in zip(images, edges, strict=True):
        image = Image.fromarray(pixels)
        for x0, y0, x1, y1 in boxes:
            box = (x0 * width, y0 * height, x1 * width, y1 * height)
            size = (networks.CROP, networks.CROP)
            found.append(np.asarray(image.resize(size, Image.Resampling.BILINEAR, box)))
    return np.stack(found) if found else np.zeros((0, networks.CROP, networks.CROP, 3), np.uint8)


def background_boxes(boxes: Sequence[Box], random: Uniforms) -> list[consistency.Edges]:
    """For each box one of its size where a tenth of it at most is covered by any, if found."""
    found = []
    for _, x0, y0, x1, y1 in boxes:
        wide, high = x1 - x0, y1 - y0
        for _ in range(_TRIES):
            x, y = random() * (1 - wide), random() * (1 - high)
            covered = [
                max(0.0, min(x + wide, b[3]) - max(x, b[1]))
                * max(0.0, min(y + high, b[4]) - max(y, b[2]))
                for b in boxes
            ]
            if max(covered) <= 0.1 * wide * high:
                found.append((x, y, x + wide, y + high))
                break
    return found


# -- fitting ----------------------------------------------------------------------------------


def _fit_classes(
    network: Any, images: np.ndarray, classes: np.ndarray, kind: str, out: np.ndarray, **draws: Any
) -> Judge:
    """Fits a network of scores; `out` (N,) bool marks what it is not fitted to."""

    def loss(params: Any, batch: dict, key: Any) -> Any:
        seen = networks.augment(batch["image"], key, **draws)
        return networks.class_loss(network.apply({"params": params}, seen), batch["class"])

    _check_count(kind, out)
    arrays = {"image": images[~out], "class": classes[~out]}
    size = {"batch_size": _BATCH_SIZE[kind]} if kind in _BATCH_SIZE else {}
    params = networks.fit(loss, _start(network, images[:1]), arrays, steps=STEPS[kind], **size)
    judge = {"params": params, "classes": network.classes, "images": int((~out).sum())}
    found = scores(type(network), judge, images[out]).argmax(-1)
    return judge | {"held_out": float((found == classes[out]).mean())}


def _start(network: Any, *arrays: np.ndarray) -> Any:
    return jax.jit(network.init)(jax.random.key(0), *(jnp.asarray(x, jnp.float32) for x in arrays))[
        "params"
    ]


def _check_count(kind: str, out: np.ndarray) -> None:
    if not out.any() or out.all():
        raise UserError(
            f"the data have too few images to fit a judge ({kind}) and to try it: it takes some "
            "hundreds (config.data.split, or --source)"
        )


def _held_out(count: int) -> np.ndarray:
    """Every tenth of `count` examples, but never all: (count,) bool."""
    return (np.arange(count) % 10 == 0) & (count > 1)


def fit_label(examples: Examples, config: ConfigDict) -> Judge:
    """Which class an image is of."""
    images, classes = judged_size(examples.images), examples.fields["label"]
    network = networks.Classifier(max(config.label.num_classes, int(classes.max()) + 1))
    draws = {"shift": images.shape[1] // 16, "flip": config.data.flip}
    return _fit_classes(network, images, classes, "label", _held_out(len(images)), **draws)


def fit_layout(examples: Examples, config: ConfigDict) -> Judge:
    """Which class fills a box, or, as the last class, that it is of the background."""
    layouts = [visible_boxes(t, config.layout.vocab_size) for t in examples.fields["boxes"]]
    empty = [
        background_boxes(boxes, Uniforms(0, _BACKGROUND, i)) for i, boxes in enumerate(layouts)
    ]
    seen = max((box[0] for boxes in layouts for box in boxes), default=0)
    classes = max(examples.num_labels, seen + 1)
    edges = [[box[1:] for box in full] + rest for full, rest in zip(layouts, empty, strict=True)]
    labels = [
        [box[0] for box in full] + [classes] * len(rest)
        for full, rest in zip(layouts, empty, strict=True)
    ]
    out = np.repeat(_held_out(len(edges)), [len(boxes) for boxes in edges])
    network = networks.Classifier(classes + 1)
    targets = np.concatenate([np.asarray(row, np.int32) for row in labels])
    draws = {"shift": 2, "flip": config.data.flip}
    return _fit_classes(network, crops(examples.images, edges), targets, "layout", out, **draws)


def fit_segmentation(examples: Examples, config: ConfigDict) -> Judge:
    """Which class a pixel is of."""
    images, maps = judged_size(examples.images), judged_maps(examples.fields["segmentation"])
    classes = (
        max(config.segmentation.num_classes, 1) if "segmentation" in config.conditioners else 1
    )
    network = networks.Segmenter(max(classes, int(maps.max()) + 1))
    return _fit_classes(network, images, maps, "segmentation", _held_out(len(images)))


def fit_text(examples: Examples, config: ConfigDict) -> Judge:
    """How alike an image and a caption are, by its words."""
    images, texts = judged_size(examples.images), examples.captions
    out = _held_out(len(images))
    _check_count("text", out)
    fitted = [text for text, left in zip(texts, out, strict=True) if not left]
    counts = Counter(word for text in fitted for word in sorted(set(split_words(text))))
    words = [word for word, _ in counts.most_common(_WORDS)]
    network, bags = networks.DualEncoder(), word_bags(texts, words)
    draws = {"shift": images.shape[1] // 16, "flip": config.data.flip}

    def loss(params: Any, batch: dict, key: Any) -> Any:
        seen = networks.augment(batch["image"], key, **draws)
        return networks.contrastive_loss(*network.apply({"params": params}, seen, batch["words"]))

    arrays = {"image": images[~out], "words": bags[~out]}
    start = _start(network, images[:1], bags[:1])
    params = networks.fit(loss, start, arrays, steps=STEPS["text"])
    judge = {"params": params, "words": words, "images": int((~out).sum())}
    rest = [text for text, left in zip(texts, out, strict=True) if left]
    places = np.arange(len(rest))
    found = embeddings(judge, images[out], rest)
    among = min(CANDIDATES, len(rest))
    return judge | {"held_out": consistency.retrieval(*found, rest, places, among)}


FITTED = {
    "label": fit_label,
    "text": fit_text,
    "layout": fit_layout,
    "segmentation": fit_segmentation,
}


# -- judging ----------------------------------------------------------------------------------


def scores(network: type, judge: Judge, images: np.ndarray) -> np.ndarray:
    """What a `Classifier` or `Segmenter` says of (N, H, W, 3) uint8: (N, ..., classes)."""
    module = network(judge["classes"])
    return networks.predict(lambda x: module.apply({"params": judge["params"]}, x), images)


def embeddings(
    judge: Judge, images: np.ndarray, texts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """The text judge's embeddings of N images and N captions, (N, D) each."""

    def apply(x: Any, words: Any) -> Any:
        return networks.DualEncoder().apply({"params": judge["params"]}, x, words)[:2]

    return networks.predict(apply, judged_size(images), word_bags(texts, judge["words"]))


def split_words(text: str) -> list[str]:
    """The words of a caption, in small letters."""
    return re.findall(r"[^\W_]+", text.lower())


def word_bags(texts: Sequence[str], words: Sequence[str]) -> np.ndarray:
    """How often each of V words is in each text: (N, V) float32; other words do not count."""
    place = {word: i for i, word in enumerate(words)}
    bags = np.zeros((len(texts), max(1, len(words))), np.float32)
    for bag, text in zip(bags, texts, strict=True):
        for word in split_words(text):
            if word in place:
                bag[place[word]] += 1
    return bags
