"""`python -m ldm_jax.convert` as a user runs it."""

import hashlib
import json
import pathlib
import sys

import numpy as np
import pytest
import yaml
from absl.testing import flagsaver
from commands import command

import ldm_jax
from ldm_jax.convert import __main__ as convert_command
from ldm_jax.convert.export import export_compvis, export_safetensors

from .models import MODELS, make_model, make_tokenizer


def digest(*folders: pathlib.Path) -> list[dict[str, str]]:
    return [
        {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("weights.safetensors")
        }
        for folder in folders
    ]


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> pathlib.Path:
    """A class-conditional model in the original layout, as if downloaded."""
    path = tmp_path_factory.mktemp("published")
    export_compvis(make_model(MODELS["class_context"], scale=0.5), path)
    return path


def test_import_sample_and_export(published, tmp_path):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    source = (f"--checkpoint={published / 'model.ckpt'}",)
    done = command(
        "convert",
        "import",
        *source,
        f"--model_config={published / 'config.yaml'}",
        f"--workdir={first}",
    )
    assert "imported into" in done.stdout
    out, condition = tmp_path / "images", tmp_path / "condition.npz"
    np.savez(condition, label=np.array([3, 1]))
    options = ("--num_samples=3", "--steps=2", f"--condition={condition}", "--spacing=trailing")
    command("sample", f"--workdir={first}", f"--out={out}", *options)
    assert (out / "000002.png").is_file() and (out / "grid.png").is_file()
    record = json.loads((out / "samples.json").read_text())
    assert record["condition"] == {"label": [3, 1, 3]} and record["spacing"] == "trailing"
    command("convert", "export", f"--workdir={first}", "--format=diffusers", f"--out={second}")
    command("convert", "import", f"--checkpoint={second}", f"--workdir={third}")
    ours, theirs = digest(first, third)
    assert ours == theirs and len(ours) == 2


def test_captions_by_flag(tmp_path):
    model = make_model(MODELS["text_bert"])
    workdir, vocabulary = tmp_path / "run", make_tokenizer(tmp_path / "vocabulary", "bert")
    export_safetensors(model._replace(tokenizer=vocabulary), workdir)
    pipe = ldm_jax.load(workdir)
    one = pipe.condition({"text": ["w1 w2", "w3"]})
    two = pipe.condition({"tokens": pipe.tokenizer(["w1 w2", "w3"])})
    np.testing.assert_array_equal(one.context, two.context)
    assert not np.array_equal(one.context[0], one.context[1])
    out = tmp_path / "images"
    options = ("--num_samples=2", "--steps=2", "--prompt=w1 w2", "--prompt=w3")
    command("sample", f"--workdir={workdir}", f"--out={out}", *options)
    assert '"w1 w2"' in (out / "samples.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say first what to do"),
        (["import"], "--checkpoint is missing"),
        (["import", "--checkpoint=none.ckpt"], "--workdir is missing"),
        (["import", "--checkpoint=none.ckpt", "--workdir=/tmp/none"], "no checkpoint at none.ckpt"),
        (["import", "--checkpoint=none.ckpt", "--workdir={full}"], "is not empty"),
        (["import", "--checkpoint={ckpt}", "--workdir=/tmp/none"], "--model_config is missing"),
        (["export", "--workdir=/tmp/none", "--out=/tmp/no"], "no format given"),
        (["export", "--workdir=/none", "--format=compvis", "--out=/tmp/no"], "is no workdir"),
        (["export", "--workdir=/none", "--format=onnx", "--out=/tmp/no"], "onnx"),
        (["export", "--workdir=/none", "--checkpoint=a.ckpt"], "leave --checkpoint away"),
        (["import", "--format=compvis"], "leave --format away"),
        (
            ["import", "--checkpoint={full}", "--workdir=/tmp/none", "--null_class=last"],
            "own config",
        ),
    ],
)
def test_wrong_input_gets_one_line(published, arguments, message, monkeypatch, capsys):
    places = {"full": published, "ckpt": published / "model.ckpt"}
    monkeypatch.setattr(sys, "argv", ["convert", *(a.format(**places) for a in arguments)])
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as stopped:
        convert_command.main()
    shown = capsys.readouterr().err
    assert stopped.value.code == 1 and message in shown
    assert "Traceback" not in shown and len(shown.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--condition=/none.npz"], "is no .npz file"),
        (["--label=1", "--condition=/none.npz"], "not both"),
        (["--prompt=a cat"], "--prompt needs a model with the conditioner 'text'"),
        (["--spacing=wide"], "unknown spacing 'wide'"),
        (["--sampler=plms", "--eta=1"], "eta must be 0"),
    ],
)
def test_conditions_and_settings_that_do_not_fit(published, tmp_path_factory, options, message):
    workdir = tmp_path_factory.getbasetemp() / "settings"
    if not workdir.is_dir():
        export_safetensors(make_model(MODELS["class_context"]), workdir)
    done = command("sample", f"--workdir={workdir}", *options, check=False)
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_a_misfit_of_file_and_config_writes_nothing(published, tmp_path):
    block = yaml.safe_load((published / "config.yaml").read_text())
    block["model"]["params"]["unet_config"]["params"]["channel_mult"] = [1, 1]
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(block))
    workdir = tmp_path / "run"
    done = command(
        "convert",
        "import",
        f"--checkpoint={published / 'model.safetensors'}",
        f"--model_config={tmp_path / 'other.yaml'}",
        f"--workdir={workdir}",
        check=False,
    )
    assert done.returncode == 1 and "do not fit the model" in done.stderr
    assert not workdir.exists()
