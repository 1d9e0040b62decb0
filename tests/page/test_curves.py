"""Curves as SVG: where points come to lie, ticks, gaps and what is left out."""

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from ldm_jax.page import curves
from ldm_jax.page.curves import Curve, draw, log_ticks, short, thin, ticks


def parse(svg):
    return ET.fromstring(str(svg))


def path(svg, index=0):
    """The points of a path, with M where a part begins."""
    d = parse(svg).findall("path")[index].get("d")
    return [(kind, float(x), float(y)) for kind, x, y in re.findall(r"([ML])(\S+) ([^ML]+)", d)]


def test_points_lie_where_axes_say():
    svg = draw([Curve("loss", [0, 50, 100], [0.0, 1.0, 2.0])], "a loss")
    (_, x0, y0), (_, x1, y1), (_, x2, y2) = path(svg)
    assert x0 == curves.LEFT and x2 == curves.WIDTH - curves.RIGHT
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.06)  # written with one decimal
    assert y0 > y1 > y2 and y1 == pytest.approx((y0 + y2) / 2, abs=0.06)
    texts = {t.text: t for t in parse(svg).iter("text")}
    # The tick 1 lies as high as the point of value 1.
    assert float(texts["1"].get("y")) == pytest.approx(y1, abs=0.06)
    assert float(texts["50"].get("x")) == pytest.approx(x1, abs=0.06)


def test_wide_ranges_have_a_logarithmic_axis():
    values = [1.0, 10.0, 100.0]
    ys = [y for _, _, y in path(draw([Curve("a", [0, 1, 2], values)], ""))]
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.11)
    ys = [y for _, _, y in path(draw([Curve("a", [0, 1, 2], values)], "", linear=True))]
    assert ys[0] - ys[1] == pytest.approx((ys[0] - ys[2]) / 11, abs=0.11)
    assert not curves.is_log([0.0, 100.0]) and not curves.is_log([5.0, 100.0])


def test_values_that_are_not_finite_leave_a_gap():
    values = [1.0, 2.0, math.nan, 2.0, math.inf, 1.0, 3.0]
    kinds = [kind for kind, *_ in path(draw([Curve("a", range(7), values)], ""))]
    assert kinds == ["M", "L", "M", "M", "L"]
    assert "No finite value" in draw([Curve("a", [1, 2], [math.nan, math.nan])], "")


@pytest.mark.parametrize(
    "values", [[5.0], [5.0, 5.0], [0.0, 0.0], [-1.0, 1e-300], [1e30, 1e-30], [-3.0]]
)
def test_odd_values_stay_within_the_picture(values):
    svg = draw([Curve("a", range(1, 1 + len(values)), values)], "")
    for _, x, y in path(svg):
        assert curves.LEFT <= x <= curves.WIDTH and 0 <= y <= curves.HEIGHT - curves.BOTTOM + 0.1
    assert all(t.text for t in parse(svg).iter("text"))


def test_each_curve_has_its_colour_and_tells_its_values():
    svg = draw([Curve("a<b>", [1, 2], [1.0, 2.0]), Curve("c", [1, 2], [3.0, 4.0])], 'x"<y>')
    root = parse(svg)  # it is well formed: names are escaped
    assert [p.get("class") for p in root.findall("path")] == ["c0", "c1"]
    titles = [c.find("title").text for c in root.findall("circle")]
    assert titles == ["step 1: a<b> 1", "step 2: a<b> 2", "step 1: c 3", "step 2: c 4"]
    assert root.get("aria-label") == 'x"<y>' and root.get("role") == "img"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.3, 0.31), (-5, 1e6), (1e-9, 2e-9)])
def test_ticks_are_round_and_few(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 7 and low <= found[0] and found[-1] <= high * (1 + 1e-9)
    steps = np.diff(found)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5)) < 1e-6


def test_ticks_of_a_logarithmic_axis():
    assert log_ticks(1, 100) == [1, 3, 10, 30, 100] or log_ticks(1, 100) == [1, 2, 5, 10, 20, 50]
    assert log_ticks(1, 10) == [1, 2, 5, 10]
    assert len(log_ticks(1e-30, 1e30)) <= 6


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (1200, "1200"), (12000, "12k"), (2.5e6, "2.5M"), (0.25, "0.25"), (1e-5, "1e-5")],
)
def test_numbers_at_axes_are_short(value, shown):
    assert short(value) == shown


def test_thinning_loses_no_spike():
    points = [(x, 0.0) for x in range(10_000)]
    points[5555], points[7777] = (5555, 9.0), (7777, -4.0)
    kept = thin(points, 100)
    assert len(kept) <= 100 and kept[0] == points[0] and kept[-1] == points[-1]
    assert {(5555, 9.0), (7777, -4.0)} <= set(kept) and kept == sorted(kept)
    assert thin(points[:100], 100) == points[:100]
