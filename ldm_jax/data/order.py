"""Random numbers of the data: functions of a seed and a place in the sequence, without state.

Only NumPy's Philox bits are used, in counter mode. Unlike the methods of `numpy.random.Generator`
they are promised not to change between versions of NumPy, so an upgrade does not disturb a run.
(grain's index shuffle would need no memory, but takes milliseconds per index for small sets.)
"""

from __future__ import annotations

import functools

import numpy as np

_ORDER, _UNIFORM = range(2)  # streams of a seed
_BLOCK = 4  # Philox makes its 64-bit numbers in blocks of four, one per count


def permutation(seed: int, epoch: int, count: int, part: int = 0) -> np.ndarray:
    """The order of `count` things in an epoch: (count,) int32; those of other parts differ."""
    bits = _philox(seed, _ORDER, [0, epoch, part, 0]).random_raw(count)
    return np.argsort(bits, kind="stable").astype(np.int32)


@functools.lru_cache(maxsize=4)  # batches in the making at an epoch boundary need two
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of `count` examples in an epoch: (count,) int32, a permutation."""
    return permutation(seed, epoch, count)


def uniforms_at(seed: int, position: int, count: int, width: int) -> np.ndarray:
    """Uniform numbers in [0, 1) for `count` positions from `position` on: (count, width).

    `width` is at most 4. The numbers of a position do not depend on where the call starts.
    """
    bits = _philox(seed, _UNIFORM, [position, 0, 0, 0]).random_raw(count * _BLOCK)
    return (bits >> np.uint64(11)).reshape(count, _BLOCK)[:, :width] * 2.0**-53


def _philox(seed: int, stream: int, counter: list[int]) -> np.random.Philox:
    key = np.random.SeedSequence([seed, stream]).generate_state(2, np.uint64)
    return np.random.Philox(key=key, counter=np.array(counter, np.uint64))
