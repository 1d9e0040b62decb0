"""Writes one HTML page of a run: curves, samples over time, figures, times, config.

python -m ldm_jax.report --workdir=runs/quickstart
python -m ldm_jax.report --workdir=runs/quickstart --out=quickstart.html --price_per_hour=2.5

The page holds its pictures itself and asks nothing of a network: it can be sent or archived as one
file. It tells what the workdir holds by now, so a run may still be going on.
"""

from __future__ import annotations

import datetime
import math
import os
import pathlib

from absl import flags

from ldm_jax import cli
from ldm_jax.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", "", "Workdir of a run or of an imported model.")
_OUT = flags.DEFINE_string("out", None, "File to write. Default: <workdir>/report.html.")
_PRICE = flags.DEFINE_float(
    "price_per_hour", None, "Of the whole machine, in any currency: adds what training has cost."
)


def main() -> None:
    """Reads the flags and the workdir, and writes the page."""
    if not _WORKDIR.value:
        raise UserError("no workdir given: use --workdir=runs/quickstart")
    price = _PRICE.value
    if price is not None and not (math.isfinite(price) and price >= 0):
        raise UserError(f"--price_per_hour is {price:g}, but must be at least 0")
    root = pathlib.Path(_WORKDIR.value)
    out = pathlib.Path(_OUT.value or root / "report.html")
    if out.is_dir():
        raise UserError(f"--out={out} is a folder: name a file, such as {out / 'report.html'}")
    from ldm_jax.page.build import make_page
    from ldm_jax.page.read import read_run

    run = read_run(root)
    made = f"told at {datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"
    page = make_page(run, made, price)
    with cli.writing(out):
        write_page(out, page)
    print(f"wrote {out} ({len(page.encode()) / 2**20:.1f} MiB): open it in a browser")


def write_page(path: pathlib.Path, page: str) -> None:
    """Writes a page, complete or not at all; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    cli.run(main)
