"""Several processes that train and sample together, with real ones: two devices each."""

import json
import pathlib
import re
import signal
import socket

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from hosts import CONFIG, finish, rows, start, wait_for
from PIL import Image

from ldm_jax import cli, distributed, timing
from ldm_jax.errors import UserError
from ldm_jax.training.interrupt import Interrupts


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG)
    return path


def pictures(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))])


def stop_after_five_steps(count, victim, workdir, arguments):
    """Trains until a signal comes to one process; returns the step that all have stopped at."""
    processes = start(count, "train", *arguments, "--config.train.steps=100000")
    wait_for(workdir / "metrics.jsonl", '"step": 5,', processes[0])
    processes[victim].send_signal(signal.SIGTERM)
    texts = finish(processes, code=75)
    (stopped,) = re.findall(r"saved diffusion at step (\d+) of", texts[0][0])
    # The one that got the signal says so, and only the first one says the rest.
    assert [("SIGTERM: saving" in stderr) for _, stderr in texts] == [
        index == victim for index in range(count)
    ]
    assert all("saved" not in stdout and "step" not in stdout for stdout, _ in texts[1:])
    assert (workdir / "checkpoints" / stopped).is_dir()
    return int(stopped)


def test_a_signal_to_one_of_two_processes_stops_both_and_one_goes_on(config, tmp_path):
    workdir = tmp_path / "run"
    arguments = f"--config={config}", f"--workdir={workdir}", "--config.mesh.fsdp=2"
    stopped = stop_after_five_steps(2, 1, workdir, arguments)
    more = f"--config.train.steps={stopped + 3}", "--allow_config_change"
    arguments = f"--config={config}", f"--workdir={workdir}", *more
    ((stdout, _),) = finish(start(1, "train", *arguments))
    assert f"resuming at step {stopped} from" in stdout
    logged = [s for s in range(1, stopped + 4) if s % 5 == 0 or s in (stopped, stopped + 3)]
    assert list(rows(workdir)) == logged
    for count, out in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        sample = f"--workdir={workdir}", "--num_samples=5", f"--out={out}", "--label=3"
        finish(start(count, "sample", *sample))
    # Sums in another order: a level of grey at most.
    one, two = (pictures(tmp_path / name).astype(int) for name in ("one", "two"))
    assert one.shape == (5, 8, 8, 3) and np.abs(one - two).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (4, 2), (2, 4)])
def test_any_number_of_processes_goes_on_from_any_other(before, after, config, tmp_path):
    plain, workdir = tmp_path / "plain", tmp_path / "run"
    finish(start(1, "train", f"--config={config}", f"--workdir={plain}"))
    arguments = f"--config={config}", f"--workdir={workdir}", "--config.train.checkpoint_every=10"
    finish(start(before, "train", *arguments, "--config.train.steps=10"))
    arguments = *arguments, "--allow_config_change"
    (stdout, _), *_ = finish(start(after, "train", *arguments))
    assert "resuming at step 10 from" in stdout
    want, found = rows(plain), rows(workdir)
    assert list(found) == list(want) == [5, 10, 15, 20]
    np.testing.assert_allclose(list(found.values()), list(want.values()), rtol=1e-5)
    assert len(list((workdir / "ema").iterdir())) == 2
    grids = [np.asarray(Image.open(path / "samples" / "final.png")) for path in (plain, workdir)]
    assert np.abs(grids[0].astype(int) - grids[1]).max() <= 1


@pytest.mark.slow
def test_four_processes_stop_together(config, tmp_path):
    workdir = tmp_path / "run"
    stop_after_five_steps(4, 2, workdir, (f"--config={config}", f"--workdir={workdir}"))


@pytest.mark.slow
def test_a_host_with_another_config_is_named(config, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, seed in zip(folders, (0, 1), strict=True):
        folder.mkdir()
        text = CONFIG.replace("    return c", f"    c.seed = {seed}\n    return c")
        (folder / "tiny.py").write_text(text)
    arguments = "--config=tiny.py", f"--workdir={tmp_path / 'run'}"
    texts = finish(start(2, "train", *arguments, folders=folders), code=1)
    for _, stderr in texts:
        assert "error: the config differs on process 1 (" in stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_encoding_and_a_first_stage_need_no_single_host(tmp_path):
    quickstart = pathlib.Path(__file__).parents[1] / "configs" / "quickstart.py"
    for count in (1, 2):
        arguments = f"--config={quickstart}:smoke", f"--workdir={tmp_path / str(count)}"
        scale = "--config.first_stage.latent_scale=channel", "--config.data.cache_latents=True"
        finish(start(count, "train", *arguments, *scale))
        finish(start(count, "evaluate", arguments[1], "--metrics=psnr", "--num_images=12"))
    one, two = (rows(tmp_path / count) for count in "12")
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-4)
    scores = [
        json.loads((tmp_path / count / "evaluation" / "metrics.json").read_text()) for count in "12"
    ]
    psnr = [score["reconstruction"]["psnr"] for score in scores]
    np.testing.assert_allclose(psnr[1], psnr[0], rtol=1e-4)


# -- in one process ---------------------------------------------------------------------------


def hosts(monkeypatch, *texts):
    """As if other processes had told the given texts, after the own one."""
    monkeypatch.setattr(distributed, "in_use", lambda: True)
    monkeypatch.setattr(distributed, "_gather", lambda text: [text, *texts])


def test_what_differs_is_named(monkeypatch):
    monkeypatch.setattr(distributed, "in_use", lambda: True)
    told = []
    monkeypatch.setattr(distributed, "_gather", lambda text: told.append(text) or [text])
    for text in ("a", "b"):
        distributed.check_same({"the config": text, "the source": "s"})
    own, other = told
    name = socket.gethostname()
    for others, odd in (([own], None), ([other, own], "1"), ([other], "1"), ([other] * 2, "0")):
        hosts(monkeypatch, *others)
        if odd is None:
            distributed.check_same({"the config": "a", "the source": "s"})
            continue
        with pytest.raises(UserError, match=rf"^the config differs on process {odd} \({name}\)"):
            distributed.check_same({"the config": "a", "the source": "s"})


def test_what_one_host_refuses_all_refuse(monkeypatch):
    with pytest.raises(UserError, match=r"^mine$"), distributed.agreed():
        raise UserError("mine")
    hosts(monkeypatch, "", "no data")
    with pytest.raises(UserError, match=r"^process 2: no data$"), distributed.agreed():
        pass
    with pytest.raises(UserError, match=r"^mine$"), distributed.agreed():
        raise UserError("mine")
    hosts(monkeypatch, "", "")
    with distributed.agreed():
        pass


def test_all_leave_where_one_was_asked_to(monkeypatch):
    interrupts = Interrupts()
    interrupts.check("here")
    hosts(monkeypatch, "0", "1")
    with pytest.raises(Exception, match="stopped here"):
        interrupts.check("here")
    hosts(monkeypatch, "0", "0")
    interrupts.check("here")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "a:1"}, "give --coordinator, --num_processes and --process_id together"),
        ({"process_id": 0}, "give --coordinator, --num_processes and --process_id together"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "--coordinator=a must be HOST"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "--process_id=2 must be"),
    ],
)
def test_flags_that_do_not_fit_are_refused(given, message, import_command):
    import_command("ldm_jax.sample")  # which defines them
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(**given), pytest.raises(UserError, match=message):
        distributed.initialize([])
    distributed.initialize([])  # without any, there is nothing to do
    assert not distributed.in_use()


@pytest.mark.parametrize("place", [["--process_id=1"], ["--process_id", "1"]])
def test_command_lines_differ_in_the_process_only(place):
    one = distributed._shared(["train", "--config=a", *place, "--num_processes=2", "--seed=1"])
    assert one == "--config=a --seed=1"


def test_a_dead_peer_is_seen_behind_what_failed_on_top(monkeypatch):
    monkeypatch.setattr(distributed, "in_use", lambda: True)
    lost = jax.errors.JaxRuntimeError("Gloo all-reduce: Connection closed by peer")
    try:
        try:
            raise lost
        finally:
            raise ValueError("no checkpoint")
    except ValueError as error:
        assert distributed.peer_died(error)
    assert not distributed.peer_died(ValueError("no checkpoint"))


def test_pods_are_recognised(monkeypatch):
    def on_pod(libtpu=False, **environment):
        with monkeypatch.context() as patch:
            patch.setattr(distributed.importlib.util, "find_spec", lambda name: libtpu or None)
            for name in ("SLURM_STEP_NUM_TASKS", "JAX_PLATFORMS", "TPU_WORKER_HOSTNAMES"):
                patch.delenv(name, raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            return distributed._on_pod()

    assert on_pod(SLURM_STEP_NUM_TASKS="2") and not on_pod(SLURM_STEP_NUM_TASKS="1")
    assert not on_pod(SLURM_NTASKS="8")  # in a batch script, outside of srun
    assert on_pod(True, TPU_WORKER_HOSTNAMES="a,b") and not on_pod(True, TPU_WORKER_HOSTNAMES="a")
    assert not on_pod(TPU_WORKER_HOSTNAMES="a,b")
    assert not on_pod(True, TPU_WORKER_HOSTNAMES="a,b", JAX_PLATFORMS="cpu")


def test_folders_that_are_no_paths_are_refused(import_command, tmp_path):
    import_command("ldm_jax.sample")
    flags.FLAGS.mark_as_parsed()
    for given, said in (
        ({"workdir": "gs://b/run"}, "^--workdir=gs://b/run: .*mount what is at gs:// and give"),
        ({"out": "s3://b/run"}, "^--out=s3://b/run: "),
    ):
        with flagsaver.flagsaver(**given), pytest.raises(UserError, match=said):
            cli._check_folders()
    with flagsaver.flagsaver(workdir=str(tmp_path), out="a:b//c"):
        cli._check_folders()


def test_all_make_as_many_calls(monkeypatch):
    hosts(monkeypatch, "7")  # another host was faster
    assert len(timing.call_times(lambda: (), 1e-9, least=2)) == 7
    hosts(monkeypatch, "1")
    assert len(timing.call_times(lambda: (), 1e-9, least=2)) == 2


@pytest.mark.slow
def test_the_first_process_says_what_several_measured(tmp_path):
    quickstart = pathlib.Path(__file__).parents[1] / "configs" / "quickstart.py"
    out = tmp_path / "out.json"
    arguments = f"--config={quickstart}:smoke", "--what=train", "--seconds=0.5", f"--out={out}"
    (stdout, _), (other, _) = finish(start(2, "benchmark", *arguments, "--fixed_batch"))
    assert "images per second" in stdout and "images per second" not in other
    assert json.loads(out.read_text())["devices"] == 4
