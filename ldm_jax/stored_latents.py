"""Folders of stored latents: how one is made, and what a run that trains from one takes of it."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ldm_jax import tensors
from ldm_jax import workdir as files
from ldm_jax.conditioners.stored import COLLECTION
from ldm_jax.config import frozen_parts
from ldm_jax.data.bad import BAD_IMAGES, TolerantSource
from ldm_jax.data.captions import CaptionedSource
from ldm_jax.data.latents_index import INDEX, NULL_TEXT, Index, read_index, write_index
from ldm_jax.data.latents_source import LatentsSource, latents_folder
from ldm_jax.data.sources import Source
from ldm_jax.errors import UserError
from ldm_jax.first_stage.statistics import RULES
from ldm_jax.training import encoding, latents
from ldm_jax.training.encoding import Settings
from ldm_jax.training.text_outputs import frozen_text_part, text_embedder

Check = Callable[[str], None]  # raises Interrupted if a signal came; is told in what


def encode_data(
    config: ConfigDict,
    source: Source,
    folder: pathlib.Path,
    settings: Settings,
    check: Check,
    *,
    workdir: str = "",
    first_stage: str = "",
    text_embeddings: bool = False,
) -> Index:
    """Writes this process's share of the stored latents of a data set, as far as it is not there.

    Args:
        config: of the run that is to be trained; `data` says what is read and how.
        source: the data, as `preflight.open_data` opens it.
        folder: that is written to, or gone on with.
        settings: see there.
        check: called now and then.
        workdir: whose first stage, and text encoder, are used as they are.
        first_stage: whose weights are used, scaled as the config says; by default those of
            config.first_stage.weights.
        text_embeddings: also store the outputs of a text encoder that is not trained.

    Raises:
        UserError: something cannot be stored, or the folder holds other latents.
    """
    encoding.check_settings(config, settings)
    frozen = _variables(config, workdir, first_stage)
    mesh = encoding.local_mesh()
    encode = encoding.moments_encoder(config, frozen, mesh)
    texts: dict[str, Any] = {}
    null: dict[str, np.ndarray] = {}
    if text_embeddings:
        params = _text_params(config, workdir)
        texts["embed"], null = text_embedder(config, params, mesh, settings.batch_size)
        texts["text_encoder"] = tensors.digest(params)
    if isinstance(source, CaptionedSource):
        texts["vocabulary"] = files.training_tokenizer(_root(workdir, folder), config)[0].digest()
    source = TolerantSource(source, config.data.max_bad, folder / BAD_IMAGES)
    digest = encoding.digest_of(frozen)
    index = encoding.make_index(config, source, encode, settings, digest, **texts)
    index = _claim(folder, index, settings)
    if settings.process_index == 0:
        own = folder / "first_stage"
        if not (own / files.WEIGHTS).is_file():
            record = None
            if not workdir:
                frozen, record = latents.scaled(
                    config, frozen, source, mesh, lambda: check("while measuring the latents")
                )
            elif (files.first_stage_folder(workdir) / files.LATENTS).is_file():
                record = _read_record(files.first_stage_folder(workdir))
            files.save_first_stage(own, config, jax.device_get(frozen), record)
        if null:
            tensors.save_tensors(folder / NULL_TEXT, null)
    encoding.write_shards(
        folder,
        index,
        config,
        source,
        encode,
        settings,
        lambda: check("while encoding the images"),
        texts.get("embed"),
    )
    return index


def _root(workdir: str, folder: pathlib.Path) -> pathlib.Path:
    """Where a tokenizer is looked for first."""
    return pathlib.Path(workdir) if workdir else folder


def _variables(config: ConfigDict, workdir: str, first_stage: str) -> dict[str, Any]:
    path = workdir or first_stage or config.first_stage.weights
    if path:
        return files.load_first_stage(path, config)
    if config.first_stage.kind == "identity":
        return {"latents": latents.unscaled(config)}
    raise UserError(
        "no first stage to encode with: give --workdir of a run that has one, --first_stage or "
        "config.first_stage.weights (`ldm_jax.train` with --config.train.steps=0 trains one)"
    )


def _text_params(config: ConfigDict, workdir: str) -> Any:
    part = frozen_text_part(config)
    for path in (workdir, config.init_from):
        root = pathlib.Path(path)
        if path and (files.has_checkpoint(root) or (root / files.WEIGHTS).is_file()):
            conditioner = files.open_weights(root, config)[1].get("conditioner", {})
            if part in conditioner:
                return jax.tree.map(np.asarray, conditioner[part])
    raise UserError(
        "--text_embeddings needs the text encoder's weights: set config.init_from, or --workdir, "
        "to an imported model that has them"
    )


def _claim(folder: pathlib.Path, index: Index, settings: Settings) -> Index:
    """Makes a folder that of these latents, or checks that it already is; returns its index."""
    if (folder / INDEX).is_file():
        theirs = read_index(folder)
        given = settings.shards or theirs.shards
        ours, stored = (_flat(i) for i in (dataclasses.replace(index, shards=given), theirs))
        for key in sorted(ours.keys() | stored.keys()):
            if ours.get(key) != stored.get(key):
                raise UserError(
                    f"{folder} holds other latents ({key}: {_short(stored.get(key))} -> "
                    f"{_short(ours.get(key))}): choose another --out, or remove it"
                )
        return theirs
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror}): choose another --out"
        ) from error
    if any(folder.glob("shard-*.arrayrecord")):
        raise UserError(f"{folder} has shards but no {INDEX}: choose another --out, or remove it")
    # Every process does, with the same text: none writes a shard before there is an index.
    write_index(folder, index, f"{INDEX}.{settings.process_index}.tmp")
    return index


def _flat(index: Index) -> dict[str, Any]:
    flat = dataclasses.asdict(index)
    return flat.pop("made_of") | {f"the {name}": value for name, value in flat.items()}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# -- in a run -----------------------------------------------------------------------------------


def given_first_stage(config: ConfigDict) -> str:
    """The folder of a first stage that is not to be trained; '' where it is."""
    folder = latents_folder(config.data.source)
    return config.first_stage.weights or (str(folder) if folder else "")


def check_first_stage(source: LatentsSource, variables: Mapping[str, Any], where: Any) -> None:
    """Checks that a first stage is the one that made the latents.

    Raises:
        UserError: it is another.
    """
    if encoding.digest_of(variables) != source.index.first_stage:
        raise UserError(
            f"the first stage in {where} is not the one that made the latents in {source.folder}: "
            "use that (it is in the same folder), or encode the data again"
        )


def scaled(
    config: ConfigDict, variables: dict[str, Any], source: LatentsSource
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the variables of a first stage with the scale of the config's rule, and its record.

    Without images nothing can be measured: a rule that does takes what was measured of them.

    Raises:
        UserError: another rule was used then.
    """
    rule = config.first_stage.latent_scale
    if rule not in RULES:
        variables = latents.rescale(variables, rule)
        return variables, latents.record(variables, rule)
    folder = source.folder / "first_stage"
    record = _read_record(folder)
    if record.get("rule") != rule:
        raise UserError(
            f"config.first_stage.latent_scale is '{rule}', but the scale in {folder} was made by "
            f"'{record.get('rule')}', and there are no images to measure: use 'stored'"
        )
    scale = {name: np.asarray(record[name], np.float32) for name in ("shift", "scale")}
    return variables | {"latents": scale}, record


def stored_null(config: ConfigDict, source: Source) -> dict[str, Any]:
    """The null condition of stored text outputs, as more variables of a step; {} without them."""
    if not isinstance(source, LatentsSource) or not source.index.text_encoder:
        return {}
    if not config.text.null_tokens or not frozen_parts(config):
        return {}
    flat, _ = tensors.open_tensors(source.folder / NULL_TEXT)
    null = {name: np.asarray(array) for name, array in flat.items()}
    return {COLLECTION: {frozen_parts(config)[0]: null}}


def check_text_encoder(config: ConfigDict, source: Source, conditioner: Mapping[str, Any]) -> None:
    """Checks that a conditioner's text encoder is the one whose outputs are stored, if they are.

    Raises:
        UserError: it is another.
    """
    parts = frozen_parts(config)
    if not parts or not isinstance(source, LatentsSource) or not source.index.text_encoder:
        return
    if tensors.digest(conditioner[parts[0]]) != source.index.text_encoder:
        raise UserError(
            f"the text encoder in config.init_from='{config.init_from}' is not the one whose "
            f"outputs are stored in {source.folder}: encode the data again"
        )


def _read_record(folder: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads((folder / files.LATENTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {folder / files.LATENTS}: {error}") from error
