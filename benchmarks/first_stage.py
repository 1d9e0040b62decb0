"""Trains first stages that differ in one thing each on photographs, and compares them.

python -m benchmarks.first_stage --photos=photos_256.zip --out=runs/first_stages
python -m benchmarks.first_stage --photos=photos_256.zip --out=runs/first_stages --only=kl_f4_l2

`--photos` is a zip of images with a metadata.jsonl that names the `source` of each file: the
photograph that it was cut from. Whole photographs are held out, about one in eight. Each variant is
one `python -m ldm_jax.train` and one `python -m ldm_jax.evaluate`, whose command is printed; those
ending in _torch are one of `benchmarks.first_stage_torch`, which needs the extra [parity]. What is
finished is not run again. Writes `table.md` and `side_by_side.png` into `--out`.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Iterator

import numpy as np
from absl import flags
from PIL import Image

from ldm_jax import cli, images
from ldm_jax.errors import UserError

PHOTOS = flags.DEFINE_string("photos", "", "Zip of the images.")
OUT = flags.DEFINE_string("out", "", "A folder for the runs and the results.")
ONLY = flags.DEFINE_list("only", [], "Names of variants. Default: all.")
METRICS = ("psnr", "ssim", "lpips", "rfid")
SHOWN = 8  # held-out images in the picture

# Narrow networks, on images that two CPU cores can train on.
SHARED = {
    "data.resolution": 64,
    "data.crop": "center",
    "first_stage.width": 24,
    "first_stage.norm_groups": 8,
    "first_stage.depth": 1,
    "first_stage.log_variance": -6.0,
    "first_stage.discriminator.width": 32,
    "first_stage.discriminator.layers": 2,
    "first_stage.discriminator.start": 80,
    "first_stage.discriminator.lr": 5e-4,
    "first_stage.train.batch_size": 8,
    "first_stage.train.steps": 200,
    "first_stage.train.optimizer": "muon",
    "first_stage.train.lr": 0.01,
    "first_stage.train.warmup_steps": 20,
    "first_stage.train.lr_decay": "cosine",
    "first_stage.train.log_every": 20,
    "first_stage.train.picture_every": 0,
    "first_stage.train.checkpoint_every": 100,
    "first_stage.eval.metrics": "('psnr',)",
    "first_stage.eval.split": "test",
}
NO_ADVERSARY = {"first_stage.discriminator.weight": 0.0}
PIXELS_ONLY = NO_ADVERSARY | {"first_stage.perceptual_weight": 0.0}
L2 = PIXELS_ONLY | {"first_stage.loss": "l2"}
# Options are compared without LPIPS, which would take most of the time, at half the resolution.
SMALL = {
    "data.resolution": 32,
    "first_stage.perceptual_weight": 0.0,
    "first_stage.train.steps": 300,
    "first_stage.discriminator.start": 100,
}
ADAM = {  # as in the original code, one learning rate for both networks
    "first_stage.train.optimizer": "adamw",
    "first_stage.train.lr": 1e-3,
    "first_stage.discriminator.lr": 0.0,
}
SMALL_PIXELS = SMALL | NO_ADVERSARY
FSQ = {"first_stage.kind": "fsq", "first_stage.levels": (20, 20, 20)}

# name: (config, changes)
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "kl_f4_l2": ("autoencoder_kl_f4", L2),
    "kl_f4_lpips": ("autoencoder_kl_f4", NO_ADVERSARY),
    "kl_f4": ("autoencoder_kl_f4", {}),
    "vq_f4_l2": ("autoencoder_vq_f4", L2),
    "vq_f4_lpips": ("autoencoder_vq_f4", NO_ADVERSARY),
    "vq_f4": ("autoencoder_vq_f4", {}),
    "vq_f4_modern": ("autoencoder_vq_f4:modern", {}),
    "kl_f8": ("autoencoder_kl_f8", {}),
    "kl_f4_adam": ("autoencoder_kl_f4", ADAM),
    "kl_f4_adam_torch": ("autoencoder_kl_f4", ADAM),
    "vq_f4_adam": ("autoencoder_vq_f4", ADAM),
    "vq_f4_adam_torch": ("autoencoder_vq_f4", ADAM),
    "small_vq": ("autoencoder_vq_f4", SMALL_PIXELS),
    "small_vq_reset": (
        "autoencoder_vq_f4",
        SMALL_PIXELS | {"first_stage.codebook.reset": 0.05},
    ),
    "small_vq_ema": (
        "autoencoder_vq_f4",
        SMALL_PIXELS | {"first_stage.codebook.rule": "ema"},
    ),
    "small_vq_ema_reset": (
        "autoencoder_vq_f4",
        SMALL_PIXELS | {"first_stage.codebook.rule": "ema", "first_stage.codebook.reset": 0.05},
    ),
    "small_fsq": ("autoencoder_vq_f4", SMALL_PIXELS | FSQ),
    "small_kl": ("autoencoder_kl_f4", SMALL_PIXELS),
    "small_kl_adam": ("autoencoder_kl_f4", SMALL_PIXELS | ADAM),
    "small_kl_log_variance": (
        "autoencoder_kl_f4",
        SMALL_PIXELS | {"first_stage.learn_log_variance": True},
    ),
    "small_kl_average": ("autoencoder_kl_f4", SMALL_PIXELS | {"first_stage.ema_decay": 0.99}),
    "small_kl_clip": ("autoencoder_kl_f4", SMALL_PIXELS | {"first_stage.train.grad_clip": 1.0}),
    "small_kl_adversary": ("autoencoder_kl_f4", SMALL),
    "small_kl_warmup": (
        "autoencoder_kl_f4",
        SMALL | {"first_stage.discriminator.warmup": 50, "first_stage.discriminator.ramp": 100},
    ),
    "small_kl_lecam": ("autoencoder_kl_f4", SMALL | {"first_stage.discriminator.lecam": 0.1}),
    "small_kl_adversary_average": (
        "autoencoder_kl_f4",
        SMALL | {"first_stage.ema_decay": 0.99},
    ),
}


def unpack(archive: pathlib.Path, folder: pathlib.Path) -> None:
    """Unpacks a zip into folder/train and folder/test, by photograph, unless that was done."""
    if folder.is_dir():
        return
    if not zipfile.is_zipfile(archive):
        raise UserError(f"--photos={archive} is no zip file")
    temporary = folder.with_name(folder.name + ".tmp")
    with zipfile.ZipFile(archive) as opened:
        for line in opened.read("metadata.jsonl").splitlines():
            row = json.loads(line)
            number = int(hashlib.sha256(row["source"].encode()).hexdigest(), 16)
            split = "test" if number % 8 == 0 else "train"
            path = temporary / split / pathlib.PurePosixPath(row["file_name"]).name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(opened.read(row["file_name"]))
    os.replace(temporary, folder)


def train_command(name: str, photos: pathlib.Path, workdir: pathlib.Path) -> list[str]:
    """The command that trains a variant."""
    if name.endswith("_torch"):
        module = ["benchmarks.first_stage_torch", f"--workdir={workdir.with_name(name[:-6])}"]
        return [sys.executable, "-m", *module, f"--out={workdir}"]
    config, changes = VARIANTS[name]
    file, _, arg = config.partition(":")
    overrides = {"data.source": f"folder:{photos}"} | SHARED | changes
    return [
        *(sys.executable, "-m", "ldm_jax.train"),
        f"--config=configs/{file}.py" + (f":{arg}" if arg else ""),
        f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in overrides.items()),
    ]


def run(command: list[str]) -> float:
    """Runs a command, shown, and returns its peak memory in GB."""
    print("$ " + shlex.join(["python", *command[1:]]), flush=True)
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError("that failed: see above")
    return usage.ru_maxrss / 2**20  # kilobytes on Linux


def images_per_second(workdir: pathlib.Path) -> float:
    """The median of a run's reports but the first, which holds the compilation."""
    lines = (workdir / "first_stage" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = [json.loads(line).get("images_per_second") for line in lines]
    return statistics.median([rate for rate in rates if rate is not None][1:])


def results(out: pathlib.Path, names: list[str]) -> Iterator[tuple[str, dict]]:
    """Trains and evaluates the variants that are not there yet; yields what each came to."""
    photos = out / "photos"
    for name in names:
        workdir, command = out / name, train_command(name, photos, out / name)
        record = workdir / "result.json"
        if not record.is_file():
            memory = run(command)
            evaluate = ["-m", "ldm_jax.evaluate", f"--workdir={workdir}", "--split=test"]
            metrics = METRICS[:-1] if name.startswith("small") else METRICS
            which = [f"--source=folder:{photos}", f"--metrics={','.join(metrics)}"]
            run([sys.executable, *evaluate, *which])
            found = json.loads((workdir / "evaluation" / "metrics.json").read_text())
            found["images_per_second"], found["gigabytes"] = images_per_second(workdir), memory
            found["command"] = command[1:]
            record.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        found = json.loads(record.read_text(encoding="utf-8"))
        if found["command"] != command[1:]:
            raise UserError(f"{workdir} was made with another command: choose another --out")
        yield name, found


def table(rows: list[tuple[str, dict]]) -> str:
    """The results as Markdown."""
    held_out = rows[0][1]["num_images"]
    seen = SHARED["first_stage.train.batch_size"] * SHARED["first_stage.train.steps"]
    small = SHARED["first_stage.train.batch_size"] * SMALL["first_stage.train.steps"]
    lines = [
        f"After {seen} images (small: {small}), on {held_out} held-out images; one run each.",
        "",
        "| variant | PSNR, dB | SSIM | LPIPS | rFID | code perplexity | images/s | memory, GB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in rows:
        values = found["reconstruction"]
        perplexity = values.get("code_perplexity")
        rfid = f"{values['rfid']:.0f}" if "rfid" in values else ""
        lines.append(
            f"| {name} | {values['psnr']:.2f} | {values['ssim']:.3f} | {values['lpips']:.3f} "
            f"| {rfid} | {'' if perplexity is None else f'{perplexity:.0f}'} "
            f"| {found['images_per_second']:.1f} | {found['gigabytes']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def side_by_side(out: pathlib.Path, names: list[str]) -> np.ndarray:
    """Held-out images in the first row, each variant's reconstructions in one row below."""
    from ldm_jax.data.sources import open_source
    from ldm_jax.data.transforms import Draw, ImageTransform
    from ldm_jax.workdir import load

    source = open_source(f"folder:{out / 'photos'}", split="test", label="")
    transform = ImageTransform(SHARED["data.resolution"], "center", False)
    chosen = np.linspace(0, len(source) - 1, SHOWN).astype(int)
    shown = np.stack([transform.apply(source[int(i)], Draw())["image"] for i in chosen])
    rows = [shown]
    for name in names:
        pipe = load(out / name)
        rows.append(images.to_uint8(np.asarray(pipe.decode(pipe.encode(shown)))))
    return images.make_grid(np.concatenate(rows), columns=SHOWN)


def main() -> None:
    """Runs the variants and writes the table and the picture."""
    if not PHOTOS.value or not OUT.value:
        raise UserError("give --photos=ZIP and --out=FOLDER")
    out, names = pathlib.Path(OUT.value), ONLY.value or list(VARIANTS)
    for name in names:
        if name not in VARIANTS:
            raise UserError(f"no variant '{name}': choose from {', '.join(VARIANTS)}")
    out.mkdir(parents=True, exist_ok=True)
    unpack(pathlib.Path(PHOTOS.value), out / "photos")
    rows = []
    for row in results(out, names):
        rows.append(row)
        (out / "table.md").write_text(table(rows), encoding="utf-8")
    print(table(rows))
    large = [name for name in names if not name.startswith("small")]
    if large:
        grid = side_by_side(out, large)
        picture = Image.fromarray(grid)
        picture.resize((2 * picture.width, 2 * picture.height), Image.NEAREST).save(
            out / "side_by_side.png"
        )
        print(f"rows of {out / 'side_by_side.png'}: images, {', '.join(large)}")


if __name__ == "__main__":
    cli.run(main)
