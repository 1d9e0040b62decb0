import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import load, quick_jit

from ldm_jax.conditioners.clip import ClipText
from ldm_jax.convert.text import text_to_flax

SMALL = ClipText(60, 32, 2, 4, 64, length=12, null_tokens=(58, 59), pad_token=59)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_fixture(activation):
    golden, clip = load(f"clip_text_{activation}"), SMALL.clone(activation=activation)
    params = jax.tree.map(jnp.asarray, text_to_flax(golden.weights(), clip, "hf"))
    tokens = jnp.asarray(golden["in.ids"])

    @quick_jit
    def run(params):
        bound = clip.bind({"params": params})
        return (
            bound({"tokens": tokens}),
            bound.pooled(tokens),
            jnp.stack(bound.hidden_states(tokens)),
        )

    cond, pooled, hidden = run(params)
    assert cond.context_mask is None
    golden.check("out.last_hidden_state", cond.context)
    golden.check("out.pooler_output", pooled)
    atol = golden.meta["tolerance"]["mid.hidden_states"]["suggested_atol"]
    np.testing.assert_allclose(hidden, golden["mid.hidden_states"], rtol=0, atol=atol)


@pytest.fixture(scope="module")
def variables():
    return quick_jit(SMALL.init)(jax.random.key(0), {"tokens": jnp.zeros((1, 12), jnp.int32)})


def test_no_token_sees_those_after_it(variables):
    tokens, apply = jnp.arange(12)[None], quick_jit(SMALL.apply)
    one = apply(variables, {"tokens": tokens}).context
    two = apply(variables, {"tokens": tokens.at[0, 7].set(30)}).context
    np.testing.assert_array_equal(one[:, :7], two[:, :7])
    assert np.abs(one - two)[:, 7:].max(-1).min() > 0


def test_null_is_the_empty_text(variables):
    null = quick_jit(lambda v: SMALL.apply(v, 3, method="null"))(variables).context
    empty = jnp.array([[58] + [59] * 11] * 3)
    want = quick_jit(SMALL.apply)(variables, {"tokens": empty}).context
    np.testing.assert_allclose(null, want, atol=1e-6)


def test_the_default_is_the_text_model_of_clip_vit_large():
    tokens = {"tokens": jnp.zeros((1, 77), jnp.int32)}
    params = jax.eval_shape(ClipText().init, jax.random.key(0), tokens)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 123_060_480
