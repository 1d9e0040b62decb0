"""Settings of guidance, as a user gives them."""

import pytest

from ldm_jax import config as config_lib
from ldm_jax.arguments import choose_scale, make_guidance
from ldm_jax.diffusion.guidance import Guidance
from ldm_jax.errors import UserError


def config(conditioners=("label",)):
    c = config_lib.get_config()
    c.conditioners = conditioners
    return c


def test_what_is_off_is_compiled_away():
    assert make_guidance(config(), 3.0, 0.0, (0.0, 1.0), False) == Guidance(3.0, None, None)


def test_what_is_not_given_is_the_configs_where_there_is_guidance():
    c = config()
    c.sample.update(guidance_scale=1.0, guidance_rescale=0.7, guidance_interval=(0.0, 0.5))
    assert make_guidance(c) == Guidance()
    assert make_guidance(c, 3.0) == Guidance(3.0, 0.7, (0.0, 500.0))
    composed = make_guidance(c, weights=(2, -0.5), classifier_scale=10)
    assert composed == Guidance(1.0, 0.7, (0.0, 500.0), (2.0, -0.5), 10.0)
    assert make_guidance(config(()), 2.0, weak=True) == Guidance(2.0)


def test_a_scale_needs_something_to_guide():
    c = config()
    c.sample.guidance_scale = 2.0
    label = {"label": [3]}
    assert choose_scale(c, None, label) == 2.0 and choose_scale(c, 5.0, label) == 5.0
    assert choose_scale(c, None, None, negative=label) == choose_scale(c, None, None, None, 1) == 2
    # A default is off without a condition, and what asks for more is refused.
    assert choose_scale(c, None, None) == choose_scale(c, None, {}) == choose_scale(c, 1, None) == 1
    with pytest.raises(UserError, match=r"guidance_scale is 5\.0, but without a condition"):
        choose_scale(c, 5.0, {})
    # A label may be there for the classifier alone.
    text = config(("text",))
    text.text.null_tokens = (1, 2)
    text.sample.guidance_scale = 2.0
    assert choose_scale(text, None, label) == 1 and choose_scale(text, None, {"text": ["a"]}) == 2
    with pytest.raises(UserError, match="nothing to guide"):
        choose_scale(text, 5.0, label)


def test_an_interval_becomes_times():
    found = make_guidance(config(), 3.0, 0.7, (0.25, 0.75), True)
    assert found == Guidance(3.0, 0.7, (250.0, 750.0))


@pytest.mark.parametrize(
    "conditioners, given, said",
    [
        ((), (2.0, 0.0, (0.0, 1.0), False), r"guidance_scale is 2.0, .* no null condition"),
        (("label",), (2.0, 1.5, (0.0, 1.0), False), r"guidance_rescale is 1.5, .* from 0 to 1"),
        (("label",), (2.0, 0.0, (0.5, 0.5), False), r"guidance_interval is 0.5,0.5"),
        (("label",), (2.0, 0.0, (0.0, float("nan")), False), r"guidance_interval is 0,nan"),
        (("label",), (2.0, 0.0, (0.0, 0.5, 1.0), False), r"guidance_interval is 0,0.5,1, .* two"),
        (("label",), (float("nan"), 0.0, (0.0, 1.0), False), r"guidance_scale is nan"),
        (("label",), (1.0, 0.0, (0.0, 1.0), True), r"a negative condition needs a guidance_scale"),
        (("label",), (1.0, 0.5, (0.0, 1.0), False), r"guidance_rescale needs a guidance_scale"),
        (("label",), (1.0, 0.0, (0.0, 0.5), False), r"guidance_interval needs a guidance_scale"),
    ],
)
def test_senseless_settings_are_refused(conditioners, given, said):
    with pytest.raises(UserError, match=said):
        make_guidance(config(conditioners), *given)
