"""What steers besides the condition, on densities whose guided denoisers are known exactly.

Data are Gaussians of one standard deviation around a mean per class. At a noise level, x_t of class
k is N(alpha mean_k, alpha^2 STD^2 + sigma^2), and eps is -sigma times the gradient of its log
density.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion.guidance import Guidance, Guides, make_denoise
from ldm_jax.diffusion.parameterization import PARAMETERIZATIONS, network_input, regression_target
from ldm_jax.diffusion.schedule import Level
from ldm_jax.errors import UserError
from ldm_jax.types import Condition

STD, SIGMA_DATA = 0.5, 0.7
MEANS = np.array([[1.0, -0.5, 0.3], [-1.5, 0.4, 0.2], [0.2, 0.1, -2.0]])  # (K, D)
PRIOR = np.array([0.5, 0.3, 0.2])
VARIANCE_PRESERVING = Level(*(jnp.float32(x) for x in (5.0, 0.8, 0.6)))
FLOW = Level(*(jnp.float32(x) for x in (5.0, 0.3, 0.7)))
X_T = jax.random.normal(jax.random.key(0), (4, 3))


def class_log_density(x_t, level):
    """(B, K), up to a constant."""
    distance = ((x_t[:, None] - level.alpha * jnp.float32(MEANS)[None]) ** 2).sum(-1)
    return -distance / (2 * (level.alpha**2 * STD**2 + level.sigma**2))


def mixture(x_t, level, prior):
    """(B,) log density of classes of a `prior` (B, K); one class alone where it is one-hot."""
    return jax.nn.logsumexp(class_log_density(x_t, level) + jnp.log(prior), axis=1)


def network(level, predict, seen, t, cond):
    """The ideal denoiser of a mixture whose prior is told as `vector`; of PRIOR without one."""
    std = network_input(jnp.ones(()), level, predict, SIGMA_DATA)
    x_t = seen / std
    prior = jnp.broadcast_to(jnp.float32(PRIOR), (len(seen), 3))
    if cond is not None and cond.vector is not None:
        prior = cond.vector
    eps = -level.sigma * jax.grad(lambda x: mixture(x, level, prior).sum())(x_t)
    x0 = (x_t - level.sigma * eps) / level.alpha
    return regression_target(x0, eps, level, predict, SIGMA_DATA)


def of_class(k):
    return Condition(vector=jnp.tile(jnp.eye(3)[k], (len(X_T), 1)))


NULL = Condition(vector=jnp.tile(jnp.float32(PRIOR), (len(X_T), 1)))


def class_gradient(k, x_t, level):
    """Of the exact posterior log p(k | x_t), by differentiation."""

    def log_posterior(x):
        logits = class_log_density(x, level) + jnp.log(jnp.float32(PRIOR))[None]
        return jax.nn.log_softmax(logits)[:, k].sum()

    return jax.grad(log_posterior)(x_t)


def denoiser(predict, level, *args, **options):
    apply = functools.partial(network, level, predict)
    return make_denoise(apply, predict, *args, sigma_data=SIGMA_DATA, **options)


@pytest.mark.parametrize("level", [VARIANCE_PRESERVING, FLOW], ids=["vp", "flow"])
@pytest.mark.parametrize("predict", PARAMETERIZATIONS)
def test_an_exact_classifier_makes_the_unconditional_denoiser_conditional(predict, level):
    """Bayes' rule: at scale 1 the gradient of the posterior is all that a condition adds."""
    guides = Guides(log_prob_grad=functools.partial(class_gradient, 1))
    guided = denoiser(predict, level, guidance=Guidance(classifier_scale=1.0), guides=guides)
    expected = denoiser(predict, level, of_class(1))(X_T, level)
    found = guided(X_T, level)
    alone = denoiser(predict, level)(X_T, level)
    assert np.abs(alone.eps - expected.eps).max() > 0.3
    # float32 gradients of log densities of size 10
    np.testing.assert_allclose(found.eps, expected.eps, atol=2e-5)
    np.testing.assert_allclose(found.x0, expected.x0, atol=5e-5)


def test_pure_noise_is_left_as_it_is():
    level = Level(*(jnp.float32(x) for x in (9.0, 0.0, 1.0)))
    guides = Guides(log_prob_grad=lambda x_t, level: jnp.full_like(x_t, 3.0))
    apply = lambda x_t, t, cond: 0.1 * x_t  # noqa: E731
    guided = make_denoise(apply, "v", guidance=Guidance(classifier_scale=2.0), guides=guides)
    plain = make_denoise(apply, "v")
    for name in ("x0", "eps"):
        pair = (getattr(denoise(X_T, level), name) for denoise in (guided, plain))
        np.testing.assert_array_equal(*pair)


@pytest.mark.parametrize("predict", PARAMETERIZATIONS)
def test_composition_is_the_product_of_the_densities(predict):
    """p(x) (p(x|a)/p(x))^scale (p(x|b)/p(x))^weight ... of Gaussians is a Gaussian again."""
    level, scale, weights = VARIANCE_PRESERVING, 1.5, (0.8, -0.4)
    variance = 0.8**2 * STD**2 + 0.6**2
    means = np.array([[0.7, 0.9, -0.6], *MEANS])  # of null, cond, and two more

    def apply(seen, t, cond):
        """The ideal denoiser of one Gaussian, whose mean is told as `vector`."""
        x_t = seen / network_input(jnp.ones(()), level, predict, SIGMA_DATA)
        eps = level.sigma * (x_t - level.alpha * cond.vector) / variance
        x0 = (x_t - level.sigma * eps) / level.alpha
        return regression_target(x0, eps, level, predict, SIGMA_DATA)

    null, cond, *also = (Condition(vector=jnp.tile(jnp.float32(m), (len(X_T), 1))) for m in means)
    found = make_denoise(
        apply,
        predict,
        cond,
        null,
        Guidance(scale, weights=weights),
        sigma_data=SIGMA_DATA,
        guides=Guides(also=tuple(also)),
    )(X_T, level)
    powers = np.array([1 - scale - sum(weights), scale, *weights])
    precision = powers.sum() / variance
    mean = (powers[:, None] * 0.8 * means).sum(0) / variance / precision
    expected = 0.6 * precision * (np.asarray(X_T, np.float64) - mean)
    np.testing.assert_allclose(found.eps, expected, atol=2e-5)


def test_conditions_are_told_in_one_call_of_so_many_times_the_batch():
    sizes = []

    def apply(x_t, t, cond):
        sizes.append(len(x_t))
        return x_t * cond.vector

    given = (of_class(0), NULL, Guidance(2.0, weights=(0.5, 1.0)))
    guides = Guides(also=(of_class(1), of_class(2)))
    once = make_denoise(apply, "eps", *given, guides=guides)(X_T, FLOW)
    assert sizes == [16]
    turns = make_denoise(apply, "eps", *given, guides=guides, two_calls=True)(X_T, FLOW)
    assert sizes == [16, 4, 4, 4, 4]
    np.testing.assert_array_equal(once.eps, turns.eps)
    a, b, c, null = (x.vector for x in (*map(of_class, range(3)), NULL))
    expected = null + 2 * (a - null) + 0.5 * (b - null) + 1.0 * (c - null)
    np.testing.assert_allclose(once.eps, X_T * expected, rtol=1e-6)


@pytest.mark.parametrize("cond", [None, Condition(), of_class(1)])
def test_a_model_guided_by_itself_is_unchanged(cond):
    """Also without a condition, or without a null one."""
    apply = functools.partial(network, FLOW, "v")
    weak = lambda x_t, t: apply(x_t, t, cond)  # noqa: E731
    guided = make_denoise(apply, "v", cond, None, 3.0, guides=Guides(weak=weak))
    np.testing.assert_array_equal(
        guided(X_T, FLOW).x0, make_denoise(apply, "v", cond)(X_T, FLOW).x0
    )


@pytest.mark.parametrize("two_calls", [False, True])
def test_a_weak_model_that_knows_no_condition_is_classifier_free_guidance(two_calls):
    apply = functools.partial(network, FLOW, "flow")
    weak = lambda x_t, t: apply(x_t, t, NULL)  # noqa: E731
    guided = make_denoise(
        apply, "flow", of_class(2), NULL, 3.0, two_calls=two_calls, guides=Guides(weak=weak)
    )
    expected = make_denoise(apply, "flow", of_class(2), NULL, 3.0)
    np.testing.assert_allclose(guided(X_T, FLOW).x0, expected(X_T, FLOW).x0, atol=2e-6)


def everything(calls):
    """A network and all guides, which write down who is called."""

    def apply(x_t, t, cond):
        jax.debug.callback(lambda x: calls.append(("network", len(x))), x_t)
        return x_t * cond.vector

    def weak(x_t, t):
        jax.debug.callback(lambda x: calls.append(("weak", len(x))), x_t)
        return 0.2 * x_t

    def log_prob_grad(x_t, level):
        jax.debug.callback(lambda x: calls.append(("classifier", len(x))), x_t)
        return jnp.cos(x_t)

    return apply, Guides(weak, (of_class(1),), log_prob_grad)


@pytest.mark.parametrize(
    ("t", "called"),
    [(1.0, {("network", 4)}), (3.0, {("network", 12), ("weak", 4), ("classifier", 4)})],
)
def test_outside_the_interval_all_of_it_is_off(t, called):
    calls = []
    apply, guides = everything(calls)
    level = FLOW._replace(t=jnp.float32(t))
    guidance = Guidance(2.0, 0.5, (2.0, 4.0), (0.7,), 1.5)
    denoise = make_denoise(apply, "eps", of_class(0), NULL, guidance, guides=guides)
    found = jax.block_until_ready(denoise(X_T, level).eps)
    jax.effects_barrier()
    assert set(calls) == called
    if t == 1.0:
        np.testing.assert_array_equal(found, X_T * of_class(0).vector)


def test_numbers_are_traced():
    apply, guides = everything([])

    @jax.jit
    def run(guidance):
        return make_denoise(apply, "eps", of_class(0), NULL, guidance, guides=guides)(X_T, FLOW).eps

    first, second = (
        run(jax.tree.map(jnp.float32, Guidance(scale, share, None, (weight,), s)))
        for scale, share, weight, s in [(2.0, 0.5, 0.7, 1.5), (3.0, 0.1, -0.7, 4.0)]
    )
    assert run._cache_size() == 1 and np.abs(first - second).max() > 0.1


def test_a_scale_of_one_needs_no_weaker_model():
    apply, guides = everything([])
    guides = guides._replace(also=(), log_prob_grad=None, weak=lambda *_: 1 / 0)
    make_denoise(apply, "eps", of_class(0), NULL, 1.0, guides=guides)(X_T, FLOW)


@pytest.mark.parametrize(
    ("null", "guidance", "guides", "said"),
    [
        (NULL, Guidance(), Guides(also=(NULL,)), "needs a weight"),
        (None, Guidance(weights=(1.0,)), Guides(also=(NULL,)), "all of them a null condition"),
        (NULL, Guidance(classifier_scale=1.0), Guides(), "go together"),
        (NULL, Guidance(), Guides(log_prob_grad=lambda x_t, level: x_t), "go together"),
    ],
)
def test_guides_without_their_numbers(null, guidance, guides, said):
    with pytest.raises(UserError, match=said):
        make_denoise(lambda *_: X_T, "eps", of_class(0), null, guidance, guides=guides)
