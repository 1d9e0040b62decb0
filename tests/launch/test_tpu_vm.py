import re

import pytest

from launch.stubs import Stubs, printed

NODE = ("--name=run", "--zone=us-west4-a")
MAKE = (*NODE, "--accelerator=v5litepod-16", "--spot")
WORK = ("--config=configs/quickstart.py:smoke", "--workdir=gs://bucket/runs/a")
WATCH = ("watch", *MAKE, *WORK, "--interval=0")
ABSENT = "1 ERROR: (gcloud) NOT_FOUND: no such node"


def four(*states: str) -> str:
    """What four workers answer."""
    return "0 SSH: connecting|" + "|".join(f"worker_state={state}" for state in states)


ALL_DONE = four(*["exit:0"] * 4)


def actions(calls: list[list[str]]) -> list[str]:
    """The calls that change something, each by its name."""
    names = []
    for call in calls:
        text = " ".join(call)
        found = re.search(r"worker\.sh (setup|start)| (create|delete|scp) ", text)
        if found:
            names.append(found[1] or found[2])
    return names


def test_dry_run_prints_what_a_run_does(stubs: Stubs) -> None:
    flags = ["--config.data.where=it's 'here'", "--config.train.lr=1e-4"]
    for options in (
        (),
        ("--queued", "--delete_at_end", "--project=p", "--env=XLA_FLAGS=--a --b"),
        ("--repository=https://host/a b.git", "--ref=main", "--create_flag=--network=n"),
    ):
        given = (*WATCH, *options, "--", *flags)
        dry = stubs.run("tpu_vm.sh", WATCH[0], "--dry_run", *given[1:])
        assert dry.returncode == 0, dry.stderr
        assert stubs.calls() == []
        stubs.answer("node", *([] if "--queued" in options else [ABSENT]), "0 READY")
        stubs.answer("queue", ABSENT, "0 ACTIVE")
        stubs.answer("workers", four("absent"), ALL_DONE)
        real = stubs.run("tpu_vm.sh", *given)
        assert real.returncode == 0, real.stderr
        calls = stubs.calls()
        made = [command for command in printed(dry.stdout) if command[0] != "mkdir"]
        assert made == calls
        start = next(call for call in calls if "worker.sh start" in call[-1])
        remote = printed(start[-1].removeprefix("--command="))[0]
        assert remote[-3:] == ["--workdir=/mnt/gcs/bucket/runs/a", *flags]
        assert "--bucket=bucket" in remote and "--worker=all" in start


@pytest.mark.parametrize("code", [75, 77])
def test_restarts_after_interruptions(stubs: Stubs, code: int) -> None:
    stubs.answer("node", "0 READY")
    stubs.answer("workers", four(f"exit:{code}", "exit:75", "exit:77", "lost"), ALL_DONE)
    result = stubs.run("tpu_vm.sh", *WATCH)
    assert result.returncode == 0, result.stderr
    assert actions(stubs.calls()) == ["start"]  # the workers are set up already


@pytest.mark.parametrize("code", [0, 1, 76, 134, 137])
def test_other_codes_end_the_watch(stubs: Stubs, code: int) -> None:
    stubs.answer("node", "0 READY")
    stubs.answer("workers", four(*[f"exit:{code}"] * 4))
    result = stubs.run("tpu_vm.sh", *WATCH)
    assert result.returncode == code
    assert actions(stubs.calls()) == []
    assert "run is still there and paid for" in result.stderr


def test_failure_of_one_worker_is_not_hidden_by_its_peers(stubs: Stubs) -> None:
    stubs.answer("node", "0 READY")
    stubs.answer("workers", four("exit:77", "running", "exit:1", "exit:77"))
    assert stubs.run("tpu_vm.sh", *WATCH).returncode == 1
    assert actions(stubs.calls()) == []


@pytest.mark.parametrize("queued", [False, True])
def test_preempted_nodes_are_made_anew(stubs: Stubs, queued: bool) -> None:
    options = ("--queued",) if queued else ()
    if queued:
        waiting = ["0 WAITING_FOR_RESOURCES", "0 PROVISIONING"]
        stubs.answer(
            "queue", "0 ACTIVE", "0 SUSPENDING", "0 SUSPENDED", ABSENT, *waiting, "0 ACTIVE"
        )
        stubs.answer("node", "0 READY")
    else:
        stubs.answer("node", "0 READY", "0 PREEMPTED", ABSENT, "0 CREATING", "0 READY")
    stubs.answer("workers", four(*["running"] * 4), four(*["absent"] * 4), ALL_DONE)
    result = stubs.run("tpu_vm.sh", *WATCH, *options)
    assert result.returncode == 0, result.stderr
    calls = stubs.calls()
    assert actions(calls) == ["delete", "create", "scp", "setup", "start"]
    create = next(call for call in calls if "create" in call)
    assert {"--spot", "--accelerator-type=v5litepod-16", "--zone=us-west4-a"} <= set(create)
    assert ("--runtime-version" if queued else "--version") + "=v2-alpha-tpuv5-lite" in create
    delete = next(call for call in calls if "delete" in call)
    assert ("--force" in delete) == queued
    assert ("queued-resources" in delete) == queued


def test_restarts_are_bounded(stubs: Stubs) -> None:
    stubs.answer("node", "0 READY")
    stubs.answer("workers", four(*["exit:75"] * 4))
    result = stubs.run("tpu_vm.sh", *WATCH, "--max_restarts=3", "--delete_at_end")
    assert result.returncode == 75
    assert actions(stubs.calls()) == ["start"] * 3 + ["delete"]
    assert "after 3 restarts" in result.stderr


def test_nodes_that_cannot_be_made_are_bounded(stubs: Stubs) -> None:
    stubs.answer("node", ABSENT)
    stubs.answer("create", "1 no capacity")
    result = stubs.run("tpu_vm.sh", *WATCH, "--max_restarts=2")
    assert result.returncode == 1
    assert actions(stubs.calls()) == ["create"] * 3


def test_failed_copy_is_not_followed_by_a_start(stubs: Stubs) -> None:
    stubs.answer("node", "0 READY")
    stubs.answer("workers", four(*["absent"] * 4), four("absent"), ALL_DONE)
    stubs.answer("scp", "1 broken pipe", "0")
    assert stubs.run("tpu_vm.sh", *WATCH).returncode == 0
    assert actions(stubs.calls()) == ["scp", "scp", "setup", "start"]


def test_stop_ends_the_watch(stubs: Stubs) -> None:
    stubs.answer("node", "0 READY")
    stubs.answer("workers", four("running", "running"), four("stopped", "running"))
    result = stubs.run("tpu_vm.sh", *WATCH)
    assert result.returncode == 75 and "stopped" in result.stderr
    assert actions(stubs.calls()) == []


def test_workers_that_hang_are_restarted(stubs: Stubs) -> None:
    stubs.answer("node", "0 READY")
    hanging = [four("exit:77", "running")] * 11
    stubs.answer("workers", *hanging, ALL_DONE)
    assert stubs.run("tpu_vm.sh", *WATCH).returncode == 0
    calls = stubs.calls()
    assert actions(calls) == ["start"]
    assert any("worker.sh start --force" in call[-1] for call in calls)
    stubs.answer("workers", *hanging[:10], ALL_DONE)  # they ended in time
    assert stubs.run("tpu_vm.sh", *WATCH).returncode == 0
    assert actions(stubs.calls()) == []


def test_gives_up_when_nothing_answers(stubs: Stubs) -> None:
    stubs.answer("node", "1 ERROR: no network")
    result = stubs.run("tpu_vm.sh", *WATCH)
    assert result.returncode == 1
    assert "(30 of 30 in a row)" in result.stderr and "no network" in result.stderr
    assert len(stubs.calls()) == 30


@pytest.mark.parametrize("state", ["STOPPED", "HIDDEN"])
def test_unexpected_states_are_named(stubs: Stubs, state: str) -> None:
    stubs.answer("node", f"0 {state}")
    result = stubs.run("tpu_vm.sh", *WATCH)
    assert result.returncode == 1 and f"run is {state}" in result.stderr


def test_single_commands(stubs: Stubs) -> None:
    expected = {
        "setup": ["tar", "scp", "worker.sh setup"],
        "start": ["worker.sh start --bucket=bucket"],
        "status": ["describe", "worker.sh state"],
        "logs": ["tail -n 100 -F"],
        "stop": ["worker.sh stop"],
        "delete": ["delete run --zone=us-west4-a --quiet"],
    }
    stubs.answer("node", "0 READY")
    for action, parts in expected.items():
        flags = WORK if action == "start" else ()
        dry = stubs.run("tpu_vm.sh", action, *NODE, *flags, "--dry_run")
        assert dry.returncode == 0 and stubs.calls() == []
        assert stubs.run("tpu_vm.sh", action, *NODE, *flags).returncode == 0
        calls = stubs.calls()
        assert calls == [c for c in printed(dry.stdout) if c[0] != "mkdir"]
        assert len(calls) == len(parts)
        for call, part in zip(calls, parts, strict=True):
            assert part in " ".join(call)
    stubs.answer("node", ABSENT, "0 READY")
    assert stubs.run("tpu_vm.sh", "create", *MAKE).returncode == 0
    assert actions(stubs.calls()) == ["create"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "no command given"),
        (("train",), "no command 'train'"),
        (("watch",), "no --name given"),
        (("watch", "--name=run"), "no --zone given"),
        (("watch", *NODE), "no --accelerator given"),
        (("watch", *NODE, "--accelerator=v9-8"), "give --runtime_version"),
        (("watch", *MAKE), "no --config given"),
        (("watch", *MAKE, WORK[0]), "no --workdir given"),
        (("watch", *MAKE, "--config=configs/none.py", WORK[1]), "no config file configs/none.py"),
        (("watch", *MAKE, WORK[0], "--workdir=gs://bucket"), "gs://BUCKET/FOLDER"),
        (("watch", *MAKE, *WORK, "--max_restarts=many"), "must be a whole number"),
        (("watch", *MAKE, *WORK, "--interval=1m"), "must be a number of seconds"),
        (("watch", *MAKE, *WORK, "--env=A"), "write --env=KEY=VALUE"),
        (("watch", *MAKE, *WORK, "--config.lr=1"), "unexpected argument '--config.lr=1'"),
        (("delete", "--name=Run", NODE[1]), "--name is 'Run'"),
    ],
)
def test_wrong_arguments(stubs: Stubs, args: tuple[str, ...], message: str) -> None:
    result = stubs.run("tpu_vm.sh", *args)
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert stubs.calls() == []
