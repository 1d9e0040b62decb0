"""Proves, at toy size, what a run survives, and writes the figures down.

python -m benchmarks.reliability --what=resume [--only=quickstart,imagenet_dit]
python -m benchmarks.reliability --what=soak --kills=200
python -m benchmarks.reliability --what=curves --renew

What: resume (every config, broken off and taken up again, against an undisturbed run), topology
(other numbers of devices), damage (of checkpoints), typos (in configs), batch (an image in other
company), curves (the golden ones of tests/reliability/curves, which --renew records again), preempt
(SIGTERM at random moments) and soak (many kills of one run; the same command goes on with one that
was broken off). Each run of one appends a line of JSON to results.jsonl in --out.
"""

from __future__ import annotations

import datetime
import json
import pathlib
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any

from absl import flags

from ldm_jax import cli
from ldm_jax.errors import UserError

WHATS = ("resume", "topology", "damage", "typos", "batch", "curves", "preempt", "soak")
WHAT = flags.DEFINE_enum("what", None, WHATS, "What is to be proven.")
OUT = flags.DEFINE_string("out", "runs/reliability", "A folder for runs and results.jsonl.")
ONLY = flags.DEFINE_list("only", [], "Of resume: names of configs. Default: all.")
RENEW = flags.DEFINE_bool("renew", False, "Of curves: make them the golden ones.")
KILLS = flags.DEFINE_integer("kills", 200, "Of soak.")
TRIALS = flags.DEFINE_integer("trials", 20, "Of preempt.")
STEPS = flags.DEFINE_integer("steps", 2000, "Of soak.")
EVERY = flags.DEFINE_integer("checkpoint_every", 2, "Of soak: steps between checkpoints.")
SEED = flags.DEFINE_integer("seed", 0, "Of soak and preempt: the random moments.")


def figures(what: str, out: pathlib.Path) -> Iterator[dict[str, Any]]:
    """What a kind of proof finds, one after the other."""
    from benchmarks.reliability import batches, curves, damage, kills, resume, topology, toys, typos

    if what == "resume":
        known = toys.names()
        if unknown := set(ONLY.value) - set(known):
            raise UserError(f"no config {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        for name in ONLY.value or known:
            config = toys.shrunk(name, steps=8)
            stops = resume.stops_of(config, 3, ("crash", "signal"))
            found = resume.compare(config, out / name, stops, devices=1)
            yield {"config": name, "trials": len(stops)} | found
    elif what == "topology":
        for name in ("unet", "dit"):
            for split in topology.MESHES:
                found = topology.measure(name, out / f"{name}_{split}", split=split)
                yield {"model": name, "split": split, "trials": len(found), "devices": found}
    elif what == "damage":
        yield damage.measure(out)
    elif what == "typos":
        found = typos.measure(out)
        yield {"trials": found["tried"]} | found
    elif what == "batch":
        for name in ("kl_unet", "vq_dit"):
            found = batches.measure(name)
            yield {"model": name, "trials": found["cases"]} | found
    elif what == "curves":
        for run in curves.RUNS:
            found = curves.record(run, out / run)
            again = curves.record(run, out / f"{run}_again")
            if RENEW.value:
                curves.store(found)
            for name, columns in found.items():
                equal = columns == again[name]
                compared = curves.compare(name, columns)
                yield {"curve": name, "trials": 2, "two_runs_equal": equal} | compared
    elif what == "preempt":
        yield kills.preempt(out, TRIALS.value, 12, SEED.value, _say)
    else:
        numbers = KILLS.value, STEPS.value, EVERY.value, SEED.value
        yield kills.soak(out, *numbers, _say)


def _say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    """Runs what is asked for, and writes a line for each result."""
    what = WHAT.value
    if what is None:
        raise UserError(f"say --what: one of {', '.join(WHATS)}")
    from benchmarks.reliability import machine

    folder = pathlib.Path(OUT.value).absolute()
    machine.prepare(folder / "cache")
    results, out = folder / "results.jsonl", folder / what
    if what != "soak":  # which goes on where it was
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "benchmarks.reliability", *sys.argv[1:]])
    begin = time.perf_counter()
    for found in figures(what, out):
        row = {
            "what": what,
            **found,
            "seconds": round(time.perf_counter() - begin, 1),
            "command": command,
            "machine": machine.kind(),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        }
        with open(results, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        _say(json.dumps({key: row[key] for key in row if key not in ("command", "machine")}))
        begin = time.perf_counter()


if __name__ == "__main__":
    cli.run(main)
