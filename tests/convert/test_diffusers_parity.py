"""The same weights in `diffusers` and here give the same outputs; needs the extra [parity]."""

import importlib
import json
import pathlib

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from golden_utils import quick_jit

from convert.models import MODELS, UNET, VQ, make_config, make_model, make_tokenizer, shapes
from ldm_jax import builders
from ldm_jax.convert import to_pipeline
from ldm_jax.convert.diffusers import read_folder, write_folder
from ldm_jax.convert.diffusers_configs import write_first_stage, write_unet
from ldm_jax.convert.diffusers_names import first_stage_from_flax, unet_from_flax
from ldm_jax.convert.diffusers_parts import write_scheduler
from ldm_jax.diffusion.parameterization import to_prediction
from ldm_jax.diffusion.samplers import SAMPLERS, make_table, sample
from ldm_jax.errors import UserError
from ldm_jax.types import Condition

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("diffusers")

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
RANDOM = np.random.default_rng(1)
ROUNDING = 1e-4  # in float32, relative to the root mean square; most are below 2e-5


def assert_close(ours, reference):
    """Compares (B, H, W, C) with a tensor (B, C, H, W)."""
    want = reference.detach().numpy().transpose(0, 2, 3, 1)
    assert ours.shape == want.shape
    np.testing.assert_allclose(ours, want, rtol=0, atol=ROUNDING * np.sqrt(np.mean(want**2)))


def tensor(array):
    """(B, H, W, C), or another rank, as a tensor (B, C, H, W)."""
    array = np.asarray(array)
    return torch.from_numpy(array.transpose(0, 3, 1, 2) if array.ndim == 4 else array)


def normal(*shape):
    return RANDOM.standard_normal(shape, np.float32)


def compare_denoiser(model, unet, side=8):
    """Both UNets on the same random inputs, with what conditions they take."""
    given = unet.config
    x_t, t = normal(2, side, side, given.in_channels), np.array([3, 977])
    cond, extra = Condition(), {}
    if given.get("cross_attention_dim"):
        context = normal(2, 5, given.cross_attention_dim)
        cond, extra = Condition(context=context), {"encoder_hidden_states": tensor(context)}
    if given.get("num_class_embeds"):
        labels = np.array([0, given.num_class_embeds - 1])
        rows = np.asarray(model.weights["conditioner"]["parts_0"]["embedding"])[labels]
        cond, extra = Condition(vector=rows), extra | {"class_labels": tensor(labels)}
    with torch.no_grad():
        want = unet(tensor(x_t), tensor(t), **extra).sample
    params = jax.tree.map(np.asarray, model.weights["denoiser"])
    apply = quick_jit(builders.build_denoiser(model.config).apply)
    assert_close(apply({"params": params}, x_t, t, cond), want)


def compare_first_stage(model, first_stage, side=32):
    """Both first stages: encoding before sampling, and decoding."""
    images, module = normal(2, side, side, 3), builders.build_first_stage(model.config)
    variables = jax.tree.map(np.asarray, model.weights["first_stage"])
    with torch.no_grad():
        encoded = first_stage.encode(tensor(images))
        kl = hasattr(encoded, "latent_dist")
        moments = encoded.latent_dist.parameters if kl else encoded.latents
        ours = quick_jit(lambda v, x: module.apply(v, x, method="moments"))(variables, images)
        assert_close(ours, moments)
        latents = normal(*ours.shape[:-1], variables["latents"]["scale"].shape[0])
        c = first_stage.config
        unscaled = latents / np.float32(c.scaling_factor) + np.float32(c.get("shift_factor") or 0)
        decoded = first_stage.decode(tensor(unscaled)).sample
        ours = quick_jit(lambda v, z: module.apply(v, z, method="decode"))(variables, latents)
        assert_close(ours, decoded)


@pytest.mark.parametrize(
    "name", ["uncond", "resampling", "class_vector", "text_bert", "segmentation", "pixels"]
)
def test_exported_denoiser(name, tmp_path):
    model = make_model(MODELS[name])
    write_folder(model, tmp_path / "out")
    kind = json.loads((tmp_path / "out/unet/config.json").read_text())["_class_name"]
    loaded, info = getattr(theirs, kind).from_pretrained(
        tmp_path / "out/unet", output_loading_info=True
    )
    assert not any(info.values())
    compare_denoiser(model, loaded)


@pytest.mark.parametrize(("name", "kind"), [("kl", "AutoencoderKL"), ("vq", "VQModel")])
def test_exported_first_stage(name, kind, tmp_path):
    shift = 0.25 if name == "kl" else 0.0
    model = make_model(MODELS[name], scale=0.3, shift=shift)
    write_folder(model, tmp_path / "out")
    loaded, info = getattr(theirs, kind).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    compare_first_stage(model, loaded)


SMALL = dict(sample_size=8, block_out_channels=(32, 64), layers_per_block=1)
PLAIN = dict(
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
RESNET = dict(
    down_block_types=("AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D"),
    downsample_type="resnet",
    resnet_time_scale_shift="scale_shift",
    attn_norm_num_groups=32,
)
CROSS = dict(
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=24,
)


def disturbed(module):
    """The module with every weight moved, so that nothing is as it was initialised."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return module.eval()


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("UNet2DModel", PLAIN | dict(num_class_embeds=5)),
        ("UNet2DModel", RESNET | dict(attention_head_dim=None, up_block_types=(
            "ResnetUpsampleBlock2D", "AttnUpBlock2D"))),
        ("UNet2DConditionModel", CROSS | dict(use_linear_projection=True, attention_head_dim=2)),
        ("UNet2DConditionModel", CROSS | dict(attention_head_dim=(2, 4), out_channels=3,
         in_channels=3, transformer_layers_per_block=2)),
    ],
)  # fmt: skip
def test_imported_denoiser(kind, given, tmp_path):
    unet = disturbed(getattr(theirs, kind)(**SMALL | given))
    unet.save_pretrained(tmp_path)
    compare_denoiser(read_folder(tmp_path), unet)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("AutoencoderKL", dict(latent_channels=4, norm_num_groups=16)),
        ("VQModel", dict(vq_embed_dim=4, num_vq_embeddings=16, mid_block_add_attention=False)),
    ],
)
@pytest.mark.parametrize("safe", [True, False])
def test_imported_first_stage(kind, given, safe, tmp_path):
    first_stage = disturbed(
        getattr(theirs, kind)(
            block_out_channels=(32, 32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2 + ("AttnDownEncoderBlock2D",),
            up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 2,
            layers_per_block=2,
            **given,
        )
    )
    first_stage.save_pretrained(tmp_path, safe_serialization=safe)
    compare_first_stage(read_folder(tmp_path), first_stage)


# Heads of more than one width.
NOT_THEIRS = {"lsun_churches", "inpainting_big"}
PUBLISHED = sorted({path.stem for path in CONFIGS.glob("*.py")} - {"imported", "quickstart"})


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_names_and_shapes(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    abstract = shapes(config)
    pairs = [(write_first_stage(config, 0.0, 1.0), abstract["first_stage"]["params"])]
    modules = [(first_stage_from_flax, builders.build_first_stage(config))]
    if config.train.steps > 0:
        kernels = {"/".join(k): v.shape for k, v in flatten_dict(abstract["denoiser"]).items()}
        context = [shape[0] for path, shape in kernels.items() if path.endswith("cross/k/kernel")]
        facts = kernels["conv_in/kernel"][2], context[0] if context else 0
        if name in NOT_THEIRS:
            with pytest.raises(UserError, match="num_heads"):
                write_unet(config, *facts)
        else:
            pairs.append((write_unet(config, *facts), abstract["denoiser"]))
            modules.append((unet_from_flax, builders.build_denoiser(config)))
    for (given, params), (from_flax, module) in zip(pairs, modules, strict=True):
        with torch.device("meta"):
            network = getattr(theirs, given["_class_name"]).from_config(given)
        zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), params)
        ours = {key: weight.shape for key, weight in from_flax(zeros, module).items()}
        assert ours == {key: tuple(w.shape) for key, w in network.state_dict().items()}


ZERO_SNR = dict(zero_terminal_snr=True, predict="v")
FLOW = dict(schedule="flow", predict="flow")


@pytest.mark.parametrize(
    ("sampler", "spacing", "process", "off"),
    [
        ("unipc", "linspace_open", {}, 1e-5),
        ("unipc", "trailing", dict(predict="x0"), 1e-5),
        ("unipc", "karras", dict(predict="v"), 1e-5),
        # Of few steps, theirs makes the last but one in second order.
        ("deis", "linspace_open", {}, 1e-3),
        ("deis", "trailing", dict(predict="v"), 5e-2),
        ("ddim", "trailing", ZERO_SNR, 1e-5),
        # But for ddim, theirs leaves a signal of 2**-24 in pure noise.
        ("euler", "trailing", ZERO_SNR, 3e-3),
        ("dpmpp_2m", "trailing", ZERO_SNR, 3e-3),
        ("unipc", "trailing", ZERO_SNR, 3e-3),
        ("euler", "linspace", FLOW, 1e-5),
        ("ddim", "linspace", FLOW | dict(steps=500), 1e-5),
    ],
)
def test_schedulers_make_the_same_steps(sampler, spacing, process, off):
    """A function of x_t and t stands for the network; `off` is relative to the outcome's spread."""
    steps, noise = 10, normal(2, 4, 4, 3)
    config = make_config(dict(first_stage=VQ, denoiser=UNET, diffusion=process))
    with config.unlocked():
        config.sample.update(sampler=sampler, spacing=spacing, eta=0.0)
    given = write_scheduler(config)
    scheduler = getattr(theirs, given["_class_name"]).from_config(given)
    scheduler.set_timesteps(steps)
    if sampler == "deis":  # theirs ends at the noise of the first time step, ours without any
        scheduler.sigmas[-1] = 1e-6
    scale = getattr(scheduler, "scale_model_input", lambda x_t, t: x_t)  # a flow has none
    x_t = tensor(noise) * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        raw = 0.5 * torch.tanh(scale(x_t, t)) + 2e-4 * t
        x_t = scheduler.step(raw, t, x_t).prev_sample

    def denoise(x_t, level):
        raw = 0.5 * jax.numpy.tanh(x_t) + 2e-4 * level.t
        return to_prediction(raw, x_t, level, config.diffusion.predict)

    table = make_table(sampler, builders.build_schedule(config), steps, 0.0, spacing)
    keys = jax.random.split(jax.random.key(0), 2)
    found = sample(denoise, noise, keys, table, SAMPLERS[sampler])
    want = np.moveaxis(x_t.numpy(), 1, -1)
    np.testing.assert_allclose(found, want, rtol=0, atol=off * want.std())


@pytest.mark.parametrize("name", ["uncond", "pixels", "text_bert", "text_clip"])
def test_pipelines_make_the_same_images(name, tmp_path):
    pytest.importorskip("transformers")
    scale = 1.0 if name == "pixels" else 0.4
    model = make_model(MODELS[name], scale=scale)
    if "text" in name:
        model = model._replace(tokenizer=make_tokenizer(tmp_path / "words", name[5:]))
    write_folder(model, tmp_path / "out")
    pipeline = theirs.DiffusionPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    ours = to_pipeline(model)
    noise = normal(2, *ours.latent_shape)
    options, prompts = dict(num_inference_steps=4, output_type="np"), ["w1 w2", "a b"]
    fields = None
    if "text" in name:
        fields = {"tokens": ours.tokenizer(prompts)}
        options |= dict(prompt=prompts, latents=tensor(noise), guidance_scale=1.0)
        options |= dict(height=32, width=32)
    else:
        options["batch_size"] = 2
        generated = torch.Generator().manual_seed(0)
        shape = (2, ours.latent_shape[2], *ours.latent_shape[:2])
        noise = torch.randn(shape, generator=generated).numpy().transpose(0, 2, 3, 1)
        options["generator"] = torch.Generator().manual_seed(0)
    want = pipeline(**options).images
    found = ours.sample([0, 1], fields, steps=4, eta=0.0, guidance_scale=1.0, noise=noise)
    assert np.abs(found / 255 - want).mean() < 2e-3
