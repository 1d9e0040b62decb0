"""Imports released checkpoints into a workdir, and exports a workdir to other tools.

python -m ldm_jax.convert import --checkpoint=model.ckpt --model_config=model.yaml --workdir=DIR
python -m ldm_jax.convert import --checkpoint=DIFFUSERS_FOLDER --workdir=DIR
python -m ldm_jax.convert export --workdir=DIR --format=compvis --out=OUT

An imported workdir can be sampled from, fine-tuned, exported, or used as a first stage.
"""

from __future__ import annotations

import pathlib
import sys

from absl import flags

from ldm_jax import cli
from ldm_jax.errors import UserError

FORMATS = ("compvis", "diffusers", "safetensors")
MAX_YAML = 2**20  # bytes; published ones have a few thousand

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "", "import: a .ckpt, .pt or .safetensors file, or a folder of diffusers."
)
_MODEL_CONFIG = flags.DEFINE_string("model_config", "", "import: the YAML that came with the file.")
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", "", "import: folder with the vocabulary of the model's text encoder."
)
_NULL_CLASS = flags.DEFINE_enum(
    "null_class",
    "auto",
    ["auto", "last", "none"],
    "import: whether the last class is the null condition; auto: where there are 1001 classes.",
)
_WORKDIR = flags.DEFINE_string("workdir", "", "import: where to write; export: what to export.")
_FORMAT = flags.DEFINE_enum("format", None, FORMATS, "export: the layout of the files.")
_OUT = flags.DEFINE_string("out", "", "export: the folder to write.")


def import_model() -> None:
    """Reads the flags and imports a checkpoint."""
    _refuse_flags(_FORMAT, _OUT)
    source, root = _required(_CHECKPOINT, "model.ckpt"), _required(_WORKDIR, "runs/imported")
    _refuse_full(root, "--workdir")
    from ldm_jax import workdir as files
    from ldm_jax.convert.compvis_model import read_model
    from ldm_jax.convert.diffusers import read_folder
    from ldm_jax.convert.reader import open_checkpoint

    if source.is_dir():
        _refuse_flags(_MODEL_CONFIG, _NULL_CLASS, why="a folder of diffusers has its own config")
        model = read_folder(source)
    else:
        weights = open_checkpoint(source)
        null_class = {"auto": None, "last": True, "none": False}[_NULL_CLASS.value]
        model = read_model(weights, _read_yaml(), null_class)
        if "label" not in model.config.conditioners:
            _refuse_flags(_NULL_CLASS, why="this model knows no classes")
    tokenizer = model.tokenizer
    if _TOKENIZER.value:
        if "text" not in model.config.conditioners:
            _refuse_flags(_TOKENIZER, why="this model reads no captions")
        tokenizer = pathlib.Path(_TOKENIZER.value)
        if not tokenizer.is_dir():
            raise UserError(f"no tokenizer folder {tokenizer}: check --tokenizer")
    try:
        files.save_model(
            root, model.config, model.weights, model.step, model.label_names, tokenizer
        )
    except OSError as error:
        raise UserError(
            f"cannot write to {root} ({error.strerror}): choose another --workdir"
        ) from error
    print(f"imported into {root}: {_describe(model)}")
    if model.config.train.steps == 0:
        print(f"use it as a first stage: --config.first_stage.weights={root}")
    else:
        print(f"sample: python -m ldm_jax.sample --workdir={root}")
        train = f"python -m ldm_jax.train --config=configs/imported.py:{root}"
        print(f"fine-tune: {train} --workdir=NEW")


def export_model() -> None:
    """Reads the flags and exports a workdir."""
    _refuse_flags(_CHECKPOINT, _MODEL_CONFIG, _TOKENIZER, _NULL_CLASS)
    root, out = _required(_WORKDIR, "runs/quickstart"), _required(_OUT, "exported")
    if _FORMAT.value is None:
        raise UserError(f"no format given: use --format={'|'.join(FORMATS)}")
    _refuse_full(out, "--out")
    from ldm_jax.convert import export

    try:
        written = export.EXPORTS[_FORMAT.value](export.open_model(root), out)
    except OSError as error:
        raise UserError(
            f"cannot write to {out} ({error.strerror}): choose another --out"
        ) from error
    print(f"exported {root} as {_FORMAT.value}: {', '.join(map(str, written))}")


def _required(flag: flags.FlagHolder, example: str) -> pathlib.Path:
    if not flag.value:
        raise UserError(f"--{flag.name} is missing: use e.g. --{flag.name}={example}")
    return pathlib.Path(flag.value)


def _refuse_flags(*given: flags.FlagHolder, why: str = "it has no meaning here") -> None:
    for flag in given:
        if flag.present:
            raise UserError(f"leave --{flag.name} away: {why}")


def _refuse_full(folder: pathlib.Path, flag: str) -> None:
    if folder.is_file():
        raise UserError(f"{folder} is a file: choose another {flag}")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is not empty: choose another {flag}")


def _read_yaml() -> dict:
    import yaml

    path = _required(_MODEL_CONFIG, "config.yaml")
    try:
        if path.stat().st_size > MAX_YAML:
            raise UserError(f"{path} is too long for a model's YAML: check --model_config")
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): check --model_config") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is no YAML file: {reason}") from error


def _describe(model) -> str:
    import jax

    sizes = {name: sum(x.size for x in jax.tree.leaves(w)) for name, w in model.weights.items()}
    return ", ".join(f"{name} {size:,} parameters" for name, size in sizes.items() if size)


ACTIONS = {"import": import_model, "export": export_model}


def main() -> None:
    """Runs what the first argument names."""
    if len(sys.argv) > 1 and sys.argv[1] in ACTIONS:
        cli.run(ACTIONS[sys.argv[1]], sys.argv[:1] + sys.argv[2:])
    cli.run(_refuse, sys.argv if {"--help", "-h"} & set(sys.argv) else sys.argv[:1])


def _refuse() -> None:
    raise UserError("say first what to do: python -m ldm_jax.convert import|export --flags")


if __name__ == "__main__":
    main()
