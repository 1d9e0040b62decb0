"""The losses of the autoencoders against the original code and against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import load, quick_jit

from ldm_jax.convert.losses import discriminator_to_flax, lpips_to_flax
from ldm_jax.errors import UserError
from ldm_jax.first_stage.autoencoder import Decoder
from ldm_jax.first_stage.discriminator import (
    PatchDiscriminator,
    discriminator_loss,
    generator_loss,
)
from ldm_jax.first_stage.kl import kl_divergence
from ldm_jax.first_stage.losses import (
    adaptive_weight,
    adversarial_factor,
    code_usage,
    output_loss,
    reconstruction_loss,
    regulariser,
)
from ldm_jax.first_stage.lpips import LPIPS
from ldm_jax.nn.conv import conv3x3

RNG = np.random.RandomState(0)
IMAGES = RNG.uniform(-1, 1, (3, 8, 8, 3)).astype(np.float32)
RECONSTRUCTION = RNG.uniform(-1, 1, (3, 8, 8, 3)).astype(np.float32)
LATENTS = np.zeros((3, 2, 2, 4), np.float32)
DIFFERENCE = RECONSTRUCTION.astype(np.float64) - IMAGES
POWER = {"l1": 1, "l2": 2}

# The scalars that the original code logs, and where ours are found.
LOGGED = {
    "total_loss": "loss",
    "logvar": "log_variance",
    "kl_loss": "kl",
    "quant_loss": "codebook",
    "nll_loss": "reconstruction",
    "rec_loss": "reconstruction_error",
    "p_loss": "perceptual",
    "d_weight": "adaptive_weight",
    "disc_factor": "adversarial_factor",
    "g_loss": "adversarial",
    "perplexity": "code_perplexity",
    "cluster_usage": "codes_used",
    "disc_loss": "discriminator",
    "logits_real": "logits_real",
    "logits_fake": "logits_fake",
}


@functools.cache
def perceptual_weights() -> dict:
    """The variables of `LPIPS` that the loss fixtures use."""
    golden = load("lpips_vgg16")
    heads = {f"lin{i}.model.1.weight": golden[f"heads.lin{i}"] for i in range(5)}
    return lpips_to_flax(golden.weights() | heads)


def evaluator(name: str):
    """(step, example weights) -> our metrics, the reconstruction, the last kernel's gradient.

    The autoencoder is one convolution, whose input, kernel and bias the fixture holds.
    """
    golden = load(name)
    config = golden.meta["config"]
    kind = "kl" if "kl_weight" in config else "vq"
    net = PatchDiscriminator(config.get("disc_ndf", 64))
    weights = {key: config[key] for key in ("kl_weight", "codebook_weight") if key in config}
    given = {
        "discriminator": discriminator_to_flax(golden.weights("discriminator."), net),
        "lpips": perceptual_weights(),
        "images": golden.nhwc("in.x"),
        "features": golden.nhwc("in.h"),
        "kernel": golden["in.last_layer_weight"].transpose(2, 3, 1, 0),
        "bias": golden["in.last_layer_bias"].reshape(1, 1, 1, 3),
        "aux": {"latents": golden.nhwc("in.x")},
    }
    if kind == "kl":
        given["aux"]["kl"] = kl_divergence(golden.nhwc("in.moments"))
    else:
        indices = golden["in.indices"] if "in.indices" in golden.arrays else np.zeros(1, int)
        given["aux"]["codebook"] = golden["in.codebook_loss"][None]
        given["aux"]["code_counts"] = np.bincount(indices, minlength=32).astype(np.float32)

    # The arrays are arguments: XLA would spend minutes on computing with constants.
    @quick_jit
    def evaluate(given, step, example_weights):
        def logits(images):
            return net.apply(given["discriminator"], images, train=True)

        def last_layer(kernel):
            return conv3x3(given["features"], kernel, 1, (1, 1)) + given["bias"]

        def likelihood(reconstruction, log_variance):
            return reconstruction_loss(
                reconstruction,
                given["images"],
                kind=kind,
                loss=config.get("pixel_loss", "l1"),
                perceptual=functools.partial(LPIPS().apply, given["lpips"]),
                log_variance=log_variance,
            )

        reconstruction, pull_back = jax.vjp(last_layer, given["kernel"])
        factor = adversarial_factor(step, config["disc_start"])
        loss = output_loss(
            reconstruction,
            jnp.float32(config.get("logvar_init", 0.0)),
            likelihood,
            lambda images: generator_loss(logits(images)),
            lambda grad: pull_back(grad)[0],
            weight=config["disc_weight"],
            factor=factor,
            example_weights=example_weights,
        )
        term, metrics = regulariser(given["aux"], kind=kind, **weights)
        real, generated = logits(given["images"]), logits(reconstruction)
        metrics |= loss.metrics | {"loss": loss.value + term}
        loss_d = discriminator_loss(real, generated, config.get("disc_loss", "hinge"))
        metrics |= {"discriminator": factor * loss_d}
        metrics |= {"logits_real": real.mean(), "logits_fake": generated.mean()}
        if kind == "vq":
            metrics["codes_used"] = metrics["code_usage"] * given["aux"]["code_counts"].size
        return metrics, reconstruction, pull_back(loss.reconstruction_grad)[0]

    return functools.partial(evaluate, given)


@pytest.mark.parametrize("name", ["loss_kl", "loss_vq", "loss_vqldm"])
def test_every_logged_scalar_matches_the_original(name):
    golden, evaluate = load(name), evaluator(name)
    weighted = "out.weighted_total" in golden.arrays
    for step in golden.meta["global_steps"]:
        metrics, reconstruction, grad = evaluate(step, np.ones(2, np.float32) if weighted else None)
        golden.check("out.rec", reconstruction)
        stored = [key for key in golden.arrays if key.startswith(f"step{step}.train/")]
        assert len(stored) >= 10
        for key in stored:
            golden.check(key, metrics[LOGGED[key.split("/")[1]]])
        golden.check(
            f"step{step}.grad_last_layer_of_total", grad.transpose(3, 0, 1, 2)
        )  # `check` puts channels last
    if weighted:
        unlike, _, _ = evaluate(step, np.float32([1.0, 0.5]))
        golden.check("out.weighted_total", unlike["loss"])
        # The original takes the adaptive weight before it weighs the examples.
        np.testing.assert_allclose(unlike["adaptive_weight"], metrics["adaptive_weight"])


WEIGHT, LOG_VARIANCE = 0.7, jnp.float32(0.3)


class Toy:
    """A small decoder and its latents, with two losses of their reconstruction."""

    net = Decoder(width=16, mult=(1,), depth=0, attn_downsample=(), mid_attn=False, norm_groups=4)
    images = np.random.RandomState(1).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    cotangent = np.random.RandomState(2).standard_normal(images.shape).astype(np.float32)

    @functools.cached_property
    def params(self):
        rng, latents = np.random.RandomState(3), jax.ShapeDtypeStruct((2, 16, 16, 2), np.float32)
        shapes = jax.eval_shape(self.net.init, jax.random.key(0), latents)["params"]
        return jax.tree.map(
            lambda leaf: (0.1 * rng.standard_normal(leaf.shape)).astype(np.float32),
            {"decoder": shapes, "latents": latents},
        )

    def autoencode(self, params):
        """The reconstruction, a term of the latents, and metrics."""
        reconstruction = self.net.apply({"params": params["decoder"]}, params["latents"])
        aux = {"kl": jnp.square(params["latents"]).sum((1, 2, 3)), "latents": params["latents"]}
        term, metrics = regulariser(aux, kind="kl", kl_weight=0.1)
        return (reconstruction, term), metrics

    def likelihood(self, reconstruction, log_variance):
        return reconstruction_loss(
            reconstruction, self.images, kind="kl", loss="l2", log_variance=log_variance
        )

    def adversarial(self, reconstruction):
        return (jnp.sin(reconstruction) * self.cotangent).mean()

    def step(self, params, log_variance, weight, adaptive=True):
        """Loss, metrics and gradients as a training step would take them."""
        (reconstruction, term), pull, metrics = jax.vjp(self.autoencode, params, has_aux=True)

        def pull_back(grad):
            if not adaptive:
                return jnp.ones((1,))
            return pull((grad, jnp.float32(0)))[0]["decoder"]["conv_out"]["kernel"]

        loss = output_loss(
            reconstruction,
            log_variance,
            self.likelihood,
            self.adversarial,
            pull_back,
            weight=weight,
            factor=jnp.float32(0.5),
        )
        grads = pull((loss.reconstruction_grad, jnp.float32(1)))[0]
        return loss.value + term, metrics | loss.metrics, grads, loss.log_variance_grad

    @functools.cache  # noqa: B019 (there is one)
    def compiled(self, adaptive=True):
        """`step` for the params and a log-variance."""
        step = functools.partial(self.step, weight=WEIGHT, adaptive=adaptive)
        return quick_jit(step).lower(self.params, LOG_VARIANCE).compile()

    def direct(self, params, log_variance, adaptive):
        """The same scalar, written down as it stands."""
        (reconstruction, term), _ = self.autoencode(params)
        value = self.likelihood(reconstruction, log_variance)[0].mean()
        return value + term + adaptive * 0.5 * self.adversarial(reconstruction)


TOY = Toy()


def test_adaptive_weight_and_gradients_are_those_of_the_whole_network():
    @quick_jit
    def reference(params):
        def term(kernel, of):
            conv_out = {**params["decoder"]["conv_out"], "kernel": kernel}
            changed = {**params, "decoder": {**params["decoder"], "conv_out": conv_out}}
            return of(TOY.autoencode(changed)[0][0])

        kernel = params["decoder"]["conv_out"]["kernel"]
        norms = [
            jnp.sqrt(jnp.square(jax.grad(term)(kernel, of)).sum())
            for of in (lambda r: TOY.likelihood(r, LOG_VARIANCE)[0].mean(), TOY.adversarial)
        ]
        adaptive = WEIGHT * norms[0] / (norms[1] + 1e-4)
        return adaptive, jax.value_and_grad(TOY.direct, argnums=(0, 1))(
            params, LOG_VARIANCE, adaptive
        )

    adaptive, (value, (grads, log_variance_grad)) = reference(TOY.params)
    found_value, metrics, found_grads, found_grad = TOY.compiled()(TOY.params, LOG_VARIANCE)
    assert 1 < adaptive < 1e4
    np.testing.assert_allclose(metrics["adaptive_weight"], adaptive, rtol=1e-5)
    np.testing.assert_allclose(found_value, value, rtol=1e-5)
    np.testing.assert_allclose(found_grad, log_variance_grad, rtol=1e-5)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * largest),
        found_grads,
        grads,
    )


def test_adaptive_weight_costs_the_gradient_of_one_layer():
    whole, without = (TOY.compiled(a).cost_analysis()["flops"] for a in (True, False))
    layer = 2 * TOY.params["decoder"]["conv_out"]["kernel"].size * TOY.images[..., 0].size
    assert 0 < whole - without < 2.5 * layer < 0.03 * without


@pytest.mark.parametrize(
    ("reference", "adversarial", "want"), [(3.0, 1.5, 2.0), (3.0, 0.0, 1e4), (0.0, 1.0, 0.0)]
)
def test_adaptive_weight_is_clamped(reference, adversarial, want):
    ones = np.ones((1, 2, 2, 3), np.float32)
    weight = adaptive_weight(lambda grad: 2 * grad, reference * ones, adversarial * ones)
    np.testing.assert_allclose(weight, want, rtol=1e-4)
    gradient = jax.grad(lambda g: adaptive_weight(lambda x: x, g, ones))(ones)
    np.testing.assert_array_equal(gradient, np.zeros_like(ones))


def test_discriminator_starts_at_its_step():
    factors = [float(adversarial_factor(step, 10, 0.8)) for step in (0, 9, 10, 11)]
    np.testing.assert_allclose(factors, [0, 0, 0.8, 0.8])


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_perceptual_distance_joins_every_element(kind):
    distance = np.float32([0.1, 0.2, 0.6])

    def perceptual(images, reconstruction):
        assert images is IMAGES and reconstruction is RECONSTRUCTION
        return jnp.asarray(distance)

    total, metrics = reconstruction_loss(
        RECONSTRUCTION,
        IMAGES,
        kind=kind,
        perceptual=perceptual,
        perceptual_weight=0.5,
        log_variance=-0.4,
    )
    error = np.abs(DIFFERENCE) + 0.5 * distance[:, None, None, None]
    reduced = (error * np.exp(0.4) - 0.4).reshape(3, -1)
    want = reduced.sum(1) if kind == "kl" else reduced.mean(1)
    np.testing.assert_allclose(total, want, rtol=1e-5)
    np.testing.assert_allclose(metrics["reconstruction"], want.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["reconstruction_error"], error.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["perceptual"], 0.3, rtol=1e-6)


def test_code_usage():
    usage, perplexity = code_usage(np.float32([4, 0, 4, 0, 4, 4, 0, 0]))
    np.testing.assert_allclose([usage, perplexity], [0.5, 4.0], rtol=1e-5)


def autoencoder_loss(reconstruction, images, aux, *, kind, loss, **weights):
    """The sum of both terms, as a step without a discriminator minimises it."""
    per_example, metrics = reconstruction_loss(reconstruction, images, kind=kind, loss=loss)
    term, more = regulariser(aux, kind=kind, **weights)
    return per_example.mean() + term, metrics | more


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_kl_sums_over_an_example(loss):
    aux = {"kl": np.array([3.0, 5.0, 7.0], np.float32), "latents": LATENTS}
    total, metrics = autoencoder_loss(
        RECONSTRUCTION, IMAGES, aux, kind="kl", loss=loss, kl_weight=0.1
    )
    reconstruction = (np.abs(DIFFERENCE) ** POWER[loss]).sum() / 3
    np.testing.assert_allclose(total, reconstruction + 0.1 * 5, rtol=1e-5)
    np.testing.assert_allclose(metrics["reconstruction"], reconstruction, rtol=1e-5)
    np.testing.assert_allclose(metrics["reconstruction_mae"], np.abs(DIFFERENCE).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["kl_per_element"], 5 / 16)


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_vq_averages_over_all_elements(loss):
    counts = np.array([6.0, 0.0, 6.0, 0.0], np.float32)
    aux = {"codebook": np.array([1.0, 2.0, 6.0], np.float32), "code_counts": counts}
    total, metrics = autoencoder_loss(
        RECONSTRUCTION, IMAGES, aux, kind="vq", loss=loss, codebook_weight=0.5
    )
    reconstruction = (np.abs(DIFFERENCE) ** POWER[loss]).mean()
    np.testing.assert_allclose(total, reconstruction + 0.5 * 3, rtol=1e-5)
    np.testing.assert_allclose(metrics["reconstruction_mae"], np.abs(DIFFERENCE).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["code_usage"], 0.5)
    np.testing.assert_allclose(metrics["code_perplexity"], 2.0, rtol=1e-5)


@pytest.mark.parametrize(("kind", "loss"), [("kl", "l3"), ("identity", "l1")])
def test_unknown_names_are_refused(kind, loss):
    with pytest.raises(UserError):
        autoencoder_loss(RECONSTRUCTION, IMAGES, {}, kind=kind, loss=loss)
