"""Config keys that are misspelt, and values of the wrong type: in a file, and as flags."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

from absl import flags
from ml_collections import config_flags

from ldm_jax import config as config_lib
from ldm_jax.errors import UserError

# A config file that sets what its argument says, KEY=PYTHON or nothing.
FILE = """
from ldm_jax import config as base

def get_config(arg=""):
    c = base.get_config()
    if arg:
        path, _, value = arg.partition("=")
        *blocks, name = path.split(".")
        block = c
        for part in blocks:
            block = getattr(block, part)
        setattr(block, name, eval(value))
    return c
"""
REFUSALS = (KeyError, AttributeError, TypeError, ValueError, flags.Error, UserError)


def keys() -> dict[str, Any]:
    """All keys of the default config, 'a.b' -> value."""
    return config_lib.flatten(config_lib.get_config())


def misspelt(key: str, everywhere: bool = True) -> Iterator[str]:
    """The key with one letter of its last part changed: each in turn, or the middle one only."""
    block, _, name = key.rpartition(".")
    siblings = {other.rpartition(".")[2] for other in keys()}
    places = range(len(name)) if everywhere else [len(name) // 2]
    for place in places:
        for letter in "xyz":
            changed = name[:place] + letter + name[place + 1 :]
            if changed not in siblings:
                yield f"{block}.{changed}" if block else changed
                break


def accepted(*argv: str) -> bool:
    """Whether flags of a config, as the commands define them, are read and checked."""
    known = flags.FlagValues()
    line = ["train", *argv]
    # It looks for overrides where the process has its own command line.
    flag = config_flags.DEFINE_config_file("config", None, "", known, sys_argv=line)
    with contextlib.suppress(*REFUSALS):
        known(line)
        config_lib.check(flag.value)
        return True
    return False


def wrong(value: Any) -> list[Any]:
    """Python values that cannot stand in the place of a default."""
    if isinstance(value, bool):
        return ["maybe", 3]
    if isinstance(value, str):
        return [3, ("a",)]
    if isinstance(value, list):
        return [3, "three"]
    return ["three", (1, 2)] + ([1.5] if isinstance(value, int) else [])


def measure(out: pathlib.Path, everywhere: bool = True) -> dict[str, Any]:
    """Tries every misspelt key and wrong type; returns how many were tried, and the accepted ones.

    `everywhere` changes every letter of each key, one at a time, rather than the middle one.
    """
    file = out / "typos.py"
    file.write_text(FILE, encoding="utf-8")
    if not accepted(f"--config={file}", "--config.train.lr=1e-3"):
        raise RuntimeError("not even the default is accepted")
    tried, passed = 0, []

    def refuse(*argv: str) -> None:
        nonlocal tried
        tried += 1
        if accepted(*argv):
            passed.append(argv[-1])

    for key, value in keys().items():
        for name in misspelt(key, everywhere):
            refuse(f"--config={file}:{name}=1")
            refuse(f"--config={file}", f"--config.{name}=1")
        for bad in wrong(value):
            refuse(f"--config={file}:{key}={bad!r}")
        # Of a flag, any text is a string, and 3 stands for (3,).
        for bad in [] if isinstance(value, str) else ["three", "1.5"]:
            if not (bad == "1.5" and isinstance(value, float)):
                refuse(f"--config={file}", f"--config.{key}={bad}")
    return {"keys": len(keys()), "tried": tried, "accepted": passed}
