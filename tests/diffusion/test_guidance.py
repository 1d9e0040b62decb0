import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import random
from ldm_jax.diffusion.guidance import Guidance, drop, make_denoise
from ldm_jax.diffusion.schedule import Level, make_schedule
from ldm_jax.errors import UserError
from ldm_jax.types import Condition

SCHEDULE = make_schedule(steps=10)
X_T, T = jnp.full((2, 3), 0.5), jnp.array([3, 7])
COND = Condition(vector=jnp.array([[1.0], [2.0]]))
LEVEL = SCHEDULE.level(T, 2)
NULL = Condition(vector=jnp.array([[10.0], [20.0]]))


def recorder():
    calls = []

    def apply(x_t, t, cond):
        calls.append((x_t, t, cond))
        return x_t * 0 + (0 if cond is None or cond.vector is None else cond.vector[:, :1])

    return apply, calls


@pytest.mark.parametrize("null", [None, NULL])
def test_scale_one_runs_one_half(null):
    apply, calls = recorder()
    prediction = make_denoise(apply, "eps", COND, null, 1.0)(X_T, LEVEL)
    assert len(calls) == 1 and calls[0][0].shape == (2, 3)
    np.testing.assert_array_equal(prediction.eps, np.repeat([[1.0], [2.0]], 3, axis=1))


@pytest.mark.parametrize("cond", [None, Condition()])
def test_without_a_condition_a_traced_scale_runs_one_half(cond):
    apply, calls = recorder()
    jax.jit(lambda s: make_denoise(apply, "eps", cond, cond, s)(X_T, LEVEL))(3.0)
    assert calls[0][0].shape == (2, 3)


def test_guided_call_puts_the_unconditional_half_first():
    apply, calls = recorder()
    prediction = make_denoise(apply, "eps", COND, NULL, 3.0)(X_T, LEVEL)
    assert len(calls) == 1
    np.testing.assert_array_equal(calls[0][1], [3, 7, 3, 7])
    np.testing.assert_array_equal(calls[0][2].vector.ravel(), [10, 20, 1, 2])
    np.testing.assert_allclose(prediction.eps[:, 0], [10 + 3 * (1 - 10), 20 + 3 * (2 - 20)])


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_guidance_acts_alike_on_x0_and_eps(predict):
    apply, _ = recorder()
    guided = make_denoise(apply, predict, COND, NULL, 2.5)(X_T, LEVEL)
    cond = make_denoise(apply, predict, COND)(X_T, LEVEL)
    uncond = make_denoise(apply, predict, NULL)(X_T, LEVEL)
    for name in ("x0", "eps"):
        c, u = getattr(cond, name), getattr(uncond, name)
        np.testing.assert_allclose(getattr(guided, name), u + 2.5 * (c - u), rtol=1e-5, atol=1e-4)


def test_one_level_serves_the_whole_batch():
    apply, calls = recorder()
    level = Level(*(jnp.float32(value) for value in (2.5, 0.8, 0.6)))
    prediction = make_denoise(apply, "v", COND, NULL, 3.0)(X_T, level)
    np.testing.assert_array_equal(calls[0][1], [2.5] * 4)
    np.testing.assert_allclose(prediction.x0, 0.8 * X_T - 0.6 * jnp.array([[-17.0], [-34.0]]))


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_clipping_keeps_x0_in_range_and_eps_in_agreement(predict):
    x_t, raw = 3 * jax.random.normal(jax.random.key(0), (2, 2, 400))
    level = SCHEDULE.level(T, 2)
    free, clipped = (
        make_denoise(lambda *_: raw, predict, clip_x0=clip)(x_t, level) for clip in (False, True)
    )
    inside = np.abs(free.x0) <= 1
    assert inside.any() and not inside.all()
    np.testing.assert_array_equal(clipped.x0, np.clip(free.x0, -1, 1))
    np.testing.assert_allclose(clipped.eps[inside], free.eps[inside], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(level.noised(clipped.x0, clipped.eps), x_t, rtol=1e-5, atol=1e-5)


def test_changing_a_traced_scale_does_not_compile_again():
    apply, calls = recorder()
    run = jax.jit(lambda s: make_denoise(apply, "eps", COND, NULL, s)(X_T, LEVEL).eps)
    np.testing.assert_allclose(run(1.0)[:, 0], [1, 2])
    np.testing.assert_allclose(run(0.0)[:, 0], [10, 20])
    assert len(calls) == 1


@pytest.mark.parametrize("cond, null", [(COND, None), (None, None), (Condition(), Condition())])
def test_guidance_without_a_null_condition(cond, null):
    with pytest.raises(UserError, match="null condition"):
        make_denoise(recorder()[0], "eps", cond, null, 2.0)


def full_condition(value, batch_size):
    return Condition(
        context=jnp.full((batch_size, 2, 3), value),
        context_mask=jnp.full((batch_size, 2), value > 0),
        concat=jnp.full((batch_size, 2, 2, 1), value),
        vector=jnp.full((batch_size, 5), value),
    )


def test_drop_replaces_every_slot_of_an_example():
    keys = random.example_keys(jax.random.key(0), 400)
    out = drop(full_condition(1.0, 400), full_condition(0.0, 400), keys, 0.25)
    kept = np.asarray(out.vector[:, 0])
    assert 60 < (kept == 0).sum() < 140  # 100 +- 4.6 sd
    for leaf in jax.tree.leaves(out):
        flat = np.asarray(leaf, np.float32).reshape(400, -1)
        np.testing.assert_array_equal(flat, np.repeat(kept[:, None], flat.shape[1], axis=1))
    part = drop(full_condition(1.0, 3), full_condition(0.0, 3), keys[5:8], 0.25)
    np.testing.assert_array_equal(part.vector[:, 0], kept[5:8])


@pytest.mark.parametrize("rate, value", [(0.0, 1.0), (1.0, 0.0)])
def test_drop_nothing_or_everything(rate, value):
    keys = random.example_keys(jax.random.key(0), 50)
    out = drop(full_condition(1.0, 50), full_condition(0.0, 50), keys, rate)
    np.testing.assert_array_equal(out.concat, jnp.full((50, 2, 2, 1), value))
    assert out.context_mask.dtype == bool


# The networks below return the condition times x_t, so that outputs differ within an image.

WIDE = jnp.array([[0.5, -1.0, 2.0], [1.5, 0.25, -0.5]])


def scaled_by_condition(x_t, t, cond):
    return x_t * cond.vector


def test_two_calls_are_the_doubled_batch():
    made = [
        make_denoise(scaled_by_condition, "v", COND, NULL, 3.0, two_calls=two)(WIDE, LEVEL).x0
        for two in (False, True)
    ]
    np.testing.assert_array_equal(*made)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_rescaling_moves_the_spread_of_each_image_to_the_conditional_one(share):
    guided, cond, rescaled = (
        make_denoise(scaled_by_condition, "eps", COND, null, guidance)(WIDE, LEVEL).eps
        for null, guidance in [(NULL, 3.0), (None, 1.0), (NULL, Guidance(3.0, share))]
    )
    expected = share * cond.std(1) + (1 - share) * guided.std(1)
    # Guided outputs are negative multiples here: the spread is what is compared. float32 rounding
    np.testing.assert_allclose(rescaled.std(1), expected, rtol=1e-5)


@pytest.mark.parametrize("t, inside", [(1.0, False), (2.0, True), (5.0, True), (6.0, False)])
def test_guidance_is_off_outside_its_interval(t, inside):
    level = Level(jnp.float32(t), jnp.float32(0.8), jnp.float32(0.6))
    denoise = make_denoise(
        scaled_by_condition, "eps", COND, NULL, Guidance(3.0, interval=(2.0, 5.0))
    )
    scale = 3.0 if inside else 1.0
    expected = make_denoise(scaled_by_condition, "eps", COND, NULL, scale)(WIDE, level)
    np.testing.assert_allclose(jax.jit(denoise)(WIDE, level).eps, expected.eps, rtol=1e-6)


def test_outside_the_interval_a_step_costs_half():
    """The compiled program runs one of two branches, of which one has the single batch."""
    level = Level(jnp.float32(1.0), jnp.float32(0.8), jnp.float32(0.6))
    sizes = []

    def apply(x_t, t, cond):
        jax.debug.callback(lambda x: sizes.append(len(x)), x_t)
        return scaled_by_condition(x_t, t, cond)

    guidance = Guidance(3.0, interval=(2.0, 5.0))
    jax.block_until_ready(make_denoise(apply, "eps", COND, NULL, guidance)(WIDE, level).eps)
    jax.effects_barrier()
    assert sizes == [2]
