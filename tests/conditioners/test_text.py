import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import load, quick_jit

from ldm_jax.conditioners.text import TextTransformer, empty_text
from ldm_jax.convert.text import text_from_flax, text_to_flax
from ldm_jax.errors import UserError

GOLDEN = TextTransformer(vocab_size=50, width=64, depth=2, length=12)
SMALL = TextTransformer(
    vocab_size=9, width=8, depth=1, heads=2, head_dim=3, length=6, null_tokens=(1, 2), pad_token=3
)
TOKENS = jnp.array([[1, 4, 5, 2, 3, 3], [1, 7, 2, 3, 3, 3]])
apply = quick_jit(SMALL.apply)
FIXTURES = ("bert_embedder", "bert_embedder_small_weights")


def golden_params(golden):
    return jax.tree.map(jnp.asarray, text_to_flax(golden.weights(), GOLDEN, "compvis"))


@pytest.mark.parametrize("name", FIXTURES)
def test_fixture(name):
    golden = load(name)
    params, tokens = golden_params(golden), jnp.asarray(golden["in.ids"])
    mask = np.ones(tokens.shape, bool)
    mask[1, -4:] = False
    encode = quick_jit(lambda *args: GOLDEN.apply({"params": params}, *args, method="encode"))
    embeddings = encode(tokens)
    golden.check("out.embeddings", embeddings)
    golden.check("out.embeddings_short", encode(tokens[:, :-3]))
    golden.check("out.embeddings_masked", encode(tokens, jnp.asarray(mask)))
    # Ours has no head; the original's says once more that the embeddings are right.
    head = golden.weights("transformer.to_logits.")
    golden.check("out.logits", np.asarray(embeddings) @ head["weight"].T + head["bias"])


@pytest.mark.parametrize("name", FIXTURES)
def test_fixture_gradients(name):
    golden = load(name)
    tokens, cotangent = jnp.asarray(golden["in.ids"]), jnp.asarray(golden["in.cotangent"])

    def loss(params):
        return (GOLDEN.apply({"params": params}, {"tokens": tokens}).context * cotangent).sum()

    gradients = quick_jit(jax.grad(loss))(golden_params(golden))
    gradients = text_from_flax(gradients, GOLDEN, "compvis")
    head = {key: np.zeros(1) for key in golden.meta["grad_l2"] if "to_logits" in key}
    golden.check_gradients(gradients | head)


@pytest.fixture(scope="module")
def variables():
    return quick_jit(SMALL.init)(jax.random.key(0), {"tokens": TOKENS})


def test_condition_and_null(variables):
    cond = apply(variables, {"tokens": TOKENS})
    null = quick_jit(lambda v: SMALL.apply(v, 2, method="null"))(variables)
    assert cond.context.shape == null.context.shape == (2, 6, 8)
    assert jax.tree.structure(cond) == jax.tree.structure(null)
    empty = jnp.tile(jnp.array([[1, 2, 3, 3, 3, 3]]), (2, 1))
    want = apply(variables, {"tokens": empty}).context
    np.testing.assert_allclose(null.context, want, rtol=1e-5, atol=1e-6)
    # Padding is read like any token, as in the original.
    other = apply(variables, {"tokens": TOKENS.at[:, -1].set(6)}).context
    assert np.abs(other - cond.context)[:, 0].max() > 1e-4


def test_a_layout_is_read_from_its_own_field(variables):
    layout = SMALL.clone(field="boxes", null_tokens=())
    cond = quick_jit(layout.apply)(variables, {"boxes": TOKENS, "tokens": 0 * TOKENS})
    np.testing.assert_array_equal(cond.context, apply(variables, {"tokens": TOKENS}).context)
    with pytest.raises(UserError, match=r"null_tokens is empty.*guidance_scale 1"):
        layout.apply(variables, 2, method="null")


def test_low_precision_stays_inside(variables):
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    low = SMALL.clone(dtype=jnp.bfloat16)
    context = quick_jit(low.apply)(variables, {"tokens": TOKENS}).context
    exact = apply(variables, {"tokens": TOKENS}).context
    assert context.dtype == jnp.float32
    assert 0 < np.abs(context - exact).max() < 0.1


def test_a_token_outside_the_vocabulary_is_not_clamped(variables):
    for bad in (9, -1):
        context = apply(variables, {"tokens": TOKENS.at[0, 1].set(bad)}).context
        assert np.isnan(context[0]).all() and np.isfinite(context[1]).all()


def test_more_tokens_than_positions():
    with pytest.raises(UserError, match="7 tokens are more than the 6 positions"):
        SMALL.init(jax.random.key(0), {"tokens": jnp.zeros((1, 7), jnp.int32)})
    with pytest.raises(UserError, match="2 null_tokens do not fit into length 1"):
        empty_text((1, 2), 0, 1)


@pytest.mark.parametrize(
    ("width", "published"), [(640, 186_154_682), (1280, 581_994_042)], ids=["text2img256", "1p4b"]
)
def test_parameter_count_of_the_published(width, published):
    encoder = TextTransformer(vocab_size=30522, width=width, depth=32)
    tokens = {"tokens": jnp.zeros((1, 77), jnp.int32)}
    params = jax.eval_shape(encoder.init, jax.random.key(0), tokens)["params"]
    head = 30522 * (width + 1)  # of logits, which is not used
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == published - head
