"""The default config: complete, locked, and refusing what cannot work."""

import pytest

from ldm_jax import checks
from ldm_jax import config as config_lib
from ldm_jax.checks_diffusion import CONTINUOUS
from ldm_jax.conditioners.label import SLOTS
from ldm_jax.data import degradation, masks
from ldm_jax.denoisers import dit
from ldm_jax.diffusion import times
from ldm_jax.diffusion.objective import LOSSES
from ldm_jax.diffusion.parameterization import PARAMETERIZATIONS
from ldm_jax.diffusion.samplers import SAMPLERS
from ldm_jax.diffusion.schedule import BETAS
from ldm_jax.diffusion.spacing import SPACINGS
from ldm_jax.diffusion.weighting import WEIGHTINGS
from ldm_jax.errors import UserError

FLOW = {"diffusion.schedule": "flow", "diffusion.predict": "flow"}


def misspelt(key: str) -> str:
    return key[:-1] + ("x" if key[-1] != "x" else "y")


@pytest.mark.parametrize("key", sorted(config_lib.flatten(config_lib.get_config())))
def test_every_misspelt_key_is_refused(key):
    config = config_lib.get_config()
    with pytest.raises((KeyError, AttributeError)):
        config.update_from_flattened_dict({misspelt(key): 1})
    flat = config_lib.to_json(config).replace(f'"{key.split(".")[-1]}"', f'"{misspelt(key)}"')
    with pytest.raises(UserError, match="unknown config key"):
        config_lib.from_json(flat.replace(misspelt(key), misspelt(key.split(".")[-1])))


@pytest.mark.parametrize("key", sorted(config_lib.flatten(config_lib.get_config())))
def test_every_wrong_type_is_refused(key):
    config = config_lib.get_config()
    value = config_lib.flatten(config)[key]
    wrong = 3 if isinstance(value, str | list) else "three"
    with pytest.raises((TypeError, UserError)):
        config.update_from_flattened_dict({key: wrong})
        config_lib.check(config)


def test_json_round_trip_keeps_everything():
    config = config_lib.shrink(config_lib.get_config())
    again = config_lib.from_json(config_lib.to_json(config))
    assert config_lib.differences(config, again) == []
    assert again.to_dict() == config.to_dict()
    assert again.is_locked


def test_differences_name_the_key_and_both_values():
    ours, theirs = config_lib.get_config(), config_lib.get_config()
    theirs.train.lr = 1e-3
    assert config_lib.differences(ours, theirs) == ["train.lr: 9.6e-05 -> 0.001"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.resolution": 100}, "choose a multiple of 32"),
        ({"denoiser.width": 33}, "multiple of 32"),
        ({"sample.steps": 1001}, "from 1 to 1000"),
        ({"sample.steps": 0}, "from 1 to 1000"),
        ({"train.batch_size": 0}, "at least 1"),
        ({"train.dtype": "float16"}, "choose from float32, bfloat16"),
        ({"first_stage.kind": "gan"}, "choose from kl, vq, fsq, identity"),
        ({"first_stage.levels": (8, 8)}, "kind='fsq' only"),
        ({"first_stage.kind": "fsq"}, "must be 3 numbers"),
        ({"first_stage.kind": "fsq", "first_stage.levels": (8, 2, 8)}, "at least 3"),
        ({"first_stage.eval.metrics": ("fid",)}, "choose from psnr, ssim, lpips, rfid"),
        ({"first_stage.codebook.rule": "mean"}, "choose from gradient, ema"),
        ({"first_stage.codebook.reset": 2.0}, "at most 1"),
        ({"first_stage.kind": "kl", "first_stage.codebook.reset": 0.1}, "kind='vq' only"),
        ({"first_stage.discriminator.warmup": -1}, "at least 0"),
        ({"first_stage.latent_scale": "big"}, "stored, first_batch"),
        ({"conditioners": ("caption",)}, "choose from label"),
        ({"conditioners": ("label",)}, "add 'label' to config.data.fields"),
        ({"denoiser.cross_attention": True}, "no conditioner gives a context"),
        ({"data.cache_latents": True, "data.crop": "random"}, "crop='center'"),
        ({"diffusion.schedule": "fast"}, "choose from scaled_linear, .*, flow, log_snr"),
        ({"diffusion.weighting": "snr"}, "choose from simple, min_snr"),
        ({"diffusion.times": "normal"}, "choose from uniform, logit_normal, log_normal"),
        ({"diffusion.schedule": "flow"}, "predict='eps' does not go with schedule='flow'"),
        ({"diffusion.zero_terminal_snr": True}, "does not go with zero_terminal_snr"),
        (FLOW | {"diffusion.zero_terminal_snr": True}, "has none"),
        ({"diffusion.times": "log_normal"}, "schedules in continuous time"),
        ({"diffusion.times_shift": 3.0}, "schedules in continuous time"),
        (FLOW | {"diffusion.times_shift": 0.0}, "times_shift is 0.0, but must be above 0"),
        (FLOW | {"diffusion.times_shift": 3.0, "diffusion.weighting": "vlb"}, "uniform times only"),
        (FLOW | {"sample.spacing": "quad"}, "choose from leading, linspace, trailing, karras"),
        (FLOW | {"diffusion.steps": 1}, "at least 2"),
        ({"diffusion.ratios": (80.0, 0.002)}, "0 < first < last"),
        ({"diffusion.p2": (0.0, 1.0)}, "k above 0"),
        ({"diffusion.sigma_data": 0.0}, "above 0"),
    ],
)
def test_values_that_do_not_fit_are_refused(change, message):
    config = config_lib.get_config()
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message):
        config_lib.check(config)


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("sample.sampler", SAMPLERS),
        ("sample.spacing", SPACINGS),
        ("diffusion.schedule", (*BETAS, *CONTINUOUS)),
        ("diffusion.times", times.TIMES),
        ("diffusion.weighting", WEIGHTINGS),
        ("diffusion.predict", PARAMETERIZATIONS),
        ("diffusion.loss", LOSSES),
        ("denoiser.dit.positions", dit.POSITIONS),
        ("denoiser.dit.context", dit.CONTEXTS),
        ("denoiser.dit.mlp", dit.MLPS),
        ("label.slot", SLOTS),
        ("data.mask", masks.KINDS),
        ("data.low_res.degradation", degradation.KINDS),
    ],
)
def test_choices_are_what_the_parts_know(key, names):
    assert set(checks.CHOICES[key]) == set(names)


def test_unknown_argument_is_refused():
    with pytest.raises(UserError, match="'smok': choose from modern, smoke"):
        config_lib.finish(config_lib.get_config(), "smok")


def test_arguments_join_in_either_order():
    one, other = (
        config_lib.finish(config_lib.get_config(), arg) for arg in ("modern,smoke", "smoke,modern")
    )
    assert config_lib.to_json(one) == config_lib.to_json(other)
    assert one.first_stage.codebook.rule == "ema" and one.data.resolution == 32


@pytest.mark.parametrize("schedule", checks.CHOICES["diffusion.schedule"])
@pytest.mark.parametrize("predict", PARAMETERIZATIONS)
def test_schedules_go_with_all_predictions_that_have_a_meaning(schedule, predict):
    config = config_lib.get_config()
    config.diffusion.update(schedule=schedule, predict=predict)
    if (schedule, predict) != ("flow", "eps"):
        config_lib.check(config)
