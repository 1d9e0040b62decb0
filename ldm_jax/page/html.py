"""HTML as text, in which nothing that was not written here is taken for markup."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping
from typing import Any


class Markup(str):
    """Text that is HTML already; any other text is escaped where it comes into a page."""


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """An element with escaped attributes and children.

    Children that are None are left out. An attribute `class_` is written class, `stroke_width`
    stroke-width; one that is True has no value, and None or False leaves it out.
    """
    shown = "".join(_attribute(key, value) for key, value in attributes.items())
    inner = "".join(text(child) for child in children if child is not None)
    return Markup(f"<{name}{shown}>{inner}</{name}>")


def text(value: Any) -> Markup:
    """Anything as HTML: markup as it is, all else escaped."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value), quote=True))


def join(parts: Iterable[Any]) -> Markup:
    """Parts in a row."""
    return Markup("".join(text(part) for part in parts if part is not None))


def _attribute(key: str, value: Any) -> str:
    if value is None or value is False:
        return ""
    key = key.rstrip("_").replace("_", "-")
    return f" {key}" if value is True else f' {key}="{html.escape(str(value), quote=True)}"'


def number(value: Any, digits: int = 4) -> str:
    """A value for people to read: thousands apart, `digits` significant ones of a fraction."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "not finite"
        if value == int(value) and abs(value) < 1e6:
            return f"{int(value):,}"
        if abs(value) >= 10 ** (digits - 1) and abs(value) < 1e7:
            return f"{value:,.0f}"
        return f"{value:.{digits}g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(number(item, digits) for item in value) or "none"
    return str(value)


def duration(seconds: float) -> str:
    """Seconds as people say them, in two units."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def size(count: float) -> str:
    """Bytes in binary units."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            break
        count, unit = count / 1024, "TiB" if unit == "GiB" else unit
    return f"{count:.0f} {unit}" if count >= 100 or unit == "bytes" else f"{count:.1f} {unit}"


def table(head: Iterable[Any], rows: Iterable[Iterable[Any]], numeric: bool = True) -> Markup:
    """A table that scrolls by itself where it is too wide; the first column names the rows."""
    columns = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    lines = [
        tag("tr", *(tag("td" if i else "th", cell) for i, cell in enumerate(row))) for row in rows
    ]
    made = tag("table", tag("thead", columns), tag("tbody", *lines), class_=numeric and "numbers")
    return tag("div", made, class_="scroll")


def pairs(values: Mapping[str, Any]) -> Markup:
    """Names and values, a line each."""
    parts = []
    for key, value in values.items():
        shown = value if isinstance(value, Markup) else number(value)
        parts.append(tag("div", tag("dt", key), tag("dd", shown)))
    return tag("dl", *parts)
