"""The FID of samples while training, and the best weights."""

import json

import jax
import numpy as np
import pytest

import ldm_jax
from ldm_jax import config as config_lib
from ldm_jax import progress, tensors
from ldm_jax import workdir as files
from ldm_jax.errors import UserError
from ldm_jax.metrics.features import Extractor
from ldm_jax.metrics.references import from_features, load_reference, save_reference
from ldm_jax.run import run
from ldm_jax.training.sharding import make_mesh

RNG = np.random.RandomState(0)
FIRST = {"latents": {"shift": np.zeros(3, np.float32), "scale": np.ones(3, np.float32)}}


class Images:
    """12 random images that are named by their numbers."""

    columns, label_names, num_labels = (), None, 0

    def __init__(self, count=12, names=""):
        self.names, self.pixels = names, RNG.randint(0, 200, (count, 8, 8, 3)).astype(np.uint8)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return {"image": self.pixels[index]}

    def name(self, index):
        return f"{self.names}{index}"


class Pipe:
    """Gives the real images, `shift` levels brighter; of step `step`."""

    def __init__(self, source, shift=0, step=1):
        self.source, self.shift, self.step, self.seeds = source, shift, step, []
        self.variables = {"denoiser": {"w": np.full(2, step, np.float32)}, "conditioner": {}}

    def sample(self, seeds, condition):
        assert condition is None
        self.seeds.append(list(seeds))
        return self.source.pixels[np.array(seeds) % len(self.source)] + np.uint8(self.shift)


def extractor(digest="d" * 64):
    """The levels of an image's first pixel: a shift by d moves the mean by d in each of three."""
    extract = lambda images: {"pool": images[:, 0, 0].astype(np.float32)}  # noqa: E731
    return Extractor("inception", digest, "pytorch", {"pool": 3}, extract)


@pytest.fixture(autouse=True)
def network(monkeypatch):
    loaded = []

    def load(kind, *, mesh, outputs):
        assert kind == "inception" and tuple(outputs) == ("pool",)
        loaded.append(kind)
        return extractor()

    monkeypatch.setattr(progress, "load_extractor", load)
    return loaded


def toy(**changes):
    c = config_lib.get_config()
    c.data.update(source="folder:none", resolution=8, threads=2, flip=False)
    c.first_stage.kind = "identity"
    c.denoiser.update(kind="dit", width=32, depth=1, num_heads=2)
    c.train.update(batch_size=8, steps=3, log_every=1, picture_every=0, checkpoint_every=3)
    c.train.update(fid_every=2, fid_samples=12)
    c.sample.update(steps=1, batch_size=5, num_samples=8)
    c.update_from_flattened_dict(changes)
    return config_lib.check(c)


def fid_of(tmp_path, source, config=None, first_stage=FIRST):
    return progress.SamplesFID(config or toy(), tmp_path, source, first_stage, make_mesh())


def test_equal_sets_are_at_0_and_a_shift_at_its_square(tmp_path):
    source = Images()
    fid, pipe = fid_of(tmp_path, source), Pipe(source)
    # 1e-6: rounding of float64 products of levels up to 255
    assert fid(pipe) == pytest.approx(0, abs=1e-6)
    assert fid(Pipe(source, shift=10)) == pytest.approx(3 * 10**2, rel=1e-6)
    # 12 samples in batches of one size, of which the last is cut
    assert pipe.seeds == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]


def test_statistics_of_the_real_images_are_kept_and_made_again_for_others(tmp_path, monkeypatch):
    source, path = Images(), tmp_path / progress.FOLDER / progress.REFERENCE
    fid_of(tmp_path, source)(Pipe(source))
    kept = load_reference(path, extractor())
    assert kept.count == 12 and "12 of 12 images, centred crops of 8x8" in kept.origin
    known = fid_of(tmp_path, Images())  # images of the same names are not looked at again
    assert known(Pipe(source)) == pytest.approx(0, abs=1e-6)
    for other in (Images(names="b"), Images(7)):
        assert fid_of(tmp_path, other)(Pipe(source)) > 1
        assert load_reference(path, extractor()).count == len(other)
    path.write_bytes(b"no file of statistics")
    assert fid_of(tmp_path, source)(Pipe(source)) == pytest.approx(0, abs=1e-6)
    monkeypatch.setattr(progress, "REFERENCE_IMAGES", 5)
    assert fid_of(tmp_path, source).reference.count == 5


def test_a_given_reference(tmp_path):
    source = Images()
    features = [{"pool": source.pixels[:, 0, 0].astype(np.float32)}]
    given = tmp_path / "real.npz"
    save_reference(given, from_features(features, extractor(), resolution=8, origin="mine"))
    config = toy(**{"train.fid_reference": str(given)})
    progress.check(config, source, make_mesh())
    fid = fid_of(tmp_path, source, config)
    assert fid(Pipe(source)) == pytest.approx(0, abs=1e-6)
    assert not (tmp_path / progress.FOLDER).exists()
    larger = toy(**{"train.fid_reference": str(given), "data.resolution": 16})
    with pytest.raises(UserError, match="images of 8x8"):
        progress.check(larger, source, make_mesh())


def test_a_signal_gives_up_between_batches(tmp_path):
    source, calls = Images(), []

    def interrupted():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    fid = progress.SamplesFID(toy(), tmp_path, source, FIRST, make_mesh(), interrupted)
    pipe = Pipe(source)
    with pytest.raises(KeyboardInterrupt):
        fid(pipe)
    assert len(pipe.seeds) == 1  # the first call is of the real images


def test_the_best_weights_stay(tmp_path):
    source = Images()
    fid, path = fid_of(tmp_path, source), tmp_path / progress.BEST / files.WEIGHTS
    assert progress.read_best(tmp_path) is None
    for step, value, best in ((1, 9.0, 1), (2, 10.0, 1), (3, 8.5, 3), (4, 8.5, 3)):
        fid.keep_if_best(Pipe(source, step=step), value)
        stored, metadata = tensors.open_tensors(path)
        assert metadata["step"] == str(best) and np.asarray(stored["denoiser/w"])[0] == best
    assert progress.read_best(tmp_path) == progress.Best(3, 8.5)
    assert progress.read_best(tmp_path, "other") is None


@pytest.mark.parametrize("what", ["samples", "first stage"])
def test_figures_of_other_settings_are_not_compared(tmp_path, what):
    source = Images()
    fid_of(tmp_path, source).keep_if_best(Pipe(source, step=1), 1.0)
    config = toy(**{"train.fid_samples": 6}) if what == "samples" else toy()
    first = {"latents": {**FIRST["latents"], "scale": 2 * FIRST["latents"]["scale"]}}
    other = fid_of(tmp_path, source, config, first if what == "first stage" else FIRST)
    other.keep_if_best(Pipe(source, step=2), 50.0)
    assert progress.read_best(tmp_path) == progress.Best(2, 50.0)
    stored = tensors.open_tensors(tmp_path / progress.BEST / "first_stage" / files.WEIGHTS)[0]
    scale = np.asarray(stored["latents/scale"])[0]
    assert scale == (2 if what == "first stage" else 1)


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"sample.batch_size": 4, "sample.num_samples": 4, "sample.two_calls": True}, True),
        ({"sample.steps": 2}, False),
        ({"data.split": "test"}, True),  # of a model without conditions
    ],
)
def test_settings_that_change_no_figure_keep_the_best(tmp_path, changes, kept):
    source = Images()
    fid_of(tmp_path, source).keep_if_best(Pipe(source, step=1), 1.0)
    other = fid_of(tmp_path, source, toy(**changes))
    # The real images' names are what tells their split.
    other.reference = fid_of(tmp_path, source).reference
    other.keep_if_best(Pipe(source, step=2), 50.0)
    assert progress.read_best(tmp_path).step == (1 if kept else 2)


def test_conditions_of_other_data_are_not_compared():
    c = toy()
    label = dict(num_classes=3, width=32, slot="vector")
    c.label.update(label)
    c.conditioners, c.data.fields = ("label",), ("label",)
    before = progress._conditions(c)
    assert before["split"] == c.data.split
    c.data.split = "test"
    assert progress._conditions(c) != before
    assert progress._conditions(toy()) is None


def test_the_former_best_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    source, config = Images(), toy(**{"train.fid_samples": 6})
    fid_of(tmp_path, source).keep_if_best(Pipe(source, step=1), 1.0)
    other, save = fid_of(tmp_path, source, config), files.save_model

    def full(folder, *args):
        save(folder, *args)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_model", full)
        with pytest.raises(UserError, match="No space left on device"):
            other.keep_if_best(Pipe(source, step=2), 50.0)
    assert progress.read_best(tmp_path) == progress.Best(1, 1.0)
    # Cut off after the first rename, what is new takes its place at the next start.
    other.keep_if_best(Pipe(source, step=3), 50.0)
    assert not list(tmp_path.glob("best.*"))
    (tmp_path / "best").rename(tmp_path / "best.new")
    (tmp_path / "best.former").mkdir()
    other.keep_if_best(Pipe(source, step=4), 60.0)
    assert progress.read_best(tmp_path) == progress.Best(3, 50.0)
    assert not list(tmp_path.glob("best.*"))


def test_what_cannot_be_measured_is_refused_before_any_work(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="fid_every needs 2 images at least, there is 1"):
        progress.check(toy(), Images(1), make_mesh())
    with pytest.raises(UserError, match=r"fid_samples is 1, but must be at least 2"):
        toy(**{"train.fid_samples": 1})

    def no_weights(kind, *, mesh, outputs):
        raise UserError("no weights")

    monkeypatch.setattr(progress, "load_extractor", no_weights)
    with pytest.raises(UserError, match=r"no weights, or set config\.train\.fid_every=0"):
        progress.check(toy(), Images(), make_mesh())
    progress.check(toy(**{"train.fid_every": 0}), Images(1), make_mesh())


def test_latents_need_a_reference_of_images(monkeypatch):
    monkeypatch.setattr(progress, "LatentsSource", Images)
    with pytest.raises(UserError, match=r"fid_every needs real images.*fid_reference"):
        progress.check(toy(), Images(), make_mesh())


def test_a_run_measures_and_keeps_a_model_that_samples(tmp_path, monkeypatch):
    take = progress.SamplesFID.__call__

    def better_and_better(self, pipe):
        assert take(self, pipe) > 0
        return 100.0 - pipe.step

    monkeypatch.setattr(progress.SamplesFID, "__call__", better_and_better)
    emoji = {"data.source": "emoji", "data.where": "category=Smileys & Emotion"}
    run(toy(**emoji, **{"data.resolution": 16}), tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    found = {row["step"]: row["fid"] for row in map(json.loads, lines) if "fid" in row}
    assert found == {2: 98.0, 3: 97.0}
    assert progress.read_best(tmp_path / "run") == progress.Best(3, 97.0)
    best, last = (ldm_jax.load(tmp_path / "run" / name) for name in (progress.BEST, "."))
    assert best.step == last.step == 3
    for a, b in zip(*(jax.tree.leaves(p.variables["denoiser"]) for p in (best, last)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert best.sample([0]).shape == (1, 16, 16, 3)
