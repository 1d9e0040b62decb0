"""Linear filters of images: resizing and Gaussian blur, in NumPy.

Images are planes: (C, H, W) float32. Sums are taken tap by tap, in a fixed order, and not by matrix
products: so that they are the same, bit for bit, whatever the machine and its number of threads.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

RESIZES = ("linear", "cubic", "area")


class Taps(NamedTuple):
    """A filter along one axis: out[i] = sum over t of weight[t, i] * in[index[t, i]].

    Attributes:
        index: (taps, length of the output) int.
        weight: (taps, length of the output) float32.
    """

    index: np.ndarray
    weight: np.ndarray


def filter_planes(planes: np.ndarray, rows: Taps, columns: Taps) -> np.ndarray:
    """Filters (C, H, W) along H, by `rows`, and then along W, by `columns`."""
    out = 0
    for index, weight in zip(*rows, strict=True):
        out = out + planes[:, index] * weight[:, None]
    planes, out = out, 0
    for index, weight in zip(*columns, strict=True):
        out = out + planes[:, :, index] * weight
    return out


def resize(planes: np.ndarray, size: tuple[int, int], kind: str) -> np.ndarray:
    """Resizes (C, H, W) to (C, *size) as OpenCV does.

    Args:
        kind: 'linear' and 'cubic' (with the constant -0.75, so it can leave the range of the
            input) interpolate, without antialiasing; 'area' takes means.
    """
    taps = [_resize_taps(*lengths, kind) for lengths in zip(planes.shape[1:], size, strict=True)]
    return filter_planes(planes, *taps)


def gaussian_taps(
    length: int, size: int, sigma: float, shift: float = 0.0, stride: int = 1
) -> Taps:
    """The Gaussian of `gaussian_kernel` along one axis of `length`, with mirrored ends.

    Args:
        size: number of taps, odd.
        sigma: more than 0, in pixels.
        shift: out[i] is centred at in[i * stride + shift]; between two taps it is interpolated.
        stride: of the output.
    """
    place = np.arange(size) - size // 2
    weight = np.interp(place - shift, place, np.exp(-0.5 * (place / sigma) ** 2))
    weight = (weight / weight.sum()).astype(np.float32)
    index = _reflect(np.arange(0, length, stride) + place[:, None], length)
    return Taps(index, np.broadcast_to(weight[:, None], index.shape))


def gaussian_kernel(size: int, covariance: np.ndarray) -> np.ndarray:
    """A Gaussian about the middle of a square: (size, size) float32, [y, x], of sum 1.

    Args:
        size: odd; the Gaussian is cut off there.
        covariance: (2, 2), of x and y, positive definite however narrow.
    """
    place = np.arange(size) - size // 2
    precision = np.linalg.inv(covariance)
    exponent = 0.5 * (
        precision[0, 0] * place**2
        + precision[1, 1] * place[:, None] ** 2
        + 2 * precision[0, 1] * place * place[:, None]
    )
    kernel = np.exp(-exponent)
    kernel[kernel < 1e-5] = 0  # for speed: most of a narrow one is empty
    return (kernel / kernel.sum()).astype(np.float32)


def convolve(planes: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolves (C, H, W) with a square kernel of odd size, with mirrored ends."""
    _, height, width = planes.shape
    last = len(kernel) - 1
    rows, columns = (
        _reflect(np.arange(-(last // 2), length + last // 2), length) for length in (height, width)
    )
    padded = planes[:, rows[:, None], columns]
    out = np.zeros_like(planes)
    product = np.empty_like(out[0])
    for y, x in zip(*np.nonzero(kernel), strict=True):
        top, left = last - y, last - x
        for plane, source in zip(out, padded, strict=True):  # one plane fits into the cache
            np.multiply(source[top : top + height, left : left + width], kernel[y, x], out=product)
            plane += product
    return out


def _resize_taps(length: int, out_length: int, kind: str) -> Taps:
    scale = length / out_length
    if kind == "area":  # the share of each pixel that is under the new one
        start = np.arange(out_length) * scale
        index = np.floor(start).astype(int) + np.arange(int(scale) + 2)[:, None]
        covered = np.minimum(index + 1, start + scale) - np.maximum(index, start)
        weight = np.maximum(covered, 0) / scale
    else:
        middle = (np.arange(out_length) + 0.5) * scale - 0.5
        reach = {"linear": 1, "cubic": 2}[kind]
        index = np.floor(middle).astype(int) + np.arange(1 - reach, 1 + reach)[:, None]
        distance = np.abs(middle - index)
        weight = 1 - distance if kind == "linear" else _cubic(distance)
    return Taps(np.clip(index, 0, length - 1), weight.astype(np.float32))


def _cubic(x: np.ndarray, a: float = -0.75) -> np.ndarray:
    """The cubic of Keys, for distances of 0 to 2."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x <= 1, near, far)


def _reflect(index: np.ndarray, length: int) -> np.ndarray:
    """Brings places beyond the ends back, mirrored at the middle of the last pixel."""
    period = max(2 * (length - 1), 1)
    index = np.abs(index) % period
    return np.minimum(index, period - index)
