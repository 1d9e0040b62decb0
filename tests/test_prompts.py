"""Captions from the config to the model: the shipped vocabulary, and prompts that are too long."""

import types

import pytest
from absl import flags
from toy_models import read

from ldm_jax import config as config_lib
from ldm_jax import workdir as files
from ldm_jax.data import scenes_vocabulary
from ldm_jax.errors import UserError
from ldm_jax.preflight import open_data


@pytest.fixture(autouse=True)
def parsed():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["test"])


def config(fields, conditioners, **changes):
    c = config_lib.get_config()
    c.data.update(source="scenes", split="test[:4]", fields=fields, resolution=32, flip=False)
    c.conditioners = conditioners
    c.text.update(tokenizer="scenes", vocab_size=scenes_vocabulary.SIZE, length=8)
    c.denoiser.cross_attention = True
    c.update_from_flattened_dict(changes)
    return c


def test_the_shipped_vocabulary_is_found_by_name_and_a_run_has_its_own(tmp_path):
    c = config(("tokens",), ("text",))
    tokenizer, folder = files.training_tokenizer(tmp_path, c)
    assert folder == scenes_vocabulary.FOLDER
    source = open_data(c, tmp_path)
    assert (source[0]["tokens"] == tokenizer([source[0]["text"]])).all()
    files.copy_tokenizer(folder, tmp_path / files.TOKENIZER)
    assert files.tokenizer_folder(tmp_path, c) == tmp_path / files.TOKENIZER
    assert (files.read_tokenizer(tmp_path, c)(["a cat"]) == tokenizer(["a cat"])).all()


def test_scenes_with_captions_must_not_be_mirrored(tmp_path):
    with pytest.raises(UserError, match=r"must not be mirrored: set config\.data\.flip=False"):
        open_data(config(("tokens",), ("text",), **{"data.flip": True}), tmp_path)


def test_more_classes_of_boxes_than_tokens_are_refused(tmp_path):
    c = config(("boxes",), ("layout",), **{"layout.vocab_size": 7})
    assert len(open_data(c, tmp_path).label_names) == 6
    c.layout.vocab_size = 6
    with pytest.raises(UserError, match=r"have 6 classes, .* room for 5: set it to 7 or more"):
        open_data(c, tmp_path)


def test_what_is_cut_off_a_prompt_is_printed_once(tmp_path, capsys):
    c = config(("tokens",), ("text",))  # room for six words
    tokenizer = files.read_tokenizer(tmp_path, c)
    pipe = types.SimpleNamespace(
        config=c, tokenizer=tokenizer, label_names=None, check_size=lambda size: size
    )
    prompts = ["a cat left of a bus and a bat", "a cat", ""]
    inputs, _ = read(pipe, 9, prompt=prompts, negative_prompt="a dog, a cat, a bus")
    assert inputs["condition"]["text"] == prompts * 3
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(lines) == 2 and lines[0].endswith('cut off is "and a bat"')
    assert lines[1].endswith('cut off is "a bus"')
