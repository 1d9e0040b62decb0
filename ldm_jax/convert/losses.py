"""Names of the loss and feature networks in other codes' files: LPIPS, discriminator, Inception."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from ldm_jax.convert.tables import Layer, Row, StateDict, from_flax, make_table, to_flax, within
from ldm_jax.first_stage.discriminator import PatchDiscriminator
from ldm_jax.first_stage.lpips import LPIPS, VGG16
from ldm_jax.metrics.inception import SIZE, Inception

COUNTERS = r".*\.num_batches_tracked"


def lpips_layers() -> dict[str, Layer]:
    """Our path to their layer: torchvision's VGG16 and the heads of the package lpips."""
    layers, number = {}, 0
    for i, (depth, _) in enumerate(VGG16):
        for j in range(depth):
            layers[f"conv_{i}_{j}"] = Layer(f"features.{number}", "conv")
            number += 2  # the rectifier counts
        number += 1  # and so does the pooling
        layers[f"head_{i}"] = Layer(f"lin{i}.model.1", "conv1x1")
    return within("", "", layers)


def discriminator_layers(module: PatchDiscriminator) -> dict[str, Layer]:
    """Our path to their layer for a discriminator of these fields."""
    layers = {"conv_0": Layer("main.0", "conv")}
    for i in range(1, module.layers + 1):
        layers[f"conv_{i}"] = Layer(f"main.{3 * i - 1}", "conv")
        layers[f"norm_{i}"] = Layer(f"main.{3 * i}")
    layers["conv_out"] = Layer(f"main.{3 * module.layers + 2}", "conv")
    return within("", "", layers)


def inception_layers(variables: Mapping[str, Any]) -> dict[str, Layer]:
    """Our path to their layer: the names are the same."""
    paths = {path[:-1] for path in flatten_dict(variables["params"])}
    kinds = {"conv": "conv", "fc": "linear"}
    layers = {"/".join(p): Layer(".".join(p), kinds.get(p[-1], "same")) for p in paths}
    return within("", "", layers)


def variables_table(layers: Mapping[str, Layer], variables: Mapping[str, Any]) -> list[Row]:
    """A row for each parameter and running statistic of `variables`, under their collections."""
    rows = [
        row._replace(ours=("params", *row.ours))
        for row in make_table(layers, flatten_dict(variables["params"]))
    ]
    for path in flatten_dict(variables.get("batch_stats", {})):
        theirs = tuple(f"{n}.running_{path[-1]}" for n in layers["/".join(path[:-1])].theirs)
        rows.append(Row(theirs, ("batch_stats", *path), "same"))
    return rows


def without(state_dict: StateDict, pattern: str) -> dict:
    """The weights whose whole name does not match the regular expression."""
    return {name: w for name, w in state_dict.items() if not re.fullmatch(pattern, name)}


def lpips_to_flax(state_dict: StateDict) -> dict:
    """Weights of LPIPS with VGG16 as the variables of `LPIPS`.

    The trunk is named as in torchvision (`features.0.weight`) or as in the package lpips and in the
    loss of the original code (`net.slice1.0.weight`); the heads are `lin0.model.1.weight` and so
    on. The classifier of the trunk and the constants of the colours are left out.

    Raises:
        UserError: names are missing, unexpected or of the wrong shape; lists them.
    """
    leftovers = r"classifier\..*|scaling_layer\.(shift|scale)|lins\.\d\.model\.1\.weight"
    renamed = {
        re.sub(r"^net\.slice\d\.", "features.", name): weight
        for name, weight in without(state_dict, leftovers).items()
    }
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), np.float32)
    abstract = jax.eval_shape(LPIPS().init, jax.random.key(0), image, image)
    return _read(renamed, lpips_layers(), abstract)


def lpips_from_flax(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The variables of `LPIPS` under the names of torchvision and of the heads."""
    return from_flax(variables, variables_table(lpips_layers(), variables))


def discriminator_to_flax(state_dict: StateDict, module: PatchDiscriminator) -> dict:
    """Weights of their NLayerDiscriminator as the variables of `module`.

    The input channels are those of the weights. Counters of batches are left out.

    Raises:
        UserError: names are missing, unexpected or of the wrong shape; lists them.
    """
    first = np.shape(state_dict.get("main.0.weight", ()))
    size = 3 * 2**module.layers
    image = (1, size, size, first[1] if len(first) == 4 else 3)
    image = jax.ShapeDtypeStruct(image, np.float32)
    abstract = jax.eval_shape(module.init, jax.random.key(0), image)
    return _read(without(state_dict, COUNTERS), discriminator_layers(module), abstract)


def discriminator_from_flax(
    variables: Mapping[str, Any], module: PatchDiscriminator
) -> dict[str, np.ndarray]:
    """The variables of `module` under the names of their NLayerDiscriminator."""
    return from_flax(variables, variables_table(discriminator_layers(module), variables))


def inception_to_flax(state_dict: StateDict) -> dict:
    """Weights of pytorch-fid's Inception (`pt_inception-2015-12-05`) as the variables of ours.

    Raises:
        UserError: names are missing, unexpected or of the wrong shape; lists them.
    """
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), np.float32)
    abstract = jax.eval_shape(Inception().init, jax.random.key(0), image)
    return _read(without(state_dict, COUNTERS), inception_layers(abstract), abstract)


def inception_from_flax(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The variables of `Inception` under the names of pytorch-fid's file."""
    return from_flax(variables, variables_table(inception_layers(variables), variables))


def _read(state_dict: StateDict, layers: Mapping[str, Layer], abstract: Any) -> dict:
    variables = to_flax(state_dict, variables_table(layers, abstract), flatten_dict(abstract))
    return jax.tree.map(np.asarray, variables)
