"""What the flags of `ldm_jax.sample` name, read from files and checked: the arguments of a call.

Its flags are defined here too, so that sample.py is left with settings and output.
"""

from __future__ import annotations

import math
import pathlib
import zipfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from absl import flags

from ldm_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from ldm_jax.first_stage.tiled import Memory
    from ldm_jax.pipeline import Pipeline

_LABEL = flags.DEFINE_list(
    "label", None, "Class numbers or names, used in turn. Default: all classes in turn."
)
_PROMPT = flags.DEFINE_multi_string(
    "prompt", None, "A caption; may be given several times, and then they are used in turn."
)
_PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "A file of captions, one a line.")
_NEGATIVE = flags.DEFINE_string(
    "negative_prompt", None, "A caption that guidance leads away from, in place of the empty one."
)
_ALSO = flags.DEFINE_multi_string(
    "also",
    None,
    "A further caption or class and its weight after the last colon, such as 'a red teapot:1.5'; "
    "below 0 leads away from it. May be given several times.",
)
_AUTOGUIDANCE = flags.DEFINE_string(
    "autoguidance",
    None,
    "Workdir of a weaker model that --guidance_scale leads away from, in place of the null "
    "condition.",
)
_CLASSIFIER_SCALE = flags.DEFINE_float(
    "classifier_scale",
    None,
    "How much the gradient of the model's classifier is followed towards --label; 1 is Bayes' "
    "rule, 0 = off.",
)
_TWO_CALLS = flags.DEFINE_bool(
    "two_calls", None, "Guide by network calls in turn, which take the memory of one."
)
_LAYOUT = flags.DEFINE_string(
    "layout",
    None,
    'A JSON list of {"label": class, "bbox": [left, top, width, height]}, in shares of the image.',
)
_SEGMENTATION = flags.DEFINE_string(
    "segmentation", None, "A grey or palette PNG whose values are class numbers."
)
_LOW_RES = flags.DEFINE_string("low_res", None, "An image to enlarge.")
_NOISE_LEVEL = flags.DEFINE_float(
    "noise_level",
    None,
    "Noise that --low_res is given, for a model trained with it: more invents more. Default: 0.",
)
_CONDITION = flags.DEFINE_string(
    "condition", None, "An .npz file with an array per field of the condition, one row per image."
)
_IMAGE = flags.DEFINE_string("image", None, "An image to keep but for --mask.")
_MASK = flags.DEFINE_string("mask", None, "A picture that is white where --image is made anew.")
_RESAMPLE = flags.DEFINE_list(
    "resample",
    None,
    "Of --image --mask: how often each step is made, from latents that are noised again, so that "
    "what is made fits what is kept; and by how many steps they go back (default 1): 10 or 10,5.",
)
_INIT_IMAGE = flags.DEFINE_string("init_image", None, "An image to start from: see --strength.")
_STRENGTH = flags.DEFINE_float(
    "strength", 0.7, "Of --init_image: how much of it may change, above 0; 1 keeps nothing."
)
_COLORIZE = flags.DEFINE_string("colorize", None, "A grey image to be given colours.")
_INTERPOLATE = flags.DEFINE_list(
    "interpolate_seeds", None, "Two seeds: the images lie on the way from one to the other."
)
_HEIGHT = flags.DEFINE_integer("height", None, "Of the images, in pixels.")
_WIDTH = flags.DEFINE_integer("width", None, "Of the images, in pixels.")
_TILE = flags.DEFINE_integer(
    "tile",
    None,
    "Side of the overlapping tiles in which images are made, in pixels; 0 = all at once. Default: "
    "at once up to twice the training size (of a dit, up to it), else tiles of the training size.",
)


def read_inputs(pipe: Pipeline, count: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the arguments of `Pipeline.sample` that the flags name, for `count` images, and
    pictures of them to lay beside the result, by name.

    Raises:
        UserError: files or values that cannot be used.
    """
    from ldm_jax.workdir import load

    pictures: dict[str, np.ndarray] = {}
    size = _size(pipe)
    condition = _condition(pipe, count, size, pictures)
    inputs = {"condition": condition, "size": size}
    # What is not given is left to the defaults of `Pipeline.sample`.
    given = (_TILE, _NOISE_LEVEL, _CLASSIFIER_SCALE, _TWO_CALLS)
    inputs |= {f.name: f.value for f in given if f.value is not None}
    if _NOISE_LEVEL.value is not None:
        _need(pipe, "noise_level", _NOISE_LEVEL)
    if _NEGATIVE.value is not None:
        _need(pipe, "text", _NEGATIVE)
        inputs["negative"] = {"text": [_NEGATIVE.value] * count}
        _warn_of_cuts(pipe, [_NEGATIVE.value])
    if _ALSO.value:
        inputs["also"] = [_also(pipe, text, count) for text in _ALSO.value]
    if _AUTOGUIDANCE.value:
        inputs["weak"] = load(_AUTOGUIDANCE.value)
    inputs |= _pixels(count, size, pictures)
    if _RESAMPLE.value:
        inputs["resample"] = _resampling()
    if _INTERPOLATE.value:
        inputs["noise"] = _between_seeds(pipe, count, size)
    return inputs, pictures


def recorded() -> dict[str, Any]:
    """What samples.json repeats of flags whose values `read_inputs` turns into arrays."""
    return {flag.name: flag.value for flag in (_AUTOGUIDANCE, _ALSO) if flag.value}


def memory_check(pipe: Pipeline, inputs: dict[str, Any]) -> Callable[[Memory], None] | None:
    """What says how much memory large images take, and refuses more than is free; else None.

    It is for `measured` of `Pipeline.sample`, with the inputs that `read_inputs` returned.
    """
    from ldm_jax.arguments import choose_tile
    from ldm_jax.config import has_null

    (height, width), resolution = inputs["size"], pipe.config.data.resolution
    tile = choose_tile(pipe.config, (height, width), inputs.get("tile"))
    if max(height, width) <= resolution and tile is None:
        return None
    what = f"a batch of {height}x{width} " + ("at once" if tile is None else f"in tiles of {tile}")
    less = f"use --tile={resolution} or a" if tile is None else "use a smaller --tile or"
    less += " smaller --batch_size"
    guided = has_null(pipe.config) or inputs.keys() & {"weak", "classifier_scale"}
    if guided and not inputs.get("two_calls", pipe.config.sample.two_calls):
        less += ", or guide with --two_calls"

    def check(need: Memory) -> None:
        print(f"{what}; memory: {need.bound('a batch')}", flush=True)
        need.check_fits(what, less)

    return check


def _size(pipe: Pipeline) -> tuple[int, int]:
    default = pipe.config.data.resolution
    height, width = (default if flag.value is None else flag.value for flag in (_HEIGHT, _WIDTH))
    return pipe.check_size((height, width))


def _need(pipe: Pipeline, conditioner: str, flag: flags.FlagHolder) -> None:
    if conditioner not in pipe.config.conditioners:
        has = ", ".join(pipe.config.conditioners) or "none"
        raise UserError(
            f"--{flag.name} needs a model with the conditioner '{conditioner}': this one has {has}"
        )


def _also(pipe: Pipeline, text: str, count: int) -> tuple[dict[str, Any], float]:
    """A further condition and its weight, of CAPTION:WEIGHT or CLASS:WEIGHT."""
    wanted, _, number = text.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not wanted or not math.isfinite(weight):
        raise UserError(
            f"--also={text} must end in a colon and a number, its weight: --also='a red teapot:1.5'"
        )
    if "text" in pipe.config.conditioners:
        _warn_of_cuts(pipe, [wanted])
        return {"text": [wanted] * count}, weight
    _need(pipe, "label", _ALSO)
    return {"label": [pipe.label(wanted)] * count}, weight


def _resampling() -> tuple[int, int]:
    """How often each step is made, and the length of a jump back."""
    given = ",".join(_RESAMPLE.value)
    if not _IMAGE.value:
        raise UserError(f"--resample={given} makes parts fit those of an image: add --image --mask")
    if len(_RESAMPLE.value) > 2 or not all(x.strip().isdecimal() for x in _RESAMPLE.value):
        raise UserError(f"--resample={given} must be one or two whole numbers, such as 10 or 10,5")
    times, length = (*map(int, _RESAMPLE.value), 1)[:2]
    return times, length


def _condition(
    pipe: Pipeline, count: int, size: tuple[int, int], pictures: dict[str, np.ndarray]
) -> dict[str, Any] | None:
    """The condition of every sample, in turn; None for an unconditional model."""
    import numpy as np

    from ldm_jax.data import condition_files as read
    from ldm_jax.data.layout import box_picture, encode_layout, slots
    from ldm_jax.images import class_picture

    if _PROMPT.value and _PROMPTS_FILE.value:
        raise UserError("give --prompt or --prompts_file, not both")
    if _CONDITION.value:
        others = (_LABEL, _PROMPT, _PROMPTS_FILE, _LAYOUT, _SEGMENTATION, _LOW_RES)
        if given := [flag.name for flag in others if flag.value]:
            raise UserError(f"give --condition or --{given[0]}, not both")
        return _read_condition(_CONDITION.value, count)
    c, found = pipe.config, {}
    prompts = read.read_prompts(_PROMPTS_FILE.value) if _PROMPTS_FILE.value else _PROMPT.value
    if prompts:
        _need(pipe, "text", _PROMPTS_FILE if _PROMPTS_FILE.value else _PROMPT)
        found["text"] = [prompts[i % len(prompts)] for i in range(count)]
        _warn_of_cuts(pipe, found["text"])
    if _LABEL.value:
        chosen = [pipe.label(text) for text in _LABEL.value]
        if "label" not in c.conditioners and not _CLASSIFIER_SCALE.value:
            raise UserError(
                "no conditioner of this model reads --label: leave it away, or add "
                "--classifier_scale where there is a classifier"
            )
        found["label"] = [chosen[i % len(chosen)] for i in range(count)]
    elif c.conditioners == ("label",):
        found["label"] = [i % c.label.num_classes for i in range(count)]
    if _LAYOUT.value:
        _need(pipe, "layout", _LAYOUT)
        names = list(pipe.label_names or map(str, range(c.layout.vocab_size - 1)))
        boxes = read.read_layout(_LAYOUT.value, names, slots(c.layout.length))
        tokens = encode_layout(boxes, c.layout.length, c.layout.vocab_size)
        found["boxes"] = np.tile(tokens, (count, 1))
        side = max(256, c.data.resolution)
        pictures["layout"] = box_picture(boxes, names, (side, side))
    if _SEGMENTATION.value:
        _need(pipe, "segmentation", _SEGMENTATION)
        classes = read.read_label_map(_SEGMENTATION.value, c.segmentation.num_classes, size)
        found["segmentation"] = np.tile(classes, (count, 1, 1))
        pictures["segmentation"] = class_picture(classes, c.segmentation.num_classes)
    if _LOW_RES.value:
        _need(pipe, "low_res", _LOW_RES)
        small_size = tuple(side // c.data.low_res.factor for side in size)
        small = _fitted(read.read_low_res(_LOW_RES.value, small_size))
        found["low_res"] = np.tile(small.astype(np.float32) / 127.5 - 1, (count, 1, 1, 1))
        pictures["low_res"] = small
    return found or None


def _pixels(count: int, size: tuple[int, int], pictures: dict[str, np.ndarray]) -> dict[str, Any]:
    """Images that sampling starts from or keeps."""
    import numpy as np

    from ldm_jax.data import condition_files as read
    from ldm_jax.metrics.consistency import grey_levels

    found: dict[str, Any] = {}
    repeat = lambda x: np.repeat(x[None], count, axis=0)  # noqa: E731
    if bool(_IMAGE.value) != bool(_MASK.value):
        raise UserError("give --image and --mask together: what is kept, and where it is not")
    if _IMAGE.value:
        image = read.read_image(_IMAGE.value, size)
        mask = read.read_mask(_MASK.value, size, image_size=image.file_size)
        pixels = _fitted(image)
        found |= {"image": repeat(pixels), "hole": repeat(mask)}
        pictures["masked"] = np.where(mask[..., None], np.uint8(127), pixels)
    if _INIT_IMAGE.value:
        pixels = _fitted(read.read_image(_INIT_IMAGE.value, size))
        found |= {"init_image": repeat(pixels), "strength": _STRENGTH.value}
        pictures["init_image"] = pixels
    if _COLORIZE.value:
        pixels = _fitted(read.read_image(_COLORIZE.value, size))
        grey = grey_levels(pixels)
        found["grey"] = repeat(grey)
        pictures["grey"] = np.repeat(grey[..., None], 3, axis=-1)
    return found


def _warn_of_cuts(pipe: Pipeline, prompts: list[str]) -> None:
    """Says of each prompt that is too long what the model does not see of it."""
    from ldm_jax.data.tokenizers import Tokenizer, cut_notes

    if isinstance(pipe.tokenizer, Tokenizer):
        for note in cut_notes(pipe.tokenizer, prompts):
            print(note)


def _fitted(image: Any) -> np.ndarray:
    """The pixels of a `FittedImage`; says what was done to it."""
    if image.note:
        print(image.note)
    return image.pixels


def _between_seeds(pipe: Pipeline, count: int, size: tuple[int, int]) -> np.ndarray:
    """Noise from that of one seed to that of another, of unit variance all the way."""
    import numpy as np

    values = _INTERPOLATE.value
    if len(values) != 2 or not all(value.strip().isdecimal() for value in values):
        raise UserError(f"--interpolate_seeds={','.join(values)} must be two whole numbers")
    ends = pipe.initial_noise([int(value) for value in values], size)
    angle = np.linspace(0, np.pi / 2, count)[:, None, None, None]
    return (np.cos(angle) * ends[0] + np.sin(angle) * ends[1]).astype(np.float32)


def _read_condition(path: str, count: int) -> dict[str, Any]:
    """The fields of an .npz file, whose rows are used in turn."""
    import numpy as np

    if not zipfile.is_zipfile(pathlib.Path(path)):
        raise UserError(f"--condition={path} is no .npz file")
    try:
        with np.load(path, allow_pickle=False) as stored:
            fields = dict(stored)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read the condition {path}: {error}") from error
    for name, value in fields.items():
        if value.ndim < 1 or not len(value):
            raise UserError(f"'{name}' in {path} has no rows")
    return {n: value[np.arange(count) % len(value)] for n, value in fields.items()}
