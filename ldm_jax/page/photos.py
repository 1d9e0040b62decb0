"""Pictures inside of a page, as data."""

from __future__ import annotations

import base64
import io
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from ldm_jax.page.html import Markup, join, tag

MOST_SHOWN = 9  # pictures of a sequence
MOST_BYTES = 600_000  # of a file that is taken as it is
MOST_PIXELS = 1600  # of the longer side of one that is not
QUALITY = 88  # of its JPEG


class Shown(NamedTuple):
    """A picture with its caption: what is bold of it, and the rest."""

    path: pathlib.Path
    title: str
    words: str = ""


def spread(items: Sequence, most: int = MOST_SHOWN) -> list:
    """At most `most` of the items, evenly apart, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def gallery(pictures: Sequence[Shown], name: str, section: str = "", wide: bool = False) -> Markup:
    """Pictures side by side; each is seen as large as the window at a click.

    Args:
        pictures: PNG files.
        name: by which the page's links call them; unique in it.
        section: of the page, to which one comes back; '' = that of the name.
        wide: one below the other, for those that are much wider than high.
    """
    figures = [_figure(shown, f"{name}-{i}", section or name) for i, shown in enumerate(pictures)]
    return tag("div", *figures, class_="pictures wide" if wide else "pictures")


def _figure(shown: Shown, anchor: str, back: str) -> Markup:
    made = data(shown.path)
    if made is None:
        return tag("p", f"{shown.path.name} cannot be read as a picture.", class_="warn")
    source, width, height, note = made
    image = tag(
        "img", src=source, alt=f"{shown.title} {shown.words}".strip(), width=width, height=height
    )
    rest = " ".join(part for part in (shown.words, note) if part)
    caption = tag(
        "figcaption",
        tag("b", shown.title),
        f" {rest}" if rest else None,
        tag("a", "close", href=f"#{back}", class_="close"),
    )
    # An <img> has no end tag.
    image = Markup(image.removesuffix("</img>"))
    return tag("figure", join([tag("a", image, href=f"#{anchor}"), caption]), id=anchor)


def data(path: pathlib.Path) -> tuple[str, int, int, str] | None:
    """A picture as a URL that holds it, its width and height, and what was done to it.

    A large file is reduced, or written anew as JPEG. None if there is no picture.
    """
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            width, height = image.size
            if len(content) <= MOST_BYTES:
                return _url("png", content), width, height, ""
            scale = min(1.0, MOST_PIXELS / max(width, height))
            small = (max(1, round(width * scale)), max(1, round(height * scale)))
            made = image.convert("RGB")
            made = made.resize(small, Image.Resampling.LANCZOS) if scale < 1 else made
            file = io.BytesIO()
            made.save(file, format="JPEG", quality=QUALITY)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    note = f"(reduced from {width}x{height})" if scale < 1 else "(as JPEG)"
    return _url("jpeg", file.getvalue()), *small, note


def _url(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
