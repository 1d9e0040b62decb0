"""Encodes and decodes images with the first stage of a workdir, and says how close they come.

python -m ldm_jax.reconstruct --workdir=runs/quickstart --image=cat.png,dog.jpg
python -m ldm_jax.reconstruct --workdir=runs/quickstart --image=poster.png --tile=512 --crop

Writes NAME.png and NAME_difference.png, which is 4 times amplified around mid-grey. Images may be
of any size and kind; with --tile also larger than what fits into memory at once.
"""

from __future__ import annotations

import pathlib
import time
from typing import TYPE_CHECKING

from absl import flags

from ldm_jax import cli
from ldm_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from ldm_jax.pipeline import Pipeline

_WORKDIR = flags.DEFINE_string("workdir", "", "Workdir of a training run, or its first_stage.")
_IMAGE = flags.DEFINE_list("image", None, "Image files.")
_TILE = flags.DEFINE_integer(
    "tile", None, "Side in pixels of overlapping tiles to go by. Default: the whole image at once."
)
_CROP = flags.DEFINE_bool(
    "crop", False, "Cut sides to multiples of what the first stage needs, around the centre."
)
_OUT = flags.DEFINE_string("out", None, "Where to write. Default: <workdir>/reconstructions.")

SUGGESTED_TILE = 512
ROWS = 128  # compared at a time: a whole large image would need large temporary copies
SECONDS = 10  # between two lines of progress


def main() -> None:
    """Reads the flags and reconstructs one image after the other."""
    if not _WORKDIR.value:
        raise UserError("no workdir given: use --workdir=runs/quickstart")
    if not _IMAGE.value:
        raise UserError("no image given: use --image=cat.png")
    from ldm_jax import config as config_lib
    from ldm_jax import workdir as files
    from ldm_jax.first_stage.tiled import check_tile
    from ldm_jax.pipeline import Pipeline

    cli.use_compilation_cache()
    root, paths = pathlib.Path(_WORKDIR.value), [pathlib.Path(name) for name in _IMAGE.value]
    config = files.read_config(root)
    factor = config_lib.downsampling(config)
    if _TILE.value is not None:
        check_tile(_TILE.value, factor)
    for path in paths:  # all of them before the work, which may take long
        _read(path, factor)
    out = pathlib.Path(_OUT.value or root / "reconstructions")
    _check_outputs(paths, out)
    pipe = Pipeline(config, {"first_stage": files.load_first_stage(root, config)}, step=0)
    with cli.writing(out):
        out.mkdir(parents=True, exist_ok=True)
        for path in paths:
            _reconstruct(pipe, path, factor, out)


def _outputs(path: pathlib.Path, out: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    return out / f"{path.stem}.png", out / f"{path.stem}_difference.png"


def _check_outputs(paths: list[pathlib.Path], out: pathlib.Path) -> None:
    """Checks that every output has one input, and that none is an input.

    Raises:
        UserError: one would overwrite an image, or the output of another.
    """
    inputs, sources = {path.resolve() for path in paths}, {}
    for path in paths:
        for target in _outputs(path, out):
            if target.resolve() in inputs:
                raise UserError(f"{target} would overwrite an image given: choose another --out")
            if target in sources:
                raise UserError(
                    f"{sources[target]} and {path} would both write {target}: give them one by "
                    "one, each with its own --out"
                )
            sources[target] = path


def _read(path: pathlib.Path, factor: int) -> np.ndarray:
    """Decodes an image to (H, W, 3) uint8, with --crop cut to multiples of `factor`.

    Raises:
        UserError: it cannot be read, or `factor` does not divide its sides.
    """
    import numpy as np

    from ldm_jax.data.decode import decode_image
    from ldm_jax.first_stage.tiled import check_sides

    pixels = decode_image(path, str(path))
    height, width = pixels.shape[:2]
    if min(height, width) < factor:
        raise UserError(f"{path} is {height}x{width}, but must be at least {factor}x{factor}")
    if _CROP.value:
        top, left = height % factor // 2, width % factor // 2
        height, width = (side // factor * factor for side in (height, width))
        pixels = pixels[top : top + height, left : left + width]
    try:
        check_sides(height, width, factor, f"the image {path}")
    except UserError as error:
        raise UserError(f"{error}, or add --crop") from None
    return np.array(pixels)


def _reconstruct(pipe: Pipeline, path: pathlib.Path, factor: int, out: pathlib.Path) -> None:
    """Reconstructs one image, writes what comes of it and says how close it is."""
    from ldm_jax import images
    from ldm_jax.first_stage.tiled import OVERLAP

    pixels = _read(path, factor)
    height, width = pixels.shape[:2]
    need = pipe.memory(height, width, _TILE.value)
    print(f"{path}: {height}x{width}; memory: {need.bound()}", flush=True)
    suggested = max(OVERLAP, SUGGESTED_TILE // factor) * factor
    way_out = "use a smaller --tile or image" if _TILE.value else f"use --tile={suggested}"
    need.check_fits(f"{path} ({height}x{width})", way_out)
    begin = time.perf_counter()
    # A tile over all of the image runs the very program that was measured.
    tile = _TILE.value or max(height, width, OVERLAP * factor)
    latents = pipe.encode(pixels[None], tile, progress=_Progress("encoded"))
    decoded = pipe.decode(latents, tile, progress=_Progress("decoded"))[0]
    seconds = time.perf_counter() - begin
    reconstruction, psnr = _compare(pixels, decoded)
    del decoded  # writing a file takes as much again
    target, difference = _outputs(path, out)
    images.save_png(target, reconstruction)
    images.save_png(difference, pixels)
    print(f"{target}: PSNR {psnr:.2f} dB, {seconds:.1f} s", flush=True)


def _compare(pixels: np.ndarray, decoded: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns `decoded`, (H, W, 3) float32, as uint8 and its PSNR; `pixels` become differences."""
    import numpy as np

    from ldm_jax import images
    from ldm_jax.metrics.reconstruction import psnr

    reconstruction = np.empty_like(pixels)
    error = 0.0
    for top in range(0, len(pixels), ROWS):
        rows = slice(top, top + ROWS)
        reconstruction[rows] = images.to_uint8(decoded[rows])
        pair = (images.to_float(part[rows][None]) for part in (pixels, reconstruction))
        error += len(pixels[rows]) * 10 ** (-float(psnr(*pair)[0]) / 10)  # squared errors add up
        pixels[rows] = images.show_difference(pixels[rows], reconstruction[rows])
    return reconstruction, -10 * float(np.log10(error / len(pixels)))


class _Progress:
    """Prints how many tiles are done, once in a while."""

    def __init__(self, what: str) -> None:
        self._what, self._printed = what, time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        if time.perf_counter() - self._printed > SECONDS:
            self._printed = time.perf_counter()
            print(f"{self._what} {done} of {total} tiles", flush=True)


if __name__ == "__main__":
    cli.run(main)
