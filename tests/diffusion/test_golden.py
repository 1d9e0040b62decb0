"""Losses and DDIM trajectories of the original code, with its own noise and time steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import Golden, load

from ldm_jax import random
from ldm_jax.convert.compvis import unet_to_flax
from ldm_jax.denoisers.unet import UNet
from ldm_jax.diffusion.guidance import make_denoise
from ldm_jax.diffusion.objective import make_loss
from ldm_jax.diffusion.samplers import SAMPLERS, make_table, sample
from ldm_jax.diffusion.schedule import make_schedule
from ldm_jax.types import Condition

DDIM = SAMPLERS["ddim"]


def to_nhwc(array):
    return jnp.moveaxis(jnp.asarray(array), -3, -1)


def schedule_of(golden: Golden):
    spec = golden.meta["schedule"]
    beta = spec["linear_start"], spec["linear_end"]
    return make_schedule("scaled_linear", beta, spec["timesteps"])


def unet_of(golden: Golden):
    """The fixture's UNet and its weights as our params."""
    config = golden.meta["config"]
    module = UNet(
        width=config["model_channels"],
        out_channels=config["out_channels"],
        mult=tuple(config["channel_mult"]),
        depth=config["num_res_blocks"],
        attn_downsample=tuple(config["attention_resolutions"]),
        head_dim=config["num_head_channels"],
        cross_attention=config.get("use_spatial_transformer", False),
    )
    return module, unet_to_flax(golden.weights(), module)


@functools.partial(jax.jit, static_argnums=0)
def forward(module, params, x_t, t, cond):
    """One compilation per module and shape, however many fixtures use it."""
    return module.apply({"params": params}, x_t, t, cond)


def p_losses_of(name):
    """(fixture, loss_at, its arguments z, t, noise and the arguments of `forward`)."""
    golden = load(name)
    module, params = unet_of(golden)
    cond = Condition()
    if "in.c_crossattn" in golden.arrays:
        cond = Condition(context=jnp.asarray(golden["in.c_crossattn"]))
    schedule = schedule_of(golden)
    loss_at = make_loss(
        schedule,
        predict=golden.meta["parameterization"],
        loss=golden.meta["loss_type"],
        vlb_weight=golden.meta["original_elbo_weight"],
        log_variance=golden.meta["logvar_init"],
    )
    z, noise = to_nhwc(golden["in.z"]), to_nhwc(golden["in.noise"])
    t = jnp.asarray(golden["in.t"], jnp.int32)
    x_t = schedule.add_noise(z, noise, t)
    return golden, loss_at, (z, t, noise), (module, params, x_t, t, cond)


P_LOSSES = [f"p_losses_{c}_{p}" for c in ("none", "crossattn") for p in ("eps", "x0")]


@pytest.mark.parametrize("name", P_LOSSES)
def test_p_losses(name):
    golden, loss_at, example, (module, params, *_, cond) = p_losses_of(name)
    seen = {}

    def network(x_t, t):
        raw = forward(module, params, x_t, t, cond)
        seen.update({"out.x_noisy": x_t, "out.model_output": raw})
        return raw

    per_example, aux = loss_at(network, *example)
    golden.check("out.x_noisy", seen["out.x_noisy"])
    golden.check("out.model_output", seen["out.model_output"])
    golden.check("out.loss_simple", aux["loss_simple"].mean())
    golden.check("out.loss_vlb", aux["loss_vlb"].mean())
    golden.check("out.loss", per_example.mean())
    golden.check("out.total", per_example.mean())


@functools.partial(jax.jit, static_argnums=0)
def pull_to_conv_in(module, params, x_t, t, cond, cotangent):
    """The gradient of the first kernel, given that of the raw output."""

    def raw(conv_in):
        return module.apply({"params": {**params, "conv_in": conv_in}}, x_t, t, cond)

    return jax.vjp(raw, params["conv_in"])[1](cotangent)[0]["kernel"]


@pytest.mark.slow
@pytest.mark.parametrize("name", P_LOSSES)
def test_gradient_of_p_losses(name):
    golden, loss_at, example, call = p_losses_of(name)
    raw = forward(*call)
    cotangent = jax.grad(lambda raw: loss_at(lambda *_: raw, *example)[0].mean())(raw)
    kernel = pull_to_conv_in(*call, cotangent)
    golden.check("grad.conv_in", kernel.transpose(3, 0, 1, 2))  # O, H, W, I


def check_trajectory(golden, apply, cond=None, null=None, scale=1.0):
    """Compares x_t and the predicted x0 after each step and the result."""
    schedule, steps = schedule_of(golden), golden.meta["S"]
    table = make_table("ddim", schedule, steps, float(golden.meta["eta"]), "uniform")
    np.testing.assert_array_equal(table["t"], golden["out.timesteps"])
    noise = to_nhwc(golden["in.noise"]) if "noise" in table else None
    denoise = make_denoise(apply, schedule, "eps", cond, null, scale)

    x0s = []

    def recorded(x_t, t):
        prediction = denoise(x_t, t)
        x0s.append(prediction.x0)
        return prediction

    carry, x_ts = DDIM.init(to_nhwc(golden["in.x_T"])), []
    for i in range(steps):
        row = {key: column[i] for key, column in table.items()}
        carry = DDIM.step(recorded, carry, row, None if noise is None else noise[i])
        x_ts.append(carry[0])
    for name, ours in (("out.x_inter", x_ts), ("out.pred_x0", x0s)):
        atol = golden.meta["tolerance"][name]["suggested_atol"]
        want = to_nhwc(golden[name])
        np.testing.assert_allclose(jnp.stack(ours), want, rtol=0, atol=atol, err_msg=name)
    golden.check("out.samples", carry[0])
    return denoise, table, noise


@pytest.mark.parametrize("eta", ["0", "05", "1"])
def test_ddim_of_the_analytic_model(eta):
    def apply(x_t, t, cond):
        clock = 0.4 * jnp.sin(0.01 * t.reshape(-1, 1, 1, 1))
        return 0.9 * jnp.tanh(0.6 * x_t + clock + 0.2 * jnp.roll(x_t, 1, axis=2)) + 0.05 * x_t

    golden = load(f"sampler_ddim_eta{eta}_analytic")
    denoise, table, noise = check_trajectory(golden, apply)
    x_T = to_nhwc(golden["in.x_T"])
    keys = random.example_keys(jax.random.key(0), len(x_T))
    run = jax.jit(lambda x_T: sample(denoise, x_T, keys, table, DDIM, noise))
    golden.check("out.samples", run(x_T))


@pytest.mark.parametrize("name", ["eta0_uncond", "eta1_uncond", "concat", "cfg", "eta1_cfg"])
def test_ddim_of_a_unet(name):
    golden = load(f"sampler_ddim_{name}")
    module, params = unet_of(golden)
    cond, null = Condition(), None
    if name == "concat":
        cond = Condition(concat=to_nhwc(golden["in.cond"]))
    elif "cfg" in name:
        cond, null = (Condition(context=jnp.asarray(golden[f"in.{c}"])) for c in ("cond", "uncond"))

    def apply(x_t, t, cond):
        return forward(module, params, x_t, t, cond)

    scale = golden.meta.get("unconditional_guidance_scale", 1.0)
    check_trajectory(golden, apply, cond, null, scale)
