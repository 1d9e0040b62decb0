"""How well samples obey their conditions: judges, figures and the command, on untrained models."""

import json
import os

import jax
import numpy as np
import pytest
from commands import command
from PIL import Image
from toy_models import save_untrained

from ldm_jax import condition_judges as judging
from ldm_jax import condition_sheet, judges, tensors
from ldm_jax import config as config_lib
from ldm_jax import workdir as files
from ldm_jax.condition_figures import FIGURES, Context, guided_tasks
from ldm_jax.data import scenes_vocabulary as vocabulary
from ldm_jax.data.draws import Uniforms
from ldm_jax.data.layout import encode_layout
from ldm_jax.errors import UserError
from ldm_jax.extractors import Clip
from ldm_jax.first_stage import lpips as lpips_module
from ldm_jax.held_out import count_trained, read_examples
from ldm_jax.images import encode_png
from ldm_jax.metrics.consistency import derangement
from ldm_jax.metrics.features import Extractor
from ldm_jax.obedience import Request, evaluate_conditions
from ldm_jax.perceptual import load_perceptual
from ldm_jax.records import write_record
from ldm_jax.weights import FILES


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    """Judges see little; nothing is fetched, and LPIPS is small."""
    monkeypatch.setattr(judging, "STEPS", dict.fromkeys(judging.STEPS, 2))
    monkeypatch.setattr(judging, "IMAGES", 40)
    monkeypatch.setenv("LDM_JAX_WEIGHTS", str(tmp_path / "cache"))
    monkeypatch.setattr(lpips_module, "VGG16", ((1, 4), (1, 4)))


@pytest.fixture
def fetched(tmp_path):
    params = judges.load_networks(["lpips"], "random")["lpips"]
    tensors.save_tensors(tmp_path / "cache" / FILES["lpips"], jax.device_get(params))


def toy(*conditioners, **changes):
    c = config_lib.get_config()
    fields = tuple(f for name in conditioners for f in config_lib.FIELDS[name])
    c.data.update(source="scenes", split="train[:300]", resolution=32, flip=False, fields=fields)
    c.data.update(threads=2)
    c.conditioners = conditioners
    c.first_stage.update(kind="kl", width=8, mult=(1,), depth=1, patch=4, norm_groups=8)
    c.first_stage.update(mid_attn=False, z_channels=3, channels=3)
    c.first_stage.eval.split = "train[300:600]"
    c.denoiser.update(width=32, mult=(1,), depth=1, attn_downsample=(1,))
    c.denoiser.cross_attention = bool({"layout", "text"} & set(conditioners))
    c.label.update(num_classes=6, width=128, slot="vector")
    c.text.update(encoder="bert", tokenizer=vocabulary.NAME, vocab_size=vocabulary.SIZE)
    c.text.update(width=32, mlp_width=128, depth=1, heads=2, length=vocabulary.LENGTH)
    c.text.update(null_tokens=vocabulary.NULL_TOKENS, pad_token=vocabulary.PAD_TOKEN)
    c.layout.update(vocab_size=401, width=32, depth=1, length=18, null=True)
    c.segmentation.update(num_classes=7, stages=2)
    c.sample.update(steps=2, batch_size=8)
    c.update_from_flattened_dict(changes)
    return config_lib.check(c)


def save(root, config):
    return save_untrained(root, config, label_names=tuple("abcdef"))


# -- the whole ----------------------------------------------------------------------------------

ALL = ("label", "text", "layout", "segmentation", "low_res", "inpainting")
SHARES = ("class_accuracy", "caption_retrieval", "box_class_accuracy", "box_iou")
SHARES += ("pixel_agreement", "object_pixel_agreement")


@pytest.mark.slow
def test_all_conditions_of_a_model_are_measured(tmp_path, fetched, capsys):
    root = save(tmp_path / "run", toy(*ALL))
    record, sheet = evaluate_conditions(root, Request(num_images=50, seed=3))
    figures = record["figures"]
    for name in SHARES:
        assert list(figures[name]) == ["samples", "shuffled", "real"]
        assert all(0 <= value <= 1 for value in figures[name].values())
    for name in ("psnr", "ssim", "lpips"):
        assert list(figures[name]) == ["samples", "shuffled", "bicubic"]
    assert figures["psnr"]["bicubic"] > figures["psnr"]["samples"]
    assert "real" not in figures["low_res_psnr"]  # which would be equal by definition
    assert list(figures["hole_lpips"]) == ["samples", "shuffled", "mean colour"]
    assert figures["change_outside_hole"] == {"samples": 0}
    assert set(figures) == {*SHARES, "psnr", "ssim", "lpips", "low_res_psnr", "hole_lpips"} | {
        "change_outside_hole"
    }
    judges = record.pop("judges")
    assert set(judges) == {"label", "text", "layout", "segmentation"}
    assert all(0 <= judge["held_out"] <= 1 for judge in judges.values())
    del record["figures"]
    assert len(record.pop("weights")) == 64
    assert record == {
        "num_images": 50,
        "source": "scenes",
        "split": "train[300:600]",
        "where": "",
        "seed": 3,
        "sampler": "ddim",
        "steps": 2,
        "eta": 1.0,
        "spacing": "leading",
        "guidance_scale": 1.0,
        "checkpoint_step": 0,
        "notes": [],
    }
    # Six rows of two examples: six conditions, the real image and three samples each.
    sizes = condition_sheet.SIZES
    assert sheet.shape[1] in [2 * (10 * (size + 3) + 3) + 12 for size in sizes]
    assert len(encode_png(sheet, condition_sheet.COLOURS)) < 300_000
    # The judges are kept.
    assert capsys.readouterr().out.count("fitting a judge") == 4
    assert len(list((root / "evaluation").glob("judge_*.msgpack"))) == 4


def test_the_command_keeps_what_was_measured_before(tmp_path):
    root = save(tmp_path / "run", toy())
    (root / "evaluation").mkdir()
    (root / "evaluation" / "metrics.json").write_text('{"resolution": 32}')
    done = command(
        "evaluate", f"--workdir={root}", "--of=condition", "--num_images=3", "--steps=1",
        "--guidance_scale=1", "--sampler=ddim", "--split=train[:300]",
    )  # fmt: skip
    assert "3 conditions (scenes, train[:300]), step 0, ddim, 1 steps, guidance 1" in done.stdout
    assert "note: 3 of the 3 conditions are of training images" in done.stdout
    assert "note: no LPIPS: " in done.stdout and "fetch lpips" in done.stdout
    record = json.loads((root / "evaluation" / "metrics.json").read_text())
    assert list(record) == ["resolution", "condition"]
    figures = record["condition"]["figures"]
    assert list(figures) == [
        "change_outside_hole", "luma_error", "colorize_colourfulness", "stroke_distance",
        "stroke_colourfulness",
    ]  # fmt: skip
    assert figures["luma_error"]["real"] < 0.5  # of rounding
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("  stroke_distance"))
    assert line.split()[1] == f"{figures['stroke_distance']['samples']:.4f}"
    assert Image.open(root / "evaluation" / "condition.png").width > 5 * 32
    # A later evaluation of the first stage leaves it there.
    write_record(root / "evaluation" / "metrics.json", {"resolution": 64})
    record = json.loads((root / "evaluation" / "metrics.json").read_text())
    assert record["resolution"] == 64 and record["condition"]["figures"] == figures


def test_what_cannot_be_evaluated_is_refused(tmp_path):
    root = save(tmp_path / "text", toy("text"))
    with pytest.raises(UserError, match=r"20 conditions are too few .* needs at least 50"):
        evaluate_conditions(root, Request(num_images=20))
    with pytest.raises(UserError, match="no split 'tset'"):
        evaluate_conditions(root, Request(split="tset"))
    alone = toy(**{"train.steps": 0})
    random = np.random.RandomState(0)
    variables = jax.tree.map(
        lambda x: random.standard_normal(x.shape).astype(np.float32),
        files.abstract_first_stage(alone),
    )
    files.save_model(tmp_path / "alone", alone, {"first_stage": variables})
    with pytest.raises(UserError, match="a first stage and no denoiser"):
        evaluate_conditions(tmp_path / "alone", Request())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--of=conditions"], "--of=conditions: choose from reconstruction, condition"),
        (["--of=condition", "--metrics=psnr"], "--metrics is of --of=reconstruction"),
        (["--steps=3"], "--steps is of --of=condition"),
        (["--of=memorisation", "--clip=x"], "--clip is of --of=condition: leave"),
        (["--num_training=9"], "--num_training is of --of=memorisation: leave"),
    ],
)
def test_bad_commands_get_one_clear_line(args, message):
    done = command("evaluate", "--workdir=/nowhere", *args, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert message in done.stderr


# -- the parts ----------------------------------------------------------------------------------


def test_examples_are_drawn_evenly_and_hold_what_conditions_take(tmp_path):
    config = toy("text", "layout", "inpainting")
    held = read_examples(config, tmp_path, "train[300:600]", 20)
    assert held.images.shape == (20, 32, 32, 3) and held.images.dtype == np.uint8
    # No 'masked_image', which is large; maps, since scenes have them.
    assert set(held.fields) == {"tokens", "boxes", "mask", "segmentation"}
    assert held.map_classes == (1, 2, 3, 4, 5, 6)
    numbers = [int(name.split()[1]) for name in held.names]
    everything = read_examples(config, tmp_path, "train[300:600]")
    assert len(everything.names) == 300 and numbers == sorted(numbers)
    place = [everything.names.index(name) for name in held.names]
    assert max(place) > 200  # not the first ones
    np.testing.assert_array_equal(held.images, everything.images[place])
    tokens = files.training_tokenizer(tmp_path, config)[0](held.captions)
    np.testing.assert_array_equal(held.fields["tokens"], tokens)
    assert count_trained(config, held.names, "train[300:600]") == 0
    config = toy("label", **{"data.split": "train[:400]"})
    trained = read_examples(config, tmp_path, "train[:400]").names
    assert count_trained(config, held.names, "") == len(set(trained) & set(held.names)) > 0


def test_boxes_as_the_model_sees_them():
    boxes = [(3, 0.5, 0.5, 1.0, 1.0), (1, 0.0, 0.0, 0.25, 0.25)]
    crop = (0.5, 0.0, 1.0, 1.0)
    # Corners lie on a grid of 1/20: exact here.
    found = judging.visible_boxes(encode_layout(boxes, 11, 441, crop), 441)
    assert [box[0] for box in found] == [3]
    np.testing.assert_allclose(found[0][1:], (0.0, 0.5, 1.0, 1.0))
    found = judging.visible_boxes(encode_layout(boxes[:1], 9, 441), 441)
    np.testing.assert_allclose(found, boxes[:1])


def test_crops_and_the_background_between_boxes():
    image = np.zeros((1, 64, 64, 3), np.uint8)
    image[:, 32:, :32] = 200
    edges = [[(0.0, 0.5, 0.5, 1.0), (0.5, 0.0, 1.0, 0.5)]]
    found = judging.crops(image, edges)
    assert found.shape == (2, 32, 32, 3)
    assert (found[0] == 200).all() and (found[1] == 0).all()
    boxes = [(0, 0.1, 0.1, 0.4, 0.4), (2, 0.5, 0.5, 0.9, 0.8)]
    for i in range(20):
        for x0, y0, x1, y1 in judging.background_boxes(boxes, Uniforms(0, 0, i)):
            for _, a, b, c, d in boxes:
                both = max(0, min(x1, c) - max(x0, a)) * max(0, min(y1, d) - max(y0, b))
                assert both <= 0.1 * (x1 - x0) * (y1 - y0) + 1e-9
    assert judging.background_boxes([(0, 0.0, 0.0, 1.0, 1.0)], Uniforms(0)) == []


def test_large_images_are_judged_at_64():
    images = np.repeat(np.repeat(np.arange(64, dtype=np.uint8), 4)[None, :, None, None], 256, 2)
    images = np.repeat(images, 3, 3)
    small = judging.judged_size(images)
    assert small.shape == (1, 64, 64, 3)
    np.testing.assert_array_equal(small[0, :, 0, 0], np.arange(64))
    np.testing.assert_array_equal(judging.judged_maps(images[..., 0])[0, :, 0], np.arange(64))
    assert judging.judged_size(images[:, :48, :48]).shape == (1, 48, 48, 3)


def test_what_judges_are_fitted_to_is_reduced_while_it_is_read(tmp_path):
    config = toy("label", "segmentation", **{"data.resolution": 128})
    full = read_examples(config, tmp_path, "train[:300]", 5)
    small = read_examples(config, tmp_path, "train[:300]", 5, reduce=judging.reduced)
    assert small.images.shape == (5, 64, 64, 3)
    np.testing.assert_array_equal(small.images, judging.judged_size(full.images))
    maps = judging.judged_maps(full.fields["segmentation"])
    np.testing.assert_array_equal(small.fields["segmentation"], maps)
    np.testing.assert_array_equal(small.fields["label"], full.fields["label"])
    assert small.names == full.names and small.ground == full.ground == 0
    # What they see of images that are reduced already is the same.
    np.testing.assert_array_equal(judging.judged_size(small.images), small.images)
    whole = judging.reduced({"image": full.images, "mask": full.images}, whole=True)
    assert set(whole) == {"image"} and whole["image"].shape == (5, 128, 128, 3)


@pytest.mark.parametrize("kind", ["label", "layout"])
def test_classes_of_other_data_are_found_by_name(kind, tmp_path):
    config, split = toy(kind), "train[300:600]"
    plain = read_examples(config, tmp_path, split, 5)
    known = plain.label_names
    assert read_examples(config, tmp_path, split, 5, known).label_names == known
    names = ["other", *reversed(known)]
    found = read_examples(config, tmp_path, split, 5, names)
    assert found.label_names == tuple(names) and found.num_labels == 7
    if kind == "label":
        want = [names.index(known[i]) for i in plain.fields["label"]]
        np.testing.assert_array_equal(found.fields["label"], want)
    else:
        for ours, theirs in zip(found.fields["boxes"], plain.fields["boxes"], strict=True):
            pairs = zip(*(judging.visible_boxes(x, 401) for x in (ours, theirs)), strict=True)
            assert all(names[a[0]] == known[b[0]] and a[1:] == b[1:] for a, b in pairs)
    with pytest.raises(UserError, match=rf"class '{known[1]}' and 4 more, which the model has not"):
        read_examples(config, tmp_path, split, 5, [known[0]])


def test_the_command_takes_classes_of_other_data_by_name(tmp_path):
    config = toy("label", **{"data.source": "emoji"})
    with pytest.raises(UserError, match="the data have the class 'animal' and 5 more, which the"):
        evaluate_conditions(save(tmp_path, config), Request(source="scenes"))


@pytest.mark.parametrize("kind", ["label", "text", "segmentation"])
def test_samples_are_judged_once(kind, tmp_path, monkeypatch):
    config = toy(kind)
    held = read_examples(config, tmp_path, "train[300:600]", 4)
    seen = []

    def scores(network, judge, images):
        seen.append(len(images))
        return np.zeros((len(images), *([32, 32] if kind == "segmentation" else []), 7))

    def embeddings(judge, images, texts):
        seen.append(len(images))
        return np.ones((len(images), 2)), np.ones((len(texts), 2))

    monkeypatch.setattr(judging, "scores", scores)
    monkeypatch.setattr(judging, "embeddings", embeddings)
    context = Context(config, held, lambda kind: {}, None)
    FIGURES[kind](context, held.images, derangement(4))
    assert seen == [4, 4]  # the samples, and the real images


def test_clip_scores_images_by_their_captions(tmp_path, monkeypatch):
    held = read_examples(toy("text"), tmp_path, "train[300:600]", 4)
    embeddings = lambda judge, x, texts: (np.ones((4, 2)), np.ones((4, 2)))  # noqa: E731
    monkeypatch.setattr(judging, "embeddings", embeddings)
    # Image and caption i lie on axis i, but those of the real images halfway to another axis.
    own, halfway = np.eye(8)[:4], np.eye(8)[:4] + np.eye(8)[4:]
    samples = np.zeros_like(held.images)
    pool = lambda x: {"pool": halfway if x is held.images else own}  # noqa: E731
    clip = Clip(Extractor("clip", "", "", {"pool": 8}, pool), lambda captions: 3 * own)
    context = Context(toy("text"), held, lambda kind: {}, None, clip)
    figures = FIGURES["text"](context, samples, derangement(4))
    assert list(figures) == ["caption_retrieval", "clip_score"]
    want = {"samples": 100, "shuffled": 0, "real": 100 / np.sqrt(2)}
    assert figures["clip_score"] == pytest.approx(want)


def test_clip_is_for_models_of_texts(tmp_path):
    with pytest.raises(UserError, match="--clip is for models of texts"):
        evaluate_conditions(save(tmp_path / "run", toy("label")), Request(clip="clip"))
    with pytest.raises(UserError, match=r"no CLIP in clip: it has no config\.json"):
        evaluate_conditions(save(tmp_path / "text", toy("text")), Request(clip="clip"))


def test_maps_without_a_ground_have_no_objects(tmp_path, monkeypatch):
    config = toy("segmentation")
    held = read_examples(config, tmp_path, "train[300:600]", 4)
    monkeypatch.setattr(judging, "scores", lambda network, judge, x: np.zeros((4, 32, 32, 7)))
    figures = {}
    for ground in (0, None):
        context = Context(config, held._replace(ground=ground), lambda kind: {}, None)
        figures[ground] = set(FIGURES["segmentation"](context, held.images, derangement(4)))
    assert figures == {0: {"pixel_agreement", "object_pixel_agreement"}, None: {"pixel_agreement"}}


def test_a_judge_of_a_folder_follows_from_its_files(tmp_path, monkeypatch):
    root, fitted = tmp_path / "images", []
    root.mkdir()
    for i in range(3):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(root / f"{i}.png")
    config = toy("label", **{"data.source": f"folder:{root}"})
    fit = lambda *args: fitted.append(1) or {"images": 3}  # noqa: E731
    monkeypatch.setitem(judging.FITTED, "label", fit)
    held = read_examples(toy("label"), tmp_path, "train[:4]")

    def fits():
        judging.load_judge(tmp_path / "judges", "label", config, lambda: held)
        return len(fitted)

    assert fits() == fits() == 1
    (root / "notes.txt").write_text("no image")
    assert fits() == 1
    Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(root / "3.png")
    assert fits() == 2
    stat = (root / "0.png").stat()
    os.utime(root / "0.png", ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert fits() == 3
    (root / "metadata.jsonl").write_text('{"file_name": "0.png"}')
    assert fits() == 4


def test_words():
    assert judging.split_words("A cat's BUS, left-of") == ["a", "cat", "s", "bus", "left", "of"]
    bags = judging.word_bags(["a cat, a bus", "nothing"], ["cat", "a"])
    np.testing.assert_array_equal(bags, [[1, 2], [0, 0]])


def test_a_judge_follows_from_the_data(tmp_path, monkeypatch):
    config, fitted = toy("label"), []
    monkeypatch.setitem(
        judging.FITTED, "label", lambda *args: fitted.append(1) or {"params": {}, "images": 4}
    )
    read = lambda: read_examples(config, tmp_path, "train[:4]")  # noqa: E731
    for _ in range(2):
        assert judging.load_judge(tmp_path, "label", config, read)["images"] == 4
    assert len(fitted) == 1
    judging.load_judge(tmp_path, "label", toy("label", **{"data.split": "train[:9]"}), read)
    assert len(fitted) == 2
    for path in tmp_path.glob("judge_label_*.msgpack"):
        path.write_bytes(path.read_bytes()[:3])  # cut off
    judging.load_judge(tmp_path, "label", config, read)
    assert len(fitted) == 3


def test_a_perfect_judge_tells_own_from_shuffled_conditions(tmp_path, monkeypatch):
    config = toy("segmentation")
    held = read_examples(config, tmp_path, "train[300:600]", 8)
    truth = {image.tobytes(): classes for image, classes in zip(*_pairs(held), strict=True)}

    def scores(network, judge, images):
        maps = np.stack([truth[image.tobytes()] for image in images])
        return np.eye(7, dtype=np.float32)[maps]

    monkeypatch.setattr(judging, "scores", scores)
    context = Context(config, held, lambda kind: {}, None)
    found = FIGURES["segmentation"](context, held.images, derangement(8))
    for values in found.values():
        assert values["samples"] == values["real"] == 1 and values["shuffled"] < 0.9
    # Layouts: the extents of exact maps are the boxes, but for what is hidden and the grid.
    config = toy("layout")
    held = read_examples(config, tmp_path, "train[300:600]", 8)
    context = Context(config, held, lambda kind: {}, None)
    monkeypatch.setattr(
        judging,
        "scores",
        lambda network, judge, images: (
            scores(network, judge, images)
            if images.shape[1:] == held.images.shape[1:]
            and images.tobytes() == held.images.tobytes()
            else np.zeros((len(images), 7))
        ),
    )
    found = FIGURES["layout"](context, held.images, derangement(8))["box_iou"]
    assert found["real"] == found["samples"] > 0.6 and found["shuffled"] < 0.35


def _pairs(held):
    return held.images, held.fields["segmentation"]


def test_guided_tasks_of_perfect_images(tmp_path, fetched):
    config = toy()
    held = read_examples(config, tmp_path, "train[300:600]", 4)
    lpips, note = load_perceptual(config)
    assert note == ""
    other, figures = derangement(4), {}
    for task in guided_tasks(Context(config, held, None, lpips)):
        for part in task.figures:
            figures |= part(held.images, other)
    assert figures["hole_lpips"]["samples"] == 0 != figures["hole_lpips"]["shuffled"]
    assert figures["luma_error"]["samples"] < 0.5 < figures["luma_error"]["shuffled"]
    distance = figures["stroke_distance"]
    assert distance["samples"] == distance["real"] < distance["shuffled"]


def test_a_sheet_shows_each_class_once_and_else_the_first_examples(tmp_path):
    held = read_examples(toy("label"), tmp_path, "train[300:600]", 40)
    rows = condition_sheet.choose_rows(held)
    assert held.fields["label"][rows].tolist() == sorted(set(held.fields["label"].tolist()))
    held = held._replace(fields=held.fields | {"boxes": np.zeros((40, 3))})
    assert condition_sheet.choose_rows(held) == list(range(12))


def test_a_sheet_fits_its_bytes():
    noise = np.random.RandomState(0).randint(0, 255, (12, 5, 128, 128, 3)).astype(np.uint8)
    sheet = condition_sheet.make_sheet(noise)
    plain = condition_sheet.make_sheet(0 * noise)
    assert len(encode_png(sheet, condition_sheet.COLOURS)) < 300_000
    assert sheet.shape[1] < plain.shape[1] == 2 * (5 * 131 + 3) + 12
    words = condition_sheet.draw_text("a cat left of a bus and quite some other things, too")
    assert words.shape == (128, 128, 3) and (words[60:] < 128).sum() == 0 < (words < 128).sum()
