"""What is measured of samples that were made under a condition, kind by kind.

Every figure stands beside references from the same run: 'shuffled', the same samples judged against
another example's condition, and 'real', the held-out images against their own condition, which is
the best that the judge lets anyone reach. Where real images would be perfect by definition there is
a simpler way of making images in its place: 'bicubic' or 'mean colour'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageFilter

from ldm_jax import condition_judges as judging
from ldm_jax import condition_sheet, fields, images
from ldm_jax.data.degradation import bicubic_down
from ldm_jax.errors import UserError
from ldm_jax.extractors import Clip
from ldm_jax.held_out import Examples
from ldm_jax.metrics import consistency as measure
from ldm_jax.metrics.judge_networks import Classifier, Segmenter
from ldm_jax.metrics.reconstruction import WINDOW, psnr, ssim
from ldm_jax.perceptual import Perceptual

# figure -> {'samples': ..., 'shuffled': ..., reference: ...}
Figures: TypeAlias = dict[str, dict[str, float]]
# (what is seen of images, rows of the examples whose conditions they are judged against) -> value
# by figure
Measure: TypeAlias = Callable[[Any, np.ndarray], dict[str, float]]

STRENGTH = 0.6  # of what is made of strokes
_COLOURS, _MEDIAN = 6, 16  # of strokes: flat colours, and the width of a stroke: R / 16


class Context(NamedTuple):
    """What the measures of a run share.

    Attributes:
        config: of the run, with the data that are asked for.
        held: the examples whose conditions are used.
        judge: kind -> a judge.
        lpips: distances of images, or None without its weights.
        clip: embeddings of images and captions, or None where nobody gave its weights.
    """

    config: ConfigDict
    held: Examples
    judge: Callable[[str], judging.Judge]
    lpips: Perceptual | None
    clip: Clip | None = None


class Task(NamedTuple):
    """Samples of one kind, and what is measured of them.

    Attributes:
        inputs: arguments of `Pipeline.sample` with a row for each example.
        settings: other arguments.
        figures: (samples, other) -> what is measured; `other` is a derangement of the rows.
        pictures: rows -> the conditions as pictures, a row of cells for each.
    """

    inputs: dict[str, Any]
    settings: dict[str, Any]
    figures: tuple[Callable[[np.ndarray, np.ndarray], Figures], ...]
    pictures: Callable[[list[int]], list[list[np.ndarray]]]


def against(
    measured: Measure,
    samples: np.ndarray,
    other: np.ndarray,
    see: Callable[[np.ndarray], Any] = lambda pixels: pixels,
    **references: np.ndarray,
) -> Figures:
    """Measures samples, the same shuffled, and other images of the same conditions, by name.

    `see` makes of images, once, what `measured` takes of them whatever the condition.
    """
    own, seen = np.arange(len(samples)), see(samples)
    found = {"samples": measured(seen, own), "shuffled": measured(seen, other)}
    found |= {name: measured(see(pixels), own) for name, pixels in references.items()}
    return {
        name: {column: float(values[name]) for column, values in found.items()}
        for name in found["samples"]
    }


# -- conditional models -----------------------------------------------------------------------


def conditional_tasks(context: Context) -> list[Task]:
    """All conditions of a model at once; [] for an unconditional one."""
    config, held = context.config, context.held
    if not config.conditioners:
        return []
    # The pipeline makes 'mask' and 'masked_image' of the image and its hole.
    names = [name for name in fields.specify(config) if name in held.fields and name != "mask"]
    parts = [part for part in config.conditioners if part in FIGURES]
    inputs: dict[str, Any] = {}
    if names:
        inputs["condition"] = {name: held.fields[name] for name in names}
    if "inpainting" in config.conditioners:
        inputs |= {"image": held.images, "hole": holes(held)}
    figures = tuple(
        lambda samples, other, part=part: FIGURES[part](context, samples, other) for part in parts
    )

    def pictures(rows: list[int]) -> list[list[np.ndarray]]:
        return [[condition_sheet.picture(p, config, held, row) for p in parts] for row in rows]

    return [Task(inputs, {}, figures, pictures)]


def condition_inputs(config: ConfigDict, held: Examples) -> dict[str, Any]:
    """Arguments of `Pipeline.sample` with the condition of each example; {} without conditions."""

    def no_judge(kind: str) -> judging.Judge:
        raise AssertionError("conditions are used here, and not judged")

    tasks = conditional_tasks(Context(config, held, no_judge, None))
    return tasks[0].inputs if tasks else {}


def holes(held: Examples) -> np.ndarray:
    """Where images are to be made: (N, R, R) bool."""
    return held.fields["mask"][..., 0] > 0


def label_figures(context: Context, samples: np.ndarray, other: np.ndarray) -> Figures:
    """Share of the images that the classifier puts in their class."""
    judge, labels = context.judge("label"), context.held.fields["label"]

    def see(pixels: np.ndarray) -> np.ndarray:
        return judging.scores(Classifier, judge, judging.judged_size(pixels)).argmax(-1)

    def measured(found: np.ndarray, rows: np.ndarray) -> dict[str, float]:
        return {"class_accuracy": (found == labels[rows]).mean()}

    return against(measured, samples, other, see, real=context.held.images)


def text_figures(context: Context, samples: np.ndarray, other: np.ndarray) -> Figures:
    """Share of the images whose caption is found among 50, and the CLIP score if CLIP is given."""
    judge, texts = context.judge("text"), context.held.captions

    def see(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return judging.embeddings(judge, pixels, texts)

    def measured(found: tuple[np.ndarray, np.ndarray], rows: np.ndarray) -> dict[str, float]:
        return {"caption_retrieval": measure.retrieval(*found, texts, rows, judging.CANDIDATES)}

    figures = against(measured, samples, other, see, real=context.held.images)
    if context.clip:
        embedded = context.clip.texts(texts)

        def scored(seen: np.ndarray, rows: np.ndarray) -> dict[str, float]:
            return {"clip_score": measure.clip_score(seen, embedded[rows]).mean()}

        embed = lambda pixels: context.clip.images.extract(pixels)["pool"]  # noqa: E731
        figures |= against(scored, samples, other, embed, real=context.held.images)
    return figures


def layout_figures(context: Context, samples: np.ndarray, other: np.ndarray) -> Figures:
    """Share of boxes with their class in them, and how well objects fill them."""
    held, judge = context.held, context.judge("layout")
    vocab_size = context.config.layout.vocab_size
    layouts = [judging.visible_boxes(tokens, vocab_size) for tokens in held.fields["boxes"]]
    segmenter = None if held.map_classes is None else context.judge("segmentation")

    def see(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        if segmenter is None:
            return pixels, None
        small = judging.judged_size(pixels)
        return pixels, judging.scores(Segmenter, segmenter, small).argmax(-1)

    def measured(given: tuple[np.ndarray, np.ndarray | None], rows: np.ndarray) -> dict[str, float]:
        (pixels, maps), chosen = given, [layouts[row] for row in rows]
        edges = [[box[1:] for box in boxes] for boxes in chosen]
        labels = np.array([box[0] for boxes in chosen for box in boxes])
        seen = judging.crops(pixels, edges)
        if not len(seen):
            raise UserError("the held-out layouts have no boxes: choose another --split")
        found = judging.scores(Classifier, judge, seen).argmax(-1)
        overlaps = []
        for i, boxes in enumerate(chosen):
            ground = measure.differs_from_ground(pixels[i], edges[i]) if maps is None else None
            for label, *box in boxes:
                mask = ground if ground is not None else maps[i] == held.map_classes[label]
                overlaps.append(measure.box_iou(measure.extent_near(mask, box), box))
        return {"box_class_accuracy": (found == labels).mean(), "box_iou": np.mean(overlaps)}

    return against(measured, samples, other, see, real=held.images)


def segmentation_figures(context: Context, samples: np.ndarray, other: np.ndarray) -> Figures:
    """Share of pixels that are of the map's class, and of those that it gives an object, where the
    data say which class is the ground.
    """
    judge, maps = context.judge("segmentation"), context.held.fields["segmentation"]
    maps = judging.judged_maps(maps)

    def see(pixels: np.ndarray) -> np.ndarray:
        return judging.scores(Segmenter, judge, judging.judged_size(pixels)).argmax(-1)

    def measured(seen: np.ndarray, rows: np.ndarray) -> dict[str, float]:
        everywhere, objects = measure.agreement(seen, maps[rows], context.held.ground)
        found = {"pixel_agreement": everywhere}
        return found | ({} if np.isnan(objects) else {"object_pixel_agreement": objects})

    return against(measured, samples, other, see, real=context.held.images)


def low_res_figures(context: Context, samples: np.ndarray, other: np.ndarray) -> Figures:
    """How close enlarged images come to the true ones, and, reduced again, to what they are of."""
    real, small = context.held.images, images.to_uint8(context.held.fields["low_res"])
    factor, size = context.config.data.low_res.factor, real.shape[1:3]

    def measured(pixels: np.ndarray, rows: np.ndarray) -> dict[str, float]:
        a, b = images.to_float(pixels), images.to_float(real[rows])
        found = {"psnr": np.mean(psnr(a, b))}
        if min(size) >= WINDOW:
            found["ssim"] = np.mean(ssim(a, b))
        if context.lpips:
            found["lpips"] = context.lpips(pixels, real[rows]).mean()
        return found

    def reduced(pixels: np.ndarray, rows: np.ndarray) -> dict[str, float]:
        less = np.stack([bicubic_down(image, factor) for image in pixels])
        pair = images.to_float(less), images.to_float(small[rows])
        return {"low_res_psnr": np.mean(psnr(*pair))}

    cubic = Image.Resampling.BICUBIC
    enlarged = np.stack([np.asarray(Image.fromarray(x).resize(size[::-1], cubic)) for x in small])
    found = against(measured, samples, other, bicubic=enlarged)
    # Reduced by the same method the real images are their small ones: that is no reference.
    known = context.config.data.low_res.degradation == "bicubic"
    references = {"bicubic": enlarged} | ({} if known else {"real": real})
    return found | against(reduced, samples, other, **references)


def inpainting_figures(context: Context, samples: np.ndarray, other: np.ndarray) -> Figures:
    """How close the content of holes comes to the truth, and that nothing else has changed."""
    real, hole = context.held.images, holes(context.held)

    def measured(pixels: np.ndarray, rows: np.ndarray) -> dict[str, float]:
        where, truth = hole[rows], real[rows]
        filled = np.where(where[..., None], pixels, truth)
        distances = context.lpips.maps(filled, truth)
        return {"hole_lpips": np.mean([d[w].mean() for d, w in zip(distances, where, strict=True)])}

    found: Figures = {}
    if context.lpips:
        fill = measure.mean_colour_fill(real, hole)
        found = against(measured, samples, other, **{"mean colour": fill})
    change = measure.largest_change(samples, real, hole)
    return found | {"change_outside_hole": {"samples": float(change)}}


FIGURES = {
    "label": label_figures,
    "text": text_figures,
    "layout": layout_figures,
    "segmentation": segmentation_figures,
    "low_res": low_res_figures,
    "inpainting": inpainting_figures,
}


# -- unconditional models, guided -------------------------------------------------------------


def guided_tasks(context: Context) -> list[Task]:
    """What a model without conditions is guided to: fill holes, colour greys, follow strokes."""
    held = context.held
    real, hole = held.images, holes(held)
    grey, strokes = measure.grey_levels(real), np.stack([make_strokes(image) for image in real])
    masked = np.where(hole[..., None], np.uint8(127), real)

    def inpainting(samples: np.ndarray, other: np.ndarray) -> Figures:
        return inpainting_figures(context, samples, other)

    def colours(samples: np.ndarray, other: np.ndarray) -> Figures:
        error = lambda x, rows: {"luma_error": measure.luma_error(x, grey[rows]).mean()}  # noqa: E731
        found = against(error, samples, other, real=real)
        return found | {"colorize_colourfulness": _colourfulness(samples, real)}

    def follow(samples: np.ndarray, other: np.ndarray) -> Figures:
        far = lambda x, rows: {  # noqa: E731
            "stroke_distance": measure.stroke_distance(x, strokes[rows]).mean()
        }
        found = against(far, samples, other, real=real)
        return found | {"stroke_colourfulness": _colourfulness(samples, real)}

    shades = np.repeat(grey[..., None], 3, axis=-1)
    return [
        Task({"image": real, "hole": hole}, {}, (inpainting,), lambda rows: _cells(masked, rows)),
        Task({"grey": grey}, {}, (colours,), lambda rows: _cells(shades, rows)),
        Task(
            {"init_image": strokes},
            {"strength": STRENGTH},
            (follow,),
            lambda rows: _cells(strokes, rows),
        ),
    ]


def _cells(pixels: np.ndarray, rows: list[int]) -> list[list[np.ndarray]]:
    return [[pixels[row]] for row in rows]


def _colourfulness(samples: np.ndarray, real: np.ndarray) -> dict[str, float]:
    parts = {"samples": samples, "real": real}
    return {name: float(measure.colourfulness(x).mean()) for name, x in parts.items()}


def make_strokes(image: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) uint8 in a few flat colours without fine detail, as if painted."""
    few = Image.fromarray(image).quantize(_COLOURS, Image.Quantize.MEDIANCUT, dither=0)
    size = max(3, min(image.shape[:2]) // _MEDIAN // 2 * 2 + 1)  # odd
    return np.asarray(few.convert("RGB").filter(ImageFilter.MedianFilter(size)))
