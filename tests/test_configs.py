"""Every file in configs/ is a config that builds, at full size and at toy size."""

import importlib.util
import pathlib

import jax
import pytest
from commands import command

from ldm_jax import config as config_lib
from ldm_jax.training.steps import diffusion_functions, first_stage_functions

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))
# One of each family runs by default: VQ and unconditional, cross-attention; a class-conditional KL
# model runs in test_end_to_end.
DEFAULT = {"lsun_bedrooms", "imagenet_ldm8"}
DENOISERS = {
    "celebahq": 274_056_163,
    "ffhq": 274_056_163,
    "lsun_bedrooms": 274_056_163,
    "lsun_churches": 294_966_916,
    "imagenet_ldm4": 400_920_579,
    "imagenet_ldm8": 394_984_196,
}
FIRST_STAGES = {"vq-f4": 55_322_782, "kl-f8": 83_653_863, "vq-f8": 67_717_295}


def load(path: pathlib.Path, arg: str = ""):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return config_lib.check(module.get_config(arg))


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("arg", ["", "smoke"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_builds(path, arg):
    config = load(path, arg)
    for functions in (first_stage_functions, diffusion_functions):
        state = jax.eval_shape(functions(config)[0], jax.random.key(0))
        assert count(state.params) > 0
    if not arg and path.stem in DENOISERS:
        assert count(state.params["denoiser"]) == DENOISERS[path.stem]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("lsun_bedrooms", "vq-f4"), ("lsun_churches", "kl-f8"), ("imagenet_ldm8", "vq-f8")],
)
def test_first_stage_has_the_published_size(name, kind):
    config = load(next(path for path in CONFIGS if path.stem == name))
    state = jax.eval_shape(first_stage_functions(config)[0], jax.random.key(0))
    assert count(state.params) == FIRST_STAGES[kind]


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, marks=[] if p.stem in DEFAULT else [pytest.mark.slow], id=p.stem)
        for p in CONFIGS
    ],
)
def test_smoke_runs(path, tmp_path):
    arguments = [f"--config={path}:smoke", f"--workdir={tmp_path / 'run'}"]
    command("train", *arguments)
    assert (tmp_path / "run" / "samples" / "final.png").is_file()
