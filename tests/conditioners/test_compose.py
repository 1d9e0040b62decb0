import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioners.compose import Compose, join
from ldm_jax.conditioners.label import LabelEmbedder
from ldm_jax.types import Condition


class Tokens(nn.Module):
    """A context of three ones with a mask, or of zeros."""

    def __call__(self, batch):
        return Condition(context=batch["tokens"], context_mask=batch["tokens"][..., 0] > 0)

    def null(self, batch_size):
        return Condition(
            context=jnp.zeros((batch_size, 3, 4)), context_mask=jnp.ones((batch_size, 3), bool)
        )


BATCH = {
    "label": jnp.array([0, 1]),
    "tokens": jnp.ones((2, 3, 4)).at[0, 2].set(-1.0),
}


def test_contexts_are_joined_along_the_length_and_masks_filled():
    module = Compose((LabelEmbedder(num_classes=2, width=4), Tokens()))
    cond, variables = module.init_with_output(jax.random.key(0), BATCH)
    assert cond.context.shape == (2, 4, 4)
    np.testing.assert_array_equal(cond.context[:, 1:], BATCH["tokens"])
    np.testing.assert_array_equal(cond.context_mask, [[1, 1, 1, 0], [1, 1, 1, 1]])
    null = module.apply(variables, 2, method="null")
    assert jax.tree.map(jnp.shape, null) == jax.tree.map(jnp.shape, cond)


def test_vectors_are_added_and_concats_are_stacked():
    parts = [
        Condition(vector=jnp.ones((2, 3)), concat=jnp.zeros((2, 4, 4, 1))),
        Condition(vector=jnp.full((2, 3), 2.0), concat=jnp.ones((2, 4, 4, 2))),
        Condition(context=jnp.zeros((2, 1, 3))),
    ]
    cond = join(parts)
    np.testing.assert_array_equal(cond.vector, jnp.full((2, 3), 3.0))
    np.testing.assert_array_equal(cond.concat[0, 0, 0], [0, 1, 1])
    assert cond.context.shape == (2, 1, 3) and cond.context_mask is None


def test_one_part_is_that_part_and_none_is_empty():
    part = LabelEmbedder(num_classes=2, width=4, slot="vector")
    cond, variables = Compose((part,)).init_with_output(jax.random.key(0), BATCH)
    rows = variables["params"]["parts_0"]["embedding"]
    np.testing.assert_array_equal(cond.vector, rows[:2])
    cond, variables = Compose(()).init_with_output(jax.random.key(0), BATCH)
    assert cond == Condition() and not variables
    assert Compose(()).apply({}, 2, method="null") == Condition()
