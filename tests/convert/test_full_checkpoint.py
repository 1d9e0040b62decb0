"""A complete checkpoint of the original code: every way in, every number out."""

import jax
import numpy as np
import pytest
from golden_utils import load

from ldm_jax import convert
from ldm_jax.convert.compvis_model import read_model, write_model
from ldm_jax.errors import UserError

GOLDEN = "full_checkpoint"


def state_dict() -> dict[str, np.ndarray]:
    golden = load(GOLDEN)
    stored = {n.removeprefix("ckpt."): x for n, x in golden.arrays.items() if n[:5] == "ckpt."}
    return golden.weights() | stored


@pytest.fixture(scope="module")
def yaml() -> dict:
    return {"model": {"target": "ldm.LatentDiffusion", "params": load(GOLDEN).meta["config"]}}


@pytest.fixture(scope="module")
def pipe(yaml):
    return convert.import_compvis(state_dict(), yaml, null_class=True)


def nchw(x) -> np.ndarray:
    return np.asarray(x).transpose(0, 3, 1, 2)


def close(name: str, value: np.ndarray) -> None:
    golden = load(GOLDEN)
    atol = golden.meta["tolerance"][name]["suggested_atol"]
    np.testing.assert_allclose(value, golden[name], rtol=0, atol=atol, err_msg=name)


def test_latents_and_pixels(pipe):
    golden = load(GOLDEN)
    z = pipe.encode(golden["in.image"])
    close("out.z", nchw(z))
    decoded = pipe._jit["decode"](pipe.variables, z)  # the fixture is not clipped
    close("out.image_of_z", nchw(decoded))


def test_condition_and_denoiser(pipe, yaml):
    golden = load(GOLDEN)
    cond = pipe.condition({"label": golden["in.class_label"]})
    close("out.cond", np.asarray(cond.context))
    close("out.uncond", np.asarray(pipe.null_condition(len(golden["in.class_label"])).context))
    x_t = golden["in.x_T"].transpose(0, 2, 3, 1)
    close("out.eps_ema", nchw(pipe.denoise(x_t, golden["in.t"], cond)))
    raw = {n: w for n, w in state_dict().items() if not n.startswith("model_ema")}
    raw = convert.import_compvis(raw, yaml, null_class=True)
    close("out.eps_raw", nchw(raw.denoise(x_t, golden["in.t"], cond)))


def test_guided_samples(pipe):
    golden = load(GOLDEN)
    latents = pipe.sample(
        range(len(golden["in.x_T"])),
        {"label": golden["in.class_label"]},
        sampler="ddim",
        steps=golden.meta["S"],
        eta=0.0,
        spacing="uniform",
        guidance_scale=golden.meta["guidance"],
        noise=golden["in.x_T"].transpose(0, 2, 3, 1),
        decode=False,
    )
    close("out.samples", nchw(latents))
    close("out.image", nchw(pipe._jit["decode"](pipe.variables, latents)))


def test_round_trip_is_bit_equal(yaml):
    model = read_model(state_dict(), yaml, null_class=True)
    again = read_model(*write_model(model), null_class=True)
    assert again.config.to_dict() == model.config.to_dict()
    jax.tree.map(np.testing.assert_array_equal, again.weights, model.weights)


def test_averages_inside_the_first_stage_are_taken(yaml):
    name = "first_stage_model."
    first = {n.removeprefix(name): w for n, w in state_dict().items() if n.startswith(name)}
    averages = {f"{name}model_ema.{n.replace('.', '')}": w + 1 for n, w in first.items()}
    averages |= {
        f"{name}model_ema.decay": np.zeros(()),
        f"{name}model_ema.num_updates": np.ones(()),
    }
    found = read_model(state_dict() | averages, yaml).weights["first_stage"]
    shifted = {name + n: w + 1 for n, w in first.items()}
    want = read_model(state_dict() | shifted, yaml).weights["first_stage"]
    jax.tree.map(np.testing.assert_array_equal, found, want)


@pytest.mark.parametrize("factor", [np.zeros(()), np.float32(np.nan), np.ones(2)])
def test_factors_that_scale_nothing_are_refused(yaml, factor):
    with pytest.raises(UserError, match="scale"):
        read_model(state_dict() | {"scale_factor": factor}, yaml)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.diffusion_model.extra.weight": np.zeros(3)}, "model.diffusion_model|extra.weight"),
        ({"strange": np.zeros(3)}, "unknown use: strange"),
        ({"first_stage_model.strange": np.zeros(3)}, "first_stage: .*strange unexpected"),
        ({"cond_stage_model.strange": np.zeros(3)}, "conditioner: .*strange"),
        ({"cond_stage_model.embedding.weight": np.zeros((6, 16))}, r"shape \(7, 16\)"),
        ({"model_ema.strange": np.zeros(3)}, "model_ema.strange"),
    ],
)
def test_every_name_is_accounted_for(yaml, change, message):
    with pytest.raises(UserError, match=message):
        read_model(state_dict() | change, yaml, null_class=True)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("model.diffusion_model.out.2", "model_ema.diffusion_modelout2"),
        ("model_ema.diffusion_modelout2", "none for diffusion_model.out.2.bias"),
        ("first_stage_model.quant_conv", "first_stage: .*quant_conv.bias, .* missing"),
        ("cond_stage_model", "there is none"),
    ],
)
def test_missing_names_are_listed(yaml, prefix, message):
    rest = {n: w for n, w in state_dict().items() if not n.startswith(prefix)}
    with pytest.raises(UserError, match=message):
        read_model(rest, yaml, null_class=True)
