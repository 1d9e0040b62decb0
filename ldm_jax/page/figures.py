"""The parts of a page that show numbers: curves of the stages, and records of evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ldm_jax.page import words
from ldm_jax.page.curves import COLOURS, Curve, draw, is_log
from ldm_jax.page.html import Markup, join, number, pairs, table, tag
from ldm_jax.page.read import Stage

SKIPPED = ("step",)
# Parts of a record whose own names say nothing.
PLAIN = ("figures", "reconstruction", "values", "metrics")
HEADS = {"ode": "Probability-flow ODE", "vlb": "Variational bound"}


def stage_curves(stage: Stage) -> Markup:
    """Curves of all figures of a stage but those that never change, which are named."""
    columns = _columns(stage.rows)
    flat = [
        key
        for key, curve in columns.items()
        if len(set(curve.values)) == 1 and (len(curve.values) > 1 or curve.values[0] == 0)
    ]
    drawn = [key for key in columns if key not in flat]
    if "loss" in columns and "loss_simple" in columns:
        equal = columns["loss"].values == columns["loss_simple"].values
        drawn = [key for key in drawn if not (equal and key == "loss_simple")]
    charts = []
    for title, group in words.TOGETHER:
        members = [columns[key]._replace(name=name) for key, name in group.items() if key in drawn]
        if members:
            at = max(drawn.index(key) for key in group if key in drawn)
            charts.append((at, _together(title, members)))
        drawn = [None if key in group else key for key in drawn]
    charts += [(at, _chart(key, columns[key])) for at, key in enumerate(drawn) if key]
    shown = [chart for _, chart in sorted(charts, key=lambda pair: pair[0])]
    same = [f"{words.figure(key).name.lower()} {number(columns[key].values[0])}" for key in flat]
    notes = [f"The same throughout: {', '.join(same)}."] if same else []
    bad = sum(not math.isfinite(y) for curve in columns.values() for y in curve.values)
    notes += [f"{bad} values are not finite, and leave gaps."] if bad else []
    return join(
        [
            tag("div", *shown, class_="charts"),
            tag("p", " ".join(notes), class_="note") if notes else None,
        ]
    )


def record_section(record: Mapping[str, Any]) -> Markup:
    """All that was evaluated: of the first stage, of samples, and whatever else there is."""
    own = {key: value for key, value in record.items() if key not in words.SECTIONS}
    parts = []
    if own:
        parts.append(_record_part("Reconstructions", own))
    for key, title in words.SECTIONS.items():
        if isinstance(record.get(key), dict):
            parts.append(_record_part(title, record[key]))
    return join(parts)


def find_figure(record: Any, key: str) -> float | None:
    """The first finite number of that name anywhere in a record; None if there is none."""
    if not isinstance(record, dict):
        return None
    value = record.get(key)
    value = value.get("value") if isinstance(value, dict) else value
    if _is_number(value) and math.isfinite(value):
        return float(value)
    found = (find_figure(part, key) for part in record.values())
    return next((x for x in found if x is not None), None)


# -- curves --------------------------------------------------------------------------------------


def _columns(rows: Sequence[Mapping[str, float]]) -> dict[str, Curve]:
    """A curve for each figure, in the order in which they are shown."""
    columns: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        for key, value in row.items():
            if key not in SKIPPED:
                steps, values = columns.setdefault(key, ([], []))
                steps.append(row["step"])
                values.append(value)

    def rank(key: str) -> tuple[int, int]:
        if key in words.FIRST:
            return 0, words.FIRST.index(key)
        if key in words.LAST:
            return 3, words.LAST.index(key)
        return (1, 0) if key.startswith("eval_") else (2, 0)

    return {key: Curve(words.figure(key).name, *columns[key]) for key in sorted(columns, key=rank)}


def _chart(key: str, curve: Curve) -> Markup:
    figure = words.figure(key)
    finite = [(y, x) for x, y in zip(curve.steps, curve.values, strict=True) if math.isfinite(y)]
    linear = key in words.LINEAR
    says = [figure.unit] if figure.unit else []
    says += ["logarithmic"] if not linear and is_log([y for y, _ in finite]) else []
    if figure.better and finite:
        best, step = min(finite) if figure.better == "lower" else max(finite)
        says.append(f"{figure.better} is better, best {number(float(best))} at step {step:,}")
    caption = tag(
        "figcaption",
        tag("b", figure.name),
        tag("span", number(float(curve.values[-1])), class_="last"),
        tag("span", "; ".join(says), class_="sub"),
    )
    return tag("figure", caption, draw([curve], _spoken([curve]), linear), class_="chart")


def _together(title: str, curves: Sequence[Curve]) -> Markup:
    keys = [
        tag(
            "span",
            tag("svg", tag("path", d="M0 2H16", class_=f"c{i % COLOURS}"), viewBox="0 0 16 4"),
            curve.name,
            class_="key",
        )
        for i, curve in enumerate(curves)
    ]
    caption = tag("figcaption", tag("b", title), tag("span", *keys, class_="sub"))
    return tag("figure", caption, draw(curves, _spoken(curves)), class_="chart")


def _spoken(curves: Sequence[Curve]) -> str:
    """What curves show, in words."""
    return "; ".join(
        f"{c.name} from {number(float(c.values[0]))} at step {c.steps[0]} to "
        f"{number(float(c.values[-1]))} at step {c.steps[-1]}"
        for c in curves
    )


# -- records -------------------------------------------------------------------------------------


def _record_part(title: str, record: Mapping[str, Any]) -> Markup:
    """A part of metrics.json: tables of its figures, then what they were measured with."""
    tables, settings, notes = [], {}, []
    plain = {
        key: value for key, value in record.items() if key in words.FIGURES and _is_number(value)
    }
    if plain:
        tables.append(_figures(plain))
    for key, value in record.items():
        if key in plain:
            continue
        if key == "notes" and isinstance(value, list):
            notes = [tag("p", note, class_="warn") for note in value]
        elif isinstance(value, dict) and value and _is_figures(key, value):
            head = None if key in PLAIN else tag("h4", HEADS.get(key, words.figure(key).name))
            tables += [head, _figures(value)]
            lists = {name: part for name, part in value.items() if isinstance(part, dict)}
            for name, part in lists.items():
                rest = {k: x for k, x in part.items() if not _is_number(x)}
                settings |= _settings(name, rest) if rest else {}
        else:
            settings |= _settings(key, value)
    shown = pairs({name.replace("_", " "): value for name, value in settings.items()})
    return join([tag("h3", title), *tables, *notes, shown if settings else None])


def _is_figures(key: str, value: Mapping[str, Any]) -> bool:
    """Whether a part of a record holds figures, and not settings."""
    numbers = all(
        _is_number(x) or (isinstance(x, dict) and any(map(_is_number, x.values())))
        for x in value.values()
    )
    return numbers and (
        key in PLAIN or any(name in words.FIGURES for name in value) or key in HEADS
    )


def _figures(values: Mapping[str, Any]) -> Markup:
    """A line for each figure, a column for each number that it has."""
    columns: list[str] = []
    for value in values.values():
        names = value if isinstance(value, dict) else {"value": value}
        columns += [x for x in names if _is_number(names[x]) and x not in columns]
    rows = []
    for key, value in values.items():
        figure, cells = words.figure(key), value if isinstance(value, dict) else {"value": value}
        says = ", ".join(
            word for word in (figure.unit, figure.better and f"{figure.better} is better") if word
        )
        name = join([figure.name, tag("span", f" {says}", class_="sub") if says else None])
        rows.append([name, *(number(cells[c]) if c in cells else "-" for c in columns)])
    return table(["", *(name.replace("_", " ") for name in columns)], rows)


def _settings(key: str, value: Any) -> dict[str, Any]:
    """Nested values by dotted names."""
    if isinstance(value, dict):
        flat: dict[str, Any] = {}
        for name, inner in value.items():
            flat |= _settings(f"{key}: {name}", inner)
        return flat
    return {key: value} if value not in ("", None) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
