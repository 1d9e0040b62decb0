"""Image encoders from folders: what is read, and what is refused."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ldm_jax.convert.vision import COLOURS, load_clip_texts, load_tower
from ldm_jax.errors import UserError

FOLDERS = pathlib.Path(__file__).parents[1] / "golden_towers"


def copy(name, folder, drop=(), weights=None, **changes):
    """A fixture with another config, and without some weights or with more of them."""
    shutil.copytree(FOLDERS / name, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    found = load_file(folder / "model.safetensors") | (weights or {})
    save_file({k: v for k, v in found.items() if k not in drop}, folder / "model.safetensors")
    return folder


def test_clip_texts_are_those_of_transformers():
    with np.load(FOLDERS / "clip" / "outputs.npz") as want:
        texts = load_clip_texts(FOLDERS / "clip")
        pooled = texts.module.apply({"params": texts.params}, want["tokens"], method="pooled")
        # Float32 in both, of values around 1.
        np.testing.assert_allclose(pooled @ texts.projection, want["texts"], rtol=0, atol=2e-5)


def test_colours_are_those_of_the_folder_if_it_says(tmp_path):
    folder = copy("dino", tmp_path)
    assert (load_tower("dino", folder).mean, load_tower("dino", folder).std) == COLOURS["dino"]
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5], "size": 12}))
    assert load_tower("dino", folder).mean == (0.5, 0.5, 0.5)
    file.write_text(json.dumps({"image_mean": 0.5}))
    with pytest.raises(UserError, match=r"image_mean is 0\.5, but must be three numbers"):
        load_tower("dino", folder)


def test_the_backbone_of_a_classifier(tmp_path):
    weights = load_file(FOLDERS / "dino" / "model.safetensors")
    folder = copy("dino", tmp_path, drop=tuple(weights))
    whole = {f"dinov2.{name}": weight for name, weight in weights.items()}
    whole["classifier.weight"] = np.zeros((3, 32), np.float32)
    save_file(whole, folder / "model.safetensors")
    found, want = load_tower("dino", folder), load_tower("dino", FOLDERS / "dino")
    np.testing.assert_array_equal(found.params["class_token"], want.params["class_token"])


def test_what_a_config_leaves_out_is_the_default(tmp_path):
    folder = copy("clip", tmp_path, vision_config={}, text_config={})
    with pytest.raises(UserError, match="missing"):  # for want of weights of a ViT-B/32
        load_tower("clip", folder)
    with pytest.raises(UserError, match="missing"):
        load_clip_texts(folder)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dino", {"model_type": "dinov2_with_registers"}, "must be dinov2.*without registers"),
        ("dino", {"qkv_bias": False}, "no bias"),
        ("dino", {"hidden_act": "relu"}, "no activation 'relu'"),
        ("dino", {"patch_size": 15}, "must divide 224"),
        ("dino", {"hidden_size": None}, "cannot be used"),
        ("dino", {"num_hidden_layers": 3}, "do not fit the model: .*layer.2"),
        ("dino", {"image_size": 56}, "position_embeddings"),
        ("clip", {"model_type": "siglip"}, "must be clip: give the folder of a whole CLIP"),
        ("clip", {"projection_dim": 21}, "visual_projection"),
    ],
)
def test_other_networks(name, changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_tower(name, copy(name, tmp_path, **changes))


def test_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"no DINOv2 in .*: it has no config\.json"):
        load_tower("dino", tmp_path / "nowhere")
    folder = copy("dino", tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights of a DINOv2"):
        load_tower("dino", folder)
    folder = copy("clip", tmp_path, drop=("text_projection.weight",))
    with pytest.raises(UserError, match="no text_projection"):
        load_clip_texts(folder)
    config = json.loads((FOLDERS / "dino" / "config.json").read_text())
    del config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="lacks 'hidden_size'"):
        load_tower("dino", folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="no settings by name"):
        load_tower("dino", folder)
