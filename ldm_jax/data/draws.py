"""Random draws of any number and kind for one example, from Philox bits alone.

See `ldm_jax.data.order` for why not `numpy.random.Generator`: what is made of the bits is written
out here, so that the draws stay the same with every version of NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Uniforms:
    """A sequence of uniform numbers in [0, 1) that follows from a seed, a stream and a position.

    Not for use by several threads at a time; make one for each example, which costs little.

    Args:
        seed: not negative.
        stream: what the numbers are for, not negative: different streams are independent.
        position: of the example in the sequence of all examples, not negative.
    """

    def __init__(self, seed: int, stream: int = 0, position: int = 0):
        # Three words, where `order` has two: the keys differ whatever the numbers of the streams.
        key = np.random.SeedSequence([seed, stream, 1]).generate_state(2, np.uint64)
        # A position has 2^64 blocks of numbers to itself.
        self._bits = np.random.Philox(key=key, counter=np.array([0, position, 0, 0], np.uint64))

    def __call__(self) -> float:
        """The next number, in [0, 1)."""
        return (self._bits.random_raw() >> 11) * 2.0**-53

    def array(self, shape: int | Sequence[int]) -> np.ndarray:
        """The next numbers, in [0, 1), as a float64 array."""
        bits = self._bits.random_raw(math.prod(np.atleast_1d(shape).tolist()))
        return ((bits >> np.uint64(11)) * 2.0**-53).reshape(shape)

    def between(self, low: float, high: float) -> float:
        """Uniform in [low, high)."""
        return low + (high - low) * self()

    def integer(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return low + int((high - low + 1) * self())

    def choice(self, items: Sequence[T]) -> T:
        """One of the items, each with the same probability."""
        return items[int(len(items) * self())]

    def permutation(self, count: int) -> list[int]:
        """The numbers below `count` in random order."""
        return np.argsort(self._bits.random_raw(count), kind="stable").tolist()

    def normal(self, shape: int | Sequence[int]) -> np.ndarray:
        """Standard normal numbers, as a float32 array: the method of Box and Muller.

        NumPy's logarithm and sine may differ in the last bit between processors. They are taken in
        float64, so that this is all but never seen in the result.
        """
        count = math.prod(np.atleast_1d(shape).tolist())
        radius, angle = self.array((2, (count + 1) // 2))
        radius = np.sqrt(-2 * np.log(1 - radius))
        angle *= 2 * np.pi
        pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)])
        return pairs.reshape(-1)[:count].astype(np.float32).reshape(shape)
