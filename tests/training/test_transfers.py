"""A step and a sampling call leave the host alone, and are compiled once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import builders
from ldm_jax import config as config_lib
from ldm_jax.diffusion import samplers
from ldm_jax.diffusion.guidance import Guidance
from ldm_jax.networks import Networks
from ldm_jax.training.sharding import batch_sharding, make_mesh, on_mesh, replicated
from ldm_jax.training.steps import diffusion_functions

CALLS_OF_THE_HOST = ("callback", "infeed", "outfeed")


def tiny_config():
    """Diffusion on 8x8 pixels by class."""
    c = config_lib.get_config()
    c.data.update(resolution=8, fields=("label",))
    c.first_stage.kind = "identity"
    c.denoiser.update(width=32, mult=(1,), depth=1, attn_downsample=())
    c.conditioners = ("label",)
    c.label.update(num_classes=4, width=128, slot="vector")
    c.train.batch_size, c.cond_drop_rate = 8, 0.2
    return config_lib.check(c)


FROZEN = {"latents": {"shift": np.zeros(3, np.float32), "scale": np.ones(3, np.float32)}}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(devices=jax.devices()[:2])


def batch(seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    return {"image": image, "label": rng.integers(0, 4, 8).astype(np.int32)}


def ones_of(tree, sharding):
    """Arrays of the shapes of an abstract tree; nothing here depends on their values."""
    return jax.device_put(jax.tree.map(lambda x: np.full(x.shape, 0.01, x.dtype), tree), sharding)


def test_the_guard_sees_transfers():
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match=r"[Dd]isallowed"):
        jax.jit(jnp.sin)(np.ones(3, np.float32))


def test_steps_are_compiled_once_and_take_nothing_from_the_host(mesh):
    init, step = diffusion_functions(tiny_config())
    everywhere = replicated(mesh)
    state = ones_of(jax.eval_shape(init, jax.random.key(0)), everywhere)
    frozen, key = jax.device_put((FROZEN, jax.random.key(1)), everywhere)
    batches = [jax.device_put(batch(seed), batch_sharding(mesh)) for seed in range(3)]
    run = jax.jit(step, donate_argnums=0, out_shardings=everywhere)
    on_it = on_mesh(mesh, run)
    with jax.transfer_guard("disallow"):
        for part in batches:
            state, metrics = on_it(state, frozen, part, key)
        jax.block_until_ready(metrics)
    assert int(state.step) == 3 and run._cache_size() == 1
    with jax.set_mesh(mesh):
        text = run.lower(state, frozen, batches[0], key).as_text()
    assert not [word for word in CALLS_OF_THE_HOST if word in text]


def test_sampling_is_compiled_once_and_takes_nothing_from_the_host(mesh):
    config = tiny_config()
    networks, everywhere = Networks(config), replicated(mesh)
    state = jax.eval_shape(diffusion_functions(config)[0], jax.random.key(0))
    variables = ones_of(state.params | {"first_stage": FROZEN}, everywhere)
    table = samplers.make_table("ddim", builders.build_schedule(config), 3)
    nothing = ("negative", "noise", "start", "image", "hole", "grey")
    inputs = {name: None for name in nothing} | {"also": (), "weak": None, "label": None}
    run = jax.jit(
        lambda variables, inputs, guidance, table: networks.generate(
            variables, inputs, guidance, table, sampler="ddim", size=(8, 8), guided=True,
            decode=True,
        )
    )  # fmt: skip
    guidance = jax.tree.map(jnp.float32, Guidance(2.0))
    guidance, table = jax.device_put((guidance, table), everywhere)
    made = []
    for first in (0, 8):
        seeds = np.arange(first, first + 8, dtype=np.uint32)
        part = {"seeds": seeds, "fields": {"label": np.arange(8, dtype=np.int32) % 4}}
        part = inputs | jax.device_put(part, batch_sharding(mesh))
        with jax.transfer_guard("disallow"), jax.set_mesh(mesh):
            made.append(jax.block_until_ready(run(variables, part, guidance, table)))
    assert run._cache_size() == 1 and not np.array_equal(*made)
