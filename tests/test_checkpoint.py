"""The command that lists, verifies and prunes what a run has stored."""

import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import lock
from ldm_jax.tensors import save_tensors
from ldm_jax.training.checkpoint import Checkpoints
from ldm_jax.training.checkpoint_files import stored_steps
from ldm_jax.training.state import TrainState


@pytest.fixture
def command(import_command, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return import_command("ldm_jax.checkpoint")


@pytest.fixture
def workdir(tmp_path):
    """Steps 1, 2 and 3, of which the last is damaged, and the weights of a first stage."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2, 3):
        params = {"denoiser": {"w": jnp.full(4, float(step))}}
        checkpoints.save(TrainState(jnp.int32(step), params, {}, {}))
    checkpoints.close()
    (tmp_path / "checkpoints" / "3" / "params.denoiser" / "manifest.ocdbt").unlink()
    save_tensors(tmp_path / "first_stage" / "weights.safetensors", {"w": np.ones(9, np.float32)})
    return tmp_path


def test_list_and_verify(command, workdir, capsys, monkeypatch):
    assert command.list_stored(workdir) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"diffusion: {workdir / 'checkpoints'}"
    assert [line.split()[0] for line in lines[2:5]] == ["1", "2", "3"]
    assert lines[2].endswith("yes, 1 arrays") and lines[-1].endswith("weights.safetensors")
    assert command.verify(workdir) == 1
    out = capsys.readouterr().out
    assert "diffusion, step 2: good (0.000 GB in " in out and " GB/s)" in out
    assert "diffusion, step 3: DAMAGED" in out and "params.denoiser cannot be read" in out
    assert "first_stage/weights.safetensors: good" in out and out.endswith("1 damaged\n")
    monkeypatch.chdir(workdir)  # a relative path, as most people write it
    assert command.verify(pathlib.Path()) == 1
    assert "diffusion, step 2: good (0.000 GB in " in capsys.readouterr().out
    path = workdir / "first_stage" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    assert command.verify(workdir / "first_stage") == 1
    assert "'w' does not have its checksum" in capsys.readouterr().out


def test_prune_keeps_the_newest_good_steps(command, workdir, capsys):
    directory = workdir / "checkpoints"
    (directory / "4.damaged").mkdir()
    (directory / "5.orbax-checkpoint-tmp").mkdir()
    everything = sorted(directory.iterdir())
    command.prune(workdir, 1, dry_run=True)
    out = capsys.readouterr().out
    assert sorted(directory.iterdir()) == everything
    assert f"would delete {directory / '3'} (damaged: params.denoiser cannot be read" in out
    assert f"would delete {directory / '1'} (older)" in out
    command.prune(workdir, 1)
    assert [path.name for path in directory.iterdir()] == ["2"]
    (directory / "2" / "commit_success.txt").unlink()
    command.prune(workdir, 1)
    assert stored_steps(directory) == [2]  # damaged, but all that there is
    assert "no step is good; nothing is deleted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["verify"], "no workdir given"),
        (["sweep", "--workdir=x"], "say what to do"),
        (["list", "--workdir={}/nowhere"], "is no folder"),
        (["list", "--workdir={}/first_stage/.."], ""),
        (["verify", "--workdir={}/checkpoints"], "no checkpoints and no weights"),
        (["prune", "--workdir={}"], "say how many steps"),
        (["prune", "--workdir={}", "--keep=0"], "say how many steps"),
        (["prune", "--workdir={}", "--keep=9"], ""),
    ],
)
def test_the_command_line(command, workdir, argv, said, monkeypatch, capsys):
    argv = [word.format(workdir) for word in argv]
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", *argv])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == bool(said)
    assert said in capsys.readouterr().err
    assert stored_steps(workdir / "checkpoints")[:2] == [1, 2]


def test_prune_keeps_off_a_run(command, workdir, monkeypatch, capsys):
    arguments = ["checkpoint.py", "prune", f"--workdir={workdir}", "--keep=1"]
    monkeypatch.setattr(sys, "argv", arguments)
    with lock.hold(workdir), pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 1 and "is in use" in capsys.readouterr().err
    assert stored_steps(workdir / "checkpoints") == [1, 2, 3]
