"""Losses and trajectories of the original code and of diffusers, with their own noise and times."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import Golden, load

from ldm_jax.convert.compvis import split_label_embedding, unet_to_flax
from ldm_jax.denoisers.unet import UNet
from ldm_jax.diffusion.guidance import make_denoise
from ldm_jax.diffusion.objective import make_loss
from ldm_jax.diffusion.samplers import SAMPLERS, Known, make_step, make_table, sample
from ldm_jax.diffusion.schedule import make_schedule
from ldm_jax.types import Condition


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
    weights, _ = split_label_embedding(golden.weights())
    return module, unet_to_flax(weights, module)


@functools.partial(jax.jit, static_argnums=0)
def forward(module, params, x_t, t, cond):
    """One compilation per module and shape, however many fixtures use it."""
    return module.apply({"params": params}, x_t, t, cond)


def condition_of(golden: Golden) -> Condition:
    """What the fixture's denoiser is told, whichever slots that takes."""
    slots = {}
    if "in.c_crossattn" in golden.arrays:
        slots["context"] = jnp.asarray(golden["in.c_crossattn"])
    if "in.c_concat" in golden.arrays:
        slots["concat"] = to_nhwc(golden["in.c_concat"])
    if "in.y" in golden.arrays:
        labels = split_label_embedding(golden.weights())[1]
        slots["vector"] = jnp.asarray(labels[golden["in.y"]])
    return Condition(**slots)


def p_losses_of(name):
    """(fixture, log_variance -> loss_at, its arguments z, t, noise, the arguments of `forward`)."""
    golden = load(name)
    module, params = unet_of(golden)
    schedule = schedule_of(golden)
    make = functools.partial(
        make_loss,
        schedule,
        golden.meta["parameterization"],
        golden.meta["loss_type"],
        golden.meta["original_elbo_weight"],
    )
    z, noise = to_nhwc(golden["in.z"]), to_nhwc(golden["in.noise"])
    t = jnp.asarray(golden["in.t"], jnp.int32)
    x_t = schedule.add_noise(z, noise, t)
    return golden, make, (z, t, noise), (module, params, x_t, t, condition_of(golden))


def log_variance_of(golden):
    value = golden.meta["logvar_init"]
    return jnp.full(golden.meta["schedule"]["timesteps"], value) if is_learned(golden) else value


def is_learned(golden):
    return golden.meta["learn_logvar"]


# The kinds of condition and parameterization; l1 and l2 differ between them, too.
P_LOSSES = ["none_eps", "none_x0", "crossattn_eps", "crossattn_x0", "concat_eps", "concat_x0"]
P_LOSSES = [f"p_losses_{case}" for case in (*P_LOSSES, "hybrid_eps", "adm_eps")]


# Each network takes long to compile; that of the hybrid case has both a context and a concat.
SLOW = {"p_losses_concat_eps", "p_losses_concat_x0", "p_losses_adm_eps"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in P_LOSSES],
)
def test_p_losses(name):
    golden, make, example, (module, params, *_, cond) = p_losses_of(name)
    seen = {}

    def network(x_t, t):
        raw = forward(module, params, x_t, t, cond)
        seen.update({"out.x_noisy": x_t, "out.model_output": raw})
        return raw

    per_example, aux = make(log_variance_of(golden))(network, *example)
    golden.check("out.x_noisy", seen["out.x_noisy"])
    golden.check("out.model_output", seen["out.model_output"])
    golden.check("out.loss_simple", aux["loss_simple"].mean())
    golden.check("out.loss_vlb", aux["loss_vlb"].mean())
    golden.check("out.loss", per_example.mean())
    golden.check("out.total", per_example.mean())
    if is_learned(golden):
        golden.check("out.loss_gamma", aux["loss_gamma"].mean())
        golden.check("out.logvar", aux["log_variance"].mean())


def test_gradient_of_the_learned_log_variance():
    golden, make, example, call = p_losses_of("p_losses_hybrid_eps")
    raw, t = forward(*call), golden["in.t"]
    gradient = jax.grad(lambda v: make(v)(lambda *_: raw, *example)[0].mean())(
        log_variance_of(golden)
    )
    golden.check("grad.logvar_at_t", gradient[t])
    np.testing.assert_array_equal(np.delete(gradient, t), 0)


@functools.partial(jax.jit, static_argnums=0)
def pull_to_conv_in(module, params, x_t, t, cond, cotangent):
    """The gradient of the first kernel, given that of the raw output."""

    def raw(conv_in):
        return module.apply({"params": {**params, "conv_in": conv_in}}, x_t, t, cond)

    return jax.vjp(raw, params["conv_in"])[1](cotangent)[0]["kernel"]


@pytest.mark.slow
@pytest.mark.parametrize("name", P_LOSSES)
def test_gradient_of_p_losses(name):
    golden, make, example, call = p_losses_of(name)
    loss_at, raw = make(log_variance_of(golden)), forward(*call)
    cotangent = jax.grad(lambda raw: loss_at(lambda *_: raw, *example)[0].mean())(raw)
    kernel = pull_to_conv_in(*call, cotangent)
    golden.check("grad.conv_in", kernel.transpose(3, 0, 1, 2))  # O, H, W, I


def analytic(x_t, t, cond):
    """The stand-in for a network of the fixtures, on images (B, H, W, C)."""
    clock = 0.4 * jnp.sin(0.01 * t.reshape(-1, 1, 1, 1))
    return 0.9 * jnp.tanh(0.6 * x_t + clock + 0.2 * jnp.roll(x_t, 1, axis=2)) + 0.05 * x_t


def denoise_of(golden: Golden):
    """The fixture's network, condition, guidance and clipping as `denoise`."""
    cond, null, apply = Condition(), None, analytic
    if "weights_seed" in golden.meta:
        module, params = unet_of(golden)
        apply = lambda x_t, t, cond: forward(module, params, x_t, t, cond)  # noqa: E731
    if "in.uncond" in golden.arrays:
        cond, null = (Condition(context=jnp.asarray(golden[f"in.{c}"])) for c in ("cond", "uncond"))
    elif "in.cond" in golden.arrays:
        cond = Condition(concat=to_nhwc(golden["in.cond"]))
    return make_denoise(
        apply,
        golden.meta.get("parameterization", "eps"),
        cond,
        null,
        golden.meta.get("unconditional_guidance_scale", 1.0),
        clip_x0=golden.meta.get("clip_denoised", False),
    )


def table_of(golden: Golden, name: str, spacing: str):
    schedule, eta = schedule_of(golden), golden.meta.get("eta")
    steps = golden.meta.get("S", schedule.steps)
    return make_table(name, schedule, steps, eta, spacing)


def run(golden: Golden, name: str, spacing: str, noise=None, known=None):
    """Runs a sampler row by row: (table, x_t after each network call, what each call predicted)."""
    table, denoise, sampler = table_of(golden, name, spacing), denoise_of(golden), SAMPLERS[name]
    predictions, x_ts = [], []

    def recorded(x_t, level):
        predictions.append(denoise(x_t, level))
        return predictions[-1]

    step = make_step(recorded, None, sampler, known)
    carry = sampler.init(table.start * to_nhwc(golden["in.x_T"]))
    for i in range(len(table.rows["t"])):
        given = (noise, None if known is None else known.noise)
        row = {key: column[i] for key, column in table.rows.items()}
        carry = step(carry, (i, row, *(array if array is None else array[i] for array in given)))
        x_ts.append(carry[0])
    return table, x_ts, jax.tree.map(lambda *xs: jnp.stack(xs), *predictions)


def check(golden: Golden, name: str, ours) -> None:
    """Compares a trajectory (N, B, h, w, C) with a stored (N, B, C, H, W)."""
    atol = golden.meta["tolerance"][name]["suggested_atol"]
    want = to_nhwc(golden[name])
    np.testing.assert_allclose(jnp.asarray(ours), want, rtol=0, atol=atol, err_msg=name)


def check_compiled(golden: Golden, name: str, spacing: str, noise=None, known=None) -> None:
    """Compares the result of the compiled loop."""
    table, denoise = table_of(golden, name, spacing), denoise_of(golden)
    loop = jax.jit(lambda x: sample(denoise, x, None, table, SAMPLERS[name], noise, known))
    golden.check("out.samples", loop(to_nhwc(golden["in.x_T"])))


# The original code's samplers


DDIM_CASES = [f"eta{eta}_analytic" for eta in ("0", "05", "1")]
DDIM_CASES += ["eta0_uncond", "eta1_uncond", "concat", "cfg", "eta1_cfg"]


@pytest.mark.parametrize("case", DDIM_CASES)
def test_ddim(case):
    golden = load(f"sampler_ddim_{case}")
    noise = to_nhwc(golden["in.noise"]) if golden.meta["eta"] > 0 else None
    table, x_ts, predictions = run(golden, "ddim", "uniform", noise)
    np.testing.assert_array_equal(table.rows["t"], golden["out.timesteps"])
    check(golden, "out.x_inter", x_ts)
    check(golden, "out.pred_x0", predictions.x0)
    golden.check("out.samples", x_ts[-1])
    if "analytic" in case:
        check_compiled(golden, "ddim", "uniform", noise)


@pytest.mark.parametrize("case", ["analytic", "uncond", "cfg"])
def test_plms(case):
    golden = load(f"sampler_plms_{case}")
    table, x_ts, _ = run(golden, "plms", "uniform")
    times = golden["out.timesteps"]
    np.testing.assert_array_equal(table.rows["t"], np.insert(times, 1, times[1]))
    x_ts = x_ts[1:]  # the first is what the corrector corrects
    check(golden, "out.x_inter", x_ts)
    golden.check("out.samples", x_ts[-1])
    # x0 by the averaged noise is what the ends of each step, at alpha x0 + sigma eps, agree on.
    schedule = schedule_of(golden)
    ends = np.sqrt(schedule.alpha_bar[[*times, 0]]).reshape(-1, 1, 1, 1, 1)
    x = np.stack([to_nhwc(golden["in.x_T"]), *x_ts]).astype(np.float64)
    sigma = np.sqrt(1 - ends**2)
    x0 = x[1:] * sigma[:-1] - x[:-1] * sigma[1:]
    check(golden, "out.pred_x0", x0 / (ends[1:] * sigma[:-1] - ends[:-1] * sigma[1:]))
    if case == "analytic":
        check_compiled(golden, "plms", "uniform")


DDPM_CASES = [f"analytic{c}" for c in ("", "_clip", "_clip_x0param", "_x0param")]


@pytest.mark.parametrize("case", [*DDPM_CASES, "uncond", "uncond_clip"])
def test_ddpm(case):
    golden = load(f"sampler_ddpm_{case}")
    noise = to_nhwc(golden["in.noise"])
    _, x_ts, _ = run(golden, "ddpm", "leading", noise)
    check(golden, "out.inter", x_ts)
    golden.check("out.samples", x_ts[-1])
    if case == "analytic_clip":
        check_compiled(golden, "ddpm", "leading", noise)


def known_of(golden: Golden, first: str):
    """(step noise, known parts) of a fixture whose draws alternate, beginning with `first`."""
    noise = to_nhwc(golden["in.noise"])
    names = {"step": noise[first != "step" :: 2], "known": noise[first != "known" :: 2]}
    known = Known(to_nhwc(golden["in.x0"]), to_nhwc(golden["in.mask"]), names["known"])
    return names["step"], known


@pytest.mark.parametrize("case", ["analytic", "uncond"])
def test_known_parts_of_ddim(case):
    golden = load(f"sampler_ddim_mask_{case}")
    step, known = known_of(golden, "known")
    _, x_ts, predictions = run(golden, "ddim", "uniform", step, known)
    check(golden, "out.x_inter", x_ts)
    check(golden, "out.pred_x0", predictions.x0)
    golden.check("out.samples", x_ts[-1])
    if case == "analytic":
        check_compiled(golden, "ddim", "uniform", step, known)


def test_known_parts_of_ddpm():
    golden = load("sampler_ddpm_mask")
    step, known = known_of(golden, "step")
    _, x_ts, _ = run(golden, "ddpm", "leading", step, known)
    check(golden, "out.inter", x_ts)
    check_compiled(golden, "ddpm", "leading", step, known)


# diffusers' solvers

# Fixture, sampler, spacing, and whether it keeps x_t / alpha.
SOLVERS = [
    ("ddim_leading_analytic", "ddim", "leading", False),
    ("dpmpp_2m_analytic", "dpmpp_2m", "linspace_open", False),
    ("dpmpp_2m_leading_karras_analytic", "dpmpp_2m", "karras", False),
    ("dpmpp_2m_unet", "dpmpp_2m", "linspace_open", False),
    ("dpmpp_3m_analytic", "dpmpp_3m", "linspace_open", False),
    ("euler_analytic", "euler", "linspace", True),
    ("euler_leading_analytic", "euler", "leading", True),
    ("euler_unet", "euler", "linspace", True),
    ("heun_analytic", "heun", "linspace", True),
    ("heun_unet", "heun", "linspace", True),
]


@pytest.mark.parametrize("name, sampler, spacing, exploding", SOLVERS)
def test_solvers(name, sampler, spacing, exploding):
    golden = load(f"solver_{name}")
    table, x_ts, predictions = run(golden, sampler, spacing)
    rows = table.rows
    np.testing.assert_array_equal(rows["t"], golden["out.timesteps"])
    ratio = golden["out.sigmas"][: len(rows["t"])]
    if len(ratio):
        np.testing.assert_allclose(rows["sigma"] / rows["alpha"], ratio, rtol=1e-5)
    then = np.append(rows["alpha"][1:], 1.0).astype(np.float32).reshape(-1, 1, 1, 1, 1)
    check(golden, "out.x_inter", jnp.stack(x_ts) / (then if exploding else 1.0))
    check(golden, "out.eps", predictions.eps)
    golden.check("out.samples", x_ts[-1])
    if "analytic" in name:
        check_compiled(golden, sampler, spacing)
