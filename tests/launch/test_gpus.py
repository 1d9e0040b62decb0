import signal
import subprocess

import pytest

from launch.stubs import LAUNCH, TRAINER, Stubs, printed, wait_for

RUN = ("--config=configs/quickstart.py:smoke", "--workdir=runs/a b")
COMMAND = ["python", "-m", "ldm_jax.train", *RUN]


def test_dry_run_prints_what_a_run_does(stubs: Stubs) -> None:
    flags = ("--", "--config.train.lr=1e-3", "--config.data.where=x == 'y'")
    for options in ((), ("--gpus=0,2",), ("--tmux=train", "--pause=0")):
        dry = stubs.run("gpus.sh", *RUN, *options, "--dry_run", *flags)
        assert dry.returncode == 0 and stubs.calls() == []
        commands = printed(dry.stdout)
        assert stubs.run("gpus.sh", *RUN, *options, *flags).returncode == 0
        if "--gpus=0,2" in options:
            assert commands[0][:2] == ["env", "CUDA_VISIBLE_DEVICES=0,2"]
            commands[0] = commands[0][2:]
        assert commands == stubs.calls()
        if "--tmux=train" in options:
            inside = printed(commands[0][-1])[0]
            assert inside == ["bash", str(LAUNCH / "gpus.sh"), *RUN, "--pause=0", *flags]
        else:
            assert commands == [[*COMMAND, *flags[1:]]]


@pytest.mark.parametrize("code", [75, 77])
def test_restarts_after_interruptions(stubs: Stubs, code: int) -> None:
    stubs.answer("python", f"{code}", f"{code}", "0")
    result = stubs.run("gpus.sh", *RUN, "--pause=0")
    assert result.returncode == 0
    assert stubs.calls() == [COMMAND] * 3


@pytest.mark.parametrize("code", [0, 1, 76, 137])
def test_other_codes_are_final(stubs: Stubs, code: int) -> None:
    stubs.answer("python", f"{code}")
    assert stubs.run("gpus.sh", *RUN, "--pause=0").returncode == code
    assert stubs.calls() == [COMMAND]


def test_restarts_are_bounded(stubs: Stubs) -> None:
    stubs.answer("python", "77")
    result = stubs.run("gpus.sh", *RUN, "--pause=0", "--max_restarts=2")
    assert result.returncode == 77 and "after 2 restarts" in result.stderr
    assert stubs.calls() == [COMMAND] * 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_the_trainer_and_the_loop(stubs: Stubs, number: signal.Signals) -> None:
    stubs.write("python", TRAINER.replace("touch", 'echo run >>"$STUBS/runs"; touch'))
    with subprocess.Popen(
        ["bash", LAUNCH / "gpus.sh", *RUN, "--pause=0"],
        cwd=LAUNCH.parent,
        env=stubs.environment(),
        # A shell cannot listen to what was ignored before it, as it is in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as launcher:
        wait_for(stubs.folder / "ready")
        launcher.send_signal(number)
        assert launcher.wait(timeout=20) == 75
    assert (stubs.folder / "runs").read_text() == "run\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "no --config given"),
        (RUN[:1], "no --workdir given"),
        (("--config=none.py", RUN[1]), "no config file none.py"),
        ((RUN[0], "--workdir=gs://b/x"), "mount the bucket"),
        ((*RUN, "--gpus=all"), "--gpus is 'all'"),
        ((*RUN, "--max_restarts=-1"), "must be a whole number"),
        ((*RUN, "--python=/none/python"), "/none/python is not on the PATH"),
        ((*RUN, "--config.train.lr=1"), "unexpected argument"),
    ],
)
def test_wrong_arguments(stubs: Stubs, args: tuple[str, ...], message: str) -> None:
    result = stubs.run("gpus.sh", *args)
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert stubs.calls() == []
