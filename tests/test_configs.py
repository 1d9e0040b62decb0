"""Every file in configs/ is a config that builds and runs; test_zoo.py counts its parameters."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import command

from ldm_jax import builders
from ldm_jax import config as config_lib
from ldm_jax.errors import UserError
from ldm_jax.fields import specify
from ldm_jax.pipeline import Pipeline
from ldm_jax.training.steps import diffusion_functions

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
CONFIGS = sorted(path for path in FOLDER.glob("*.py") if path.stem != "imported")
# One runs by default, a first stage with all its losses and options; class-conditional models run
# in test_end_to_end.py, models with cross-attention in test_fine_tuning.py, transformers in
# reliability/test_resume.py.
DEFAULT = {"autoencoder_vq_f4"}


def load(path: pathlib.Path, arg: str = ""):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return config_lib.check(module.get_config(arg))


@pytest.mark.parametrize("arg", ["", "smoke", "modern"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_builds(path, arg):
    config = load(path, arg)
    assert config.sample.steps <= config.diffusion.steps
    builders.build_denoiser(config)
    builders.build_conditioner(config)


def trainable(path) -> bool:
    """Whether the embedded data are enough; a frozen text encoder needs its weights too."""
    config = load(path)
    return "tokens" not in config.data.fields or config.text.encoder == "bert"


def chosen(paths, default):
    return [
        pytest.param(p, marks=[] if p.stem in default else [pytest.mark.slow], id=p.stem)
        for p in paths
    ]


@pytest.mark.parametrize("path", chosen([p for p in CONFIGS if trainable(p)], DEFAULT))
def test_smoke_runs(path, tmp_path):
    workdir, alone = tmp_path / "run", load(path).train.steps == 0
    arg = "modern,smoke" if alone else "smoke"
    command("train", f"--config={path}:{arg}", f"--workdir={workdir}")
    if alone:
        assert (workdir / "first_stage" / "weights.safetensors").is_file()
    else:
        assert (workdir / "samples" / "final.png").is_file()


@pytest.mark.parametrize("path", chosen([p for p in CONFIGS if not trainable(p)], set()))
def test_smoke_samples(path):
    """Without weights to train with, the toy model still samples from its random ones."""
    config = load(path, "smoke")
    weights = jax.tree.map(np.asarray, jax.jit(diffusion_functions(config)[0])(jax.random.key(0)))
    module = builders.build_first_stage(config)
    size = config.data.resolution
    keys = jax.random.split(jax.random.key(0), 1)
    first_stage = jax.jit(module.init)(keys[0], jnp.zeros((1, size, size, 3)), keys)
    parts = {"denoiser": weights.ema_params["denoiser"], "first_stage": first_stage}
    pipe = Pipeline(config, parts | {"conditioner": weights.params["conditioner"]}, 0)
    random = np.random.default_rng(0)
    fields = {
        name: random.integers(field.low, field.high + 1, (2, *field.shape)).astype(field.dtype)
        for name, field in specify(config).items()
    }
    pixels = pipe.sample([0, 1], fields)
    assert pixels.shape == (2, size, size, 3) and pixels.std() > 0


def test_data_without_the_field_are_refused_in_one_line(tmp_path):
    workdir = tmp_path / "run"
    args = [f"--config={FOLDER / 'layout_coco.py'}:smoke", "--config.data.source=emoji"]
    done = command("train", *args, f"--workdir={workdir}", check=False)
    assert done.returncode == 1 and "no field 'boxes'" in done.stderr
    assert not workdir.exists()


def test_imported_needs_a_workdir():
    with pytest.raises(UserError, match="say which workdir"):
        load(FOLDER / "imported.py")
    with pytest.raises(UserError, match="no workdir"):
        load(FOLDER / "imported.py", "/none")


def test_imported_starts_from_the_workdir(tmp_path):
    config = load(FOLDER / "lsun_bedrooms.py")
    (tmp_path / "config.json").write_text(config_lib.to_json(config))
    tuned = load(FOLDER / "imported.py", str(tmp_path))
    assert tuned.init_from == tuned.first_stage.weights == str(tmp_path)
    first_stage = load(FOLDER / "autoencoder_kl_f8.py")
    (tmp_path / "config.json").write_text(config_lib.to_json(first_stage))
    with pytest.raises(UserError, match="a first stage only"):
        load(FOLDER / "imported.py", str(tmp_path))
