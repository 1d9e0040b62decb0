"""Reading of the reference values in `tests/golden` (see its README) and comparison with them."""

from __future__ import annotations

import functools
import gzip
import json
import pathlib
import zlib
from collections.abc import Sequence

import jax
import numpy as np

GOLDEN = pathlib.Path(__file__).parent / "golden"


def cheap_compiler_options() -> dict:
    """What makes XLA:CPU compile two to three times faster, and the result slower."""
    options = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: 0, compiler_options=options)()
    except Exception:  # an option that this version of XLA does not know
        return {}
    return options


# For functions that run once: compiling them is what takes the time.
quick_jit = functools.partial(jax.jit, compiler_options=cheap_compiler_options())


class Golden:
    """One fixture: `meta` from its JSON, `arrays` from its npz, both as they were stored."""

    def __init__(self, name: str) -> None:
        self.meta = json.loads((GOLDEN / f"{name}.json").read_text())
        with np.load(GOLDEN / f"{name}.npz") as stored:
            self.arrays = dict(stored)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def nhwc(self, name: str) -> np.ndarray:
        """An array (N, C, H, W) as (N, H, W, C)."""
        return self.arrays[name].transpose(0, 2, 3, 1)

    def weights(self, prefix: str = "") -> dict[str, np.ndarray]:
        """The state dict, from its formula; only the keys that begin with `prefix`, without it."""
        seed, weights = self.meta["weights_seed"], {}
        for key, spec in self.meta["weights_spec"].items():
            if key.startswith(prefix):
                weights[key.removeprefix(prefix)] = make_weight(key, *spec, seed)
        return weights

    def check(self, name: str, value: np.ndarray) -> None:
        """Asserts that `value` is the stored array, within the fixture's own tolerance.

        `value` is channels last; a stored (N, C, H, W) is compared in that layout.
        """
        want = self.nhwc(name) if self.arrays[name].ndim == 4 else self.arrays[name]
        atol = self.meta["tolerance"][name]["suggested_atol"]
        assert value.shape == want.shape, f"{name}: {value.shape} instead of {want.shape}"
        np.testing.assert_allclose(value, want, rtol=0, atol=atol, err_msg=name)

    def check_gradients(self, gradients: dict[str, np.ndarray], skip: Sequence[str] = ()) -> None:
        """Asserts that the norm of every parameter's gradient is the stored one, but for `skip`.

        Gradients that are zero in exact arithmetic hold the rounding errors of those around them.
        """
        stored = {key: norm for key, norm in self.meta["grad_l2"].items() if key not in skip}
        assert gradients.keys() == stored.keys()
        largest = max(stored.values())
        for key, want in stored.items():
            norm = np.sqrt(np.square(np.asarray(gradients[key], np.float64)).sum())
            atol = max(1e-5, 1e-7 * largest) if want < 1e-9 * largest else 1e-5
            np.testing.assert_allclose(norm, want, rtol=1e-3, atol=atol, err_msg=key)


@functools.cache
def load(name: str) -> Golden:
    """Reads a fixture once."""
    return Golden(name)


def make_weight(key: str, shape: list[int], kind: str, a: float, seed: int) -> np.ndarray:
    """The weight that the fixtures' formula gives to a key."""
    state = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32)
    z = state.standard_normal(shape)
    values = {"normal": lambda: a * z, "one_plus": lambda: 1 + a * z, "exp": lambda: np.exp(a * z)}
    return np.asarray(values[kind](), np.float32)


def load_manifest(name: str) -> dict:
    """Reads the state-dict keys with their shapes and the counts of a published model."""
    return json.loads(gzip.decompress((GOLDEN / "manifests" / f"{name}.json.gz").read_bytes()))
