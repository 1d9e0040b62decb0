import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_utils import load

from ldm_jax.conditioners.label import LabelEmbedder
from ldm_jax.errors import UserError

BATCH = {"label": jnp.array([0, 2, 1])}


@pytest.mark.parametrize("slot, shape", [("context", (3, 1, 4)), ("vector", (3, 4))])
def test_slots_and_null(slot, shape):
    embedder = LabelEmbedder(num_classes=3, width=4, slot=slot)
    variables = embedder.init(jax.random.key(0), BATCH)
    rows = variables["params"]["embedding"]
    assert rows.shape == (4, 4) and rows.dtype == jnp.float32
    cond, null = embedder.apply(variables, BATCH), embedder.apply(variables, 3, method="null")
    np.testing.assert_array_equal(getattr(cond, slot), rows[BATCH["label"]].reshape(shape))
    np.testing.assert_array_equal(getattr(null, slot), jnp.tile(rows[3], (3, 1)).reshape(shape))
    assert len(jax.tree.leaves(cond)) == 1
    assert jax.tree.structure(cond) == jax.tree.structure(null)


def test_initial_rows_are_standard_normal():
    variables = LabelEmbedder(num_classes=100, width=100).init(jax.random.key(0), BATCH)
    rows = np.asarray(variables["params"]["embedding"])
    assert abs(rows.mean()) < 0.04 and abs(rows.std() - 1) < 0.03


def test_a_label_outside_the_range_is_not_clamped():
    embedder = LabelEmbedder(num_classes=3, width=4)
    variables = embedder.init(jax.random.key(0), BATCH)
    out = embedder.apply(variables, {"label": jnp.array([4, -1])})
    assert np.isnan(out.context).all()


def test_no_null_label():
    embedder = LabelEmbedder(num_classes=3, width=4, null_label=False)
    variables = embedder.init(jax.random.key(0), BATCH)
    assert variables["params"]["embedding"].shape == (3, 4)
    with pytest.raises(UserError, match="guidance_scale 1"):
        embedder.apply(variables, 3, method="null")


def test_unknown_slot():
    with pytest.raises(UserError, match="context, vector"):
        LabelEmbedder(num_classes=3, width=4, slot="concat").init(jax.random.key(0), BATCH)


def test_class_embedder_fixture():
    golden = load("class_embedder")
    rows = golden.weights()["embedding.weight"]
    # The last of the original's classes is the null label.
    embedder = LabelEmbedder(num_classes=rows.shape[0] - 1, width=rows.shape[1])
    batch = {"label": jnp.asarray(golden["in.class_label"])}
    cond = embedder.apply({"params": {"embedding": jnp.asarray(rows)}}, batch)
    np.testing.assert_array_equal(cond.context, golden["out"])
