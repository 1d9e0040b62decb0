"""What is stored fits a config, or one line says which keys make the difference."""

import importlib.util
import json
import pathlib

import jax
import pytest

from ldm_jax import config as config_lib
from ldm_jax.compatibility import changed_state, check_resumable, check_same_architecture
from ldm_jax.errors import UserError
from ldm_jax.preflight import check_parts
from ldm_jax.training.first_stage_steps import first_stage_functions
from ldm_jax.training.sharding import make_mesh
from ldm_jax.training.steps import diffusion_functions

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def make_config(**changes):
    """Diffusion on 8x8 pixels by class, of one level."""
    c = config_lib.get_config()
    c.data.update(resolution=8, fields=("label",))
    c.first_stage.kind = "identity"
    c.denoiser.update(width=32, mult=(1,), depth=1, attn_downsample=())
    c.conditioners = ("label",)
    c.label.update(num_classes=4, width=128, slot="vector")
    c.update_from_flattened_dict(changes)
    return c.lock()


TRANSFORMER = {"denoiser.kind": "dit", "denoiser.head_dim": 16, "label.width": 32}


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"train.lr": 1.0, "train.weight_decay": 0.5, "sample.steps": 3}, []),
        ({"diffusion.learn_log_variance": True}, ["diffusion.learn_log_variance"]),
        ({"ema_snapshots.stds": (0.1,), "seed": 3}, ["ema_snapshots.stds"]),
        # The width of the label follows from that of the denoiser: both count.
        ({"denoiser.width": 64, "label.width": 256}, ["denoiser.width", "label.width"]),
        ({"denoiser.dit.patch": 4}, []),
    ],
)
def test_keys_that_change_what_is_stored_are_named(changes, keys):
    assert changed_state(make_config(), make_config(**changes), diffusion_functions) == keys


def test_fewer_averages_are_no_difference():
    more = make_config(**{"ema_snapshots.stds": (0.1, 0.2)})
    assert changed_state(more, make_config(), diffusion_functions) == []


def test_changes_of_a_first_stage_half_way_are_named(tmp_path):
    changes = {"first_stage.kind": "vq", "first_stage.width": 32, "first_stage.mult": (1, 2)}
    changes |= {"first_stage.discriminator.weight": 0.0}
    old = make_config(**changes)
    new = make_config(**changes, **{"first_stage.ema_decay": 0.9})
    assert changed_state(old, new, first_stage_functions) == ["first_stage.ema_decay"]
    (tmp_path / "config.json").write_text(config_lib.to_json(old))
    (tmp_path / "first_stage" / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(UserError, match=r"state of another config\.first_stage\.ema_decay: set it"):
        check_resumable(tmp_path, new)
    (tmp_path / "first_stage" / "weights.safetensors").touch()  # it is finished
    check_resumable(tmp_path, new)


ZERO = {"diffusion.predict": "v", "diffusion.zero_terminal_snr": True}


@pytest.mark.parametrize(
    ("old", "changes", "said"),
    [
        ({}, {"diffusion.predict": "v"}, r"config\.diffusion\.predict: set it as it was, or"),
        ({}, {"diffusion.beta": (0.001, 0.02)}, r"config\.diffusion\.beta: set it"),
        ({}, ZERO, r"predict, config\.diffusion\.zero_terminal_snr: set these"),
        ({}, {"diffusion.schedule": "cosine", "diffusion.steps": 9}, r"schedule, .*\.steps: set"),
        ({"diffusion.schedule": "log_snr"}, {"diffusion.ratios": (0.1, 9.0)}, r"\.ratios: set it"),
        ({"diffusion.predict": "edm"}, {"diffusion.sigma_data": 0.5}, r"\.sigma_data: set it"),
        # What is not read says nothing of the outputs, nor do the loss and its weights.
        ({"diffusion.schedule": "cosine"}, {"diffusion.beta": (0.001, 0.02)}, ""),
        ({}, {"diffusion.sigma_data": 0.5, "diffusion.ratios": (0.1, 9.0)}, ""),
        ({}, {"diffusion.weighting": "min_snr", "diffusion.loss": "l1"}, ""),
    ],
)
def test_a_trained_model_keeps_the_meaning_of_its_outputs(old, changes, said, tmp_path):
    if "diffusion.schedule" in old | changes:
        old = old | {"sample.spacing": "leading"}
    (tmp_path / "config.json").write_text(config_lib.to_json(make_config(**old)))
    new = make_config(**old | changes)
    check_resumable(tmp_path, new)  # nothing is trained yet
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    if not said:
        return check_resumable(tmp_path, new)
    way_out = r".* another --workdir, which can start from these weights \(config\.init_from="
    with pytest.raises(UserError, match=f"the outputs of the model in .*{said}{way_out}"):
        check_resumable(tmp_path, new)


@pytest.mark.parametrize(
    ("changes", "names", "said"),
    [
        ({"diffusion.schedule": "cosine"}, "ab", r"another config\.diffusion\.schedule"),
        ({"label.num_classes": 5}, "ab", r"another config\.label\.num_classes"),
        ({"data.label": "colour"}, "ab", r"another config\.data\.label"),
        ({}, "ac", "classes of other names"),
        ({"diffusion.predict": "v", "classifier.train.lr": 1.0}, "ab", ""),
        ({}, None, ""),
    ],
)
def test_a_classifier_of_other_classes_or_levels_is_not_kept(changes, names, said, tmp_path):
    (tmp_path / "config.json").write_text(config_lib.to_json(make_config()))
    (tmp_path / "labels.json").write_text('["a", "b"]')
    new, names = make_config(**changes), names and list(names)
    check_resumable(tmp_path, new, names)
    (tmp_path / "classifier").mkdir()
    (tmp_path / "classifier" / "weights.safetensors").touch()
    if not said:
        return check_resumable(tmp_path, new, names)
    with pytest.raises(UserError, match=rf"the classifier in .*/classifier .* {said}: remove that"):
        check_resumable(tmp_path, new, names)


def test_keys_of_the_other_kind_of_denoiser_do_not_keep_weights_from_being_used(tmp_path):
    (tmp_path / "config.json").write_text(config_lib.to_json(make_config()))
    check_same_architecture(tmp_path, make_config(**{"denoiser.dit.patch": 4}))
    with pytest.raises(UserError, match=r"config\.denoiser\.mult is \[2\], but the model"):
        check_same_architecture(tmp_path, make_config(**{"denoiser.mult": (2,)}))
    with pytest.raises(UserError, match=r"config\.denoiser\.kind is 'dit', but the model"):
        check_same_architecture(tmp_path, make_config(**TRANSFORMER))
    theirs = make_config(**TRANSFORMER)
    (tmp_path / "config.json").write_text(config_lib.to_json(theirs))
    check_same_architecture(tmp_path, make_config(**TRANSFORMER, **{"denoiser.mult": (1, 2)}))
    with pytest.raises(UserError, match=r"config\.denoiser\.dit\.patch is 4, but the model"):
        check_same_architecture(tmp_path, make_config(**TRANSFORMER, **{"denoiser.dit.patch": 4}))


def test_unread_keys_are_mentioned(tmp_path, capsys):
    for patch, said in ((2, False), (4, True)):
        config = make_config(**{"denoiser.dit.patch": patch})
        check_parts(config, tmp_path, None, make_mesh())
        line = "note: config.denoiser.kind='unet' does not read config.denoiser.dit.patch"
        assert (line in capsys.readouterr().out) == said


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_shipped_configs_set_no_unread_keys(path):
    if path.stem == "imported":
        pytest.skip("it takes a folder")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    default = config_lib.flatten(config_lib.get_config())
    for arg in ("", "smoke"):
        config = module.get_config(arg)
        flat = config_lib.flatten(config)
        assert [key for key in config_lib.unread_keys(config) if flat[key] != default[key]] == []


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_unread_keys_are_those_that_do_not_reach_the_network(kind):
    """Each of them may be nonsense, and the network is the same; no other key is missing here."""
    config = make_config(**({} if kind == "unet" else TRANSFORMER))
    unread = config_lib.unread_keys(config)
    nonsense = json.loads(config_lib.to_json(config))
    flat = config_lib.flatten(nonsense)
    shared = {"kind", "width", "depth", "num_heads", "head_dim", "dropout", "remat"}
    own = {key for key in flat if key.startswith("denoiser.")} - set(unread)
    own -= {f"denoiser.{name}" for name in shared}
    assert own and all(key.startswith("denoiser.dit.") == (kind == "dit") for key in own)

    def shapes(config):
        return jax.eval_shape(diffusion_functions(config)[0], jax.random.key(0)).params

    changed = config.copy_and_resolve_references()
    wrong = {"denoiser.mult": (7, 7, 7), "denoiser.scale_shift": True, "denoiser.dit.patch": 99}
    changed.update_from_flattened_dict({k: v for k, v in wrong.items() if k in unread})
    assert jax.tree.structure(shapes(changed)) == jax.tree.structure(shapes(config))
