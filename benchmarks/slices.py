"""Compiles training steps for slices of TPUs that need not be there, and writes a table.

python -m benchmarks.slices --out=runs/slices
python -m benchmarks.slices --out=runs/slices --only=lsun_bedrooms-v5e-2x2-replicated

Each entry is a process of its own of `ldm_jax.compile`; one that is finished is not run again, so
the command may be stopped and repeated. Writes <entry>.json and slices.md into `--out`. A full-size
model takes 4 minutes or more for each on 2 cores that have nothing else to do.
"""

from __future__ import annotations

import datetime
import json
import pathlib
import subprocess
import sys
import time
from typing import Any, NamedTuple

from absl import flags

from ldm_jax import cli
from ldm_jax.errors import UserError
from ldm_jax.topology import GIB

OUT = flags.DEFINE_string("out", "", "A folder for the results.")
ONLY = flags.DEFINE_list("only", [], "Names of entries to compile; all by default.")
LIMIT = flags.DEFINE_integer("limit", 3600, "Seconds that one entry may take.")
PER_CHIP = 8  # images; all in bfloat16
SLICES = {4: "v5e:2x2", 64: "v5e:8x8", 256: "v5e:16x16"}


class Entry(NamedTuple):
    """One row of the table: a config on so many chips, its state split or on every chip."""

    config: str
    chips: int
    split: bool

    @property
    def name(self) -> str:
        """Such as 'lsun_bedrooms-v5e-2x2-fsdp'."""
        place = SLICES[self.chips].replace(":", "-")
        return f"{self.config}-{place}-{'fsdp' if self.split else 'replicated'}"

    def command(self, out: pathlib.Path) -> list[str]:
        """Of `ldm_jax.compile`. The state is split over at most 16 chips, the rest is 'data'."""
        fsdp = min(self.chips, 16) if self.split else 1
        return [
            *(sys.executable, "-m", "ldm_jax.compile"),
            f"--config=configs/{self.config}.py",
            f"--topology={SLICES[self.chips]}",
            f"--out={out}",
            f"--config.train.batch_size={PER_CHIP * self.chips}",
            "--config.train.dtype=bfloat16",
            f"--config.mesh.fsdp={fsdp}",
        ]


# The most telling first.
ENTRIES = [
    *(Entry("lsun_bedrooms", chips, split) for chips in (4, 64) for split in (False, True)),
    *(Entry("text2img_1p4b", chips, split) for chips in (4, 64) for split in (True, False)),
    *(Entry("imagenet_ldm4", chips, split) for chips in (4, 64) for split in (False, True)),
    *(
        Entry(config, 256, split)
        for config in ("text2img_1p4b", "lsun_bedrooms", "imagenet_ldm4")
        for split in (True, False)
    ),
]


def compile_entry(entry: Entry, out: pathlib.Path) -> None:
    """Compiles an entry in a process of its own, and keeps its record, or why there is none."""
    made, begin = out / f"{entry.name}.part", time.time()
    made.unlink(missing_ok=True)
    try:
        run = subprocess.run(
            entry.command(made), capture_output=True, text=True, timeout=LIMIT.value, check=False
        )
    except subprocess.TimeoutExpired:
        print(f"{entry.name}: not done in {LIMIT.value} s", flush=True)
        return
    if not made.is_file():
        said = run.stderr.strip().splitlines()
        reason = said[-1] if said else f"exit code {run.returncode}"
        if not reason.startswith("error: "):  # a fault, to be looked at
            print(f"{entry.name}: {reason}", flush=True)
            return
        record = {"refused": reason.removeprefix("error: ")}
    else:
        record = json.loads(made.read_text(encoding="utf-8"))
        made.unlink()
    record |= {"date": datetime.date.today().isoformat(), "command": " ".join(entry.command(made))}
    text = json.dumps(record, indent=2) + "\n"
    (out / f"{entry.name}.json").write_text(text, encoding="utf-8")
    print(f"{entry.name}: {time.time() - begin:.0f} s", flush=True)


def table(records: dict[Entry, dict[str, Any]]) -> str:
    """The records as Markdown, and the names of the entries that are missing."""
    lines = [
        "| config | v5e chips | state | images | state, GiB | activations | total of 15.75 | "
        "exchanged, GB | compute, ms | memory | exchange | images/s | MFU | compiled |",
        "| --- | --- | --- " + "| ---: " * 10 + "| --- |",
    ]
    for entry, record in records.items():
        lines.append("| " + " | ".join(_cells(entry, record)) + " |")
    missing = [f"`{entry.name}`" for entry in ENTRIES if entry not in records]
    if missing:
        lines += ["", f"Not compiled yet: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def _cells(entry: Entry, record: dict[str, Any]) -> list[str]:
    split = f"fsdp {min(entry.chips, 16)}" if entry.split else "on every chip"
    head = [entry.config, str(entry.chips), split, str(PER_CHIP * entry.chips)]
    if "refused" in record:
        return [*head, "too large", *[""] * 8, record["date"]]
    memory = record["memory"]
    state = sum(memory[name] for name in ("parameters", "averages", "optimiser", "frozen weights"))
    if "flops" not in record:
        total = f"{record['needed'] / GIB:.2f}, does not fit"
        return [*head, f"{state / GIB:.2f}", "", total, *[""] * 6, record["date"]]
    found, total = record["estimate"], sum(memory.values())
    rate, mfu = found["images_per_second"], found["mfu"]
    return [
        *head,
        f"{state / GIB:.2f}",
        f"{memory['activations'] / GIB:.2f}",
        f"{total / GIB:.2f}" + ("" if record["fits"] else ", does not fit"),
        f"{sum(row['bytes'] for row in record['collectives']) / 1e9:.2f}",
        *(f"{1e3 * found[name]:.1f}" for name in ("compute", "memory", "communication")),
        f"{rate['serial']:.0f} to {rate['overlapped']:.0f}",
        f"{100 * mfu['serial']:.0f} to {100 * mfu['overlapped']:.0f} %",
        record["date"],
    ]


def main() -> None:
    """Compiles what is not there yet, and writes the table."""
    if not OUT.value:
        raise UserError("give --out=FOLDER")
    names = [entry.name for entry in ENTRIES]
    for name in ONLY.value:
        if name not in names:
            raise UserError(f"unknown entry {name}: choose from {', '.join(names)}")
    out = pathlib.Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    for entry in ENTRIES:
        done = (out / f"{entry.name}.json").is_file()
        if not done and (not ONLY.value or entry.name in ONLY.value):
            compile_entry(entry, out)
        records = {
            each: json.loads((out / f"{each.name}.json").read_text(encoding="utf-8"))
            for each in ENTRIES
            if (out / f"{each.name}.json").is_file()
        }
        (out / "slices.md").write_text(table(records), encoding="utf-8")
    print(table(records))


if __name__ == "__main__":
    cli.run(main)
