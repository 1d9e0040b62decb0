"""What the benchmark prints and writes."""

import json
import pathlib

import pytest
from commands import command

from configs import quickstart
from ldm_jax import timing
from ldm_jax.measures import MEASURES, Options, show, table

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
CONFIG = f"--config={CONFIGS / 'quickstart.py'}:smoke"
PEAK = 1e9  # operations per second


def test_table():
    rows = [{"threads": 1, "images_per_second": 1234.56}, {"threads": 16, "images_per_second": 2.0}]
    assert table(rows).splitlines() == [
        "threads  images per second",
        "      1               1235",
        "     16                  2",
    ]


def test_show():
    record = {
        "what": "train",
        "mesh": {"data": 2, "fsdp": 1},
        "compile_seconds": 1.23456,
        "memory_per_device": {"arguments": 3 * 2**20},
        "rows": [{"mfu": 0.5}],
    }
    assert show(record).splitlines() == [
        "what: train",
        "mesh: data 2, fsdp 1",
        "compile seconds: 1.235",
        "memory per device: arguments 3.0 MiB",
        "mfu",
        "0.5",
    ]


def test_data(tmp_path):
    out = tmp_path / "new" / "data.json"
    said = command(
        "benchmark", "--what=data", CONFIG, "--seconds=0.1", "--threads=1,2", f"--out={out}"
    ).stdout
    record = json.loads(out.read_text())
    assert record["what"] == "data" and record["batch_size"] == 8 and record["resolution"] == 32
    assert [row["threads"] for row in record["rows"]] == [1, 2]
    assert all(row["images_per_second"] > 0 for row in record["rows"])
    assert "images per second" in said and f"{record['rows'][0]['images_per_second']:.4g}" in said


@pytest.fixture
def options(monkeypatch, tmp_path):
    # The peak of eight stand-ins of devices on this machine would mean nothing.
    monkeypatch.setattr(timing, "matrix_peak", lambda dtype: PEAK)
    return Options(tmp_path, 0.1, batch_size=8, steps=3)


def check_rates(record):
    for row in record["rows"]:
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert row["images_per_second"] == pytest.approx(8e3 / row["median_ms"])
        rate = row["images_per_second"] * record["flops_per_image"]
        assert row["mfu"] == pytest.approx(rate / PEAK / record["devices"])
    assert record["compile_seconds"] > 0 and record["memory_per_device"]["arguments"] > 0
    json.dumps(record)


@pytest.mark.slow
def test_train_with_cached_latents_and_a_profile(options, tmp_path):
    config = quickstart.get_config("smoke")
    record = MEASURES["train"](config, options._replace(profile=str(tmp_path)))
    one, read = record["rows"]
    assert (one["batches"], read["batches"]) == ("one", "read")
    assert one["data_wait_share"] == 0 <= read["data_wait_share"] <= 1
    check_rates(record)
    assert list(tmp_path.rglob("*.xplane.pb"))
    assert config.data.cache_latents and config == quickstart.get_config("smoke")  # untouched


def test_sample(options):
    record = MEASURES["sample"](quickstart.get_config("smoke"), options)
    check_rates(record)
    # One image takes as many as there are devices.
    assert [(row["images"], row["steps"]) for row in record["rows"]] == [(8, 3), (8, 3)]
    for row in record["rows"]:
        assert row["steps_per_second"] == pytest.approx(3e3 / row["median_ms"])


@pytest.mark.parametrize("what", ["encode", "decode"])
def test_coding(what, options):
    record = MEASURES[what](quickstart.get_config("smoke"), options)
    check_rates(record)
    assert [row["images"] for row in record["rows"]] == [8]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--threads=two", "--threads must be numbers such as 1,2,4"),
        ("--seconds=0", "--seconds is 0.0, but must be above 0"),
        ("--batch_size=-1", "--batch_size is -1, but must be at least 1"),
        ("--what=nothing", f"<{'|'.join(MEASURES)}>"),
    ],
)
def test_wrong_flags(flag, message):
    done = command("benchmark", CONFIG, flag, check=False)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
