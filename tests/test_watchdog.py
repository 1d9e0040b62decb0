"""Peers that are killed, stopped, slow or stuck: the rule, and real processes."""

import re
import signal
import subprocess
import sys
import time

import pytest
from hosts import CONFIG, finish, start, wait_for

from ldm_jax import watchdog
from ldm_jax.watchdog import DONE, GONE, OTHER, SLOW, STEP, Report, Watchdog, verdict

# Seconds, in the tests with real processes: their imports alone may take some on a busy machine.
ALLOWED = 10.0
NOW = 1000.0


def report(phase=STEP, idle=0.0, step=7, silent=0.0, code=0):
    return Report(phase, step, idle, NOW - silent, code, "host")


@pytest.mark.parametrize(
    ("own", "peer", "expected"),
    [
        # Nothing is wrong while anybody gets further, or may take longer.
        (report(), report(), ""),
        (report(idle=50), report(idle=9), ""),
        (report(idle=50), report("compile", idle=10 * SLOW - 1), ""),
        (report(idle=50), report("save", idle=50), ""),
        (report("evaluate", idle=50), report(idle=50), ""),
        (report(OTHER, idle=1e6), report(OTHER, idle=1e6), ""),
        (report(idle=9), report(idle=50), ""),
        (report("save", idle=50), report(DONE, silent=50), ""),
        (report(DONE, idle=50), report(DONE, idle=50), ""),
        # Silence counts in every phase.
        (report(), report(silent=11), r"process 1 \(host\) has not been heard of for 11 s, after"),
        (report(OTHER), report("save", silent=11), r"of for 11 s, in 'save' after step 7 then"),
        (report(DONE), report(silent=11), "has not been heard of"),
        (report(), report(GONE, code=1), r"process 1 \(host\) has ended with exit code 1"),
        # Nobody gets further: the one that the others wait for is named.
        (report(idle=11), report(idle=12, step=6), r"for 11 s: process 1 \(host\) is after step 6"),
        (report(idle=11), report("save", idle=10 * SLOW + 1), "in 'save' after step 7 for 201 s"),
        (report(idle=5), report(idle=5, silent=7), ""),
        (report(idle=11), report(idle=5, silent=7), "no process got any further for 11 s"),
    ],
)
def test_verdict(own, peer, expected):
    found = verdict({0: own, 1: peer}, 0, 10.0, NOW)
    assert re.search(expected, found) if expected else found == ""


def test_one_process_alone():
    assert verdict({0: report(idle=9)}, 0, 10.0, NOW) == ""
    assert verdict({0: report("compile", idle=50)}, 0, 10.0, NOW) == ""
    found = verdict({0: report(idle=11)}, 0, 10.0, NOW)
    assert found.startswith("the run got no further for 11 s: it is after step 7 for 11 s; ")


def test_reports_are_told_as_text():
    told = Report("save", 12, 3.25, NOW, 75, "a host")
    assert Report.read(told.text(5), NOW) == told


class Service:
    """Stands for the coordination service."""

    def __init__(self):
        self.rows = {}

    def key_value_set(self, key, value, allow_overwrite):
        self.rows[key] = value

    def key_value_dir_get(self, folder):
        return [row for row in self.rows.items() if row[0].startswith(folder)]


class Pair:
    """Two watchdogs that hear of each other, on a clock of their own; 10 s are allowed."""

    def __init__(self, monkeypatch):
        self.now, service = NOW, Service()
        monkeypatch.setattr(watchdog.time, "monotonic", lambda: self.now)
        self.dogs = [Watchdog(10.0, service, index, 2) for index in range(2)]

    def run(self, seconds, alive=(0, 1)):
        """Lets time pass for some of them; returns why they would give up, by number."""
        reasons = {}
        for _ in range(seconds):
            self.now += 1.0
            for index in alive:
                self.dogs[index]._exchange()
            for index in alive:
                if reason := self.dogs[index]._look():
                    reasons.setdefault(index, reason)
        return reasons


def test_who_waits_for_a_slow_one_does_not_give_up(monkeypatch):
    pair = Pair(monkeypatch)
    pair.dogs[0].enter(STEP, 3)
    pair.dogs[1].enter("save", 2)
    assert pair.run(100) == {}
    pair.dogs[1].enter(STEP, 2)
    assert pair.run(10) == {}
    found = pair.run(2)
    assert set(found) == {0, 1}
    for reason in found.values():
        assert re.match(r"no process got any further for 1\d s: process 1 \(.*\) is after", reason)


def test_who_is_silent_is_noticed(monkeypatch):
    pair = Pair(monkeypatch)
    assert pair.run(100) == {}
    assert pair.run(10, alive=[0]) == {}
    assert "has not been heard of for 11 s" in pair.run(2, alive=[0])[0]
    # That one was stopped, and finds when it goes on that it did not listen itself.
    assert pair.run(5, alive=[1]) == {}
    assert 1 in pair.run(10, alive=[1])


def test_a_job_may_be_suspended(monkeypatch):
    pair = Pair(monkeypatch)
    for dog in pair.dogs:
        dog.enter(STEP, 3)
    assert pair.run(5) == {}
    pair.now += 1000.0
    assert pair.run(10) == {}
    assert set(pair.run(5)) == {0, 1}


def test_ends_are_told(monkeypatch):
    pair = Pair(monkeypatch)
    pair.dogs[1].finish(0)
    assert pair.run(1, alive=[0]) == {} == pair.run(30, alive=[0])
    pair.dogs[1].depart(76)
    assert re.match(r"process 1 \(.*\) has ended with exit code 76", pair.run(1, alive=[0])[0])


def test_threads_end():
    dog = Watchdog(100.0)
    dog.start()
    (thread,) = dog._threads
    assert thread.is_alive()
    dog.stop()
    assert not thread.is_alive()


def test_phases_of_this_process(monkeypatch):
    with watchdog.phase("save"):  # nobody watches: nothing happens
        watchdog.beat(3)
    call = len
    assert watchdog.compiling(call) is call
    dog = Watchdog(10.0)
    monkeypatch.setattr(watchdog, "_watchdog", dog)
    seen = []
    for step in watchdog.steps(range(5, 7)):
        seen.append((step, dog._state[:2]))
        with watchdog.phase("save"):
            seen.append(dog._state[:2])
    assert seen == [(5, (STEP, 0)), ("save", 0), (6, (STEP, 5)), ("save", 5)]
    assert dog._state[:2] == (OTHER, 6)


def test_the_first_call_for_each_shape_is_announced(monkeypatch):
    import numpy as np

    dog = Watchdog(10.0)
    monkeypatch.setattr(watchdog, "_watchdog", dog)
    call = watchdog.compiling(lambda state, batch: dog._state[0])
    assert [call(None, {"x": np.zeros(n)}) for n in (1, 1, 2, 1, 2)] == [
        *("compile", OTHER, "compile", OTHER, OTHER)
    ]


ABORTING = """
import os
from ldm_jax import watchdog

class Service:
    told = 0

    def key_value_set(self, *arguments, **options):
        pass

    def key_value_dir_get(self, folder):
        self.told += 1
        {answer}

watchdog.start(2.0, Service(), 1, 2)
os.abort()
"""
PEER = 'return [(folder + "0", f"{} step 3 0.0 0 host")]'


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        (PEER.replace("{}", "{self.told}"), -signal.SIGABRT, None),
        ("raise RuntimeError", 77, r"process 0, which connects all others, has ended; this is "),
        (PEER.replace("{}", "0"), 77, r"process 0 \(host\) has not been heard of for 2 s, after "),
    ],
)
def test_an_abort_for_another_reason_stays_one(answer, code, said):
    words = [sys.executable, "-c", ABORTING.format(answer=answer)]
    found = subprocess.run(words, stderr=subprocess.PIPE, text=True)
    assert found.returncode == code
    if said:
        assert re.search(rf"error: {said}", found.stderr)
        assert "most recent call first" in found.stderr


# -- real processes -------------------------------------------------------------------------------


@pytest.fixture
def arguments(tmp_path):
    (tmp_path / "tiny.py").write_text(CONFIG)
    return (
        f"--config={tmp_path / 'tiny.py'}",
        f"--workdir={tmp_path / 'run'}",
        f"--hang_timeout={ALLOWED}",
    )


def lose(count, victim, number, workdir, arguments, code=77):
    """Sends a signal to a training process; returns (seconds, stderr) of the others' ends."""
    processes = start(count, "train", *arguments, "--config.train.steps=1000000")
    others = [process for index, process in enumerate(processes) if index != victim]
    try:
        wait_for(workdir / "metrics.jsonl", '"step": 5,', processes[0])
        begin = time.monotonic()
        processes[victim].send_signal(number)
        texts = finish(others, code)
        return time.monotonic() - begin, [stderr for _, stderr in texts]
    finally:
        processes[victim].kill()
        processes[victim].communicate()


@pytest.mark.parametrize(
    ("victim", "number"),
    [
        (0, signal.SIGKILL),  # jax would abort: with 134, which means a bug
        pytest.param(1, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(0, signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_a_lost_peer_ends_the_others(victim, number, tmp_path, arguments):
    seconds, (stderr,) = lose(2, victim, number, tmp_path / "run", arguments)
    print(f"{number.name} to process {victim}: {seconds:.1f} s")  # for docs/reliability.md
    # A stopped one is silent; a killed one may be noticed at once, by the collective or by jax.
    assert seconds < 3 * ALLOWED
    assert re.search(rf"error: .*this is process {1 - victim} \(.*\), .*after step \d+", stderr)
    assert "most recent call first" in stderr  # stacks
    assert "training/loop.py" in stderr


SLOW_ONE = """
import time
from ldm_jax import pictures, run
from ldm_jax.training import checkpoint, loop

def late(call, only_once=[]):
    def slow(*arguments, **options):
        if "--process_id=1" in sys.argv and call.__name__ not in only_once:
            only_once.append(call.__name__)
            time.sleep({seconds})
        return call(*arguments, **options)
    slow.__name__ = call.__name__
    return slow

checkpoint.Checkpoints.save = late(checkpoint.Checkpoints.save)
pictures.samples = late(pictures.samples)
functions = run.diffusion_functions
run.diffusion_functions = lambda config: tuple(map(late, functions(config)))
"""


@pytest.mark.slow
def test_compiling_saving_and_pictures_may_be_slow(tmp_path, arguments):
    """Tracing, a save, and pictures along the run, each longer than a step is allowed to take."""
    settings = "--config.train.picture_every=10", "--config.train.checkpoint_every=5"
    before = SLOW_ONE.format(seconds=1.5 * ALLOWED)
    texts = finish(start(2, "train", *arguments, *settings, before=before))
    assert "error" not in "".join(stderr for _, stderr in texts)
    assert (tmp_path / "run" / "samples" / "final.png").exists()


STUCK = """
import time
from ldm_jax.data import device

take = device.DeviceBatches.__next__

def stuck(self, count=[0]):
    count[0] += 1
    if "--process_id=1" in sys.argv and count[0] == 7:
        time.sleep(1e6)
    return take(self)

device.DeviceBatches.__next__ = stuck
"""


@pytest.mark.slow
def test_a_stuck_process_ends_all_and_shows_where(arguments):
    texts = finish(start(2, "train", *arguments, before=STUCK), code=77)
    errors = [stderr for _, stderr in texts]
    # Whichever gives up first tells the other.
    assert any("no process got any further" in text for text in errors)
    assert "in stuck" in errors[1] and "after step 6" in errors[1]


@pytest.mark.slow
def test_one_process_alone_ends_only_where_that_is_asked_for(arguments):
    before = STUCK.replace('"--process_id=1" in sys.argv and', "")
    ((_, stderr),) = finish(start(1, "train", *arguments, before=before), code=77)
    assert "the run got no further" in stderr and "in stuck" in stderr


@pytest.mark.slow
def test_a_job_that_was_suspended_goes_on(tmp_path, arguments):
    processes = start(2, "train", *arguments, "--config.train.steps=1000000")
    wait_for(tmp_path / "run" / "metrics.jsonl", '"step": 5,', processes[0])
    for number, pause in ((signal.SIGSTOP, 1.5 * ALLOWED), (signal.SIGCONT, 1.5 * ALLOWED)):
        for process in processes:
            process.send_signal(number)
        time.sleep(pause)
    processes[1].send_signal(signal.SIGTERM)
    finish(processes, code=75)
