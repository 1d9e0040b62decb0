"""Real processes that are killed at random moments; benchmarks.reliability does more of it."""

import json

import pytest

from benchmarks.reliability import kills, lives, machine


@pytest.mark.slow
def test_a_run_that_is_killed_often_ends_like_an_undisturbed_one(tmp_path, capsys):
    found = kills.soak(tmp_path, kills=6, steps=100, every=2, seed=0, say=print)
    assert found["trials"] == 6 and found["unequal"] == {} and all(found["files"].values())
    assert "kill 6/6" in capsys.readouterr().out
    # What is done is not done again.
    assert kills.soak(tmp_path, kills=6, steps=100, every=2, seed=0, say=print) == found


@pytest.mark.slow
def test_sigterm_loses_no_step(tmp_path):
    found = kills.preempt(tmp_path, trials=3, steps=12, seed=0, say=print)
    assert found["steps_lost"] == 0
    assert set(found["codes"]) <= {str(kills.PREEMPTED), str(kills.UNHEARD)}


def test_kills_last_as_long_as_the_steps():
    window = kills._window(rate=40.0, steps=2000, kills=200)
    steps = kills.TRAINING * 200 * 40.0 * window / 2  # of all lives that make any
    assert steps == pytest.approx(kills.SHARE * 2000)


def test_what_is_logged_and_saved_is_read_after_a_crash(tmp_path):
    assert lives.logged(tmp_path) == lives.saved(tmp_path) == 0
    rows = [json.dumps({"step": step}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + '\n{"ste')
    for name in ("2", "10", "12.orbax-checkpoint-tmp-7", "notes"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert lives.logged(tmp_path) == 3 and lives.saved(tmp_path) == 10


def test_a_machine_has_a_kind():
    kind = machine.kind()
    assert (
        kind["processor"]
        and kind["devices"] == 8
        and kind["processors"] >= 1
        and kind["instructions"]
    )
    assert "xla_backend_optimization_level=0" in kind["xla_flags"]
    json.dumps(kind)
