"""Runs that are killed at random moments: a soak of many kills, and SIGTERM on its own."""

from __future__ import annotations

import json
import pathlib
import random
import shutil
import signal
import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.reliability import toys
from benchmarks.reliability.lives import Life, compare, logged, saved
from benchmarks.reliability.resume import folders

PREEMPTED = 75
# Before Python listens, in the first tenths of a second, SIGTERM ends it, with nothing to lose.
UNHEARD = -signal.SIGTERM
SHARE = 0.8  # of the steps that are to be made between kills; the rest is made after the last one
TRAINING = 0.5  # of the kills come after the first step of a life, the others before it

Say = Callable[[str], None]


def _undisturbed(out: pathlib.Path, argument: str) -> tuple[pathlib.Path, Life | None]:
    """A run to its end, unless it is done, and its process."""
    workdir = out / "straight"
    if (workdir / "samples" / "final.png").is_file():
        return workdir, None
    shutil.rmtree(workdir, ignore_errors=True)
    life = Life(workdir, argument, out / "cache")
    if code := life.end():
        raise RuntimeError(f"the undisturbed run ended with code {code}:\n{life.text()}")
    return workdir, life


# -- soak -------------------------------------------------------------------------------------


def _window(rate: float, steps: int, kills: int) -> float:
    """Seconds after the first step within which kills come, at random.

    So `steps` go with `kills` at a `rate` of steps per second, of which the share TRAINING comes
    after the first step, and then half a window later in the mean.
    """
    return 2 * SHARE * steps / (TRAINING * kills * rate)


def soak(out: pathlib.Path, kills: int, steps: int, every: int, seed: int, say: Say) -> dict:
    """Kills one run so many times, half by SIGTERM and half by SIGKILL, and lets it end.

    A third of the SIGTERMs are followed by SIGKILL within 2 seconds, as of a machine that does not
    wait. What was done is in `out`/kills.jsonl: called again, it goes on from there.

    Args:
        out: a folder for the runs; of one soak.
        kills: how often.
        steps: of the run.
        every: steps between its checkpoints.
        seed: of moments and signals.
        say: told how far it is.

    Returns:
        Among others 'codes', how often the run ended with each exit code, 'steps_redone', and
        what `lives.compare` finds against the undisturbed run.

    Raises:
        RuntimeError: the run ended in a way that it must not.
    """
    out.mkdir(parents=True, exist_ok=True)
    argument = f"dit,{steps},{every},0"
    straight, first = _undisturbed(out, argument)
    workdir, record, chance = out / "broken", out / "kills.jsonl", random.Random(seed)
    rows = []
    if record.is_file():
        rows = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    startups = [first.first_step()] if first else []
    rates = [first.rate()] if first else []
    startups += [row["startup"] for row in rows if row["startup"]]
    rates += [row["rate"] for row in rows if row["rate"]]
    while len(rows) < kills and not (workdir / "samples" / "final.png").is_file():
        before = saved(workdir)
        startup = statistics.median(startups[-9:] or [10.0])
        rate = statistics.median(rates[-9:] or [20.0])
        window = _window(rate, max(1, steps - before), kills - len(rows))
        chance.seed(f"{seed} {len(rows)}")
        row = _kill(Life(workdir, argument, out / "cache"), chance, startup, window)
        if row is None:  # it came to its end first
            continue
        row |= {"before": before, "logged": logged(workdir), "saved": saved(workdir)}
        startups += [row["startup"]] if row["startup"] else []
        rates += [row["rate"]] if row["rate"] else []
        rows.append(row)
        with open(record, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        say(
            f"kill {len(rows)}/{kills}: {row['signals']} after {row['moment']:.1f} s, code "
            f"{row['code']}, step {row['saved']}/{steps}; a start takes {startup:.1f} s"
        )
    if not (workdir / "samples" / "final.png").is_file():
        life = Life(workdir, argument, out / "cache")
        if code := life.end():
            raise RuntimeError(f"the last life ended with code {code}:\n{life.text()}")
    codes = [row["code"] for row in rows]
    return {
        "trials": len(rows),
        "steps": steps,
        "checkpoint_every": every,
        "codes": {str(code): codes.count(code) for code in sorted(set(codes))},
        "while_starting": sum(row["startup"] is None for row in rows),
        "while_training": sum(row["startup"] is not None for row in rows),
        "steps_redone": sum(max(0, row["logged"] - row["saved"]) for row in rows),
        "startup_seconds": statistics.median(startups),
        **compare(toys.toy("dit", steps, every), straight, workdir),
    }


def _kill(
    life: Life, chance: random.Random, startup: float, window: float
) -> dict[str, Any] | None:
    """Kills a process at a random moment: before its first step, which comes after about `startup`
    seconds, or within `window` after it. None if it came to its end before that."""
    signals = ["SIGKILL"]
    if chance.random() < 0.5:
        signals = ["SIGTERM"] + (["SIGKILL"] if chance.random() < 1 / 3 else [])
    moment = chance.uniform(0, startup)
    if chance.random() < TRAINING:
        moment = life.wait_for_step() + chance.uniform(0, window)
    for number, name in enumerate(signals):
        if not life.send(getattr(signal, name), moment + number * chance.uniform(0, 2)):
            break
    code = life.end()
    allowed = {"SIGTERM": (PREEMPTED, UNHEARD), "SIGKILL": (-signal.SIGKILL, PREEMPTED, UNHEARD)}
    if code == 0:
        return None
    # The system answers while Python starts; afterwards it must not.
    if code not in allowed[signals[-1]] or (code == UNHEARD and life.listens):
        raise RuntimeError(f"{signals} ended the run with code {code}:\n{life.text()}")
    return {
        "signals": "+".join(signals),
        "moment": moment,
        "code": code,
        "startup": life.first_step(),
        "rate": life.rate(),
        "last_line": life.last_line(),
    }


# -- SIGTERM ----------------------------------------------------------------------------------


def preempt(out: pathlib.Path, trials: int, steps: int, seed: int, say: Say) -> dict[str, Any]:
    """Sends SIGTERM at random moments of a run of both stages, with pictures and evaluations.

    The run goes on after each, and begins again when it is done; every other trial gets a second
    signal within a second. A step is lost that the metrics tell of and no checkpoint holds.

    Returns:
        Among others 'codes', 'steps_lost' over all trials, and the seconds from the signal to the
        end of the process.
    """
    out.mkdir(parents=True, exist_ok=True)
    argument, chance = f"kl_dit,{steps},{steps},{steps // 2}", random.Random(seed)
    straight, workdir, rows = out / "straight", out / "broken", []
    _undisturbed(out, argument)  # which compiles
    shutil.rmtree(straight)
    _, life = _undisturbed(out, argument)
    whole = life.seconds()
    shutil.rmtree(workdir, ignore_errors=True)
    while len(rows) < trials:
        life, moment = Life(workdir, argument, out / "cache"), chance.uniform(0, whole)
        heard = life.send(signal.SIGTERM, moment)
        sent = life.seconds()
        if heard and len(rows) % 2:
            life.send(signal.SIGTERM, sent + chance.random())
        code = life.end()
        seconds = life.seconds() - sent
        if code not in (0, PREEMPTED) and not (code == UNHEARD and not life.listens):
            raise RuntimeError(f"SIGTERM ended the run with code {code}:\n{life.text()}")
        if not heard or code == 0:
            if code:
                raise RuntimeError(f"the run ended with code {code}:\n{life.text()}")
            shutil.rmtree(workdir)
            continue
        lost = sum(max(0, logged(folder) - saved(folder)) for folder in folders(workdir))
        rows.append((code, lost, seconds, life.last_line()))
        say(f"SIGTERM {len(rows)}/{trials} after {moment:.1f} s: code {code}, {lost} steps lost, "
            f"{seconds:.2f} s: {life.last_line()}")  # fmt: skip
    codes = [row[0] for row in rows]
    return {
        "trials": trials,
        "codes": {str(code): codes.count(code) for code in sorted(set(codes))},
        "steps_lost": sum(row[1] for row in rows),
        "seconds_median": statistics.median(row[2] for row in rows),
        "seconds_max": max(row[2] for row in rows),
        "ended": [row[3] for row in rows],
    }
