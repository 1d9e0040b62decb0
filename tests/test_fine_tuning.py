"""Fine-tuning of imported models: where they start, what stays frozen, what is refused."""

import pathlib

import jax
import numpy as np
import pytest
from commands import command
from convert.models import CLIP, MODELS, make_config, make_model, make_tokenizer
from ml_collections import ConfigDict

import ldm_jax
from ldm_jax import workdir as files
from ldm_jax.config import differences, flatten
from ldm_jax.convert.export import export_safetensors
from ldm_jax.errors import UserError
from ldm_jax.run import run

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def toy(config, **changes):
    """Two steps on eight captioned emoji."""
    c = ConfigDict(config.to_dict())
    c.data.update(source="emoji", where="category=Animals & Nature", threads=2, resolution=32)
    c.train.update(batch_size=8, steps=2, checkpoint_every=2, picture_every=0)
    c.sample.update(steps=1, num_samples=8)
    c.update_from_flattened_dict(changes)
    return ConfigDict(c).lock()


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """An imported text-to-image model with a CLIP encoder."""
    root = tmp_path_factory.mktemp("imported")
    model = make_model(MODELS["text_clip"])
    model = model._replace(tokenizer=make_tokenizer(root / "words", "clip"))
    export_safetensors(model, root / "model")
    return model, root / "model"


def test_training_starts_from_the_weights_and_leaves_clip_as_it_is(imported, tmp_path):
    model, source = imported
    config = toy(model.config, **{"train.lr": 1e-3})
    changes = [f"--config.{line.split(':')[0]}" for line in differences(model.config, config)]
    values = flatten(config)
    command(
        "train",
        f"--config={CONFIGS / 'imported.py'}:{source}",
        f"--workdir={tmp_path / 'run'}",
        *(f"{flag}={values[flag.removeprefix('--config.')]}" for flag in changes),
    )
    trained = ldm_jax.load(tmp_path / "run")  # brings its tokenizer along
    assert trained.tokenizer(["ab"]).shape == (1, CLIP["length"])
    same = jax.tree.map(
        np.array_equal, trained.variables["conditioner"], model.weights["conditioner"]
    )
    assert all(jax.tree.leaves(same))
    moved = jax.tree.map(
        lambda a, b: float(np.abs(np.asarray(a) - b).max()),
        trained.variables["denoiser"],
        model.weights["denoiser"],
    )
    # Adam moves a weight by about the learning rate per step, from where it was.
    assert 0 < max(jax.tree.leaves(moved)) < 5e-3


def test_frozen_encoder_without_weights_is_refused(imported, tmp_path):
    model, source = imported
    given = {"text.tokenizer": str(source / "tokenizer"), "first_stage.weights": str(source)}
    config = toy(model.config, **given)
    with pytest.raises(UserError, match=r"set config\.init_from"):
        run(config, tmp_path / "run")


def test_captions_without_a_tokenizer_are_refused(imported, tmp_path):
    with pytest.raises(UserError, match="captions need a tokenizer"):
        run(toy(imported[0].config), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_architecture_is_refused(imported, tmp_path):
    model, source = imported
    changes = {"init_from": str(source), "first_stage.weights": str(source), "denoiser.width": 64}
    with pytest.raises(UserError, match=r"denoiser\.width is 64, but the model in .* has 32"):
        run(toy(model.config, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_that_is_too_big_is_refused(imported, tmp_path):
    words = make_tokenizer(tmp_path / "words", "bert")
    config = make_config(
        MODELS["text_bert"] | {"text": MODELS["text_bert"]["text"] | dict(vocab_size=30)}
    )
    config = ConfigDict(config.to_dict())
    config.text.tokenizer = str(words)
    with pytest.raises(UserError, match=r"has 40 tokens, but config\.text\.vocab_size is 30"):
        files.read_tokenizer(tmp_path / "run", config)


def test_a_denoiser_on_its_own(tmp_path):
    model = make_model(MODELS["text_clip"])
    model = model._replace(weights={"denoiser": model.weights["denoiser"]})
    export_safetensors(model, tmp_path / "model")
    pipe = ldm_jax.load(tmp_path / "model")
    for call in (
        lambda: pipe.sample([0]),
        lambda: pipe.condition({"tokens": np.zeros((1, 8), int)}),
    ):
        with pytest.raises(UserError, match="no weights of its conditioner"):
            call()
    with pytest.raises(UserError, match="no weights of its first_stage"):
        pipe.decode(np.zeros((1, 16, 16, 4)))
    assert files.load_weights(tmp_path / "model", model.config)[1].keys() == {"denoiser"}
