"""The evaluation of a first stage against the definitions, taken over all images at once."""

import functools

import jax
import numpy as np
import pytest

from ldm_jax import builders, images, random
from ldm_jax import config as config_lib
from ldm_jax.first_stage import lpips as lpips_module
from ldm_jax.first_stage.kl import split_moments
from ldm_jax.first_stage.lpips import LPIPS
from ldm_jax.metrics.frechet import frechet_distance
from ldm_jax.metrics.reconstruction import psnr, ssim
from ldm_jax.training import evaluation
from ldm_jax.training.evaluation import evaluation_batches, evaluator
from ldm_jax.training.interrupt import Interrupted
from ldm_jax.training.sharding import make_mesh

SIZE, COUNT, FEATURES = 16, 11, 5
ALL = ("psnr", "ssim", "lpips", "rfid")
MIX = np.random.RandomState(0).standard_normal((3, FEATURES)).astype(np.float32)


class Pictures:
    """A source of ramps and noise."""

    columns, label_names, num_labels = (), None, 0

    def __init__(self):
        random = np.random.default_rng(0)
        ramps = np.linspace(0, 1, SIZE)[None, None, :, None] * random.uniform(size=(COUNT, 1, 1, 3))
        noise = random.integers(0, 56, (COUNT, SIZE, SIZE, 3))
        self.images = (199 * ramps + noise).astype(np.uint8)

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return {"image": self.images[index]}

    def name(self, index):
        return str(index)


class Colours:
    """Stands for Inception: mixtures of the mean colour of images in [0, 1]."""

    def apply(self, variables, x):
        return x.mean((1, 2)) @ variables["mix"]


@pytest.fixture(autouse=True)
def small_networks(monkeypatch):
    monkeypatch.setattr(lpips_module, "VGG16", ((1, 4), (1, 4), (1, 4)))
    monkeypatch.setattr(evaluation, "Inception", Colours)
    monkeypatch.setattr(evaluation, "FEATURES", FEATURES)


@functools.cache
def networks():
    image = np.zeros((1, SIZE, SIZE, 3), np.float32)
    lpips = jax.jit(LPIPS().init)(jax.random.key(0), image, image)["params"]
    return {"lpips": lpips, "inception": {"mix": MIX}}


@functools.cache
def first_stage(kind):
    c = config_lib.get_config()
    c.data.update(resolution=SIZE, threads=0)
    c.first_stage.update(kind=kind, width=8, mult=(1,), depth=1, patch=4, norm_groups=2)
    c.first_stage.update(mid_attn=False, codes=32, levels=(4, 3, 3) if kind == "fsq" else ())
    module = builders.build_first_stage(c)
    keys = random.example_keys(jax.random.key(0), 1)
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, SIZE, SIZE, 3)), keys)
    normal = np.random.RandomState(1).standard_normal
    # Not `init`: that takes longer to compile than all else, and its codes are all alike.
    params = jax.tree.map(
        lambda x: (normal(x.shape) / np.sqrt(np.prod(x.shape[:-1]))).astype(np.float32),
        shapes["params"],
    )
    if kind != "kl":  # images must differ in their codes
        params["quant_conv"]["kernel"] *= 10
    latents = {"shift": np.full(3, 0.3, np.float32), "scale": np.full(3, 2.0, np.float32)}
    variables = {"params": params, "latents": latents}
    if kind == "vq":
        pictures = images.to_float(Pictures().images)
        moments = jax.jit(lambda x: module.apply(variables, x, method="moments"))(pictures)
        params["codebook"][:16] = np.asarray(moments).reshape(-1, 3)[::9][:16]
    return c, module, variables


def mesh(devices):
    return make_mesh(devices=jax.devices()[:devices])


@functools.cache
def compiled(kind, metrics, devices):
    return evaluator(first_stage(kind)[0], metrics, networks(), mesh(devices))


def evaluate(kind, batch_size=8, devices=8, metrics=ALL, count=0, change=lambda v: v):
    config, _, variables = first_stage(kind)
    batches = evaluation_batches(config, Pictures(), batch_size, mesh(devices), count)
    return compiled(kind, metrics, devices)(change(variables), batches)


def test_scalars_are_those_of_the_definitions():
    _, module, variables = first_stage("kl")
    found = evaluate("kl")
    assert list(found.scalars) == [*ALL, "kl_per_element", "mae", "images"]
    a = images.to_float(Pictures().images)
    mean, log_variance = jax.jit(
        lambda x: split_moments(module.apply(variables, x, method="moments"))
    )(a)
    decoded = jax.jit(lambda z: module.apply(variables, z, method="decode_unscaled"))(mean)
    mean, log_variance, decoded = (np.asarray(x, np.float64) for x in (mean, log_variance, decoded))
    levels = np.clip(np.round((decoded + 1) * 127.5), 0, 255)
    b = (levels / 127.5 - 1).astype(np.float32)
    assert 0.1 < np.abs(a - b).mean() < 1.5  # neither a perfect nor a lost reconstruction
    kl = 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance)
    features = [(0.5 * (x.astype(np.float64) + 1)).mean((1, 2)) @ MIX for x in (a, b)]
    moments = [f(x) for x in features for f in (lambda x: x.mean(0), lambda x: np.cov(x.T))]
    want = {
        "psnr": psnr(a, b).mean(),
        "ssim": ssim(a, b).mean(),
        "lpips": LPIPS().apply({"params": networks()["lpips"]}, a, b).mean(),
        "rfid": frechet_distance(*moments),
        "kl_per_element": kl.mean(),
        "mae": np.abs(a - b).mean(),
        "images": COUNT,
    }
    for name, value in want.items():
        # float32; a level may round the other way at a half, 1 in 8448 elements by 1/127.5.
        np.testing.assert_allclose(found.scalars[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(found.images, Pictures().images[:8])
    off = np.abs(found.reconstructions - levels[:8])
    assert found.reconstructions.dtype == np.uint8 and off.max() <= 1 and off.mean() < 1e-3
    assert found.grid().shape == (3 * SIZE + 8, 8 * SIZE + 36, 3)


@pytest.mark.parametrize("kind", ["vq", "fsq"])
def test_codes_are_counted_over_all_images_together(kind):
    _, module, variables = first_stage(kind)
    pictures = images.to_float(Pictures().images)
    _, aux = jax.jit(lambda x: module.apply(variables, x, method="autoencode"))(pictures)
    counts = np.unique(np.asarray(aux["codes"]), return_counts=True)[1]
    share = counts / counts.sum()
    total = {"vq": 32, "fsq": 36}[kind]
    assert 3 <= len(counts) < total
    found = evaluate(kind, metrics=ALL if kind == "vq" else ()).scalars
    assert {"code_usage", "code_perplexity", "mae", "images"} <= found.keys()
    np.testing.assert_allclose(found["code_usage"], len(counts) / total, rtol=1e-6)
    perplexity = np.exp(-(share * np.log(share)).sum())
    np.testing.assert_allclose(found["code_perplexity"], perplexity, rtol=1e-5)


def test_neither_batches_nor_devices_change_a_result():
    whole = evaluate("vq")
    other = evaluate("vq", batch_size=3, devices=1)
    for name, value in whole.scalars.items():
        # float32 sums in another order, and a level that rounds the other way
        np.testing.assert_allclose(other.scalars[name], value, rtol=1e-4, err_msg=name)
    np.testing.assert_array_equal(other.images, whole.images)
    off = np.abs(other.reconstructions.astype(int) - whole.reconstructions)
    assert off.max() <= 1 and off.mean() < 1e-3


def test_a_part_of_the_images():
    few, all_ = (evaluate("kl", count=count) for count in (3, 100))
    assert few.scalars["images"] == len(few.images) == 3 and all_.scalars["images"] == COUNT
    want = psnr(*(images.to_float(x) for x in (few.images, few.reconstructions))).mean()
    np.testing.assert_allclose(few.scalars["psnr"], want, rtol=1e-6)


def test_batches_are_as_large_as_they_need_to_be():
    config, _, _ = first_stage("kl")

    def sizes(batch_size, devices, count=0):
        batches = evaluation_batches(config, Pictures(), batch_size, mesh(devices), count)
        return [(len(batch["valid"]), int(batch["valid"].sum())) for batch in batches]

    assert sizes(4, 1) == [(4, 4), (4, 4), (4, 3)]
    assert sizes(64, 8) == [(16, 11)]
    assert sizes(5, 8) == [(8, 8), (8, 3)]
    assert sizes(64, 2, count=3) == [(4, 3)]


def test_nan_does_not_pass_for_black():
    def spoil(variables):
        bias = np.full_like(variables["params"]["post_quant_conv"]["bias"], np.nan)
        layer = variables["params"]["post_quant_conv"] | {"bias": bias}
        return variables | {"params": variables["params"] | {"post_quant_conv": layer}}

    scalars = evaluate("kl", change=spoil).scalars
    assert all(np.isnan(scalars[name]) for name in (*ALL, "mae"))


def test_an_evaluation_can_be_left():
    config, _, variables = first_stage("kl")
    seen = []

    def check(done):
        seen.append(done)
        if done >= 8:
            raise Interrupted("enough")

    batches = evaluation_batches(config, Pictures(), 4, mesh(4))
    with pytest.raises(Interrupted, match="enough"):
        compiled("kl", (), 4)(variables, batches, check)
    assert seen == [0, 4, 8]
