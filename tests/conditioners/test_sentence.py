import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import quick_jit

from ldm_jax.conditioners.sentence import SentenceEncoder
from ldm_jax.convert.text import text_to_flax
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


def test_bert_of_transformers():
    """The PyTorch model with random weights, small enough for the epsilon to count."""
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
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    for scale in (1.0, 1e-4):
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.data = 1 + 0.2 * noise if "LayerNorm.weight" in name else 0.2 * scale * noise
        with torch.no_grad():
            tokens = torch.tensor(np.asarray(TOKENS)).long()
            want = model(tokens, attention_mask=(tokens != 0).long()).last_hidden_state.numpy()
        weights = {name: value.numpy() for name, value in model.state_dict().items()}
        params = text_to_flax(weights, SMALL, "hf")
        context = SMALL.apply({"params": params}, {"tokens": TOKENS}).context
        np.testing.assert_allclose(context, want, atol=2e-5)
