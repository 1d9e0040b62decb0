"""The command that samples: what it asks of the model, and what it writes down."""

import json

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from toy_models import model

from ldm_jax import cli, workdir
from ldm_jax.errors import UserError

SMALL = {"text.vocab_size": 7, "text.width": 32, "text.depth": 1, "text.heads": 1}
SMALL |= {"text.length": 8, "text.mlp_width": 128, "text.null_tokens": (1, 2)}


@pytest.fixture(scope="module")
def pipe():
    return model("text", **SMALL, **{"sample.guidance_scale": 2.0})


@pytest.fixture
def run(pipe, monkeypatch, tmp_path, import_command):
    """Runs the command on a model of captions; returns what is sampled with, and the record."""
    sample_command = import_command("ldm_jax.sample")
    flags.FLAGS.mark_as_parsed()
    asked = []

    def sample(seeds, condition, **settings):
        asked.append(settings)
        return np.zeros((len(seeds), 32, 32, 3), np.uint8)

    monkeypatch.setattr(pipe, "sample", sample)
    monkeypatch.setattr(workdir, "load", lambda path: pipe)
    monkeypatch.setattr(cli, "use_compilation_cache", lambda: None)

    def run(**given):
        out = tmp_path / "out"
        with flagsaver.flagsaver(workdir="runs/x", num_samples=1, out=str(out), **given):
            sample_command.main()
        return asked[-1], json.loads((out / "samples.json").read_text())

    return run


@pytest.mark.parametrize(
    ("given", "asked", "used"),
    [
        ({"prompt": ["a cat"]}, None, 2.0),
        ({"prompt": ["a cat"], "guidance_scale": 3.0}, 3.0, 3.0),
        ({"negative_prompt": "a cat"}, None, 2.0),
        ({}, None, 1.0),
        ({"guidance_scale": 1.0}, 1.0, 1.0),
    ],
)
def test_the_scale_that_is_used_is_recorded(run, given, asked, used):
    settings, record = run(**given)
    assert (settings["guidance_scale"], record["guidance_scale"]) == (asked, used)
    assert "two_calls" not in settings


def test_a_scale_without_a_prompt_is_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"guidance_scale is 5.0, but without a condition"):
        run(guidance_scale=5.0)
    assert not (tmp_path / "out").exists()


def test_calls_in_turn_are_a_setting(run):
    assert run(prompt=["a cat"], two_calls=True)[0]["two_calls"] is True
