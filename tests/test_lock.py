import concurrent.futures
import json
import os
import re
import subprocess
import sys
import threading
import time

import pytest

from ldm_jax import lock
from ldm_jax.errors import UserError
from ldm_jax.lock import NAME, Lock, hold


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "STALE", 0.6)


def left_behind(folder, seconds=0.0, **changes):
    """A file that another process has left, last touched so many seconds ago."""
    path = folder / NAME
    record = {"host": "moon", "process": 4321, "token": "theirs", "started": "1"}
    path.write_text(json.dumps(record | {"machine": "another"} | changes))
    os.utime(path, (time.time() - seconds,) * 2)
    return path


def test_a_second_writer_is_refused_and_the_file_goes_at_the_end(tmp_path):
    folder = tmp_path / "new" / "run"
    with hold(folder):
        with pytest.raises(UserError) as caught:
            with hold(folder):
                pytest.fail("two writers")
        expected = rf"run is in use: process {os.getpid()} on \S+ writes there, and was alive \d+ s"
        assert re.search(expected, str(caught.value))
        assert (folder / NAME).exists()
    assert not (folder / NAME).exists()
    with pytest.raises(ZeroDivisionError), hold(folder):
        raise ZeroDivisionError
    assert list(folder.iterdir()) == []
    with hold(folder) as held:
        held.release()
        held.release()


def test_another_process_is_refused_and_a_killed_one_makes_room(tmp_path, capsys):
    code = (
        "import sys, time; from ldm_jax.lock import hold\n"
        "with hold(sys.argv[1]):\n    print('held', flush=True); time.sleep(600)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"process {other.pid} on "), hold(tmp_path):
            pytest.fail("two writers")
    finally:
        other.kill()
    deadline = time.monotonic() + 60
    while "Z" not in open(f"/proc/{other.pid}/stat").read().rpartition(")")[2][:3]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with hold(tmp_path):  # while it is a zombie, for which nobody has waited yet
        pass
    assert f"taking over {tmp_path}: process {other.pid} on " in capsys.readouterr().out
    other.wait()
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_was_given_to_another_process_counts_for_nothing(tmp_path, capsys):
    # It is that of this process, which is alive, but started at another time.
    left_behind(tmp_path, machine=lock._machine(), process=os.getpid(), started="7")
    with hold(tmp_path):
        assert "taking over" in capsys.readouterr().out


def test_another_host_is_silent_for_long(tmp_path, capsys):
    left_behind(tmp_path, seconds=lock.STALE + 60)
    with hold(tmp_path):
        said = capsys.readouterr().out
    assert f"taking over {tmp_path}: process 4321 on moon has ended" in said
    assert "waiting" not in said


def test_another_host_is_watched_until_it_has_been_silent_for_long(tmp_path, quick, capsys):
    left_behind(tmp_path, seconds=0.1)
    start = time.monotonic()
    with hold(tmp_path):
        assert time.monotonic() - start >= 0.45
    said = capsys.readouterr().out
    assert "by process 4321 on moon: waiting up to" in said and "taking over" in said


@pytest.mark.parametrize("ahead", [0, 3600], ids=["same clock", "clock ahead"])
def test_another_host_that_moves_is_alive(tmp_path, quick, ahead):
    path = left_behind(tmp_path, seconds=-ahead)
    stop = threading.Event()

    def beat():
        while not stop.wait(0.1):
            os.utime(path, (time.time() + ahead,) * 2)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="4321 on moon writes there"), hold(tmp_path):
            pytest.fail("two writers")
    finally:
        stop.set()
        thread.join()
    assert json.loads(path.read_text())["token"] == "theirs"


def test_a_writer_that_died_while_it_wrote_the_file(tmp_path, quick, monkeypatch, capsys):
    (tmp_path / NAME).touch()
    monkeypatch.setattr(lock, "_WRITING", 0.2)
    with hold(tmp_path):
        assert "process ? on an unknown host" in capsys.readouterr().out


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_that_start_together_one_wins(tmp_path, stale):
    for trial in range(20):
        folder = tmp_path / f"{trial}"
        folder.mkdir()
        if stale:
            left_behind(folder, machine=lock._machine(), process=os.getpid(), started="7")
        together, done = threading.Barrier(6), threading.Barrier(6)

        def one(folder, together, done):
            together.wait()
            try:
                with hold(folder):
                    done.wait()
                    return True
            except UserError:
                done.wait()
                return False

        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            calls = [pool.submit(one, folder, together, done) for _ in range(6)]
            assert sum(call.result() for call in calls) == 1
        assert list(folder.iterdir()) == []


def test_the_file_is_touched_and_made_again_but_never_taken_back(tmp_path, quick, monkeypatch):
    lost = threading.Event()
    monkeypatch.setattr(Lock, "_lost", lambda self: (lost.set(), self._released.set()))
    path = tmp_path / NAME
    with hold(tmp_path):
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 60
        while path.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        path.unlink()
        while not path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not lost.is_set()
        path.unlink()
        left_behind(tmp_path)
        assert lost.wait(60)
    assert json.loads(path.read_text())["token"] == "theirs"


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*/file/run \(.*\): choose another"):
        with hold(tmp_path / "file" / "run"):
            pytest.fail("no folder")
