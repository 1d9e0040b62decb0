import subprocess

from launch.stubs import TRAINER, Stubs, printed, wait_for


def test_goes_through_its_states(stubs: Stubs) -> None:
    def state() -> str:
        return stubs.run("worker.sh", "state").stdout.strip()

    python = stubs.home / "ldm_jax_venv" / "bin" / "python"
    stubs.answer("session", "1")  # no session runs yet
    assert state() == "worker_state=absent"
    stubs.calls()
    flags = ["--config=configs/quickstart.py", "--workdir=/mnt/gcs/b/run", "--x=a 'b' $c"]
    stubs.answer("mountpoint", "1")
    started = stubs.run("worker.sh", "start", "--bucket=b", "--env=A=b c", "--", *flags)
    assert started.returncode == 0, started.stderr
    calls = {call[0]: call for call in stubs.calls()}
    assert calls["gcsfuse"][-2:] == ["b", "/mnt/gcs/b"]
    assert "--rename-dir-limit=200000" in calls["gcsfuse"]
    inside = printed(calls["tmux"][-1])[0]
    assert inside[2:] == ["run", "env", "A=b c", str(python), "-m", "ldm_jax.train", *flags]
    assert state() == "worker_state=lost"  # started, but no session: the machine was restarted
    stubs.answer("session", "0")
    assert state() == "worker_state=running"
    assert "training is running" in stubs.run("worker.sh", "start", "--", *flags).stderr
    python.parent.mkdir(parents=True)
    python.symlink_to(stubs.folder / "bin" / "python")
    stubs.answer("python", "75 saved")
    stubs.calls()
    assert stubs.run("worker.sh", *inside[2:]).returncode == 0  # as tmux runs it
    assert stubs.calls() == [["python", "-m", "ldm_jax.train", *flags]]
    assert state() == "worker_state=exit:75"
    assert "saved" in (stubs.home / "ldm_jax_run" / "train.log").read_text()
    assert stubs.run("worker.sh", "start", "--force", "--", *flags).returncode == 0
    assert state() == "worker_state=running"  # the old code is gone


def test_stop_reaches_the_trainer(stubs: Stubs) -> None:
    stubs.answer("session", "0")
    stubs.write("python", TRAINER)
    run = stubs.home / "ldm_jax_run"
    run.mkdir()
    (run / "started").touch()
    script = str(stubs.folder / "bin" / "python")
    with subprocess.Popen(
        ["bash", "launch/worker.sh", "run", script], env=stubs.environment()
    ) as worker:
        wait_for(stubs.folder / "ready")
        assert stubs.run("worker.sh", "stop").returncode == 0
        assert worker.wait(timeout=20) == 0
    assert stubs.run("worker.sh", "state").stdout == "worker_state=stopped\n"
    assert (run / "exit").read_text() == "75\n"


def test_setup(stubs: Stubs) -> None:
    result = stubs.run("worker.sh", "setup", "--python=3.12")
    assert result.returncode == 0, result.stderr
    calls = stubs.calls()
    assert calls[0][:4] == ["uv", "venv", "--python", "3.12"]
    assert calls[1][-2:] == ["-e", ".[tpu]"]
