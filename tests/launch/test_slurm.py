import subprocess

import pytest

from launch.stubs import LAUNCH, Stubs, printed

RUN = ("--config=configs/quickstart.py", "--workdir=/shared/run")
SUBMIT = (*RUN, "--nodes=2", "--gpus=4")
# Runs the tasks of a job one after the other.
SRUN = """#!/bin/bash
[[ $1 == --kill-on-bad-exit=0 ]] || exit 9
highest=0
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i "${@:2}"
    code=$?
    ((code > highest)) && highest=$code
done
exit $highest
"""


def test_dry_run_prints_what_a_run_does(stubs: Stubs) -> None:
    options = ("--time=24:00:00", "--sbatch_flag=--partition=gpu", "--name=a b", "--per=node")
    for given in (SUBMIT, (*SUBMIT, *options)):
        dry = stubs.run("slurm.sh", *given, "--dry_run", "--", "--x=1 2")
        assert dry.returncode == 0 and stubs.calls() == []
        assert stubs.run("slurm.sh", *given, "--", "--x=1 2").returncode == 0
        calls = stubs.calls()
        assert printed(dry.stdout) == calls
        assert calls[0][-4:] == ["--", *RUN, "--x=1 2"]
        assert {"--requeue", "--signal=TERM@120", "--gres=gpu:4", "--nodes=2"} <= set(calls[0])
        per_node = "--per=node" in given
        assert f"--ntasks-per-node={1 if per_node else 4}" in calls[0]
        assert f"--ntasks={2 if per_node else 8}" in calls[0]
        assert ("--local_devices=4" in calls[0]) == per_node
        assert ("--partition=gpu" in calls[0]) == per_node


def job(stubs: Stubs, *codes: str, options: tuple = (), **more: str) -> subprocess.CompletedProcess:
    """Runs the job itself, with one task for each exit code."""
    stubs.write("srun", SRUN)
    stubs.answer("python", *codes)
    environment = {"SLURM_JOB_ID": "12", "SLURM_NTASKS": str(len(codes))} | more
    args = [f"--root={LAUNCH.parent}", "--max_restarts=3", *options, "--", *RUN]
    copy = stubs.folder / "slurm_script"  # SLURM runs a copy from elsewhere
    copy.write_text((LAUNCH / "slurm.sbatch").read_text())
    result = subprocess.run(
        ["bash", str(copy), *args],
        cwd=stubs.home,
        env=stubs.environment(**environment),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert list(stubs.home.iterdir()) == []
    return result


@pytest.mark.parametrize("codes", [("75", "75"), ("0", "77"), ("77",)])
def test_interrupted_jobs_go_back_into_the_queue(stubs: Stubs, codes: tuple[str, ...]) -> None:
    assert job(stubs, *codes).returncode == max(int(code) for code in codes)
    command = ["python", "-m", "ldm_jax.train", *RUN]
    assert stubs.calls() == [command] * len(codes) + [["scontrol", "requeue", "12"]]


@pytest.mark.parametrize("codes", [("0", "0"), ("1", "77"), ("76", "75"), ("77", "137")])
def test_others_do_not(stubs: Stubs, codes: tuple[str, ...]) -> None:
    result = job(stubs, *codes)
    final = [int(code) for code in codes if code not in ("75", "77")]
    assert result.returncode == final[0]
    assert len(stubs.calls()) == len(codes)


def test_requeues_are_bounded(stubs: Stubs) -> None:
    assert job(stubs, "75", SLURM_RESTART_COUNT="2").returncode == 75
    assert len(stubs.calls()) == 2
    result = job(stubs, "75", SLURM_RESTART_COUNT="3")
    assert result.returncode == 75 and "after 3 restarts" in result.stderr
    assert len(stubs.calls()) == 1


def test_one_process_per_node_drives_all_gpus(stubs: Stubs) -> None:
    stubs.write("devices", '#!/bin/bash\necho "devices=${JAX_LOCAL_DEVICE_IDS-unset}"\n')
    python = f"--python={stubs.folder / 'bin' / 'devices'}"
    result = job(stubs, "0", options=(python, "--local_devices=4"))
    assert result.stdout == "devices=0,1,2,3\n", result.stderr
    assert job(stubs, "0", options=(python,)).stdout == "devices=unset\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "no --config given"),
        (RUN, "no --nodes given"),
        ((*RUN, "--nodes=2"), "no --gpus given"),
        ((*RUN, "--nodes=0", "--gpus=4"), "--nodes is '0'"),
        ((*SUBMIT, "--per=host"), "--per is 'host'"),
        ((RUN[0], "--workdir=gs://b/x", *SUBMIT[2:]), "a path that all nodes see"),
        ((*SUBMIT, "--partition=gpu"), "unexpected argument '--partition=gpu'"),
    ],
)
def test_wrong_arguments(stubs: Stubs, args: tuple[str, ...], message: str) -> None:
    result = stubs.run("slurm.sh", *args)
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert stubs.calls() == []
