"""What is stored of an example: all flips and crops of its image, and the fields of conditions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from ldm_jax.data.degradation import degrade
from ldm_jax.data.task_fields import layout, segmentation
from ldm_jax.data.transforms import Draw, ImageTransform
from ldm_jax.errors import UserError

ANEW = {
    "mask": "its holes are drawn anew each time, and the first stage must see each masked image",
    "masked_image": "its holes are drawn anew each time, and the first stage must see each image",
}


def check_storable(config: ConfigDict) -> None:
    """Refuses fields that are made anew each time, by what the stored latents do not have.

    Raises:
        UserError: which, and why.
    """
    for field in config.data.fields:
        if field in ANEW:
            raise UserError(f"the field '{field}' cannot be stored: {ANEW[field]}")
        if field == "low_res" and config.data.low_res.degradation != "bicubic":
            raise UserError(
                "the field 'low_res' cannot be stored: config.data.low_res.degradation is "
                f"'{config.data.low_res.degradation}', which is drawn anew each time; only "
                "'bicubic' always gives the same"
            )


@dataclasses.dataclass(frozen=True)
class Variants:
    """Makes all that is stored of an example but moments and texts' outputs; a `Transform`.

    'image' and the fields that are made of places in it have a first axis of flips * crops. Arrays
    whose number of rows differs between examples are wrapped as objects.
    """

    image: ImageTransform
    crops: int
    config: ConfigDict
    fields: tuple[str, ...]

    def draw(self, uniforms: np.ndarray) -> Draw:
        return self.image.draw(uniforms)

    def apply(self, example: dict, draw: Draw) -> dict[str, np.ndarray]:
        # Of numbers that follow from the place in the data alone: all runs store the same crops.
        random = self.image.crop == "random"
        crops = draw.random.array((self.crops, 3)) if random else [None]
        draws = [
            Draw(flip, None if crop is None else tuple(crop.tolist()), first=True)
            for flip in ((False, True) if self.image.flip else (False,))
            for crop in crops
        ]
        pictures = [self.image.apply(example, one)["image"] for one in draws]
        arrays = {"image": np.stack(pictures)}
        if random:
            arrays["crops"] = crops
        for field in self.fields:
            arrays |= self._make(field, example, draws, pictures)
        return arrays

    def _make(
        self, field: str, example: dict, draws: Sequence[Draw], pictures: Sequence[np.ndarray]
    ) -> dict[str, np.ndarray]:
        c = self.config
        if field == "tokens":
            return {"tokens": _wrapped(np.asarray(example["tokens"], np.int32))}
        if field == "boxes":
            check = layout(c.layout.length, c.layout.vocab_size)
            for one in draws:  # now, not in the middle of a training
                check(pictures[0], example, one)
            rows = [[box["label"], *box["bbox"]] for box in example["boxes"]]
            size = np.array(example["image"].shape[:2], np.int32)
            return {"boxes": _wrapped(np.array(rows, np.float64).reshape(-1, 5)), "size": size}
        if field == "segmentation":
            make = segmentation(c.segmentation.num_classes)
            maps = [
                make(*pair)["segmentation"]
                for pair in ((p, example, d) for p, d in zip(pictures, draws, strict=True))
            ]
            return {"segmentation": np.stack(maps)}
        if field == "low_res":
            factor = c.data.low_res.factor
            return {"low_res": np.stack([degrade(p, factor, "bicubic", None) for p in pictures])}
        return {}


def _wrapped(array: np.ndarray) -> np.ndarray:
    """An array as one object, so that such of different shapes can be stacked."""
    wrapped = np.empty((), object)
    wrapped[()] = array
    return wrapped
