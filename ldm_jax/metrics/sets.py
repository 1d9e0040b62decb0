"""Metrics of sets of images: what each is made of, and how it is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ldm_jax.errors import UserError
from ldm_jax.metrics import kernel, manifold, scores
from ldm_jax.metrics.features import Extractor
from ldm_jax.metrics.frechet import frechet_distance
from ldm_jax.metrics.references import Reference
from ldm_jax.metrics.store import Collected, Kinds, shared_kinds

SENSIBLE = 10_000  # samples below which a Frechet distance says little


class Metric(NamedTuple):
    """What a metric is made of.

    Attributes:
        network: that features are of.
        output: of the network.
        samples: what it takes of samples: 'statistics' of their features, or 'features' of each.
        real: what it takes of the real images, or ''.
    """

    network: str
    output: str
    samples: str
    real: str


METRICS = {
    "fid": Metric("inception", "pool", "statistics", "statistics"),
    "fid_infinity": Metric("inception", "pool", "features", "statistics"),
    "sfid": Metric("inception", "spatial", "statistics", "statistics"),
    "fd_dino": Metric("dino", "pool", "statistics", "statistics"),
    "kid": Metric("inception", "pool", "features", "features"),
    "is": Metric("inception", "logits", "features", ""),
    "precision": Metric("inception", "pool", "features", "features"),
    "recall": Metric("inception", "pool", "features", "features"),
    "density": Metric("inception", "pool", "features", "features"),
    "coverage": Metric("inception", "pool", "features", "features"),
}
DEFAULT = ("fid", "sfid", "kid", "precision", "recall")


class Needed(NamedTuple):
    """What a network's reference must have besides statistics of 'pool'.

    Attributes:
        features: of images, for KID and the metrics of nearest neighbours.
        spatial: statistics of 'spatial', for sFID.
    """

    features: bool
    spatial: bool


class RealCount(NamedTuple):
    """How many real images there are.

    Attributes:
        images: that statistics are of; 0 = unknown.
        features: of which features are kept.
        width: of the features 'pool'.
    """

    images: int
    features: int
    width: int


# With the numbers of neighbours that are published; which of the two results each is.
NEIGHBOURS = {
    "precision": (manifold.precision_recall, 3, 0),
    "recall": (manifold.precision_recall, 3, 1),
    "density": (manifold.density_coverage, 5, 0),
    "coverage": (manifold.density_coverage, 5, 1),
}


def measure(
    metrics: Sequence[str], found: Collected, references: Mapping[str, Reference]
) -> dict[str, dict[str, Any]]:
    """Takes metrics of what was collected of samples.

    Of each, by name: the 'value', what its error is, and 'features', the network and output that it
    is of. Published values are of a network too: those of precision, recall, density and coverage
    in their papers are of VGG-16, those of the first two in the ADM suite's tables of Inception.

    Args:
        metrics: some of `METRICS`.
        found: statistics and features 'NETWORK.OUTPUT' that the metrics take.
        references: by network, with what the metrics take.

    Raises:
        UserError: too few images, or features that are not finite.
    """
    values: dict[str, dict[str, Any]] = {}
    pairs: dict[str, tuple[float, float]] = {}  # of functions that give two metrics at once
    for name in metrics:
        metric = METRICS[name]
        kind, reference = f"{metric.network}.{metric.output}", references.get(metric.network)
        if metric.samples == "statistics":
            real = reference.spatial if metric.output == "spatial" else reference[:2]
            values[name] = {"value": frechet_distance(*real, *found.statistics[kind])}
            continue
        features = found.features[kind]
        if name == "is":
            value, error = scores.inception_score(features)
            values[name] = {"value": value, "std": error}
        elif name == "kid":
            value, error = kernel.kernel_distance(reference.features, features)
            values[name] = {"value": value, "standard_error": error}
        elif name == "fid_infinity":
            counts, distances = scores.distances_by_count(features, *reference[:2])
            value, error = scores.extrapolate(counts, distances)
            values[name] = {"value": value, "standard_error": error}
            values[name] |= {"counts": counts, "distances": distances}
        elif name in NEIGHBOURS:
            function, k, place = NEIGHBOURS[name]
            both = function.__name__
            if both not in pairs:
                pairs[both] = function(reference.features, features, k)
            values[name] = {"value": pairs[both][place], "neighbours": k}
    return {
        name: value | {"features": f"{METRICS[name].network}.{METRICS[name].output}"}
        for name, value in values.items()
    }


def needed_of(names: Sequence[str]) -> dict[str, Needed]:
    """What the references that metrics take must have, by network."""
    metrics = [METRICS[name] for name in names if METRICS[name].real]
    return {
        network: Needed(
            features=any(m.real == "features" for m in metrics if m.network == network),
            spatial=any(m.output == "spatial" for m in metrics if m.network == network),
        )
        for network in dict.fromkeys(m.network for m in metrics)
    }


def kinds_of(names: Sequence[str], networks: Mapping[str, Extractor]) -> Kinds:
    """What becomes of the samples' features, 'NETWORK.OUTPUT', for these metrics."""
    widths = {f"{name}.{out}": w for name, n in networks.items() for out, w in n.outputs.items()}
    metrics = [METRICS[name] for name in names]
    used = {
        what: [f"{m.network}.{m.output}" for m in metrics if m.samples == what]
        for what in ("statistics", "features")
    }
    return shared_kinds(widths, used["statistics"], used["features"])


def check_counts(name: str, samples: int, real: RealCount) -> None:
    """Checks that so many images have a metric.

    Raises:
        UserError: they have not; says how many are needed.
    """
    metric = METRICS[name]
    try:
        if name == "kid":
            kernel.check_counts(samples, real.features)
        elif name in NEIGHBOURS:
            manifold.check_counts(NEIGHBOURS[name][1], samples, real.features)
        elif name == "is":
            scores.check_splits(samples)
        elif name == "fid_infinity" and samples < scores.smallest_for_infinity(real.width):
            least = scores.smallest_for_infinity(real.width)
            raise UserError(f"it needs at least {least:,} samples, got {samples:,}")
        if metric.samples == "statistics" and samples < 2:
            raise UserError(
                f"it needs at least 2 samples, got {samples}; {SENSIBLE:,} are the least that is "
                "sensible"
            )
    except UserError as error:
        raise UserError(f"{name}: {error}, or leave '{name}' out of --metrics") from error
