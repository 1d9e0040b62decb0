"""The comparison with PyTorch: who wins a heat, what a turn is, and both sides at toy size."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from benchmarks import comparison, lockstep, side_jax
from ldm_jax.errors import UserError

REQUEST = {"config": "lsun_bedrooms", "work": "forward"}


class FakeSide(contextlib.nullcontext):
    """Takes a given time for each variant; None fails."""

    def __init__(self, times, log, parameters=10):
        super().__init__(self)
        self.times, self.log, self.parameters = times, log, parameters

    def prepare(self, request):
        self.variant = request.get("variant", "ours")
        if self.times[self.variant] is None:
            raise lockstep.SideFailed("no compiler")
        said = dict.fromkeys(("first_seconds", "flops", "peak"), 1.0)
        more = dict(device="cpu", version=self.variant, threads=2, peer={"side": 4})
        return said | more | {"parameters": self.parameters}

    def seconds(self):
        self.log.append(self.variant)
        return self.times[self.variant]


def compared(times, parameters=10):
    log = []
    ours = lambda: FakeSide({"ours": 2.0}, log)  # noqa: E731
    theirs = lambda: FakeSide(times, log, parameters)  # noqa: E731
    return comparison.compare(REQUEST, list(times), 3, ours, theirs), log


def test_the_fastest_variant_takes_turns_with_ours():
    found, log = compared({"eager": 4.0, "channels_last": 1.0, "compile": None})
    assert found["variant"] == "channels_last" and found["variants"]["compile"] == "no compiler"
    assert found["ours"] == [2.0] * 3 and found["theirs"] == [1.0] * 3
    assert log[-6:] == ["ours", "channels_last"] * 3
    settings = dict(machine="m", processors=2, dtype="float32", batch_size=1, steps=50)
    shown = comparison.table({"lsun_forward": found}, settings | {"rounds": 3, "tiny": False})
    row = shown.splitlines()[-1]
    assert "| 2000 (2000 to 2000) | 1000 (1000 to 1000) | channels_last | 2.00 |" in row


def test_networks_of_other_sizes_and_failures_are_refused():
    with pytest.raises(UserError, match="PyTorch's networks have 11 weights, ours 10"):
        compared({"eager": 1.0}, parameters=11)
    with pytest.raises(UserError, match="PyTorch failed: no compiler"):
        compared({"compile": None})
    with pytest.raises(UserError, match="PyTorch failed: no compiler"):
        compared({"eager": None, "compile": None})


def test_a_single_variant_runs_no_heat():
    found, log = compared({"channels_last": 1.0})
    assert found["variant"] == "channels_last" and found["variants"] == {}
    assert log == ["ours", "channels_last"] * 3


def test_tasks_are_chosen():
    names = comparison.chosen_tasks([], large=False)
    assert "lsun_forward" in names and "text2img_step" not in names
    assert "text2img_step" in comparison.chosen_tasks([], large=True)
    with pytest.raises(UserError, match="no task 'ddpm'"):
        comparison.chosen_tasks(["ddpm"], large=False)
    with pytest.raises(UserError, match="add --large"):
        comparison.chosen_tasks(["text2img_step"], large=False)
    with pytest.raises(UserError, match=r"has no torch and diffusers"):
        comparison.check_torch("/bin/false")


def test_a_side_answers_and_says_what_failed(tmp_path):
    (tmp_path / "side.py").write_text(
        "from benchmarks import lockstep\n"
        "def prepare(request):\n"
        "    print('noise')\n"
        "    return (lambda: None), (lambda: None), {'twice': 2 * request['number']}\n"
        "lockstep.serve(prepare)\n"
    )
    with lockstep.Side(sys.executable, "side", {"PYTHONPATH": f"{tmp_path}"}) as side:
        assert side.prepare({"number": 21})["twice"] == 42
        assert 0 < side.seconds() < 0.1
        with pytest.raises(lockstep.SideFailed, match="KeyError: 'number'"):
            side.prepare({})
    with lockstep.Side(sys.executable, "no_such_side", {}) as side:
        with pytest.raises(lockstep.SideFailed, match="its process ended with 1"):
            side.prepare({})


@pytest.mark.parametrize("work", ["forward", "encode", "decode"])
def test_our_side(work, monkeypatch):
    monkeypatch.setattr(side_jax.timing, "matrix_peak", lambda *unused: 1e9)
    request = {"config": "lsun_bedrooms", "tiny": True, "work": work, "batch_size": 2}
    start, wait, said = side_jax.prepare(request | {"dtype": "float32", "steps": 2})
    start()
    wait()
    latents, pixels = [2, 3, 16, 16], [2, 3, 32, 32]
    assert said["peer"]["shape"] == (pixels if work == "encode" else latents)
    part = "unet" if work == "forward" else "first_stage"
    assert said["peer"][part]["_class_name"] in ("UNet2DModel", "VQModel")
    assert said["flops"] > 0 and said["parameters"] > 0
    json.dumps(said)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs the extra [bench]")
@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs the extra [bench]")
def test_both_sides(tmp_path):
    tasks = "--only=lsun_train,vq_f4_decode"
    options = ("--tiny", "--rounds=2", "--variants=eager,channels_last", f"--out={tmp_path}")
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    subprocess.run(
        [sys.executable, "-m", "benchmarks.vs_pytorch", tasks, *options],
        check=True,
        cwd=lockstep.ROOT,
        env=os.environ | cache,
    )
    found = json.loads((tmp_path / "vs_pytorch.json").read_text())["tasks"]
    assert list(found) == ["lsun_train", "vq_f4_decode"]
    assert all(len(one["ours"]) == len(one["theirs"]) == 2 for one in found.values())
    assert "| ratio |" in (tmp_path / "vs_pytorch.md").read_text()
