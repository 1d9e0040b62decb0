"""Several hosts that stop after the same step, whichever of them was asked to."""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ldm_jax.training.interrupt import Interrupts
from ldm_jax.training.sharding import AXES, replicated

# Steps after which a vote is counted: the hosts wait for the step before, not for the one that the
# devices are at.
LAG = 1


class Votes:
    """Called after each step, by all hosts; tells whether to stop, the same on each of them."""

    def __init__(self, interrupts: Interrupts, mesh: jax.sharding.Mesh) -> None:
        self.interrupts, self._pending = interrupts, collections.deque()
        self._alone, self._size = jax.process_count() == 1, mesh.size
        self._split = NamedSharding(mesh, PartitionSpec(AXES))
        self._any = jax.jit(jnp.any, out_shardings=replicated(mesh))

    def __call__(self) -> bool:
        """Whether a signal came to any host by LAG steps ago; of a single host, by now."""
        # Read once: a signal that comes while this step is written stops after the next one.
        requested, self.interrupts.unsaved = self.interrupts.requested, True
        if self._alone:
            return requested
        vote = lambda index: np.array([requested])  # noqa: E731
        flags = jax.make_array_from_callback((self._size,), self._split, vote)
        self._pending.append(self._any(flags))
        return len(self._pending) > LAG and bool(self._pending.popleft())
