"""Our side of `benchmarks.vs_pytorch`: what is timed, and what PyTorch builds for the same."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from benchmarks import lockstep
from ldm_jax import builders, fields, measures, programs, stand_ins, timing
from ldm_jax import config as config_lib
from ldm_jax.convert.diffusers_configs import write_first_stage, write_unet
from ldm_jax.flops import count_flops
from ldm_jax.training.sharding import make_mesh
from ldm_jax.workdir import abstract_first_stage

# What starts a call, operations of a call, number of weights, what PyTorch needs to know.
Work = tuple[Callable[[], Any], float, int, dict[str, Any]]


def prepare(request: dict[str, Any]) -> tuple[Callable, Callable, dict[str, Any]]:
    """Builds what a request asks for, on one device.

    request: 'config' (a name), 'tiny', 'work' (of WORKS), 'batch_size', 'dtype', 'steps' (of ddim).

    Returns what starts a call, what waits for it, and 'peer': what PyTorch needs to know,
    'parameters', 'flops' of a call, 'peak' (operations per second of products of matrices),
    'device' and 'version'.
    """
    config = read_config(request)
    peer = {"batch_size": request["batch_size"], "dtype": request["dtype"]}
    call, flops, parameters, more = WORKS[request["work"]](config, request["batch_size"])
    results: list[Any] = []

    def start() -> None:
        results[:] = [call()]
        if jax.default_backend() == "cpu":  # where calls that do not depend on each other overlap
            jax.block_until_ready(results)

    return (
        start,
        lambda: jax.block_until_ready(results),
        {
            "peer": peer | more,
            "parameters": parameters,
            "flops": flops,
            "peak": timing.matrix_peak(request["dtype"], jax.devices()[:1]),
            "device": jax.devices()[0].device_kind,
            "version": f"jax {jax.__version__}",
        },
    )


def read_config(request: dict[str, Any]) -> ConfigDict:
    """The config of a request, at its batch size and type."""
    module = importlib.import_module(f"configs.{request['config']}")
    config = module.get_config("smoke" if request["tiny"] else "").copy_and_resolve_references()
    for block in (config.train, config.first_stage.train):
        block.update(batch_size=request["batch_size"], dtype=request["dtype"])
    config.sample.update(batch_size=request["batch_size"], sampler="ddim", eta=0.0)
    config.sample.update(steps=request["steps"], guidance_scale=1.0)
    config.data.cache_latents = True  # a step trains on latents
    return config


def forward(config: ConfigDict, batch_size: int) -> Work:
    """The denoiser, once."""
    module, (x, t, cond) = builders.build_denoiser(config), denoiser_inputs(config, batch_size)
    params = jax.eval_shape(module.init, jax.random.key(0), x, t, cond)["params"]

    def apply(params: Any, *inputs: Any) -> jax.Array:
        return module.apply({"params": params}, *inputs)

    call, flops = compiled(apply, params, x, t, cond)
    width = 0 if cond.context is None else cond.context.shape[-1]
    length = 0 if cond.context is None else cond.context.shape[1]
    more = unet_peer(config, width) | {"context": [length, width]}
    return call, flops, programs.count(params), more


def train(config: ConfigDict, batch_size: int) -> Work:
    """A step of training on latents: noise, forward, backward, AdamW and the moving average."""
    mesh = make_mesh(None, jax.devices()[:1])
    program = programs.train(config, mesh)
    state, frozen, batch, key = program.arguments
    traced = program.trace(mesh)
    step = traced.lower().compile()
    now = [stand_ins.random_state(state)]
    given = stand_ins.random_variables(frozen), stand_ins.random_inputs(batch)
    given = *given, stand_ins.random_inputs(key)

    def call() -> Any:
        now[0], metrics = step(now[0], *given)
        return metrics, now[0].step

    c = config.train
    optimiser = dict(lr=c.lr, betas=list(c.betas), weight_decay=c.weight_decay)
    more = unet_peer(config, 0) | optimiser | {"ema_decay": config.ema_decay}
    parameters = programs.count(state.params["denoiser"])
    return call, count_flops(traced.jaxpr), parameters, more


def encode(config: ConfigDict, batch_size: int) -> Work:
    """Images to moments (before the codebook, where there is one)."""
    side = config.data.resolution
    return coding(config, "moments", (batch_size, side, side, 3))


def decode(config: ConfigDict, batch_size: int) -> Work:
    """Latents to images (through the codebook, where there is one)."""
    side = config_lib.latent_size(config)
    return coding(config, "decode", (batch_size, side, side, config_lib.latent_channels(config)))


def coding(config: ConfigDict, method: str, shape: tuple[int, ...]) -> Work:
    """The first stage, once."""
    variables, module = abstract_first_stage(config), builders.build_first_stage(config)
    function = functools.partial(module.apply, method=method)
    call, flops = compiled(function, variables, jax.ShapeDtypeStruct(shape, jnp.float32))
    more = {"first_stage": write_first_stage(config, 0.0, 1.0), "shape": channels_first(shape)}
    return call, flops, programs.count(variables["params"]), more


def ddim(config: ConfigDict, batch_size: int) -> Work:
    """Sampling from noise to pixels, decoded."""
    mesh = make_mesh(None, jax.devices()[:1])
    program = measures.sampling_program(config, mesh)
    traced = program.trace(mesh)
    generate, (variables, inputs, *shared) = traced.lower().compile(), program.arguments
    given = stand_ins.random_variables(variables), stand_ins.random_inputs(inputs), *shared
    more = unet_peer(config, 0) | {
        "first_stage": write_first_stage(config, 0.0, 1.0),
        "steps": config.sample.steps,
    }
    weights = variables["denoiser"], variables["first_stage"]["params"]
    call = functools.partial(generate, *given)
    return call, count_flops(traced.jaxpr), programs.count(weights), more


WORKS = {"forward": forward, "train": train, "encode": encode, "decode": decode, "ddim": ddim}


def denoiser_inputs(config: ConfigDict, batch_size: int) -> tuple:
    """Abstract x_t, t and condition."""
    size, channels = config_lib.latent_size(config), config_lib.latent_channels(config)
    x = jax.ShapeDtypeStruct((batch_size, size, size, channels), jnp.float32)
    conditioner, examples = builders.build_conditioner(config), fields.examples(config, batch_size)
    make = lambda batch: conditioner.init_with_output(jax.random.key(0), batch)[0]  # noqa: E731
    return x, jax.ShapeDtypeStruct((batch_size,), jnp.int32), jax.eval_shape(make, examples)


def unet_peer(config: ConfigDict, context_width: int) -> dict[str, Any]:
    """The same UNet in diffusers, the shape of what it takes, and the noise schedule."""
    channels, size = config_lib.latent_channels(config), config_lib.latent_size(config)
    c = config.diffusion
    return {
        "unet": write_unet(config, channels, context_width),
        "shape": [config.train.batch_size, channels, size, size],
        "schedule": {"beta": list(c.beta), "steps": c.steps},
    }


def compiled(function: Callable, variables: Any, *inputs: Any) -> tuple[Callable, float]:
    """A function with random weights and inputs, and the operations of a call."""
    traced = jax.jit(function).trace(variables, *inputs)
    program = traced.lower().compile()
    given = stand_ins.random_variables(variables), *stand_ins.random_inputs(inputs)
    return functools.partial(program, *jax.device_put(given)), count_flops(traced.jaxpr)


def channels_first(shape: tuple[int, ...]) -> list[int]:
    """(B, H, W, C) -> [B, C, H, W]."""
    return [shape[0], shape[3], *shape[1:3]]


if __name__ == "__main__":
    lockstep.serve(prepare)
