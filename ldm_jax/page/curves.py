"""Curves as SVG, drawn without any library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ldm_jax.page.html import Markup, number, tag

WIDTH, HEIGHT = 400, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 26
MOST_POINTS = 300  # of a curve; of more, the least and the greatest of each interval are drawn
MOST_TOLD = 120  # points of a curve that tell their value under the pointer
LOG_RATIO = 30.0  # of the greatest to the least value, from which on the axis is logarithmic
COLOURS = 6  # curves in one picture at most: the page's styles c0 to c5


class Curve(NamedTuple):
    """A named curve: steps and values of equal number, the steps rising."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


def draw(curves: Sequence[Curve], label: str, linear: bool = False) -> Markup:
    """An SVG picture of curves over steps, with axes; colours are those of the page's styles.

    A value that is not finite leaves a gap. Unless it shall be `linear`, the axis is logarithmic
    where all values are above 0 and the greatest is many times the least.

    Args:
        curves: 1 to `COLOURS`.
        label: what is shown, for who cannot see it.
        linear: whether the axis is linear in any case.
    """
    points = [_finite(curve) for curve in curves]
    every = [point for part in points for point in part]
    if not every:
        return tag("p", "No finite value.", class_="note")
    scale = _Scale(every, linear)
    parts = [_grid(scale)]
    for i, (curve, part) in enumerate(zip(curves, points, strict=True)):
        parts += _line(curve, part, scale, f"c{i % COLOURS}")
    return tag(
        "svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label, class_="curve"
    )


def is_log(values: Sequence[float]) -> bool:
    """Tells whether finite values are drawn on a logarithmic axis."""
    return bool(values) and min(values) > 0 and max(values) / min(values) >= LOG_RATIO


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them, evenly apart.

    low < high, both finite.
    """
    rough = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, both above 0, for a logarithmic axis."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    powers = range(first, last + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
        if len(found) <= count + 1:
            return found
    return found[:: -(-len(found) // count)]


def short(value: float) -> str:
    """A round number in few characters, as at an axis."""
    size = abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            shown = f"{value / (1e3 if letter == 'k' else limit):.3g}"
            return f"{shown}{letter}" if "e" not in shown else f"{value:.0e}"
    if size and size < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.4g}"


def thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` of the points, among them the first, the last, and the extremes of each
    interval, so that no spike is lost. `most` is at least 6."""
    if len(points) <= most:
        return list(points)
    inner, parts = points[1:-1], (most - 2) // 2
    kept = [points[0]]
    for i in range(parts):
        part = inner[i * len(inner) // parts : (i + 1) * len(inner) // parts]
        ends = {min(range(len(part)), key=lambda j: part[j][1])}
        ends.add(max(range(len(part)), key=lambda j: part[j][1]))
        kept += [part[j] for j in sorted(ends)]
    return [*kept, points[-1]]


def _finite(curve: Curve) -> list[tuple[float, float]]:
    pairs = zip(curve.steps, curve.values, strict=True)
    return [(x, y) for x, y in pairs if math.isfinite(y)]


class _Scale:
    """From steps and values to places in the picture."""

    def __init__(self, points: Sequence[tuple[float, float]], linear: bool) -> None:
        values = [y for _, y in points]
        self.log = not linear and is_log(values)
        low, high = min(values), max(values)
        if self.log:
            self._ends = math.log10(low), math.log10(high)
        else:
            if 0 < low < 0.3 * high:
                low = 0.0
            if high - low <= 1e-6 * max(abs(low), abs(high)):
                low, high = low - (0.1 * abs(low) or 1.0), high + (0.1 * abs(high) or 1.0)
            margin = 0.04 * (high - low)
            self._ends = (low if low == 0 else low - margin), high + margin
        first, last = min(x for x, _ in points), max(x for x, _ in points)
        first = 0.0 if 0 <= first < 0.3 * last else first
        self.first, self.last = (first, last) if last > first else (first - 1, last + 1)

    def x(self, step: float) -> float:
        share = (step - self.first) / (self.last - self.first)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self._ends
        place = math.log10(value) if self.log else value
        return HEIGHT - BOTTOM - (place - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def steps(self) -> list[float]:
        found = ticks(self.first, self.last)
        return [x for x in found if x == int(x)] or found[:1]

    def values(self) -> list[float]:
        low, high = self._ends
        return log_ticks(10**low * 0.999, 10**high * 1.001) if self.log else ticks(low, high)


def _grid(scale: _Scale) -> Markup:
    parts, base = [], HEIGHT - BOTTOM
    for value in scale.values():
        y = f"{scale.y(value):.1f}"
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
        parts.append(tag("text", short(value), x=LEFT - 6, y=y, dy="0.32em", text_anchor="end"))
    for step in scale.steps():
        x = scale.x(step)
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        parts.append(tag("text", short(step), x=f"{x:.1f}", y=base + 17, text_anchor=anchor))
    parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=base, y2=base, class_="base"))
    return tag("g", *parts, class_="axes")


def _line(
    curve: Curve, points: Sequence[tuple[float, float]], scale: _Scale, style: str
) -> list[Markup]:
    """The line of a curve, in parts where values are missing, and its points."""
    bad = [x for x, y in zip(curve.steps, curve.values, strict=True) if not math.isfinite(y)]
    shown, path, before = thin(points, MOST_POINTS), [], -math.inf
    for x, y in shown:
        apart = not path or any(before < gap < x for gap in bad)
        path.append(f"{'M' if apart else 'L'}{scale.x(x):.1f} {scale.y(y):.1f}")
        before = x
    parts = [tag("path", d="".join(path), class_=style)]
    alone = len(shown) <= 30
    told = shown if len(shown) <= MOST_TOLD else shown[:: -(-len(shown) // MOST_TOLD)]
    for x, y in told:
        words = f"step {number(int(x))}: {curve.name} {number(float(y))}"
        radius = 2.2 if alone else 4
        parts.append(
            tag(
                "circle",
                tag("title", words),
                cx=f"{scale.x(x):.1f}",
                cy=f"{scale.y(y):.1f}",
                r=radius,
                class_=f"{style} {'dot' if alone else 'hidden'}",
            )
        )
    return parts
