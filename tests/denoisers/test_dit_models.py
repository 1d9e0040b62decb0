"""Models with a transformer for denoiser: every condition, saving, training, and exports."""

import jax
import numpy as np
import pytest
from convert.models import MODELS, assert_same, flat, make_config, make_model

import ldm_jax
from ldm_jax import builders
from ldm_jax import config as config_lib
from ldm_jax.convert.export import EXPORTS, open_model
from ldm_jax.errors import UserError
from ldm_jax.fields import examples
from ldm_jax.pipeline import Pipeline
from ldm_jax.training.steps import diffusion_functions

SMALL = dict(kind="dit", width=32, depth=2, num_heads=2)
READS = {name for name, m in MODELS.items() if m.get("denoiser", {}).get("cross_attention")}
CONDITIONED = [
    (name, context)
    for name, blocks in MODELS.items()
    if "conditioners" in blocks
    for context in (("cross", "joint") if name in READS else ("none",))
]
FROZEN = {"latents": {"shift": np.zeros(3, np.float32), "scale": np.ones(3, np.float32)}}


def blocks_of(name: str, context: str) -> dict:
    """The blocks of a model with the same conditions, and a transformer for the UNet."""
    blocks = MODELS[name] | dict(denoiser=SMALL)
    blocks["denoiser"] = SMALL | dict(dit=dict(context=context))
    if blocks.get("label", {}).get("slot") == "vector":
        blocks["label"] = blocks["label"] | dict(width=32)
    return blocks


@pytest.mark.parametrize(("name", "context"), CONDITIONED)
def test_every_condition_trains(name, context):
    config = make_config(blocks_of(name, context))
    init, step = diffusion_functions(config)
    state = jax.eval_shape(init, jax.random.key(0))
    size, key = config.data.resolution, jax.random.key(0)
    frozen = jax.eval_shape(
        builders.build_first_stage(config).init,
        key,
        jax.ShapeDtypeStruct((1, size, size, 3), np.float32),
        jax.random.split(key, 1),
    )
    image = np.zeros((1, size, size, 3), np.uint8)
    batch = examples(config, 1) | {"image": image}
    new, metrics = jax.eval_shape(step, state, frozen, batch, jax.random.key(1))
    assert metrics["loss"].shape == ()
    assert jax.tree.map(lambda a: a.shape, new.params) == jax.tree.map(
        lambda a: a.shape, state.params
    )


def test_loss_falls_with_muon():
    c = config_lib.get_config()
    c.data.update(resolution=8, fields=("label",))
    c.first_stage.kind = "identity"
    c.denoiser.update(SMALL)
    c.conditioners = ("label",)
    c.label.update(num_classes=4, width=32, slot="vector")
    c.diffusion.update(schedule="flow", predict="flow", times="logit_normal")
    c.train.update(batch_size=8, lr=1e-2, optimizer="muon")
    init, step = diffusion_functions(config_lib.check(c))
    label = np.arange(8, dtype=np.int32) % 4
    colour = np.random.default_rng(0).integers(0, 256, (4, 1, 1, 3), dtype=np.uint8)[label]
    batch = {"image": np.broadcast_to(colour, (8, 8, 8, 3)), "label": label}
    state, run, values = jax.jit(init)(jax.random.key(0)), jax.jit(step), []
    for _ in range(20):
        state, metrics = run(state, FROZEN, batch, jax.random.key(1))
        values.append(float(metrics["loss"]))
    # The output starts at zero, and the target is noise of variance 1 less the latents.
    assert values[0] == pytest.approx(1 + np.square(colour / 127.5 - 1).mean(), rel=0.15)
    assert np.mean(values[-5:]) < 0.8 * values[0]


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model = make_model(blocks_of("class_vector", "none"))
    EXPORTS["safetensors"](model, tmp_path / "out")
    assert_same(open_model(tmp_path / "out"), model)
    pipe = ldm_jax.load(tmp_path / "out")
    assert pipe.config.denoiser.kind == "dit"
    want = flat(model.weights["denoiser"])
    assert want.keys() == flat(pipe.variables["denoiser"]).keys()
    for path, leaf in flat(pipe.variables["denoiser"]).items():
        np.testing.assert_array_equal(leaf, want[path])


@pytest.mark.parametrize("name", ["compvis", "diffusers"])
def test_layouts_of_other_tools_are_refused(name, tmp_path):
    with pytest.raises(UserError, match=r"only a UNet can be .* export to safetensors"):
        EXPORTS[name](make_model(blocks_of("class_vector", "none")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sizes_are_multiples_of_a_patch():
    model = make_model(blocks_of("class_vector", "none"))
    pipe = Pipeline(model.config, model.weights, 0)
    assert pipe.check_size((24, 40)) == (24, 40)
    with pytest.raises(UserError, match="multiples of 8"):
        pipe.check_size((28, 40))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"denoiser.dit.context": "cross"}, "no conditioner gives a context"),
        ({"denoiser.cross_attention": True}, "cross_attention is for denoiser.kind='unet' only"),
        ({"denoiser.kind": "unet", "denoiser.dit.context": "joint"}, "kind='dit' only"),
        ({"denoiser.dit.patch": 16}, "the denoiser by another 16"),
        ({"denoiser.dit.patch": 0}, "at least 1"),
        ({"denoiser.dit.mlp": "relu"}, "choose from swiglu, gelu"),
        ({"conditioners": ("label",), "data.fields": ("label",)}, "dit.context is none: set it"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes, message):
    config = config_lib.get_config()
    config.data.resolution = 32
    config.denoiser.update(SMALL)
    config_lib.check(config)
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        config_lib.check(config)
