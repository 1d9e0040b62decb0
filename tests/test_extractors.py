"""Feature networks by name."""

import pathlib

import numpy as np
import pytest

from ldm_jax import extractors
from ldm_jax.errors import UserError
from ldm_jax.metrics.consistency import clip_score
from ldm_jax.training.sharding import make_mesh

CLIP = pathlib.Path(__file__).parent / "golden_towers" / "clip"


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


def test_towers_need_a_folder(tmp_path):
    with pytest.raises(UserError, match="give their folder, --dino=PATH"):
        extractors.load_extractor("dino", mesh=make_mesh())
    with pytest.raises(UserError, match=r"no CLIP in .*config\.json"):
        extractors.load_extractor("clip", mesh=make_mesh(), path=tmp_path)


def test_clip_gives_the_cosines_of_transformers(monkeypatch):
    with np.load(CLIP / "outputs.npz") as stored:
        want = dict(stored)
    tokens = {"first": want["tokens"][0], "second": want["tokens"][1], "": want["tokens"][0]}

    def load(kind, folder, length):
        assert (kind, folder, length) == ("clip", CLIP, 8)
        return lambda captions: np.stack([tokens[caption] for caption in captions])

    monkeypatch.setattr(extractors, "load_tokenizer", load)
    found = extractors.load_clip(CLIP, make_mesh())
    texts = found.texts(["first", "second"] * 40)  # more than one batch
    assert texts.shape == (80, 20)
    # Float32 in both, of values around 1.
    np.testing.assert_allclose(texts[-2:], want["texts"], rtol=0, atol=2e-5)
    pixels = found.images.extract(want["pictures"])["pool"]
    for column in range(2):
        scores = clip_score(pixels, np.repeat(texts[column : column + 1], 2, axis=0))
        expected = 100 * np.maximum(want["cosines"][:, column], 0)
        np.testing.assert_allclose(scores, expected, rtol=0, atol=2e-3)  # of up to 100
