"""How well a first stage reconstructs images: means over a set, batch by batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ldm_jax import builders, images
from ldm_jax.data.device import to_device
from ldm_jax.data.pipeline import epoch_batches
from ldm_jax.data.sources import Source
from ldm_jax.first_stage.kl import kl_divergence
from ldm_jax.first_stage.losses import code_usage
from ldm_jax.first_stage.lpips import LPIPS
from ldm_jax.metrics.frechet import FeatureStatistics, frechet_distance
from ldm_jax.metrics.inception import FEATURES, Inception
from ldm_jax.metrics.reconstruction import psnr, ssim
from ldm_jax.training.latents import transform
from ldm_jax.training.sharding import (
    batch_parts,
    batch_sharding,
    local_part,
    put,
    replicated,
    state_shardings,
)
from ldm_jax.training.state import Batch
from ldm_jax.types import Array

SHOWN = 8  # images in a picture
NETWORKS = {"lpips": "lpips", "rfid": "inception"}  # that metrics are made with
# (networks, images, others) -> (B,), for images (B, H, W, 3) in [-1, 1].
PER_IMAGE = {
    "psnr": lambda networks, images, others: psnr(images, others),
    "ssim": lambda networks, images, others: ssim(images, others),
    "lpips": lambda networks, images, others: LPIPS().apply(
        {"params": networks["lpips"]}, images, others
    ),
}


class Evaluation(NamedTuple):
    """What an evaluation finds.

    Attributes:
        scalars: by name; see `evaluator`.
        images: the first `SHOWN` images, (n, H, W, 3) uint8.
        reconstructions: theirs, of the same shape.
    """

    scalars: dict[str, float]
    images: np.ndarray
    reconstructions: np.ndarray

    def grid(self) -> np.ndarray:
        """A picture (H', W', 3) uint8 of them, side by side; see `reconstruction_grid`."""
        return images.reconstruction_grid(self.images, self.reconstructions, len(self.images))


def evaluation_batches(
    config: ConfigDict, source: Source, batch_size: int, mesh: jax.sharding.Mesh, count: int = 0
) -> Iterator[Batch]:
    """One pass over the first `count` images (0: all) of a source, as `evaluator` takes them.

    `batch_size` becomes a multiple of the parts that the mesh splits it into, and no larger than it
    has to be. Each process gets its part.
    """
    index, processes = local_part(mesh)
    unit = batch_parts(mesh)
    count = min(count or len(source), len(source))
    return epoch_batches(
        source,
        transform(config),
        -(-min(batch_size, count) // unit) * unit,
        count=count,
        threads=config.data.threads,
        process_index=index,
        process_count=processes,
    )


def evaluator(
    config: ConfigDict, metrics: Sequence[str], networks: dict[str, Any], mesh: jax.sharding.Mesh
) -> Callable[..., Evaluation]:
    """Returns (variables, batches, check) -> `Evaluation`, compiled once.

    `variables` are the 'params' and 'latents' of a first stage, `batches` those of
    `evaluation_batches`; `check` is called between them with the number of images done, and may
    raise to leave. Images are reconstructed from the mode of the posterior and rounded to 8 bits,
    as in published evaluations. Neither the size of the batches nor the number of devices changes a
    result.

    The scalars are those of `metrics`, 'mae' (mean absolute error of values from -1 to 1),
    'kl_per_element' in nats (kl) or 'code_usage' and 'code_perplexity' over all images together
    (vq, fsq), and 'images', their number. 'rfid' is the Frechet distance of the images to their
    reconstructions, whose bias falls as their number rises; the others are means over images. A
    reconstruction that is not finite makes them NaN.

    Args:
        config: of the first stage, any but 'identity'.
        metrics: some of 'psnr' (dB), 'ssim', 'lpips' and 'rfid'.
        networks: where a metric needs them (see `NETWORKS`), 'lpips', the parameters of `LPIPS`,
            and 'inception', the variables of `Inception`.
        mesh: the devices.

    Raises:
        UserError: when called: images too small for a metric, or a single one for 'rfid'.
    """
    everywhere, split = replicated(mesh), batch_sharding(mesh)
    networks = put(networks, everywhere)
    measure = jax.jit(
        functools.partial(measure_batch, config, metrics),
        out_shardings=everywhere,
    )

    def evaluate(
        variables: Any, batches: Iterable[Batch], check: Callable[[int], None] = lambda done: None
    ) -> Evaluation:
        variables, count = put(variables, state_shardings(variables, mesh)), 0
        sums, pictures = [], []
        statistics = [FeatureStatistics(FEATURES) for _ in range(2 * ("rfid" in metrics))]
        with to_device(batches, split) as moved:
            for batch in moved:
                check(count)
                found = jax.device_get(measure(variables, networks, batch))
                sums.append(found.sums)
                for part, features in zip(statistics, found.features, strict=True):
                    part.add(features[found.valid])
                if count < SHOWN:
                    pictures.append(found.pictures[:, found.valid[:SHOWN]])
                count += int(found.valid.sum())
        totals = jax.tree.map(lambda *parts: np.sum(parts, 0, np.float64), *sums)
        scalars = _scalars(totals, count, statistics)
        first = {name: scalars[name] for name in metrics}  # in the order that was asked for
        scalars = first | scalars | {"images": count}
        return Evaluation(scalars, *np.concatenate(pictures, axis=1)[:, :SHOWN])

    return evaluate


class Measured(NamedTuple):
    """What one batch gives.

    Attributes:
        sums: over the images that are valid, of each metric () and of 'code_counts' (K,).
        features: of the images and of their reconstructions, (2, B, D), or () if not asked for.
        pictures: the first images and their reconstructions, (2, n, H, W, 3) uint8.
        valid: (B,) bool.
    """

    sums: dict[str, Array]
    features: Array | tuple[()]
    pictures: Array
    valid: Array


def measure_batch(
    config: ConfigDict, metrics: Sequence[str], variables: Any, networks: Any, batch: Batch
) -> Measured:
    """Reconstructs a batch of 'image' (B, H, W, 3) uint8, 'valid' (B,), and takes the metrics."""
    image, valid = images.to_float(batch["image"]), batch["valid"]
    reconstruction, sums = _reconstruct(config, variables, image, valid)
    pictures = jnp.stack([batch["image"], images.to_uint8(reconstruction)])
    # 8 bits know no NaN, and a network that gives them must not pass for one that gives black.
    rounded = jnp.where(jnp.isfinite(reconstruction), images.to_float(pictures[1]), jnp.nan)
    # The networks' own scores were taken with full float32 products.
    with jax.default_matmul_precision("highest"):
        rows = {
            name: PER_IMAGE[name](networks, image, rounded) for name in metrics if name != "rfid"
        }
        features = ()
        if "rfid" in metrics:  # one after the other: half the memory, and half the program
            inception = functools.partial(Inception().apply, networks["inception"])
            features = jax.lax.map(lambda x: inception(x.astype(jnp.float32) / 255), pictures)
    rows["mae"] = jnp.abs(rounded - image).mean((1, 2, 3))
    sums |= {name: _valid_sum(row, valid) for name, row in rows.items()}
    return Measured(sums, features, pictures[:, :SHOWN], valid)


def _reconstruct(
    config: ConfigDict, variables: Any, image: Array, valid: Array
) -> tuple[Array, dict[str, Array]]:
    """-> reconstruction at the mode, and sums of what the bottleneck says."""
    module = builders.build_first_stage(config)
    if config.first_stage.kind != "kl":
        reconstruction, aux = module.apply(variables, image, method="autoencode")
        counts, uses = jnp.zeros_like(aux["code_counts"]), valid.astype(jnp.float32)
        return reconstruction, {"code_counts": counts.at[aux["codes"]].add(uses[:, None, None])}
    moments = module.apply(variables, image, method="moments")
    latents = module.apply(variables, moments, method="mode")
    kl = kl_divergence(moments) / latents[0].size
    reconstruction = module.apply(variables, latents, method="decode")
    return reconstruction, {"kl_per_element": _valid_sum(kl, valid)}


def _valid_sum(rows: Array, valid: Array) -> Array:
    return jnp.where(valid, rows, 0.0).sum()


def _scalars(
    totals: dict[str, np.ndarray], count: int, statistics: Sequence[FeatureStatistics]
) -> dict[str, float]:
    """The results, from sums over `count` images and the statistics of both sets of features."""
    scalars = {name: float(total / count) for name, total in totals.items() if total.ndim == 0}
    if statistics:
        distance = frechet_distance(*statistics[0].result(), *statistics[1].result())
        scalars["rfid"] = distance if np.isfinite(scalars["mae"]) else float("nan")
    if "code_counts" in totals:
        usage, perplexity = code_usage(totals["code_counts"])
        scalars |= {"code_usage": float(usage), "code_perplexity": float(perplexity)}
    return scalars
