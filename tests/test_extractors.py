"""Feature networks by name."""

import numpy as np
import pytest

from ldm_jax import extractors
from ldm_jax.errors import UserError
from ldm_jax.training.sharding import make_mesh


def test_weights_that_are_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("LDM_JAX_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match="weights fetch inception"):
        extractors.load_extractor("inception", mesh=make_mesh())
    with pytest.raises(UserError, match=r"unknown feature network 'vgg'.*inception"):
        extractors.load_extractor("vgg", mesh=make_mesh())


def test_choices_reach_the_network(monkeypatch, tmp_path):
    paths = []

    def load(path):
        paths.append(path)
        return {"params": {"kernel": np.zeros((2, 2), np.float32)}}

    monkeypatch.setattr(extractors, "load_inception", load)
    found = extractors.load_extractor(
        "inception", mesh=make_mesh(), resize="antialiased", path=tmp_path, outputs=("pool",)
    )
    assert (found.name, found.resize, found.outputs) == ("inception", "antialiased", {"pool": 2048})
    assert paths == [tmp_path]
