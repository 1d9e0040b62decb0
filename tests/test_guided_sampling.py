"""Guidance by a weaker model, several conditions and a classifier, through a whole pipeline."""

import functools

import jax
import numpy as np
import pytest
from absl import flags
from golden_utils import quick_jit
from toy_models import NOISE, model, read

from ldm_jax import builders, memory, pipeline, sample_inputs
from ldm_jax import workdir as files
from ldm_jax.autoguidance import check_weak
from ldm_jax.errors import UserError
from ldm_jax.first_stage.tiled import Memory
from ldm_jax.pipeline import Pipeline

LABELS = {
    "label.slot": "vector",
    "label.width": 128,
    "label.num_classes": 3,
    "denoiser.scale_shift": True,  # what is only added to single channels is normalised away
    "classifier.width": 32,
    "classifier.mult": (1,),
    "classifier.depth": 1,
    "classifier.attn_downsample": (),
}


@pytest.fixture(autouse=True)
def parsed():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])


def changed(pipe, **parts):
    """The same model with other parts."""
    return Pipeline(pipe.config, pipe.variables | parts, 0, pipe.label_names)


def louder(params, factor):
    return jax.tree.map(lambda x: factor * x, params)


@pytest.fixture(scope="module")
def pipe():
    """With embeddings that show, and a classifier that nobody trained."""
    pipe = model("label", **LABELS)
    module = builders.build_classifier(pipe.config)
    z = np.zeros((1, 8, 8, 3), np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), z, np.zeros(1, np.int32))["params"]
    classifier = jax.tree.map(lambda x: np.float32(0.3 * NOISE.standard_normal(x.shape)), shapes)
    return changed(
        pipe, conditioner=louder(pipe.variables["conditioner"], 20), classifier=classifier
    )


@pytest.fixture(scope="module")
def weak(pipe):
    """Another denoiser of the same latents."""
    return changed(pipe, denoiser=louder(pipe.variables["denoiser"], 0.5))


@pytest.fixture(scope="module")
def unconditional(pipe):
    plain = model(**LABELS)
    same = {name: pipe.variables[name] for name in ("first_stage", "classifier")}
    return changed(plain, **same)


def sample(pipe, labels=(1, 2), seeds=(0, 1), **settings):
    condition = None if labels is None else {"label": list(labels)}
    settings = dict(sampler="ddim", eta=0.0, decode=False) | settings
    return pipe.sample(list(seeds), condition, **settings)


def once(pipe, labels, **settings):
    """One step of ddim from the last level, whose result is x0: linear in the outputs."""
    return sample(pipe, labels, steps=1, spacing="trailing", **settings)


def close(a, b):
    # float32 sums in another order; x0 is a difference that is divided by alpha, down to 0.07
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max(), rtol=1e-4)


def test_a_model_is_no_guide_for_itself_and_another_is(pipe, weak):
    plain = sample(pipe)
    close(sample(pipe, weak=pipe, guidance_scale=3.0), plain)
    assert np.abs(sample(pipe, weak=weak, guidance_scale=3.0) - plain).max() > 0.01


def test_a_weaker_model_needs_no_condition(pipe, unconditional):
    smaller = changed(unconditional, denoiser=louder(unconditional.variables["denoiser"], 0.5))
    one = sample(unconditional, None)
    assert np.abs(sample(unconditional, None, weak=smaller, guidance_scale=2.0) - one).max() > 0.01
    with pytest.raises(UserError, match=r"guidance_scale is 2.0, .* no null condition"):
        sample(unconditional, None, guidance_scale=2.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"diffusion.predict": "v"}, "same diffusion.predict: this one has eps, the weaker v"),
        ({"diffusion.steps": 500}, "same diffusion.steps: this one has 1000, the weaker 500"),
        ({"diffusion.schedule": "cosine"}, "same diffusion.schedule"),
        ({"label.num_classes": 4}, "same label.num_classes: this one has 3, the weaker 4"),
        ({"first_stage.channels": 4}, "same latents: this one has 3 channels at 1/4 of the pixels"),
        ({}, "another first stage"),
    ],
)
def test_models_that_cannot_guide_each_other(pipe, changes, said):
    other = model("label", **LABELS | changes)
    with pytest.raises(UserError, match=said):
        sample(pipe, weak=other, guidance_scale=2.0)


def test_more_models_that_cannot_guide_each_other(pipe, unconditional, weak):
    guided = functools.partial(sample, pipe, guidance_scale=2.0)
    with pytest.raises(UserError, match="same conditioners: this one has label, the weaker none"):
        guided(weak=unconditional)
    first_stage = pipe.variables["first_stage"]
    scaled = first_stage | {"latents": louder(first_stage["latents"], 2)}
    with pytest.raises(UserError, match=r"scaled otherwise: see latents\.json"):
        guided(weak=changed(pipe, first_stage=scaled))
    renamed = changed(pipe)
    renamed.label_names = ["bus", "animal", "cat"]
    with pytest.raises(UserError, match="other names"):
        guided(weak=renamed)
    with pytest.raises(UserError, match=r"load the weaker model: ldm_jax\.load\('runs/x'\)"):
        guided(weak="runs/x")
    without = changed(pipe)
    del without.variables["denoiser"]
    with pytest.raises(UserError, match="no weights of its denoiser"):
        guided(weak=without)
    with pytest.raises(UserError, match="autoguidance needs a guidance_scale other than 1"):
        guided(weak=weak, guidance_scale=1.0)
    with pytest.raises(UserError, match="no place for a negative condition"):
        guided(weak=weak, negative={"label": [0, 0]})


def test_classes_without_names_are_compared_by_number_alone(pipe, weak):
    unnamed = changed(weak)
    unnamed.label_names = None
    check_weak(pipe, unnamed)
    check_weak(unnamed, pipe)


def test_without_a_condition_the_scale_of_the_config_is_off(pipe, monkeypatch):
    seen = []

    def in_batches(program, variables, inputs, shared, *_, guided, **__):
        seen.append((shared[0].scale.item(), guided))

    monkeypatch.setattr(pipeline, "in_batches", in_batches)
    config = pipe.config.copy_and_resolve_references()
    config.sample.guidance_scale = 3.0
    default = Pipeline(config, pipe.variables, 0, pipe.label_names)
    also = [({"label": [0, 0]}, 1.5)]
    for labels, settings in (
        (None, {}),
        ((1, 2), {}),
        (None, {"negative": {"label": [0, 0]}}),
        (None, {"also": also}),
    ):
        sample(default, labels, **settings)
    assert seen == [(1.0, False), (3.0, True), (3.0, True), (1.0, True)]
    with pytest.raises(UserError, match=r"guidance_scale is 2\.0, but without a condition"):
        sample(pipe, None, guidance_scale=2.0)


def test_conditions_are_composed_by_weight(pipe):
    guided = functools.partial(sample, guidance_scale=2.0)
    # The same condition again is more of it; one of weight 0 is none.
    close(guided(pipe, also=[({"label": [1, 2]}, 1.5)]), sample(pipe, guidance_scale=3.5))
    close(guided(pipe, also=[({"label": [0, 0]}, 0.0)]), guided(pipe))
    programs = pipe._jit["generate"]._cache_size()
    other = guided(pipe, also=[({"label": [0, 0]}, 1.5)])
    assert pipe._jit["generate"]._cache_size() == programs  # weights are traced
    assert np.abs(other - guided(pipe)).max() > 0.01
    # In turn, and with the guidance scale off.
    config = pipe.config.copy_and_resolve_references()
    config.sample.two_calls = True
    in_turn = Pipeline(config, pipe.variables, 0, pipe.label_names)
    close(guided(in_turn, also=[({"label": [0, 0]}, 1.5)]), other)
    close(sample(pipe, also=[({"label": [1, 2]}, 1.5)]), sample(pipe, guidance_scale=2.5))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(also=[({"label": [1, 2]}, "much")]), "a weight of `also` is much, but must be a num"),
        (dict(also=[({"label": [1, 2]}, float("nan"))]), "is nan, but must be a number"),
        (dict(also=[{"label": [1, 2]}]), "must be a list of pairs"),
        (dict(also=[({}, 1.0)]), "a condition of `also` is empty"),
        (dict(also=[({"label": [1]}, 1.0)]), "one value per seed, 2"),
        (dict(classifier_scale=1.0, labels=None), "needs the class to find"),
        (dict(classifier_scale=1.0, labels=(0, 3)), "label 3 is out of range"),
        (dict(classifier_scale=1.0, size=(128, 128), tile=32), "not in tiles"),
        (dict(guidance_rescale=0.5), "guidance_rescale needs"),
    ],
)
def test_bad_guides_are_refused(pipe, settings, said):
    with pytest.raises(UserError, match=said):
        sample(pipe, **settings)


def test_composition_and_classifiers_need_their_parts(unconditional):
    with pytest.raises(UserError, match="this model has none: leave `also` away"):
        sample(unconditional, None, also=[({"label": [1, 2]}, 1.0)])
    bare = changed(unconditional)
    del bare.variables["classifier"]
    with pytest.raises(UserError, match="classifier_scale needs a classifier"):
        sample(bare, classifier_scale=1.0)


def classifier_shift(pipe, labels, scale):
    """By how much x0 moves at the initial noise: scale sigma^2 / alpha times the gradient."""
    x_T, last = pipe.initial_noise([0, 1]), np.float32(pipe._schedule.last)
    alpha, sigma = (x.item() for x in pipe._schedule.marginal(last[None]))
    gradient = quick_jit(pipe._networks.log_prob_grad)(pipe.variables, x_T, last, np.array(labels))
    return scale * sigma**2 / alpha * np.asarray(gradient)


def test_a_classifier_steers_a_model_that_knows_no_classes(unconditional):
    found = once(unconditional, (0, 1), classifier_scale=20.0)
    moved = found - once(unconditional, None)
    expected = classifier_shift(unconditional, (0, 1), 20.0)
    # Of latents of size 100 after one step from nearly pure noise, in float32.
    np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    other = once(unconditional, (0, 2), classifier_scale=20.0)
    close(other[0], found[0])  # each image follows its own class
    assert np.abs(other[1] - found[1]).max() > 0.01
    with pytest.raises(UserError, match="unknown condition 'label'"):
        once(unconditional, (0, 1))


class Measured(Exception):
    pass


def measure(pipe, labels=(0, 1), **settings):
    found = []

    def measured(need):
        found.append(need)
        raise Measured

    with pytest.raises(Measured):
        sample(pipe, labels, measured=measured, batch_size=64, **settings)
    return found[0]


def test_the_sides_that_a_classifier_takes(pipe):
    config = pipe.config.copy_and_resolve_references()
    config.classifier.mult = (1, 2)
    coarser = Pipeline(config, pipe.variables, 0, pipe.label_names)
    said = r"images of 32x36 \(height x width\): the classifier of this model sees multiples of 8"
    with pytest.raises(UserError, match=said):
        sample(coarser, classifier_scale=1.0, size=(32, 36))


@pytest.mark.slow
def test_what_guides_is_counted_in_the_memory(pipe, weak):
    """Only compiled: nothing of this is run."""
    large = dict(size=(64, 64), tile=0)
    plain = measure(pipe, **large)
    for settings in (
        dict(weak=weak, guidance_scale=2.0),
        dict(also=[({"label": [0, 0]}, 1.0)]),
        dict(classifier_scale=1.0),
    ):
        need = measure(pipe, **large, **settings)
        assert need.tile > plain.tile, settings
        if "also" in settings:  # calls in turn need no memory for a batch of three
            assert measure(pipe, **large, **settings, two_calls=True).tile < need.tile
        if "weak" in settings:
            theirs = (weak.variables[name] for name in ("denoiser", "conditioner"))
            added = sum(x.nbytes for part in theirs for x in jax.tree.leaves(part))
            assert need.weights == plain.weights + added


def test_calls_in_turn_are_a_way_out_of_too_little_memory(pipe, unconditional, monkeypatch):
    monkeypatch.setattr(memory, "free_on_host", lambda: 0)
    monkeypatch.setattr(memory, "free_on_device", lambda: None)
    need, size = Memory(0, 1, 1), dict(height=64, width=64)
    for model_, given, named in (
        (pipe, {}, True),
        (pipe, {"two_calls": True}, False),
        (unconditional, {}, False),
        (unconditional, {"label": ["1"], "classifier_scale": 1.0}, True),
    ):
        inputs, _ = read(model_, **size, **given)
        assert inputs.get("two_calls") == given.get("two_calls")
        with pytest.raises(UserError, match="smaller --batch_size") as error:
            sample_inputs.memory_check(model_, inputs)(need)
        assert str(error.value).endswith(", or guide with --two_calls") == named


def test_all_kinds_together_by_their_flags(pipe, weak, tmp_path):
    files.save_model(tmp_path / "weak", weak.config, weak.variables, label_names=weak.label_names)
    inputs, _ = read(
        pipe,
        label=["bus"],
        also=["cat:1.5"],
        autoguidance=str(tmp_path / "weak"),
        classifier_scale=2.0,
    )
    assert inputs["also"] == [({"label": [2, 2]}, 1.5)] and inputs["classifier_scale"] == 2.0
    settings = dict(steps=1, spacing="trailing", sampler="ddim", eta=0.0, decode=False)
    found = pipe.sample([0, 1], **inputs, **settings, guidance_scale=2.0)
    expected = once(weak, (1, 1)) + 2 * (once(pipe, (1, 1)) - once(weak, (1, 1)))
    expected += 1.5 * (once(pipe, (2, 2)) - once(pipe, None))
    expected += classifier_shift(pipe, (1, 1), 2.0)
    close(found, expected)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(also=["cat"]), "--also=cat must end in a colon and a number"),
        (dict(also=["cat:nan"]), "--also=cat:nan must end in a colon"),
        (dict(also=[":1"]), "must end in a colon"),
        (dict(also=["dog:1"]), "no class 'dog'"),
        (dict(autoguidance="/nowhere"), "/nowhere is no workdir"),
    ],
)
def test_bad_flags(pipe, given, said):
    with pytest.raises(UserError, match=said):
        read(pipe, **given)


def test_a_label_needs_a_conditioner_or_a_classifier(unconditional):
    with pytest.raises(UserError, match="or add --classifier_scale"):
        read(unconditional, label=["1"])
    inputs, _ = read(unconditional, label=["1"], classifier_scale=3.0)
    assert inputs["condition"] == {"label": [1, 1]}
    with pytest.raises(UserError, match="--also needs a model with the conditioner 'label'"):
        read(unconditional, also=["1:2"])
