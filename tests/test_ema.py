"""Averages that a run keeps, and the command that makes models of them."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import command
from convert.models import MODELS, make_model, make_tokenizer

import ldm_jax
from ldm_jax import config as config_lib
from ldm_jax import tensors
from ldm_jax import workdir as files
from ldm_jax.convert.export import export_safetensors
from ldm_jax.errors import UserError
from ldm_jax.run import run
from ldm_jax.training.checkpoint import Checkpoints, abstract_like
from ldm_jax.training.classifier_steps import classifier_functions
from ldm_jax.training.ema import Profile, averaged_parts
from ldm_jax.training.loop import _start_from
from ldm_jax.training.sharding import make_mesh, replicated, state_shardings
from ldm_jax.training.snapshots import write_snapshots
from ldm_jax.training.state import TrainState
from ldm_jax.training.steps import diffusion_functions

NAMES = {
    f"{name}_step_{step:07d}.safetensors"
    for name in ("std_0.05", "std_0.2", "decay_0.9999")
    for step in (4, 8, 10)
}


def make_config(steps):
    """Diffusion on 8x8 pixels by class, of one level."""
    c = config_lib.get_config()
    c.data.update(source="emoji", where="category=Smileys & Emotion", resolution=8, threads=2)
    c.data.fields = ("label",)
    c.first_stage.kind = "identity"
    c.denoiser.update(width=32, mult=(1,), depth=1, attn_downsample=())
    c.conditioners = ("label",)
    c.label.update(num_classes=30, width=128, slot="vector")
    c.train.update(batch_size=8, lr=1e-2, steps=steps, picture_every=0, checkpoint_every=6)
    c.ema_snapshots.update(stds=(0.05, 0.2), decays=(0.9999,), every=4)
    c.sample.update(steps=1, num_samples=8, batch_size=8)
    return c.lock()


def snapshots(workdir):
    return {path.name: path for path in (workdir / "ema").glob("*.safetensors")}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("averages") / "run"
    run(make_config(10), path)
    return path


def test_a_run_stores_its_averages(workdir):
    found = snapshots(workdir)
    assert found.keys() == NAMES
    for name, path in found.items():
        metadata = tensors.open_tensors(path)[1]
        kind, value = name.split("_step_")[0].split("_")
        assert metadata == {"step": str(int(name[-19:-12])), kind: value}


def test_averages_differ_and_those_of_the_usual_decay_are_the_usual_ones(workdir):
    arrays = {name: tensors.open_tensors(path)[0] for name, path in snapshots(workdir).items()}
    usual = files.load_weights(workdir, files.read_config(workdir))[1]["denoiser"]
    last = {name: found for name, found in arrays.items() if "0010" in name}
    (decay,) = (found for name, found in last.items() if name.startswith("decay"))
    for path, leaf in jax.tree_util.tree_leaves_with_path(usual):
        key = "/".join(["denoiser", *(part.key for part in path)])
        # In one program, the two may be fused otherwise.
        np.testing.assert_allclose(decay[key], leaf, rtol=1e-6, atol=1e-7)
    means = [np.asarray(found["denoiser/conv_out/kernel"]) for found in last.values()]
    for i, a in enumerate(means):
        for b in means[:i]:
            assert np.abs(a - b).max() > 1e-4


@pytest.mark.slow
def test_a_resumed_run_stores_the_same_and_nothing_twice(workdir, tmp_path):
    run(make_config(4), tmp_path / "run")
    written = {name: path.stat().st_mtime_ns for name, path in snapshots(tmp_path / "run").items()}
    assert len(written) == 3
    run(make_config(10), tmp_path / "run", allow_config_change=True)
    again, straight = snapshots(tmp_path / "run"), snapshots(workdir)
    assert again.keys() == straight.keys()
    for name, path in again.items():
        assert path.read_bytes() == straight[name].read_bytes(), name
        if name in written:
            assert path.stat().st_mtime_ns == written[name], name


@pytest.mark.slow
def test_a_run_that_goes_on_otherwise_forgets_what_it_was(tmp_path):
    """Averages of steps 4, 8 and 10, the newest checkpoint at 6: those of 8 and 10 must go."""
    root = tmp_path / "run"
    run(make_config(10), root)
    shutil.rmtree(root / "checkpoints" / "10")
    (root / "ema" / "std_0.1_step_0000010").mkdir()  # what the command has made stays
    old = {name: path.read_bytes() for name, path in snapshots(root).items()}
    other = make_config(10).copy_and_resolve_references()
    other.train.lr, other.ema_snapshots.every = 1e-3, 5
    run(other, root, allow_config_change=True)
    found = snapshots(root)
    assert {int(name[-19:-12]) for name in found} == {4, 10}
    for name, path in found.items():
        assert (path.read_bytes() == old[name]) == ("0000004" in name)
    assert (root / "ema" / "std_0.1_step_0000010").is_dir()


def test_averages_cannot_be_added_to_a_run_that_went_on_without(tmp_path):
    config = make_config(2).copy_and_resolve_references()
    config.ema_snapshots.update(stds=(), decays=())
    run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "ema").exists()
    named = r"another config\.ema_snapshots\.decays, config\.ema_snapshots\.stds: set these as"
    with pytest.raises(UserError, match=rf"the checkpoints in .* {named}.*init_from="):
        run(make_config(4), tmp_path / "run", allow_config_change=True)
    # Nothing has changed: the run goes on as it was.
    assert files.read_config(tmp_path / "run").ema_snapshots.stds == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stds": (0.1, 0.3)}, r"stds is \(0\.1, 0\.3\), but must .* between 0 and 0\.2887"),
        ({"stds": (0.0,)}, r"stds is \(0\.0,\)"),
        ({"stds": (0.1, 0.1)}, "must hold different numbers"),
        ({"decays": (1.0,)}, r"decays is \(1\.0,\), but must .* between 0 and 1"),
        ({"decays": ("a",)}, "must hold floats"),
        ({"every": 0}, "every is 0, but must be at least 1"),
    ],
)
def test_profiles_that_there_are_not_are_refused(change, message):
    config = config_lib.get_config()
    config.ema_snapshots.update(**change)
    with pytest.raises(UserError, match=message):
        config_lib.check(config)


def test_checkpoints_hold_the_averages(workdir):
    config = files.read_config(workdir)
    state = jax.eval_shape(diffusion_functions(config)[0], jax.random.key(0))
    checkpoints = Checkpoints(workdir / "checkpoints")
    state = checkpoints.restore(abstract_like(state, replicated(make_mesh())))
    checkpoints.close()
    assert set(state.averages) == {"std_0.05", "std_0.2", "decay_0.9999"}
    for name, tree in state.averages.items():
        path = workdir / "ema" / f"{name}_step_0000010.safetensors"
        jax.tree.map(np.testing.assert_array_equal, tree, tensors.load_tensors(path, tree))


def test_command_makes_a_model_to_sample_from(workdir, tmp_path):
    out = tmp_path / "out"
    done = command("ema", f"--workdir={workdir}", "--std=0.1", f"--out={out}")
    assert "width 0.1 at step 10 of 6 averages of width 0.05, 0.2" in done.stdout
    assert "% off" in done.stdout
    model = ldm_jax.load(out)
    assert model.step == 10 and model.label_names == ldm_jax.load(workdir).label_names
    done = command("sample", f"--workdir={out}", "--num_samples=2", f"--out={tmp_path / 'images'}")
    assert "2 images of step 10" in done.stdout
    record = json.loads((tmp_path / "images" / "samples.json").read_text())
    assert record["checkpoint_step"] == 10
    # Of the weights, those between two others: wider than 0.05, narrower than 0.2.
    trees = [
        tensors.open_tensors(workdir / "ema" / f"std_{std}_step_0000010.safetensors")[0]
        for std in (0.05, 0.2)
    ]
    name = "denoiser/conv_out/kernel"
    ends = [np.asarray(tree[name]) for tree in trees]
    mixed = np.asarray(model.variables["denoiser"]["conv_out"]["kernel"])
    distance = [np.linalg.norm(mixed - end) for end in ends]
    assert max(distance) < np.linalg.norm(ends[0] - ends[1])
    done = command("ema", f"--workdir={workdir}", "--std=0.1", f"--out={out}", check=False)
    assert done.returncode == 1 and "exists and is no empty folder" in done.stderr


@pytest.mark.parametrize(
    ("flag", "name"), [("--std=0.05", "std_0.05"), ("--decay=0.9999", "decay_0.9999")]
)
def test_what_was_stored_is_taken_as_it_is(flag, name, workdir):
    done = command("ema", f"--workdir={workdir}", flag, "--step=8")
    out = workdir / "ema" / f"{name}_step_0000008"
    assert f"wrote {out}; sample: python -m ldm_jax.sample --workdir={out}" in done.stdout
    step, weights = files.load_weights(out, files.read_config(out))
    assert step == 8
    stored = tensors.load_tensors(out.with_name(out.name + ".safetensors"), weights)
    jax.tree.map(np.testing.assert_array_equal, weights, stored)


def test_frozen_encoders_and_a_classifier_come_along(tmp_path):
    """They are the same at every step, so that no average holds them."""
    model = make_model(MODELS["text_clip"])
    config = model.config.copy_and_resolve_references()
    config.classifier.update(width=32, mult=(1,), depth=1, attn_downsample=())
    shapes = jax.eval_shape(classifier_functions(config)[0], jax.random.key(0)).params
    classifier = jax.tree.map(lambda leaf: np.full(leaf.shape, 3, np.float32), shapes)
    model = model._replace(config=config, weights=model.weights | classifier)
    model = model._replace(tokenizer=make_tokenizer(tmp_path / "words", "clip"))
    export_safetensors(model, tmp_path / "run")
    averaged = averaged_parts(model.weights, config_lib.frozen_parts(model.config))
    assert averaged["conditioner"] == {}
    averaged["denoiser"] = jax.tree.map(lambda leaf: 2 * np.asarray(leaf), averaged["denoiser"])
    profile = Profile("std", 0.1)
    write_snapshots(tmp_path / "run" / "ema", {profile.name: averaged}, (profile,), 7)
    command("ema", f"--workdir={tmp_path / 'run'}", "--std=0.1", f"--out={tmp_path / 'out'}")
    made = ldm_jax.load(tmp_path / "out")
    assert made.step == 7 and made.tokenizer is not None
    assert made.variables.keys() == {"first_stage", "denoiser", "conditioner", "classifier"}
    expected = model.weights | {"denoiser": averaged["denoiser"]}
    jax.tree.map(np.testing.assert_array_equal, dict(made.variables), expected)


def test_averages_start_from_given_weights():
    def state(value):
        params = {"denoiser": {"w": jnp.full(2, value)}, "conditioner": {"v": jnp.full(2, value)}}
        averages = {"decay_0.9": jax.tree.map(jnp.copy, params)}
        ema = {"denoiser": {"w": jnp.full(2, value)}}
        return TrainState(jnp.int32(0), params, ema, (), averages=averages)

    split = state_shardings(state(5.0), make_mesh())
    given = {"denoiser": {"w": np.ones(2, np.float32)}}
    started = _start_from(state(5.0), given, split)
    for tree in (started.params, started.ema_params, started.averages["decay_0.9"]):
        np.testing.assert_array_equal(tree["denoiser"]["w"], 1)
    np.testing.assert_array_equal(started.averages["decay_0.9"]["conditioner"]["v"], 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no workdir given"),
        (["--workdir=W"], "give one of --std=0.1 and --decay=0.999"),
        (["--workdir=W", "--std=0.1", "--decay=0.9"], "give one of"),
        (["--workdir=/nowhere", "--std=0.1"], "/nowhere is no workdir"),
        (["--workdir=W", "--std=0.5"], "std is 0.5, but must lie between 0 and 0.2887"),
        (["--workdir=W", "--std=0.01"], "--std=0.01 at step 10 is out of reach of the 6 averages"),
        (["--workdir=W", "--std=0.1", "--step=9"], "nothing was stored at --step=9: the nearest"),
        (["--workdir=W", "--decay=0.9"], "the decay 0.9 was not stored at step 10, but 0.9999"),
        (["--workdir=NONE", "--std=0.1"], "no averages of a std in"),
        (["--workdir=W", "--std=0.1", "--out=/dev/null/x"], "cannot write to /dev/null/x"),
    ],
)
def test_bad_commands_get_one_clear_line(arguments, message, workdir, tmp_path):
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    places = {"--workdir=W": f"--workdir={workdir}", "--workdir=NONE": f"--workdir={tmp_path}"}
    done = command("ema", *(places.get(text, text) for text in arguments), check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {message}"), line
    if "out of reach" in line:
        assert "they give 0.0" in line
