"""A workdir in the layouts of other tools."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import yaml

from ldm_jax import tensors
from ldm_jax import workdir as files
from ldm_jax.classifier_files import open_classifier
from ldm_jax.convert.compvis_model import write_model
from ldm_jax.convert.diffusers import write_folder
from ldm_jax.convert.model import Model, without_local
from ldm_jax.convert.torch_file import save_checkpoint
from ldm_jax.errors import UserError


def open_model(workdir: pathlib.Path) -> Model:
    """Opens a trained or imported workdir; weights in safetensors are not read yet.

    Raises:
        UserError: no workdir, or not trained yet.
    """
    config = files.read_config(workdir)
    weights = {"first_stage": files.open_first_stage(workdir, config)}
    step, tokenizer = 0, files.tokenizer_folder(workdir, config)
    if config.train.steps > 0:
        step, parts = files.open_weights(workdir, config)
        weights |= parts | open_classifier(workdir, config)
    return Model(config, weights, tokenizer, files.read_labels(workdir), step)


def _need_unet(model: Model) -> None:
    if model.config.train.steps > 0 and model.config.denoiser.kind != "unet":
        raise UserError(
            f"this model's denoiser is a '{model.config.denoiser.kind}', but only a UNet can be "
            "exported in this layout: export to safetensors"
        )


def export_compvis(model: Model, out: pathlib.Path) -> list[pathlib.Path]:
    """Writes `model.ckpt`, `model.safetensors` and `config.yaml` of the original code's layout."""
    _need_unet(model)
    state_dict, yaml_dict = write_model(model)
    out.mkdir(parents=True, exist_ok=True)  # after all that may be refused
    paths = [out / name for name in ("config.yaml", "model.safetensors", "model.ckpt")]
    files.write_text(paths[0], yaml.safe_dump(yaml_dict, sort_keys=False, allow_unicode=True))
    tensors.save_tensors(paths[1], state_dict)
    save_checkpoint(paths[2], state_dict)
    return paths


def export_diffusers(model: Model, out: pathlib.Path) -> list[pathlib.Path]:
    """Writes a folder that `from_pretrained` of diffusers reads."""
    _need_unet(model)
    write_folder(model, out)
    return [out]


def export_safetensors(model: Model, out: pathlib.Path) -> list[pathlib.Path]:
    """Writes plain safetensors with our names, a folder that `ldm_jax.load` reads."""
    config = without_local(model.config)
    files.save_model(out, config, model.weights, model.step, model.label_names, model.tokenizer)
    return [out]


EXPORTS: dict[str, Callable[[Model, pathlib.Path], list[pathlib.Path]]] = {
    "compvis": export_compvis,
    "diffusers": export_diffusers,
    "safetensors": export_safetensors,
}
