import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import quick_jit

from ldm_jax.conditioners.sentence import SentenceEncoder
from ldm_jax.convert.text import abstract_params, text_from_flax
from ldm_jax.errors import UserError

SMALL = SentenceEncoder(
    40, 24, 2, heads=4, mlp_width=48, length=8, positions=16, null_tokens=(1, 2), pad_token=0
)
TOKENS = jnp.array([[1, 4, 5, 7, 9, 2, 0, 0], [1, 7, 2, 0, 0, 0, 0, 0]])
apply = quick_jit(SMALL.apply)


@pytest.fixture(scope="module")
def variables():
    return quick_jit(SMALL.init)(jax.random.key(0), {"tokens": TOKENS})


def test_padding_is_masked(variables):
    cond = apply(variables, {"tokens": TOKENS})
    assert cond.context.shape == (2, 8, 24)
    np.testing.assert_array_equal(cond.context_mask, TOKENS != 0)
    # Neither how much padding there is, nor what it holds, has an influence on the tokens.
    short = apply(variables, {"tokens": TOKENS[:, :6]}).context
    np.testing.assert_allclose(cond.context[:1, :6], short[:1], atol=1e-5)
    mask = jnp.asarray(TOKENS != 0)
    other = {"tokens": jnp.where(mask, TOKENS, 30), "tokens_mask": mask}
    cond_other = SMALL.apply(variables, other)
    np.testing.assert_array_equal(cond_other.context_mask, mask)
    np.testing.assert_allclose(cond.context[mask], cond_other.context[mask], atol=1e-5)
    unmasked = apply(variables, {"tokens": other["tokens"]}).context
    assert np.abs(unmasked - cond.context)[mask].max() > 1e-3


def test_null_is_the_empty_text(variables):
    cond, null = (
        apply(variables, {"tokens": TOKENS}),
        SMALL.apply(variables, 2, method="null"),
    )
    assert jax.tree.map(jnp.shape, null) == jax.tree.map(jnp.shape, cond)
    want = apply(variables, {"tokens": jnp.array([[1, 2, 0, 0, 0, 0, 0, 0]] * 2)})
    np.testing.assert_array_equal(null.context_mask, want.context_mask)
    np.testing.assert_allclose(null.context, want.context, atol=1e-5)


def test_sentence_is_the_normalised_mean(variables):
    cond = apply(variables, {"tokens": TOKENS})
    context, mask = np.asarray(cond.context), np.asarray(cond.context_mask)
    means = [context[i][mask[i]].mean(0) for i in range(2)]
    want = np.stack([mean / np.linalg.norm(mean) for mean in means])
    sentences = quick_jit(lambda v: SMALL.apply(v, TOKENS, method="sentence"))(variables)
    np.testing.assert_allclose(sentences, want, atol=1e-6)


def test_more_tokens_than_positions():
    with pytest.raises(UserError, match="16 positions cannot read 17 tokens"):
        SMALL.clone(length=17).init(jax.random.key(0), {"tokens": TOKENS})


def bert_by_hand(params, tokens, mask):
    """BERT's formulas in float64, one text at a time: tokens (L,), mask (L,) -> (L, width)."""

    def dense(h, layer):
        return h @ layer["kernel"] + layer["bias"]

    def norm(h, layer):
        h = h - h.mean(-1, keepdims=True)
        return h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-12) * layer["scale"] + layer["bias"]

    embed = params["embed"]
    x = embed["tokens"][tokens] + embed["positions"][: len(tokens)] + params["token_types"][0]
    x = norm(x, params["norm_in"])
    for i in range(SMALL.depth):
        layer = params[f"layers_{i}"]
        heads = [np.split(dense(x, layer[name]), SMALL.heads, axis=-1) for name in ("q", "k", "v")]
        found = []
        for q, k, v in zip(*heads, strict=True):
            weights = np.exp(q @ k.T / np.sqrt(q.shape[-1])) * mask
            found.append(weights / weights.sum(-1, keepdims=True) @ v)
        x = norm(x + dense(np.concatenate(found, -1), layer["out"]), layer["norm_0"])
        h = dense(x, layer["mlp_in"])
        h = h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2
        x = norm(x + dense(h, layer["mlp_out"]), layer["norm_1"])
    return x


def random_params(scale):
    """Weights of which the norms' inputs are small, where `scale` is: their epsilon counts."""
    draw, shapes = np.random.RandomState(0), abstract_params(SMALL)

    def weight(path, shape):
        noise = 0.2 * draw.standard_normal(shape.shape)
        return 1 + noise if path[-1].key == "scale" else scale * noise

    return jax.tree_util.tree_map_with_path(weight, shapes)


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_bert_by_hand(scale):
    params, mask = random_params(scale), np.asarray(TOKENS != 0)
    narrow = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), params)
    context = apply({"params": narrow}, {"tokens": TOKENS}).context
    for i, tokens in enumerate(np.asarray(TOKENS)):
        want = bert_by_hand(params, tokens, mask[i])
        np.testing.assert_allclose(context[i], want, atol=2e-5 * np.sqrt((want**2).mean()))


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_bert_of_transformers(scale):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    params = jax.tree.map(lambda w: np.asarray(w, np.float32), random_params(scale))
    weights = text_from_flax(params, SMALL, "hf")
    weights = {name: torch.tensor(np.ascontiguousarray(w)) for name, w in weights.items()}
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        tokens = torch.tensor(np.asarray(TOKENS)).long()
        want = model(tokens, attention_mask=(tokens != 0).long()).last_hidden_state.numpy()
    context = apply({"params": params}, {"tokens": TOKENS}).context
    np.testing.assert_allclose(context, want, atol=2e-5 * np.sqrt((want**2).mean()))
