"""Golden curves; their first steps are compared in test_resume.py."""

import numpy as np
import pytest

from benchmarks.reliability import curves, machine

NAMES = [name for folders in curves.RUNS.values() for name in folders]


@pytest.mark.parametrize("name", NAMES)
def test_they_are_whole_and_a_change_is_seen(name):
    kind, columns = curves.stored(name)
    assert set(kind) == set(machine.kind())
    values = np.array(list(columns.values()))
    assert values.shape[1] == curves.STEPS and np.isfinite(values).all()
    assert values[0, -10:].mean() < values[0, :10].mean()  # the loss falls
    found = curves.compare(name, columns)
    assert found["first_unequal"] == 0 and found["apart"] == 0
    changed = {key: list(column) for key, column in columns.items()}
    changed["loss"][41] *= 1 + 1e-6
    found = curves.compare(name, changed)
    assert found["first_unequal"] == 42 and 0 < found["apart"] < 1e-5
    with pytest.raises(ValueError, match="the golden curve"):
        curves.compare(name, columns | {"speed": columns["loss"]})


@pytest.mark.slow
@pytest.mark.parametrize("run", sorted(curves.RUNS))
def test_all_steps_are_as_recorded(run, tmp_path):
    """After 100 steps, rounding has grown: on another kind of machine only the first ones count."""
    for name, columns in curves.record(run, tmp_path).items():
        found = curves.compare(name, columns)
        assert found["steps"] == curves.STEPS
        if found["same_machine"]:
            assert found["first_unequal"] == 0, (name, found)
        assert found["apart_at_first"] <= curves.TOLERANCE, (name, found)
