"""Schedulers of `diffusers` and our noise processes and samplers, in both directions."""

import pytest

from convert.models import UNET, VQ, make_config
from ldm_jax.convert import diffusers_parts
from ldm_jax.errors import UserError


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_noise_process_there_and_back(schedule, predict):
    process = dict(schedule=schedule, predict=predict, beta=(0.001, 0.015), steps=500)
    process |= dict(zero_terminal_snr=predict != "eps")
    config = make_config(dict(first_stage=VQ, denoiser=UNET, diffusion=process))
    assert diffusers_parts.read_scheduler(diffusers_parts.write_scheduler(config))[0] == process


FLOW = dict(schedule="flow", predict="flow", steps=500)


def changed(diffusion, **sample):
    config = make_config(dict(first_stage=VQ, denoiser=UNET, diffusion=diffusion))
    with config.unlocked():
        config.sample.update(**sample)
    return config


@pytest.mark.parametrize("name", ["deis", "unipc", "euler"])
@pytest.mark.parametrize("spacing", ["linspace", "trailing", "karras"])
def test_samplers_there_and_back(name, spacing):
    if spacing == "linspace" and name != "euler":
        spacing = "linspace_open"
    given = diffusers_parts.write_scheduler(changed({}, sampler=name, spacing=spacing))
    found = diffusers_parts.read_scheduler(given)[1]
    assert found == dict(sampler=name, spacing=spacing, eta=0.0)


def test_flow_there_and_back():
    given = diffusers_parts.write_scheduler(changed(FLOW, sampler="euler", spacing="linspace"))
    assert given["_class_name"] == "FlowMatchEulerDiscreteScheduler" and given["shift"] == 1.0
    found = diffusers_parts.read_scheduler(given)
    assert found == (FLOW, dict(sampler="euler", spacing="linspace", eta=0.0))


@pytest.mark.parametrize(
    ("diffusion", "sample", "match"),
    [
        (FLOW, dict(sampler="heun", spacing="linspace"), "sampler='heun' cannot .* only 'euler'"),
        (FLOW, dict(sampler="ddim", spacing="linspace", eta=1.0), "sampler='ddim'"),
        (FLOW, dict(sampler="euler", spacing="trailing"), "spacing='trailing' cannot"),
        (FLOW | dict(predict="v"), dict(sampler="euler"), r"diffusion\.predict='v' cannot"),
        (dict(schedule="log_snr", predict="edm"), {}, "schedule='log_snr'"),
        (dict(predict="flow"), {}, "predict='flow'"),
        (
            dict(zero_terminal_snr=True, predict="v"),
            dict(sampler="plms"),
            "PNDMScheduler knows no zero_terminal_snr",
        ),
    ],
)
def test_what_no_scheduler_does_is_refused(diffusion, sample, match):
    with pytest.raises(UserError, match=match):
        diffusers_parts.write_scheduler(changed(diffusion, **sample))


@pytest.mark.parametrize(
    "change", [dict(shift=3.0), dict(use_dynamic_shifting=True), dict(stochastic_sampling=True)]
)
def test_flows_of_other_levels_are_refused(change):
    with pytest.raises(UserError, match=rf"Flow.* has {next(iter(change))}="):
        given = {"_class_name": "FlowMatchEulerDiscreteScheduler"} | change
        diffusers_parts.read_scheduler(given)


@pytest.mark.parametrize(
    ("given", "sample"),
    [
        ({"_class_name": "DDIMScheduler"}, ("ddim", "leading", 0.0)),
        ({"_class_name": "UniPCMultistepScheduler"}, ("unipc", "linspace_open", 0.0)),
        (
            {"_class_name": "DEISMultistepScheduler", "algorithm_type": "deis"},
            ("deis", "linspace_open", 0.0),
        ),
        ({"_class_name": "DDPMScheduler"}, ("ddpm", "leading", 1.0)),
        ({"_class_name": "PNDMScheduler"}, ("plms", "leading", 0.0)),
        ({"_class_name": "LMSDiscreteScheduler"}, ("euler", "linspace", 0.0)),
        (
            {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"},
            ("euler", "trailing", 0.0),
        ),
        ({"_class_name": "DPMSolverMultistepScheduler"}, ("dpmpp_2m", "linspace_open", 0.0)),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3},
            ("dpmpp_3m", "linspace_open", 0.0),
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True},
            ("dpmpp_2m", "karras", 0.0),
        ),
    ],
)
def test_schedulers_become_samplers(given, sample):
    found = diffusers_parts.read_scheduler(given)[1]
    assert (found["sampler"], found["spacing"], found["eta"]) == sample


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "FlowMatchHeunDiscreteScheduler"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'"),
        ({"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
        ({"trained_betas": [0.1]}, "trained_betas"),
        (
            {"_class_name": "PNDMScheduler", "rescale_betas_zero_snr": True},
            "rescale_betas_zero_snr=True",
        ),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"variance_type": "learned_range"}, "variance_type='learned_range'"),
        ({"thresholding": True}, "thresholding=True"),
        ({"algorithm_type": "sde-dpmsolver++"}, "algorithm_type='sde-dpmsolver"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 1}, "solver_order=1"),
    ],
)
def test_other_noise_processes_are_refused(change, match):
    with pytest.raises(UserError, match=match):
        diffusers_parts.read_scheduler({"_class_name": "DDPMScheduler"} | change)
