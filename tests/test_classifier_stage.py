"""The classifier as the third stage of a run: when it is trained, stored, read and refused."""

import json
import signal

import jax
import numpy as np
import pytest

import ldm_jax
from ldm_jax import classifier_files
from ldm_jax import config as config_lib
from ldm_jax.convert.export import export_safetensors, open_model
from ldm_jax.errors import UserError
from ldm_jax.preflight import open_data
from ldm_jax.run import run
from ldm_jax.training.interrupt import Interrupted
from ldm_jax.training.logging import Progress


def tiny_config(steps=5):
    """An unconditional model of 16x16 pixels, whose classifier alone reads the label."""
    c = config_lib.get_config()
    c.data.update(source="emoji", where="category=Smileys & Emotion", label="subcategory")
    c.data.update(resolution=16, threads=2, cache_latents=True)
    c.first_stage.kind = "identity"
    c.denoiser.update(width=32, mult=(1,), depth=1, attn_downsample=(), head_dim=16)
    c.label.num_classes = 16
    c.train.update(batch_size=8, steps=2, log_every=1, picture_every=0, checkpoint_every=2)
    c.classifier.update(width=32, mult=(1,), depth=1, attn_downsample=(), head_dim=16)
    c.classifier.train.update(batch_size=8, log_every=1, checkpoint_every=5)
    if steps:
        c.data.fields = ("label",)
        c.classifier.train.steps = steps
    c.sample.update(steps=2, batch_size=8, num_samples=8)
    return config_lib.check(c)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("classifier") / "run"
    run(tiny_config(), workdir)
    return workdir


def weights(workdir):
    return (workdir / classifier_files.WEIGHTS).read_bytes()


def test_it_leaves_weights_and_metrics(straight):
    folder = straight / "classifier"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(np.isfinite(line["loss"]) and 0 <= line["accuracy"] <= 1 for line in lines)
    quarters = {f"{name}_q{q}" for name in ("loss", "accuracy") for q in range(4)}
    assert quarters <= set().union(*lines)
    assert (folder / "parameters.txt").is_file() and (straight / "samples/final.png").is_file()


def test_a_pipeline_reads_it_and_an_export_keeps_it(straight, tmp_path):
    pipe = ldm_jax.load(straight)
    assert set(pipe.variables) == {"first_stage", "denoiser", "conditioner", "classifier"}
    export_safetensors(open_model(straight), tmp_path / "out")
    exported = ldm_jax.load(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, exported.variables, pipe.variables)


def test_a_finished_run_trains_nothing_again(straight):
    before = weights(straight), (straight / "classifier" / "metrics.jsonl").read_text()
    run(tiny_config(), straight)
    assert (weights(straight), (straight / "classifier" / "metrics.jsonl").read_text()) == before


def test_a_finished_run_gets_one_and_a_broken_one_goes_on(straight, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    run(tiny_config(0), workdir)
    assert "classifier" not in ldm_jax.load(workdir).variables
    with pytest.raises(UserError, match="another config"):
        run(tiny_config(), workdir)
    report = Progress.report

    def interrupting(self, step, seconds):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return report(self, step, seconds)

    monkeypatch.setattr(Progress, "report", interrupting)
    with pytest.raises(Interrupted, match="saved classifier at step 3 of 5"):
        run(tiny_config(), workdir, allow_config_change=True)
    monkeypatch.undo()
    assert "classifier" not in ldm_jax.load(workdir).variables
    wider = tiny_config()
    wider.classifier.width = 64
    with pytest.raises(UserError, match=r"another config\.classifier\.width: set it as it was"):
        run(wider, workdir, allow_config_change=True)
    run(tiny_config(), workdir)
    assert "classifier: resuming at step 3" in capsys.readouterr().out
    assert weights(workdir) == weights(straight)
    with pytest.raises(
        UserError, match=r"set config\.classifier as it was, or remove .*classifier"
    ):
        run(wider, workdir, allow_config_change=True)
    assert config_lib.to_json(tiny_config()) == (workdir / "config.json").read_text()


def test_it_does_not_outlive_its_classes(straight):
    before = (straight / "config.json").read_text()
    other = tiny_config()
    other.data.where = "category=Animals & Nature"
    with pytest.raises(
        UserError, match=r"the classifier in .* with classes of other names: remove"
    ):
        run(other, straight, allow_config_change=True)
    assert (straight / "config.json").read_text() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.fields": ()}, r"classifier\.train\.steps is above 0: add 'label'"),
        ({"train.steps": 0}, r"classifier\.train\.steps is 5, but config\.train\.steps is 0"),
        ({"classifier.train.steps": 0}, "fields has 'label', but no conditioner reads it"),
        ({"classifier.train.picture_every": 5}, r"picture_every is 5, but a classifier has noth"),
        ({"classifier.train.optimizer": "sgd"}, r"classifier\.train\.optimizer is 'sgd'"),
        ({"classifier.mult": (1,) * 6}, "6 levels, which divide the latents by 32, .* side of 16"),
        ({"classifier.width": 48}, r"classifier\.width is 48, but must be a multiple of 32"),
        ({"classifier.depth": 0}, r"classifier\.depth is 0, but must be at least 1"),
    ],
)
def test_bad_configs_are_refused(change, message):
    config = tiny_config()
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message):
        config_lib.check(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classifier.train.batch_size": 12}, r"classifier\.train\.batch_size is 12, which 8 dev"),
        ({"classifier.head_dim": 24}, "head_dim=24 does not divide the 32 channels"),
        ({"label.num_classes": 3}, r"num_classes is 3: set it to 16"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(change, message, tmp_path):
    config = tiny_config()
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_label_of_the_classifier_alone_is_read_from_the_data(tmp_path):
    source = open_data(tiny_config(), tmp_path)
    assert source.num_labels == 16 and "label" in source.columns
