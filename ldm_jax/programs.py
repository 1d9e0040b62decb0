"""The programs of a run as the compiler sees them: functions of arrays that are never made."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ldm_jax import arguments, builders, fields, images
from ldm_jax import config as config_lib
from ldm_jax.errors import UserError
from ldm_jax.first_stage.lpips import LPIPS
from ldm_jax.networks import Networks
from ldm_jax.training.checkpoint import abstract_like
from ldm_jax.training.first_stage_steps import first_stage_functions
from ldm_jax.training.sharding import (
    batch_parts,
    batch_sharding,
    bytes_per_device,
    check_batch,
    replicated,
    state_shardings,
)
from ldm_jax.training.state import TrainState
from ldm_jax.training.steps import diffusion_functions
from ldm_jax.workdir import abstract_first_stage


class Program(NamedTuple):
    """A function with abstract arguments that say how they lie on a mesh.

    Attributes:
        function: to be jitted.
        arguments: of it.
        parts: what of them stays on the devices between calls, by what it is: 'parameters',
            'averages', 'optimiser' and 'frozen weights'.
        images: that a call learns from or makes.
        donated: numbers of the arguments whose memory the results take.
        out_shardings: None leaves them to the compiler.
        calls: of the function for each batch of images; many of a sampling step.
    """

    function: Callable
    arguments: tuple
    parts: dict[str, Any]
    images: int
    donated: tuple[int, ...] = ()
    out_shardings: Any = None
    calls: int = 1

    def trace(self, mesh: Mesh) -> jax.stages.Traced:
        """Traces it for the devices of a mesh."""
        jitted = jax.jit(
            self.function, donate_argnums=self.donated, out_shardings=self.out_shardings
        )
        with jax.set_mesh(mesh):
            return jitted.trace(*self.arguments)


def train(config: ConfigDict, mesh: Mesh) -> Program:
    """An update of the diffusion model, as in training."""
    if config.train.steps == 0:
        raise UserError("this config trains no diffusion model: use --what=first_stage")
    check_batch(config.train.batch_size, mesh, "train.batch_size", config.train.accumulate)
    frozen = _state(abstract_first_stage(config), mesh)
    batch = _images(config, config.train.batch_size)
    if config.data.cache_latents:
        moments = functools.partial(builders.build_first_stage(config).apply, method="moments")
        pixels = jax.ShapeDtypeStruct(batch["image"].shape, jnp.float32)
        batch = {"moments": jax.eval_shape(moments, abstract_first_stage(config), pixels)}
    batch |= _fields(config, config.train.batch_size)
    return _training(*diffusion_functions(config), frozen, batch, mesh)


def first_stage(config: ConfigDict, mesh: Mesh) -> Program:
    """An update of the first stage and its discriminator, as in training."""
    block = config.first_stage.train
    if config.first_stage.kind == "identity":
        raise UserError("first_stage.kind is identity, which has nothing to train")
    check_batch(block.batch_size, mesh, "first_stage.train.batch_size", block.accumulate)
    frozen, batch = {}, _images(config, block.batch_size)
    if config.first_stage.perceptual_weight > 0:
        pixels = jnp.zeros((1, *batch["image"].shape[1:]))
        lpips = jax.eval_shape(lambda: LPIPS().init(jax.random.key(0), pixels, pixels)["params"])
        frozen = {"lpips": lpips}
    functions = first_stage_functions(config)
    return _training(*functions, _state(frozen, mesh), batch, mesh)


def sample(config: ConfigDict, mesh: Mesh) -> Program:
    """One step of the config's sampler, with its guidance, for a batch of images."""
    count = _whole(config.sample.batch_size, mesh)
    s, schedule = config.sample, builders.build_schedule(config)
    tables = [
        arguments.choose_table(config, schedule, s.sampler, steps, None, None, 1.0, (1, 1))
        for steps in (1, None)
    ]
    guidance = arguments.make_guidance(config)
    none = dict.fromkeys(("negative", "weak", "label", "noise", "start", "image", "hole", "grey"))
    told = abstract_like(_fields(config, count), batch_sharding(mesh))
    inputs = none | {
        "seeds": abstract_like(jax.ShapeDtypeStruct((count,), jnp.uint32), batch_sharding(mesh)),
        "fields": told or None,
        "also": (),
    }
    generate = functools.partial(
        Networks(config).generate,
        sampler=s.sampler,
        size=(config_lib.latent_size(config),) * 2,
        guided=guidance.scale != 1,
        decode=False,
        two_calls=s.two_calls,
    )
    variables = _state(_variables(config), mesh)
    shared = (jax.tree.map(jnp.float32, guidance), jax.tree.map(jnp.asarray, tables[0]))
    shared = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shared)
    calls = len(tables[1].rows["t"]) // len(tables[0].rows["t"])
    return Program(
        generate,
        (variables, inputs, *abstract_like(shared, replicated(mesh))),
        {"parameters": variables},
        count,
        out_shardings=batch_sharding(mesh),
        calls=calls,
    )


def encode(config: ConfigDict, mesh: Mesh) -> Program:
    """Images to the parameters of their posterior, as when a set is encoded."""
    count = _whole(config.train.batch_size, mesh)
    module = builders.build_first_stage(config)

    def moments(variables: Any, image: jax.Array) -> jax.Array:
        return module.apply(variables, images.to_float(image), method="moments")

    variables = _state(abstract_first_stage(config), mesh)
    pixels = abstract_like(_images(config, count)["image"], batch_sharding(mesh))
    parts = {"parameters": variables}
    split = batch_sharding(mesh)
    return Program(moments, (variables, pixels), parts, count, out_shardings=split)


def decode(config: ConfigDict, mesh: Mesh) -> Program:
    """Latents to pixels, as at the end of sampling."""
    count, size = _whole(config.sample.batch_size, mesh), config_lib.latent_size(config)
    networks = Networks(config)

    def pixels(variables: Any, latents: jax.Array) -> jax.Array:
        return images.to_uint8(networks.decode({"first_stage": variables}, latents))

    variables = _state(abstract_first_stage(config), mesh)
    shape = (count, size, size, config_lib.latent_channels(config))
    latents = abstract_like(jax.ShapeDtypeStruct(shape, jnp.float32), batch_sharding(mesh))
    parts = {"parameters": variables}
    split = batch_sharding(mesh)
    return Program(pixels, (variables, latents), parts, count, out_shardings=split)


PROGRAMS = {
    "train": train,
    "sample": sample,
    "first_stage": first_stage,
    "encode": encode,
    "decode": decode,
}


def _training(init: Callable, step: Callable, frozen: Any, batch: Any, mesh: Mesh) -> Program:
    state: TrainState = _state(jax.eval_shape(init, jax.random.key(0)), mesh)
    key = abstract_like(jax.eval_shape(lambda: jax.random.key(0)), replicated(mesh))
    parts = {
        "parameters": state.params,
        "averages": (state.ema_params, state.averages),
        "optimiser": state.opt_state,
        "frozen weights": frozen,
    }
    return Program(
        step,
        (state, frozen, abstract_like(batch, batch_sharding(mesh)), key),
        parts,
        jax.tree.leaves(batch)[0].shape[0],
        donated=(0,),
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), replicated(mesh)),
    )


def _variables(config: ConfigDict) -> Any:
    """What sampling needs, as in `Networks`."""
    params = jax.eval_shape(diffusion_functions(config)[0], jax.random.key(0)).params
    return {
        "denoiser": params["denoiser"],
        "conditioner": params["conditioner"],
        "first_stage": abstract_first_stage(config),
    }


def _images(config: ConfigDict, count: int) -> dict[str, jax.ShapeDtypeStruct]:
    side = config.data.resolution
    return {"image": jax.ShapeDtypeStruct((count, side, side, 3), jnp.uint8)}


def _fields(config: ConfigDict, count: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct((count, *field.shape), field.dtype)
        for name, field in fields.specify(config).items()
    }


def _whole(count: int, mesh: Mesh) -> int:
    """A batch size that the mesh divides, as sampling rounds it up."""
    return -(-count // batch_parts(mesh)) * batch_parts(mesh)


def _state(tree: Any, mesh: Mesh) -> Any:
    return abstract_like(tree, state_shardings(tree, mesh))


def bytes_if_split(program: Program, mesh: Mesh) -> int:
    """Bytes of what stays on each device, on another mesh."""
    return sum(bytes_per_device(_state(part, mesh)) for part in program.parts.values())


def count(tree: Any) -> int:
    """Number of elements of a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
