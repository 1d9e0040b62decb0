"""The command `report`: one page of whatever a workdir holds."""

import html.parser
import json
import re

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from commands import command
from PIL import Image

from ldm_jax import config as config_lib
from ldm_jax.errors import UserError
from ldm_jax.page import photos
from ldm_jax.page.build import make_page
from ldm_jax.page.figures import find_figure
from ldm_jax.page.read import read_run
from ldm_jax.records import write_record
from ldm_jax.training.logging import MetricWriter

VOID = {"meta", "img"}
RNG = np.random.RandomState(0)


class Page(html.parser.HTMLParser):
    """A page taken apart; fails where tags do not fit."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.tags, self.ids, self.links = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, name, attributes):
        attributes = dict(attributes)
        self.tags.append((name, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes["href"]] if "href" in attributes else []
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def page_of(workdir, **options):
    return Page(make_page(read_run(workdir), "told now", **options))


def save(path, side=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.randint(0, 256, (side, side, 3), np.uint8)).save(path)


def write_config(workdir, **changes):
    config = config_lib.get_config()
    config.update_from_flattened_dict({"name": "a <b>run</b>", **changes})
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(config_lib.to_json(config))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """What a run of three stages leaves, without having run."""
    root = tmp_path_factory.mktemp("run") / "run"
    write_config(root, **{"train.steps": 20, "train.batch_size": 10, "train.fid_samples": 500})
    for folder, extra in ((root / "first_stage", {"eval_psnr": 20.0}), (root, {"fid": 50.0})):
        writer = MetricWriter(folder)
        for step in (10, 20):
            scalars = {"loss": 1 / step, "images_per_second": 100.0, "skipped": 0}
            quarters = {f"loss_q{i}": float(i + step) for i in range(4)}
            writer.write(step, scalars | (quarters if folder == root else {}))
        writer.write(20, {name: value - 5 for name, value in extra.items()})
        writer.close()
        (folder / "parameters.txt").write_text("| a |\nTotal: 1,234,567 -- 4,938,268 bytes\n")
    for step in (10, 20):
        save(root / "samples" / f"step_{step:07d}.png")
        save(root / "first_stage" / "reconstructions" / f"step_{step:07d}.png")
    save(root / "samples" / "final.png")
    save(root / "samples" / "final_nearest.png")
    save(root / "evaluation" / "condition.png")
    machine = {"devices": 8, "device": "TPU v5e", "memory_bytes": 2**34}
    start = json.dumps({"time": "2026-01-02T03:04:05+00:00"} | machine)
    (root / "starts.jsonl").write_text(f"{start}\n{start}\n")
    record = {
        "reconstruction": {"psnr": 24.5, "rfid": 3.25},
        "num_images": 64,
        "condition": {
            "figures": {"class_accuracy": {"samples": 0.75, "real": 0.875}},
            "seed": 7,
            "notes": ["<i>seen</i> before"],
        },
        "likelihood": {"ode": {"bits_per_dim": 3.125, "standard_error": 0.25, "steps": 50}},
        "samples": {
            "metrics": {
                "fid": {"value": 12.5},
                "kid": {"value": 0.001, "standard_error": 0.0005},
                "fid_infinity": {"value": 11.5, "counts": [100, 200], "distances": [13.0, 12.5]},
            },
            "sampler": "ddim",
            "num_samples": 2000,
        },
    }
    (root / "evaluation" / "metrics.json").write_text(json.dumps(record))
    return root


def test_a_page_tells_all_parts(workdir):
    page = page_of(workdir, price_per_hour=36.0)
    for text in (
        "a <b>run</b>",  # as it is: escaped in the file
        "First stage 20 steps of 48 images, 1.23 M parameters",
        "Diffusion 20 steps of 10 images",
        "Loss by amount of noise least little much most",
        "PSNR, evaluated",
        "12.5 FID of 2,000 samples",
        "24.5 PSNR of reconstructions, dB",
        "Class accuracy share, higher is better 0.75 0.875",
        "<i>seen</i> before",
        "Bits per dimension lower is better 3.125",
        "KID lower is better 0.001 0.0005",
        "fid infinity: counts 100, 200",
        "Step 10 close Step 20 close End close",
        "8 device TPU v5e",
        "memory of a host 16.0 GiB",
        "started 2 times, 2026-01-02T03:04:05+00:00 to 2026-01-02T03:04:05+00:00",
        "train.batch_size 10",
        "The same throughout: skipped steps 0, speed 100.",
    ):
        assert text in page.text, text
    titles = [attributes.get("id") for name, attributes in page.tags if name == "section"]
    assert titles == ["training", "samples", "reconstructions", "evaluation", "times", "config"]


def test_a_page_asks_nothing_of_a_network_and_its_links_lead_somewhere(workdir):
    text = make_page(read_run(workdir), "told now")
    page = Page(text)
    sources = [attributes["src"] for name, attributes in page.tags if name == "img"]
    assert len(sources) == 7 and all(s.startswith("data:image/png;base64,") for s in sources)
    assert not {"script", "link", "iframe"} & {name for name, _ in page.tags}
    assert "http://" not in text and "https://" not in text and "url(" not in text
    assert len(set(page.ids)) == len(page.ids)
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert (
        "default-src 'none'" in page.tags[[t for t, _ in page.tags].index("meta") + 2][1]["content"]
    )


def test_time_is_that_of_the_logs_and_cost_follows(workdir, monkeypatch):
    from ldm_jax.page import read

    monkeypatch.setattr(read, "_seconds", lambda path: 1800.0)
    run = read_run(workdir)
    assert [stage.seconds for stage in run.stages] == [1800.0, 1800.0]
    # 20 steps of 10 images at 100 images/s
    assert run.stages[1].step_seconds == pytest.approx(2.0)
    text = Page(make_page(run, "", 36.0)).text
    assert "1 h 00 min of training" in text and "36.00 cost, at 36 an hour" in text
    assert "cost, at" not in Page(make_page(run, "", None)).text


def test_seconds_are_between_events(tmp_path):
    from ldm_jax.page.read import _events, _seconds

    writer = MetricWriter(tmp_path)
    writer.write(1, {"loss": 1.0})
    writer.write(2, {"loss": 2.0})
    writer.close()
    (path,) = tmp_path.glob("events.out.tfevents.*")
    events = list(_events(path))
    assert [event.step for event in events][1:] == [1, 2]
    assert _seconds(path) == pytest.approx(events[-1].wall_time - events[0].wall_time)
    whole = path.read_bytes()
    for cut in (0, 5, 30, len(whole) - 3):  # a killed run's file ends anywhere
        path.write_bytes(whole[:cut])
        assert len(list(_events(path))) < len(events)
    path.write_bytes(RNG.bytes(500))
    assert _seconds(path) == 0


def test_a_workdir_with_nothing_but_a_config(tmp_path):
    write_config(tmp_path)
    page = page_of(tmp_path, price_per_hour=1.0)
    assert [a.get("id") for name, a in page.tags if name == "section"] == ["config"]
    with pytest.raises(UserError, match="is no workdir"):
        read_run(tmp_path / "nothing")


def test_damaged_files_are_told_of_and_left_out(tmp_path):
    write_config(tmp_path)
    rows = ['{"step": 1, "loss": 1.0}', '{"step": 2, "lo', "[]", '{"loss": 3}', '{"step": "a"}']
    rows += ['{"step": 3, "loss": NaN, "name": "x"}', '{"step": 4, "loss": 2.0}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "metrics.json").write_text("{")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "final.png").write_bytes(b"no picture")
    (tmp_path / "rollbacks.json").write_text('[{"step": 1}, {"step": 2}]')
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((tmp_path / "config.json").read_text()) | {"future": {"key": 1}})
    )
    text = page_of(tmp_path).text
    for part in (
        "1 lines could not be read",
        "metrics.json is damaged",
        "final.png cannot be read as a picture",
        "went back to an older checkpoint 2 times",
        "1 values are not finite",
        "This version does not know future.key",
        "is at step 4 of 100,000",
    ):
        assert part in text, part


def test_long_sequences_and_large_pictures_are_cut_down(tmp_path, monkeypatch):
    assert photos.spread(list(range(100)), 5) == [0, 25, 50, 74, 99]
    assert photos.spread([1, 2], 5) == [1, 2]
    monkeypatch.setattr(photos, "MOST_BYTES", 1000)
    monkeypatch.setattr(photos, "MOST_PIXELS", 20)
    save(tmp_path / "a.png", side=40)
    source, width, height, note = photos.data(tmp_path / "a.png")
    assert source.startswith("data:image/jpeg;base64,") and (width, height) == (20, 20)
    assert note == "(reduced from 40x40)"


def test_figures_are_found_by_name():
    record = {"a": {"fid": {"value": 3}}, "metrics": {"kid": {"value": float("nan")}}}
    assert find_figure(record, "fid") == 3 and find_figure(record, "kid") is None
    assert find_figure({"fid": 2.5}, "fid") == 2.5 and find_figure(None, "fid") is None


def test_what_evaluate_writes_is_read(tmp_path):
    write_config(tmp_path)
    (tmp_path / "evaluation").mkdir()
    write_record(tmp_path / "evaluation" / "metrics.json", {"reconstruction": {"ssim": 0.5}})
    assert "SSIM higher is better 0.5" in page_of(tmp_path).text


def test_the_command(workdir, tmp_path):
    out = tmp_path / "deep" / "page.html"
    said = command("report", f"--workdir={workdir}", f"--out={out}", "--price_per_hour=2").stdout
    assert re.fullmatch(rf"wrote {out} \(\d+\.\d MiB\): open it in a browser\n", said)
    assert "12.5 FID of 2,000 samples" in Page(out.read_text()).text
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "no workdir given"),
        (("workdir=/nowhere",), "is no workdir"),
        (("workdir={}", "price_per_hour=-1"), "--price_per_hour is -1"),
        (("workdir={}", "out={}"), "is a folder"),
    ],
)
def test_bad_input_is_refused_in_one_line(workdir, given, message, import_command):
    report = import_command("ldm_jax.report")
    flags.FLAGS.mark_as_parsed()
    with flagsaver.as_parsed(**dict(f.format(workdir).split("=") for f in given)):
        with pytest.raises(UserError, match=message):
            report.main()
