"""What a first stage is judged by: networks with fetched weights, and images that are held out."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ldm_jax.data.decode import Limits
from ldm_jax.data.sources import Source, open_source
from ldm_jax.errors import UserError
from ldm_jax.first_stage.lpips import LPIPS
from ldm_jax.training.evaluation import NETWORKS, measure_batch
from ldm_jax.weights import load_inception, load_lpips
from ldm_jax.workdir import abstract_first_stage


class Judges(NamedTuple):
    """What a first stage is judged by while it trains.

    Attributes:
        networks: of the perceptual term and of the metrics, each where it is needed: 'lpips', the
            parameters of `LPIPS`, and 'inception', the variables of `Inception`.
        images: that are evaluated.
        metrics: that are taken of them: those of the config, and LPIPS where its network is there.
    """

    networks: dict[str, Any]
    images: Source
    metrics: tuple[str, ...] = ()


def perceptual_weights(config: ConfigDict) -> dict[str, Any]:
    """Returns {'lpips': params} if the first stage trains with a perceptual term, else {}.

    Raises:
        UserError: there are no such weights; says how to get them.
    """
    c = config.first_stage
    return load_networks(["lpips"], c.lpips) if c.perceptual_weight > 0 else {}


def load_networks(metrics: Sequence[str], lpips: str = "") -> dict[str, Any]:
    """Returns the networks that metrics of reconstructions need, as in `Judges`.

    Args:
        metrics: such as 'psnr' or 'lpips'.
        lpips: where its weights are, as `first_stage.lpips` says.

    Raises:
        UserError: there are no such weights; says how to get them.
    """
    networks = {}
    for name in {NETWORKS[metric] for metric in metrics if metric in NETWORKS}:
        if name == "inception":
            networks[name] = load_inception()
        elif lpips == "random":
            image = jnp.zeros((1, 16, 16, 3))
            networks[name] = jax.jit(LPIPS().init)(jax.random.key(0), image, image)["params"]
        else:
            networks[name] = load_lpips(lpips)
    return networks


def first_stage_judges(config: ConfigDict, source: Source) -> Judges:
    """Returns what judges the training of a first stage on `source`, and checks that it can.

    Raises:
        UserError: weights that are not there, no such split, or images that are too small or too
            few for a metric.
    """
    c, networks = config.first_stage, perceptual_weights(config)
    if c.train.picture_every == 0:
        return Judges(networks, source)
    metrics = tuple(c.eval.metrics)
    if networks and c.lpips != "random" and "lpips" not in metrics:
        metrics += ("lpips",)
    for metric in metrics:
        if NETWORKS.get(metric) not in networks:
            try:
                networks |= load_networks([metric], c.lpips)
            except UserError as error:
                raise UserError(
                    f"{error}, or leave '{metric}' out of config.first_stage.eval.metrics"
                ) from error
    images = held_out_images(config, source)
    if "rfid" in metrics and min(c.eval.images, len(images)) < 2:
        raise UserError(
            "config.first_stage.eval.metrics has 'rfid', which needs two images at least"
        )
    size = config.data.resolution
    batch = {"image": jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)}
    batch["valid"] = jax.ShapeDtypeStruct((1,), jnp.bool)
    measure = functools.partial(measure_batch, config, metrics)
    try:
        jax.eval_shape(measure, abstract_first_stage(config), networks, batch)
    except UserError as error:
        raise UserError(f"config.first_stage.eval.metrics: {error}") from error
    return Judges(networks, images, metrics)


def held_out_images(config: ConfigDict, source: Source) -> Source:
    """Opens the part of the data that the first stage is evaluated on; without one, `source`.

    Raises:
        UserError: there is no such part.
    """
    data, split = config.data, config.first_stage.eval.split
    if not split:
        print(
            "note: reconstructions are evaluated on training images: config.first_stage.eval.split "
            "may name a part that is held out"
        )
        return source
    limits = Limits(data.min_side, data.max_pixels)
    images = open_source(data.source, split=split, where=data.where, label="", limits=limits)
    if data.source.startswith("tfds:"):
        return images  # these are named by their place in the split
    trained = {source.name(i) for i in range(len(source))}
    both = sum(images.name(i) in trained for i in range(len(images)))
    if both:
        print(
            f"note: {both} of the {len(images)} images of config.first_stage.eval.split='{split}' "
            f"are trained on too: leave them out of config.data.split='{data.split}'"
        )
    return images
