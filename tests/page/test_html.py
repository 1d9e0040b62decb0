"""HTML as text, and numbers for people."""

import math

import pytest

from ldm_jax.page.html import Markup, duration, join, number, pairs, size, table, tag


def test_everything_is_escaped_but_markup():
    evil = '<script>alert("1")</script>&'
    safe = "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;&amp;"
    assert tag("p", evil) == f"<p>{safe}</p>"
    assert tag("p", id=evil) == f'<p id="{safe}"></p>'
    assert tag("p", tag("b", "x"), None, 3) == "<p><b>x</b>3</p>"
    assert join([evil, Markup("<br>")]) == f"{safe}<br>"
    assert safe in table([evil], [["a", "b"]]) and safe in table(["a"], [[evil]])
    assert safe in pairs({evil: 1}) and safe in pairs({"a": evil})


def test_attributes():
    made = tag("a", class_="x", stroke_width=2, hidden=True, title=None, open=False)
    assert made == '<a class="x" stroke-width="2" hidden></a>'


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (12, "12"), (1234567, "1,234,567"), (2.0, "2"), (0.123456, "0.1235"), (1234.56, "1,235"),
        (1e-7, "1e-07"), (math.nan, "not finite"), (math.inf, "not finite"), (None, "-"),
        (True, "yes"), ([1, 2.5], "1, 2.5"), ([], "none"), ("a", "a"), (1e300, "1e+300"),
    ],
)  # fmt: skip
def test_numbers(value, shown):
    assert number(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(5, "5 s"), (59.7, "1 min 00 s"), (61, "1 min 01 s"), (3599.8, "1 h 00 min"),
     (3661, "1 h 01 min"), (90061, "25 h 01 min"), (2 * 86400, "2 d 0 h")],
)  # fmt: skip
def test_durations(seconds, shown):
    assert duration(seconds) == shown


def test_sizes():
    assert [size(x) for x in (5, 2048, 3 * 2**30)] == ["5 bytes", "2.0 KiB", "3.0 GiB"]
    assert size(2**43) == "8.0 TiB"
