"""Metrics of samples: from a model or files, against data, folders or files, and cut off."""

import json
import pathlib

import jax
import numpy as np
import pytest
import stub_features
from absl import flags
from absl.testing import flagsaver
from hosts import finish, start
from PIL import Image
from toy_models import save_untrained

from ldm_jax import config as config_lib
from ldm_jax import evaluation_tables, extractors, image_features, image_origins, records
from ldm_jax import sample_references as references_lib
from ldm_jax import workdir as files
from ldm_jax.data.sources import open_source
from ldm_jax.errors import UserError
from ldm_jax.held_out import choose_rows, open_examples
from ldm_jax.images import save_numbered
from ldm_jax.metrics import kernel, manifold, scores
from ldm_jax.metrics.frechet import FeatureStatistics, frechet_distance
from ldm_jax.metrics.sets import METRICS
from ldm_jax.sample_metrics import Request, evaluate_samples
from ldm_jax.training.sharding import make_mesh

TESTS = pathlib.Path(__file__).parent
NOISE = np.random.RandomState(0)


@pytest.fixture(autouse=True)
def stub(monkeypatch):
    """Small networks, and small units."""
    monkeypatch.setattr(extractors, "load_extractor", stub_features.load)
    monkeypatch.setattr(image_origins, "UNIT", 16)


def toy(*conditioners, **changes):
    c = config_lib.get_config()
    fields = tuple(f for name in conditioners for f in config_lib.FIELDS[name])
    c.data.update(source="emoji", split="train[:60]", resolution=8, fields=fields, threads=2)
    c.conditioners = conditioners
    c.first_stage.kind = "identity"
    c.denoiser.update(kind="dit", width=32, depth=1, num_heads=2)  # the quickest to compile
    c.label.update(num_classes=9, width=32, slot="vector")
    c.sample.update(steps=2, batch_size=8)
    c.update_from_flattened_dict(changes)
    return config_lib.check(c)


def save(root, config):
    return save_untrained(root, config, unscaled=True, step=7)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model") / "run", toy("label"))


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """60 images and 50 others, as .npz files."""
    folder = tmp_path_factory.mktemp("images")
    for name, count in (("real", 60), ("fake", 50)):
        np.savez(folder / f"{name}.npz", NOISE.randint(0, 256, (count, 8, 8, 3)).astype(np.uint8))
    return folder


def extract(images, name="pool"):
    return stub_features.load("inception", mesh=make_mesh()).extract(images)[name]


def statistics(features):
    found = FeatureStatistics(features.shape[1])
    found.add(features)
    return found.result()


def real_images(rows=range(60)):
    source = open_source("emoji", split="train[:60]")
    resize = lambda image: Image.fromarray(image).resize((8, 8), 3)  # noqa: E731
    return np.stack([np.asarray(resize(source[int(i)]["image"])) for i in rows])


# -- a model ------------------------------------------------------------------------------------


def test_samples_of_a_model_against_its_training_data(workdir, tmp_path, capsys):
    request = Request(tuple(METRICS), num_samples=45, seed=3, dino="towers")
    record = evaluate_samples(workdir, tmp_path, request)
    said = capsys.readouterr().out
    assert "memory for features at most: 45 samples" in said and "60 real images" in said
    # By hand: the samples of these seeds, under the labels of 45 of the 60 examples.
    pipe = files.load(workdir)
    source = open_source("emoji", split="train[:60]")
    rows = choose_rows(3, 0, 45, 60)
    assert len(set(rows)) == 45
    labels = [source[row]["label"] for row in rows]
    made = pipe.sample(range(3, 48), {"label": labels}, batch_size=8)
    real, fake = extract(real_images()), extract(made)
    values = record["metrics"]
    assert list(values) == list(METRICS)
    close = dict(rtol=1e-4, atol=1e-6)  # float32 features of another batch
    fid = frechet_distance(*statistics(real), *statistics(fake))
    np.testing.assert_allclose(values["fid"]["value"], fid, **close)
    pair = [statistics(extract(x, "spatial")) for x in (real_images(), made)]
    np.testing.assert_allclose(
        values["sfid"]["value"], frechet_distance(*pair[0], *pair[1]), **close
    )
    assert values["fd_dino"]["value"] != values["fid"]["value"]
    kid = kernel.kernel_distance(real, fake)
    found = [values["kid"][key] for key in ("value", "standard_error")]
    np.testing.assert_allclose(found, kid, rtol=1e-3, atol=1e-6)
    score = scores.inception_score(extract(made, "logits"))
    found = [values["is"][key] for key in ("value", "std")]
    np.testing.assert_allclose(found, score, **close)
    assert values["recall"]["features"] == "inception.pool"  # published with VGG-16
    near = manifold.precision_recall(real, fake) + manifold.density_coverage(real, fake)
    names = ("precision", "recall", "density", "coverage")
    assert [values[name]["value"] for name in names] == pytest.approx(near)
    infinite = values["fid_infinity"]
    assert infinite["counts"][-1] == 45 and len(infinite["distances"]) == 15
    np.testing.assert_allclose(infinite["distances"][-1], fid, **close)
    want = scores.fid_at_infinity(fake, *statistics(real))
    np.testing.assert_allclose([infinite["value"], infinite["standard_error"]], want, rtol=1e-3)
    # What it was made of.
    assert record["num_samples"] == 45 and record["size"] == [8, 8]
    assert record["seed"] == 3 and record["checkpoint_step"] == 7 and record["steps"] == 2
    assert record["sampler"] == pipe.config.sample.sampler and len(record["weights"]) == 64
    assert record["conditions"] == {
        "source": "emoji", "split": "train[:60]", "where": "", "examples": 60,
    }  # fmt: skip
    networks = record["networks"]
    assert networks["inception"]["digest"] != networks["dino"]["digest"]
    reference = record["references"]["inception"]
    assert reference["images"] == reference["features"] == 60
    assert reference["size"] == [8, 8]
    assert reference["network"] == networks["inception"]["digest"]
    assert "45 samples are biased upwards: 50,000 are customary" in record["notes"][0]
    json.dumps(record)
    for name in ("samples", "reference"):  # the first unit
        assert Image.open(tmp_path / f"{name}.png").size == (4 * 10 + 2,) * 2
    shown = np.asarray(Image.open(tmp_path / "reference.png"))[2:10, 2:10]
    np.testing.assert_array_equal(shown, real_images([0])[0])
    # The same again takes nothing but the distances.
    again = evaluate_samples(workdir, tmp_path, request)
    assert "samples: 45 of 45 are done already" in capsys.readouterr().out
    assert again["metrics"] == values


class CutOffError(Exception):
    pass


def test_what_was_cut_off_goes_on_with_the_same_result(workdir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(image_features, "SAVE_SECONDS", 0.0)
    request = Request(("fid", "kid"), num_samples=40)
    whole = evaluate_samples(workdir, tmp_path / "whole", request)
    seen, most = [], 60 + 32

    def load(kind, **settings):
        extractor = stub_features.load(kind, **settings)

        def extract(images):
            if sum(seen) >= most:
                raise CutOffError
            seen.append(len(images))
            return extractor.extract(images)

        return extractor._replace(extract=extract)

    monkeypatch.setattr(extractors, "load_extractor", load)
    with pytest.raises(CutOffError):
        evaluate_samples(workdir, tmp_path / "cut", request)
    assert seen == [16, 16, 16, 12, 16, 16]  # the reference, and two units of samples
    most = 1000
    seen.clear()
    # On another size of batches and of units.
    monkeypatch.setattr(image_origins, "UNIT", 64)
    found = evaluate_samples(workdir, tmp_path / "cut", request._replace(batch_size=16))
    assert seen == [8]
    assert "samples: 32 of 40 are done already" in capsys.readouterr().out
    for name in ("fid", "kid"):  # float32 samples of other batches
        np.testing.assert_allclose(
            found["metrics"][name]["value"], whole["metrics"][name]["value"], rtol=1e-3
        )
    # Another seed is another set, and the reference is there.
    seen.clear()
    evaluate_samples(workdir, tmp_path / "cut", request._replace(seed=1))
    assert sum(seen) == 40


def test_classes_come_as_in_the_data_or_uniformly(tmp_path, monkeypatch):
    config, seen = toy("label"), []
    root = save(tmp_path, config)
    pipe = files.load(root)

    def sample(seeds, condition=None, **settings):
        seen.append((list(seeds), condition))
        return np.zeros((len(seeds), 8, 8, 3), np.uint8)

    pipe.sample = sample
    reader = open_examples(config, root, "train[:60]")
    draw = image_origins.data_conditions(config, reader, seed=5)
    source = open_source("emoji", split="train[:60]")
    have = sorted(source[i]["label"] for i in range(60))
    drawn = draw(0, 130)["condition"]["label"]
    assert sorted(drawn[:60]) == sorted(drawn[60:120]) == have
    assert list(drawn[:60]) != list(drawn[60:120])
    np.testing.assert_array_equal(draw(50, 20)["condition"]["label"], drawn[50:70])
    uniform = image_origins.uniform_labels(config, 5)(0, 900)["condition"]["label"]
    counts = np.bincount(uniform, minlength=9)
    assert counts.shape == (9,) and abs(counts - 100).max() < 50  # five standard deviations
    origin = image_origins.samples(pipe, draw, 20, 100, {}, {}, 8)
    parts = list(origin.parts(4))
    assert [len(part) for part in parts] == [16] and origin.unit == 16
    assert [seeds for seeds, _ in seen] == [list(range(104, 120))]
    np.testing.assert_array_equal(seen[0][1]["label"], drawn[4:20])
    with pytest.raises(UserError, match="only condition is a class; this one has none"):
        image_origins.uniform_labels(toy(), 0)


def test_the_conditions_of_all_kinds_of_models_are_drawn(tmp_path):
    kinds = ("label", "segmentation", "low_res", "inpainting")
    changes = {"data.source": "scenes", "data.split": "train[:20]", "data.flip": False}
    changes |= {"data.low_res.factor": 2, "segmentation.num_classes": 7, "segmentation.stages": 0}
    changes |= {"data.resolution": 32, "label.num_classes": 6}
    config = toy(*kinds, **changes)
    reader = open_examples(config, tmp_path, "train[:20]")
    draw = image_origins.data_conditions(config, reader, 1)
    whole, part = draw(0, 6), draw(4, 2)
    assert set(whole["condition"]) == {"label", "segmentation", "low_res"}
    assert whole["image"].shape == (6, 32, 32, 3) and whole["hole"].any((1, 2)).all()
    jax.tree.map(np.testing.assert_array_equal, part, jax.tree.map(lambda x: x[4:], whole))


# -- files --------------------------------------------------------------------------------------


def test_images_made_elsewhere_against_files(archives, tmp_path, capsys):
    real, fake = (np.load(archives / f"{name}.npz")["arr_0"] for name in ("real", "fake"))
    save_numbered(tmp_path / "real", real)
    save_numbered(tmp_path / "fake", fake)
    Image.new("RGB", (99, 99)).save(tmp_path / "fake" / "grid.png")  # as `sample` leaves it
    (tmp_path / "fake" / "samples.json").write_text("{}")
    fid = frechet_distance(*statistics(extract(real)), *statistics(extract(fake)))
    written = tmp_path / "ours.npz"
    for given, reference, writes in (
        (archives / "fake.npz", archives / "real.npz", ""),
        (tmp_path / "fake", tmp_path / "real", str(written)),
        (tmp_path / "fake", written, ""),
    ):
        record = evaluate_samples(
            None,
            tmp_path / "out",
            Request(
                ("fid", "recall"),
                samples=str(given),
                reference=str(reference),
                write_reference=writes,
            ),
        )
        np.testing.assert_allclose(record["metrics"]["fid"]["value"], fid, rtol=1e-4)  # float32
        assert record["num_samples"] == 50 and "seed" not in record
    assert f"wrote the reference {written} (60 images, 'inception')" in capsys.readouterr().out
    assert record["references"]["inception"]["origin"] == f"folder:{tmp_path}/real, train"
    # The first ones of the samples, and some of the images.
    request = Request(("fid",), samples=str(tmp_path / "fake"), reference=str(tmp_path / "real"))
    some = evaluate_samples(None, tmp_path / "out", request._replace(num_samples=20, num_images=30))
    assert some["num_samples"] == 20 and some["references"]["inception"]["images"] == 30
    # The Inception score needs no reference.
    alone = evaluate_samples(
        None, tmp_path / "out", request._replace(metrics=("is",), reference="")
    )
    assert list(alone["metrics"]) == ["is"] and alone["references"] == {}


def test_a_reference_alone_for_each_network(workdir, tmp_path):
    file = tmp_path / "deep" / "real.npz"
    request = Request(("fid", "kid", "fd_dino"), num_samples=0, dino="towers")
    out = tmp_path / "out"
    made = evaluate_samples(workdir, out, request._replace(write_reference=str(file)))
    assert made == {}
    assert sorted(path.name for path in file.parent.iterdir()) == ["real.npz", "real_dino.npz"]
    with np.load(file) as entries:
        mean, covariance = statistics(extract(real_images()))
        np.testing.assert_allclose(entries["mu"], mean, rtol=1e-5)  # float32 of another batch
        np.testing.assert_allclose(entries["sigma"], covariance, atol=1e-6)
        assert entries["features"].shape == (60, 6)
    request = request._replace(num_samples=40, reference=str(file))
    record = evaluate_samples(workdir, out, request)
    origins = {name: r["origin"] for name, r in record["references"].items()}
    assert origins == dict.fromkeys(("inception", "dino"), "emoji, train[:60]")
    assert record["references"]["dino"]["network"] == record["networks"]["dino"]["digest"]


def test_references_that_do_not_fit_are_refused_unless_forced(archives, tmp_path):
    given = dict(samples=str(archives / "fake.npz"), reference=str(tmp_path / "real.npz"))
    request = Request(("fid",), **given)
    making = request._replace(
        reference=str(archives / "real.npz"), write_reference=given["reference"]
    )
    evaluate_samples(None, tmp_path, making)
    with pytest.raises(UserError, match="resize rule 'pytorch'"):
        evaluate_samples(None, tmp_path, request._replace(resize="tensorflow"))
    forced = evaluate_samples(None, tmp_path, request._replace(resize="tensorflow", force=True))
    assert any(note.startswith("forced: ") for note in forced["notes"])
    entries = dict(np.load(given["reference"]))
    about = json.loads(str(entries["about"])) | {"resolution": 16}
    np.savez(tmp_path / "large.npz", **(entries | {"about": np.array(json.dumps(about))}))
    with pytest.raises(UserError, match=r"of images of 16x8 .*, but the samples have 8x8"):
        large = str(tmp_path / "large.npz")
        evaluate_samples(None, tmp_path, request._replace(reference=large))
    about |= {"resolution": 8, "width": 16}
    np.savez(tmp_path / "wide.npz", **(entries | {"about": np.array(json.dumps(about))}))
    wide = request._replace(reference=str(tmp_path / "wide.npz"))
    with pytest.raises(UserError, match=r"of images of 8x16 .*, but the samples have 8x8"):
        evaluate_samples(None, tmp_path, wide)
    forced = evaluate_samples(None, tmp_path, wide._replace(force=True))
    assert "forced: the reference is of images of 8x16, the samples of 8x8" in forced["notes"]
    bare = tmp_path / "bare.npz"
    np.savez(bare, mu=entries["mu"], sigma=entries["sigma"])
    found = evaluate_samples(None, tmp_path, request._replace(reference=str(bare)))
    assert any("does not say of which size" in note for note in found["notes"])
    with pytest.raises(UserError, match="has statistics only, but KID"):
        evaluate_samples(None, tmp_path, request._replace(metrics=("kid",)))


@pytest.mark.parametrize(
    ("mode", "size", "message"),
    [
        ("L", (8, 8), "has the mode L, but must be RGB"),
        ("RGBA", (8, 8), "has the mode RGBA, but must be RGB"),
        ("RGB", (8, 9), r"has 9x8 pixels \(height x width\), but 0.png has 8x8"),
    ],
)
def test_images_that_are_not_alike_are_refused(mode, size, message, archives, tmp_path):
    for i in range(20):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / f"{i}.png")
    Image.new(mode, size).save(tmp_path / "9.png")
    request = Request(("fid",), samples=str(tmp_path), reference=str(archives / "real.npz"))
    with pytest.raises(UserError, match=message):
        evaluate_samples(None, tmp_path / "out", request)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(metrics=("fid", "psnr")), "unknown metric 'psnr': choose from fid, fid_infinity"),
        (dict(metrics=()), "no metric given"),
        (dict(num_samples=0), "give --write_reference=FILE.npz"),
        (dict(num_samples=-1), "must be at least 0"),
        (dict(metrics=("is",), write_reference="a.npz"), "needs a metric that takes one"),
        (dict(metrics=("fd_dino",)), "fd_dino needs the weights of DINOv2"),
        (dict(labels="all"), "choose from data, uniform"),
        (dict(reference="nowhere"), "neither a folder nor an .npz file"),
        (dict(reference="nowhere.npz"), "no reference at nowhere.npz"),
        (dict(reference="nowhere.npz", num_images=3), "--num_images is of images"),
        (dict(samples="nowhere"), "neither a folder of images nor an .npz file"),
        (dict(samples="x", steps=3), "--steps is of samples that are made here"),
        (dict(samples="x", labels="uniform"), "--labels is of samples that are made here"),
        (dict(metrics=("fid",), dino="x"), "--dino is of fd_dino, which is not among"),
        (dict(samples="x", reference="y", source="emoji"), "--source is of data, but .* a folder"),
        (dict(samples="x", reference="y.npz", split="test"), "--split is of data, but .* a file"),
        (dict(samples="x", metrics=("is",), source="emoji"), "--source is of metrics such as fid"),
        (dict(labels="uniform", reference="y.npz", split="train"), "--split is of data, but"),
        (dict(metrics=("is",), reference="y.npz"), "--reference is of metrics such as fid"),
        (dict(metrics=("kid",), num_samples=39), "kid: .*at least 40 images.*, or leave 'kid' out"),
        (dict(metrics=("recall",), num_samples=3), "recall: .*at least 4 images"),
        (dict(metrics=("is",), num_samples=19), "is: .*at least 20 images"),
        (dict(metrics=("fid",), num_samples=1), "at least 2 samples, got 1; 10,000 are the least"),
        (dict(metrics=("fid_infinity",), num_samples=13), "at least 14 samples, got 13"),
        (dict(split="tset"), "no split 'tset'"),
        (dict(batch_size=-1), "batch size is -1"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(changes, message, workdir, tmp_path):
    request = Request(**{"num_samples": 50, **changes})
    with pytest.raises(UserError, match=message):
        evaluate_samples(workdir, tmp_path, request)
    assert not (tmp_path / "features").exists()


def test_without_a_workdir_both_sets_must_be_given():
    with pytest.raises(UserError, match="both --samples and --reference"):
        evaluate_samples(None, pathlib.Path(), Request(samples="a.npz"))


def test_more_features_than_memory_are_refused(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr("ldm_jax.sample_metrics.memory.free_on_host", lambda: 1000)
    with pytest.raises(UserError, match="are free: ask for fewer by --num_samples"):
        evaluate_samples(workdir, tmp_path, Request(("fid",), num_samples=20))


def test_features_of_a_part_of_many_real_images_are_kept(archives, tmp_path, monkeypatch):
    monkeypatch.setattr(references_lib, "KEPT", 45)
    real = np.load(archives / "real.npz")["arr_0"]
    save_numbered(tmp_path / "real", real)
    request = Request(
        ("fid", "kid"), samples=str(archives / "fake.npz"), reference=str(tmp_path / "real")
    )
    record = evaluate_samples(None, tmp_path, request)
    found = record["references"]["inception"]
    assert (found["images"], found["features"]) == (60, 45)
    fake = np.load(archives / "fake.npz")["arr_0"]
    fid = frechet_distance(*statistics(extract(real)), *statistics(extract(fake)))
    np.testing.assert_allclose(record["metrics"]["fid"]["value"], fid, rtol=1e-4)  # of all


def test_a_data_set_with_a_bad_image_is_evaluated_as_it_was_trained_on(archives, tmp_path, capfd):
    real = np.load(archives / "real.npz")["arr_0"]
    save_numbered(tmp_path / "real", real)
    names = sorted((tmp_path / "real").glob("*.png"))
    names[17].write_bytes(b"no image")
    request = Request(
        ("fid", "kid"), samples=str(archives / "fake.npz"), reference=str(tmp_path / "real")
    )
    with pytest.raises(UserError, match=r"1 of 60 examples .* more than config.data.max_bad=0.01"):
        evaluate_samples(None, tmp_path / "out", request)
    config = toy(**{"data.max_bad": 0.02, "data.source": f"folder:{tmp_path / 'real'}"})
    config.data.split = "train"
    origin = image_origins.data_images(config, (8, 8))
    rows = np.concatenate([*origin.parts(0)])
    kept = np.delete(np.arange(60), 17)
    np.testing.assert_array_equal(rows[kept], real[kept])
    assert (rows[17] == real).all((1, 2, 3)).sum() == 1  # another one, as in training
    np.testing.assert_array_equal(np.concatenate([*origin.parts(16)]), rows[16:])
    # Conditions, and what is judged: with the names of those that were read.
    config.data.resolution = 16
    rows = np.concatenate([*image_origins.data_images(config, (16, 16)).parts(0)])
    reader = open_examples(config, tmp_path, "train")
    held = reader.read(range(15, 20))
    assert len(set(held.names)) == 5 and reader.source.name(17) not in held.names
    np.testing.assert_array_equal(held.images, rows[15:20])
    assert capfd.readouterr().out.count("another example takes its place") >= 2
    # Of few that are drawn the share is that of the whole set.
    assert len(reader.only(range(15, 20)).read(range(5)).images) == 5


def test_metrics_of_the_same_samples_are_kept_together(archives, tmp_path):
    file = tmp_path / "metrics.json"
    request = Request(
        ("fid",), samples=str(archives / "fake.npz"), reference=str(archives / "real.npz")
    )

    def write(**changes):
        record = evaluate_samples(None, tmp_path / "out", request._replace(**changes))
        records.write_record(file, {"foreign_samples": record})
        return json.loads(file.read_text())["foreign_samples"]

    first = write()
    found = write(metrics=("kid", "is"))
    assert list(found["metrics"]) == ["fid", "kid", "is"]
    assert found["metrics"]["fid"] == first["metrics"]["fid"]
    assert len(found["notes"]) == len(set(found["notes"])) > 0
    # Of fewer samples, another resize rule or another reference nothing is kept.
    for changes in (
        dict(num_samples=45),
        dict(resize="tensorflow"),
        dict(reference=str(archives / "fake.npz")),
    ):
        assert list(write(**changes)["metrics"]) == ["fid"]
        write()
        assert list(write(metrics=("kid",), **changes)["metrics"]) == ["kid"]
    # The digest of a reference does not depend on how many images are read at a time.
    assert (
        first["references"]["inception"]["digest"] == write()["references"]["inception"]["digest"]
    )


# -- the command --------------------------------------------------------------------------------


@pytest.fixture
def evaluate(import_command):
    module = import_command("ldm_jax.evaluate")
    flags.FLAGS.mark_as_parsed()
    return module


def test_the_metrics_say_what_is_evaluated(evaluate):
    assert set(evaluate.SAMPLE_METRICS) == set(METRICS)
    for given, want in (
        (dict(metrics=["fid", "is"]), "samples"),
        (dict(metrics=["psnr"]), "reconstruction"),
        ({}, "reconstruction"),
        (dict(of="samples"), "samples"),
        (dict(of="condition"), "condition"),
    ):
        with flagsaver.flagsaver(**given):
            assert evaluate._kind() == want
    with flagsaver.flagsaver(metrics=["fid", "psnr"]), pytest.raises(UserError, match="psnr and"):
        evaluate._kind()


def test_the_command_writes_a_section_and_a_line(evaluate, workdir, archives, capsys):
    root = workdir
    (root / "evaluation").mkdir(exist_ok=True)
    (root / "evaluation" / "metrics.json").write_text('{"condition": 1}')
    given = dict(workdir=str(root), metrics=["fid", "kid"], num_samples=40)
    for _ in range(2):
        with flagsaver.flagsaver(**given):
            evaluate.main()
    said = capsys.readouterr().out
    record = json.loads((root / "evaluation" / "metrics.json").read_text())
    assert list(record) == ["condition", "samples"]
    value = record["samples"]["metrics"]["fid"]["value"]
    assert f"  fid              {value:>10.4f}\n" in said
    assert "40 samples of 8x8 (step 7, " in said and "note: fid of 40 samples are biased" in said
    readme = (root / "README.md").read_text()
    lines = [line for line in readme.splitlines() if line.startswith("- ")]
    assert readme.startswith(f"# {root.name}\n\n## Evaluations\n\n- **fid {value:.4g}, kid ")
    assert len(lines) == 1 and "against emoji, train[:60] (60 images)" in lines[0]
    # Images made elsewhere need no workdir, but a place to write to.
    given = dict(samples=str(archives / "fake.npz"), reference=str(archives / "real.npz"))
    given |= dict(metrics=["fid"])
    with flagsaver.flagsaver(**given), pytest.raises(UserError, match="say by --out where"):
        evaluate.main()
    with flagsaver.flagsaver(**given, out=str(archives / "out")):
        evaluate.main()
    assert list(json.loads((archives / "out" / "metrics.json").read_text())) == ["foreign_samples"]
    # Beside a model's own figures they are a section of their own.
    with flagsaver.flagsaver(**given, workdir=str(root)):
        evaluate.main()
    both = json.loads((root / "evaluation" / "metrics.json").read_text())
    assert list(both) == ["condition", "samples", "foreign_samples"]
    assert both["samples"] == record["samples"]
    assert (root / "evaluation" / "foreign_samples.png").is_file()
    with flagsaver.flagsaver(metrics=["fid"]), pytest.raises(UserError, match="no workdir given"):
        evaluate.main()


def test_lines_of_a_readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# Mine\n\n## Evaluations\n\n- one\n\n## More\n\nwords\n")
    for line in ("- two", "- one", "- two"):
        records.add_to_readme(tmp_path, line)
    assert path.read_text() == "# Mine\n\n## Evaluations\n\n- one\n- two\n\n## More\n\nwords\n"
    path.write_text("words\n")
    records.add_to_readme(tmp_path, "- one")
    assert path.read_text() == "words\n\n## Evaluations\n\n- one\n"


def test_two_processes_find_the_same_as_one(workdir, tmp_path):
    before = f"import sys\nsys.path.insert(0, {str(TESTS)!r})\nimport stub_features\n"
    before += "stub_features.install()\nfrom ldm_jax import image_origins\nimage_origins.UNIT = 16"
    arguments = ["--metrics=fid,kid,is", "--num_samples=41", f"--out={tmp_path / 'two'}"]
    processes = start(2, "evaluate", f"--workdir={workdir}", *arguments, before=before)
    one = evaluate_samples(workdir, tmp_path / "one", Request(("fid", "kid", "is"), num_samples=41))
    finish(processes)
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())["samples"]
    for name, found in one["metrics"].items():  # float32 samples on other devices
        np.testing.assert_allclose(found["value"], two["metrics"][name]["value"], rtol=1e-3)
    assert two["conditions"] == one["conditions"] and two["weights"] == one["weights"]


def test_a_table_without_a_model():
    record = {
        "metrics": {"fid": {"value": 3.25}, "is": {"value": 9.5, "std": 0.25}},
        "num_samples": 50_000,
        "size": [32, 32],
        "samples": "images of made.npz",
        "networks": {"inception": {"digest": "ab" * 32, "resize": "pytorch"}},
        "references": {"inception": {"origin": "c.npz", "images": None, "digest": "cd" * 32}},
        "notes": [],
    }
    assert evaluation_tables.samples_table(record).splitlines() == [
        "50,000 images of made.npz of 32x32:",
        "  fid                  3.2500",
        "  is                   9.5000 +- 0.2500",
        "network (inception): abababababab, resized as 'pytorch'",
        "reference (inception): c.npz, unknown number of images, cdcdcdcdcdcd",
    ]
    line = evaluation_tables.samples_line(record)
    assert line == (
        "- **fid 3.25, is 9.5 ± 0.25** of 50,000 images of made.npz of 32x32, against c.npz; "
        "inception abababababab"
    )
