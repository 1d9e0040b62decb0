"""A damaged checkpoint is noticed and never used: the run goes on from the good one before it."""

import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax import config as config_lib
from ldm_jax.errors import Diverged, UserError
from ldm_jax.training import checkpoint, checkpoint_files
from ldm_jax.training.checkpoint import Checkpoints, abstract_like, state_items
from ldm_jax.training.checkpoint_files import read_index, restore_newest, stored_steps, verify
from ldm_jax.training.interrupt import Interrupts
from ldm_jax.training.loop import fit
from ldm_jax.training.sharding import make_mesh, replicated
from ldm_jax.training.stage import Stage
from ldm_jax.training.state import TrainState


def make_state(step: int) -> TrainState:
    """Weights that no codec makes smaller, large enough for a file of their own."""
    kernel = np.random.default_rng(step).normal(size=(64, 96)).astype(np.float32)
    params = {"denoiser": {"kernel": jnp.asarray(kernel), "bias": jnp.full(3, float(step))}}
    return TrainState(jnp.int32(step), params, {}, optax.sgd(0.1, momentum=0.9).init(params))


def abstract() -> TrainState:
    return abstract_like(jax.eval_shape(lambda: make_state(0)), replicated(make_mesh()))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Steps 1 and 2."""
    directory = tmp_path_factory.mktemp("stored")
    checkpoints = Checkpoints(directory)
    for step in (1, 2):
        checkpoints.save(make_state(step))
    checkpoints.close()
    return directory


@pytest.fixture
def copy(stored, tmp_path):
    return pathlib.Path(shutil.copytree(stored, tmp_path / "checkpoints"))


def flip(path: pathlib.Path, place: float = 0.5, bit: int = 3) -> None:
    """Flips a bit of the byte that lies at that share of a file."""
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1 << bit
    path.write_bytes(data)


def truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def largest(folder: pathlib.Path) -> pathlib.Path:
    """The file with an item's largest array."""
    return max(folder.rglob("d/*"), key=lambda path: path.stat().st_size)


def empty(folder: pathlib.Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


MATRIX = {
    "bit of the weights": lambda step: flip(largest(step / "params.denoiser"), 0.7),
    "bit of the optimiser": lambda step: flip(largest(step / "opt_state"), 0.2, bit=0),
    "bit of a digest": lambda step: flip(step / "digests" / "metadata", 0.6, bit=0),
    "bit of the tree": lambda step: flip(step / "params.denoiser" / "_METADATA", 0.02),
    "bit of the manifest": lambda step: flip(step / "params.denoiser" / "manifest.ocdbt"),
    "array cut off": lambda step: truncate(largest(step / "params.denoiser")),
    "array empty": lambda step: largest(step / "opt_state").write_bytes(b""),
    "array missing": lambda step: largest(step / "params.denoiser").unlink(),
    "manifest cut off": lambda step: truncate(step / "opt_state" / "manifest.ocdbt"),
    "item missing": lambda step: shutil.rmtree(step / "opt_state"),
    "tree empty": lambda step: (step / "opt_state" / "_METADATA").write_bytes(b""),
    "tree missing": lambda step: (step / "params.denoiser" / "_METADATA").unlink(),
    "digests cut off": lambda step: truncate(step / "digests" / "metadata"),
    "digests missing": lambda step: shutil.rmtree(step / "digests"),
    "metadata empty": lambda step: (step / "_CHECKPOINT_METADATA").write_bytes(b""),
    "metadata missing": lambda step: (step / "_CHECKPOINT_METADATA").unlink(),
    "no commit": lambda step: (step / "commit_success.txt").unlink(),
    "empty folder": empty,
    "another step": lambda step: (shutil.rmtree(step), shutil.copytree(step.with_name("1"), step)),
}


@pytest.mark.parametrize("kind", MATRIX)
def test_every_damage_is_noticed_and_named(kind, copy, capsys):
    MATRIX[kind](copy / "2")
    step, items, damaged = restore_newest(copy, state_items(abstract()))
    assert (step, damaged) == (1, [2])
    assert_equal(items, state_items(make_state(1)))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"checkpoint {copy / '2'} is damaged: ")
    assert line.endswith("; going back to step 1")
    assert verify(copy, 2)[1] and not verify(copy, 1)[1]
    assert stored_steps(copy) == [1, 2]  # who only reads changes nothing


def test_a_bit_of_any_file_never_gives_other_weights(copy):
    """Some bytes of the files are never read, such as the list that another one replaced."""
    rng, wrong = np.random.default_rng(0), {1: make_state(1), 2: make_state(2)}
    files = sorted(path for path in (copy / "2").rglob("*") if path.is_file())
    assert len(files) > 20
    noticed = 0
    for path in files:
        data = path.read_bytes()
        flip(path, rng.random(), int(rng.integers(8)))
        step, items, _ = restore_newest(copy, state_items(abstract()))
        assert_equal(items, state_items(wrong[step]))
        noticed += step == 1
        path.write_bytes(data)
    assert noticed >= 8


def test_the_run_saves_the_damaged_step_again(copy, capsys):
    flip(largest(copy / "2" / "params.denoiser"))
    checkpoints = Checkpoints(copy)
    assert checkpoints.latest_step() == 2
    state = checkpoints.restore(abstract())
    assert int(state.step) == checkpoints.latest_step() == 1
    lines = capsys.readouterr().out.splitlines()
    assert "params.denoiser" in lines[0]
    assert lines[1].startswith(f"moved the damaged checkpoint to {copy / '2.damaged'}")
    checkpoints.save(make_state(2))
    checkpoints.wait()
    assert_equal(checkpoints.restore(abstract()).params, make_state(2).params)
    checkpoints.close()
    assert sorted(path.name for path in copy.iterdir()) == ["1", "2", "2.damaged"]


def test_a_step_that_is_named_is_never_replaced_and_no_run_starts_over(copy):
    for step in (1, 2):
        (copy / f"{step}" / "commit_success.txt").unlink()
    checkpoints = Checkpoints(copy)
    with pytest.raises(UserError, match=r"checkpoints/2 is damaged: it was never committed"):
        checkpoints.restore(abstract(), step=2)
    with pytest.raises(UserError, match=r"no good checkpoint is left in .*all 2 are damaged"):
        checkpoints.restore(abstract())
    checkpoints.close()
    assert stored_steps(copy) == [1, 2]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda item: item | {"kernel": item["kernel"].update(shape=(2, 2))}, r"\[64, 96\] there"),
        (lambda item: item | {"kernel": item["kernel"].update(dtype=jnp.bfloat16)}, "bfloat16"),
        (lambda item: item | {"more": item["bias"]}, "it has no params.denoiser/more"),
        (lambda item: {"bias": item["bias"]}, "it also has params.denoiser/kernel"),
    ],
)
def test_another_config_is_no_damage(copy, change, reason):
    flip(largest(copy / "2" / "params.denoiser"))  # which nobody gets to see
    items = {"params.denoiser": change(abstract().params["denoiser"])}
    with pytest.raises(UserError, match=f"does not fit this config: .*{reason}"):
        restore_newest(copy, items)


def test_what_is_not_finite_is_never_saved(copy):
    checkpoints = Checkpoints(copy)
    state = make_state(3)
    state.params["denoiser"]["bias"] = jnp.array([1.0, jnp.nan, jnp.inf])
    with pytest.raises(Diverged, match=r"step 3 .* in params\.denoiser/bias \(2\): nothing"):
        checkpoints.save(state)
    assert int(checkpoints.restore(abstract()).step) == 2
    checkpoints.close()


def test_nothing_is_deleted_before_a_newer_step_is_complete(tmp_path, monkeypatch):
    checkpoints, seen = Checkpoints(tmp_path, keep=1), []
    checkpoints.save(make_state(1))
    checkpoints.wait()
    deleter = type(checkpoints._manager._checkpoint_deleter)
    delete = deleter.delete

    def spy(self, step):
        seen.append((step, [s for s in stored_steps(tmp_path) if read_index(tmp_path, s)]))
        delete(self, step)

    monkeypatch.setattr(deleter, "delete", spy)
    checkpoints.save(make_state(2))
    checkpoints.close()
    assert seen == [(1, [1, 2])] and stored_steps(tmp_path) == [2]


def test_what_a_killed_run_left_is_removed(copy):
    (copy / "3.orbax-checkpoint-tmp").mkdir()
    restore_newest(copy, {})  # it may be being written
    assert checkpoint_files.leftovers(copy)
    Checkpoints(copy).close()
    assert not checkpoint_files.leftovers(copy)


def test_too_little_space_is_said_before_anything_is_written(copy, monkeypatch, capsys):
    Usage = namedtuple("Usage", "free")
    need = checkpoint.stored_bytes(make_state(3))
    checkpoints = Checkpoints(copy, keep=3)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(need - 1))
    message = (
        rf"to {copy}: too little space left; {need:,} bytes are needed, {need - 1:,} bytes are"
    )
    for call in (checkpoints.check_room, checkpoints.save):
        with pytest.raises(UserError, match=message):
            call(make_state(3))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(need))
    capsys.readouterr()
    checkpoints.check_room(make_state(3))  # 2 of 3 + 1 are there
    assert f"will need {2 * need:,} bytes more" in capsys.readouterr().out
    checkpoints.save(make_state(3))
    checkpoints.close()
    assert stored_steps(copy) == [1, 2, 3]


SMALL_DISK = """
import json, shutil, sys
from collections import namedtuple
from ldm_jax.errors import UserError
from ldm_jax.training import checkpoint
from tests.training.test_checkpoint_damage import *

directory, errors, step = pathlib.Path(sys.argv[1]), [], 0
usage = shutil.disk_usage
for truth in (True, False):  # the second time, the disk fills up in the middle of a step
    if not truth:
        shutil.disk_usage = lambda path: namedtuple("Usage", "free")(2**40)
    checkpoints = Checkpoints(directory)
    try:
        while True:
            checkpoints.save(make_state(step + 1))
            checkpoints.wait()
            step += 1
    except UserError as error:
        errors.append(str(error))
    checkpoints.close()
    shutil.disk_usage = usage
    checkpoints = Checkpoints(directory)
    state = checkpoints.restore(abstract())
    assert_equal(state.params, make_state(step).params)
    assert int(state.step) == step
    checkpoints.close()
print(json.dumps({"steps": step, "errors": errors}))
"""


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=700k none {disk}"
    alone = ["unshare", "-rm", "sh", "-c"]
    try:
        subprocess.run([*alone, mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no small file system can be mounted here")
    (tmp_path / "fill.py").write_text(SMALL_DISK)
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [*alone, f"{mount} && {sys.executable} {tmp_path / 'fill.py'} {disk}/checkpoints"],
        env=os.environ | {"PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    asked, real = found["errors"]
    assert found["steps"] >= 2
    need = f"{checkpoint.stored_bytes(make_state(1)):,} bytes are needed, "
    assert (
        f"cannot write a checkpoint to {disk}/checkpoints: too little space left; {need}" in asked
    )
    assert f"cannot write a checkpoint to {disk}/checkpoints: no space left" in real
    assert need in real


def test_a_run_goes_on_from_the_good_step_and_ends_where_it_would_have(tmp_path, capsys):
    block = config_lib.get_config().train
    block.update(batch_size=8, steps=6, log_every=2, picture_every=0, checkpoint_every=2)

    def init(key):
        return TrainState(jnp.int32(0), {"denoiser": {"w": jnp.zeros(3)}}, {}, {})

    def step(state, frozen, batch, key):
        w = state.params["denoiser"]["w"] * 0.9 + batch["x"].mean()
        new = state.replace(step=state.step + 1, params={"denoiser": {"w": w}})
        return new, {"loss": jnp.mean(w)}

    def batches(start):
        for number in itertools.count(start):
            yield {"x": np.full((8, 1), number, np.float32)}

    def run(folder):
        stage = Stage("toy", folder, block, init, step, {}, picture=None)
        return fit(stage, batches, jax.random.key(0), make_mesh(), Interrupts())

    straight = run(tmp_path)
    for number in (4, 6):
        flip(largest(tmp_path / "checkpoints" / f"{number}" / "params.denoiser"))
    capsys.readouterr()
    again = run(tmp_path)
    assert_equal(again, straight)
    out = capsys.readouterr().out
    for number in (4, 6):
        assert f"checkpoint {tmp_path / 'checkpoints' / str(number)} is damaged: params" in out
    assert "going back to step 2" in out and "toy: resuming at step 2" in out
    assert stored_steps(tmp_path / "checkpoints") == [2, 4, 6]
    assert not any(verify(tmp_path / "checkpoints", number)[1] for number in (2, 4, 6))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
