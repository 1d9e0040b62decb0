"""Stored outputs of text encoders that are not trained, in place of running them."""

import json

import jax
import numpy as np
import pytest

from ldm_jax import builders, stored_latents
from ldm_jax import config as config_lib
from ldm_jax import workdir as files
from ldm_jax.data.latents_index import TEXT_CONTEXT, TEXT_MASK
from ldm_jax.data.pipeline import Batches
from ldm_jax.errors import UserError
from ldm_jax.preflight import open_data, open_training_data
from ldm_jax.run import run
from ldm_jax.training.encoding import Settings
from ldm_jax.training.latents import task_transform
from ldm_jax.training.steps import diffusion_functions

EXACT = Settings(dtype="float32", batch_size=8)


def text_config(folder, **changes):
    """A model of 8x8 pixels with a frozen sentence encoder, on images with 1 to 3 captions."""
    c = config_lib.get_config()
    c.data.update(source=f"folder:{folder / 'images'}", resolution=8, threads=2)
    c.data.update(fields=("tokens",), caption="captions", flip=False)
    c.first_stage.kind = "identity"
    c.denoiser.update(kind="dit", width=32, depth=1, num_heads=2)
    c.denoiser.dit.context = "cross"
    c.conditioners = ("text",)
    c.text.update(encoder="sentence", tokenizer="scenes", vocab_size=500, width=32, depth=1)
    c.text.update(heads=2, mlp_width=64, length=12, null_tokens=(2, 3))
    c.cond_drop_rate = 0.5
    c.init_from = str(folder / "model")
    c.train.update(batch_size=8, steps=2, log_every=1, picture_every=0, checkpoint_every=2)
    c.sample.update(steps=2, batch_size=8, num_samples=8)
    c.update_from_flattened_dict(changes)
    return config_lib.check(c)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images with captions, and a model with random weights."""
    folder = tmp_path_factory.mktemp("text")
    write_images(folder / "images")
    config = text_config(folder)
    shapes = jax.eval_shape(diffusion_functions(config)[0], jax.random.key(0)).params
    noise = np.random.RandomState(0)
    random = lambda x: (0.1 * noise.standard_normal(x.shape)).astype(np.float32)  # noqa: E731
    params = jax.tree.map(random, shapes)
    files.save_model(folder / "model", config, params)
    stored_latents.encode_data(
        config,
        open_data(config, folder),
        folder / "latents",
        EXACT,
        lambda place: None,
        text_embeddings=True,
    )
    return folder


def write_images(path):
    from PIL import Image

    path.mkdir()
    rows, words = [], ["a cat", "left of", "a red bus", "below a dog", "above", "two fish"]
    for i in range(13):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(path / f"{i}.png")
        captions = [" ".join(words[(i + j) % 6 :]) for j in range(1 + i % 3)]
        rows.append(json.dumps({"file_name": f"{i}.png", "captions": captions}))
    (path / "metadata.jsonl").write_text("\n".join(rows) + "\n")


def batches(config, source):
    return Batches(source, task_transform(config), batch_size=8, seed=0, threads=0)


def test_training_is_that_with_the_encoder(folder):
    config = text_config(folder)
    stored = text_config(folder, **{"data.source": f"latents:{folder / 'latents'}"})
    init, step = diffusion_functions(config)
    frozen, losses = files.load_first_stage(folder / "latents", config), []
    sources = open_data(config, folder), open_training_data(stored, folder)
    null = stored_latents.stored_null(stored, sources[1])
    assert null["stored"]["parts_0"].keys() == {TEXT_CONTEXT, TEXT_MASK}
    step, weights = jax.jit(step), files.load_weights(folder / "model", config)[1]
    start = jax.eval_shape(init, jax.random.key(0))
    start = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), start)
    other = jax.tree.map(lambda x: x + 1, weights["conditioner"])
    for c, source, variables, conditioner in (
        (config, sources[0], frozen, weights["conditioner"]),
        # With another encoder in the model: it is not run, nor for the null condition.
        (stored, sources[1], frozen | null, other),
    ):
        state = start.replace(params=weights | {"conditioner": conditioner})
        losses.append([])
        for i in range(5):
            state, metrics = step(state, variables, batches(c, source).batch(i), jax.random.key(1))
            losses[-1].append(float(metrics["loss"]))
    assert np.ptp(losses[0]) > 0.01 * np.mean(losses[0])
    # The encoder ran on other batches: its sums are in another order.
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert {len(sources[1][i][TEXT_CONTEXT]) for i in range(13)} == {1, 2, 3}


def test_a_run_trains_and_samples(folder, tmp_path):
    config = text_config(folder, **{"data.source": f"latents:{folder / 'latents'}"})
    run(config, tmp_path / "run")
    assert (tmp_path / "run" / "samples" / "final.png").is_file()
    assert (tmp_path / "run" / "first_stage" / files.WEIGHTS).is_file()
    other = jax.tree.map(lambda x: x + 1, files.load_weights(folder / "model", config)[1])
    source = open_training_data(config, tmp_path)
    with pytest.raises(UserError, match=r"text encoder in config\.init_from=.* is not the one"):
        stored_latents.check_text_encoder(config, source, other["conditioner"])


def test_another_vocabulary_or_length_is_refused(folder, tmp_path):
    changes = {"data.source": f"latents:{folder / 'latents'}"}
    with pytest.raises(UserError, match=r"text\.length is 10, but the latents .* with 12"):
        open_training_data(text_config(folder, **changes, **{"text.length": 10}), tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    with pytest.raises(UserError, match=r"the vocabulary in .* is not that of the captions"):
        open_training_data(
            text_config(folder, **changes, **{"text.tokenizer": str(tmp_path)}), tmp_path
        )


def test_only_a_frozen_encoder_with_weights_can_be_stored(folder, tmp_path):
    def encode(config):
        source = open_data(config, folder)
        options = dict(text_embeddings=True)
        stored_latents.encode_data(config, source, tmp_path, EXACT, lambda place: None, **options)

    with pytest.raises(UserError, match="--text_embeddings needs a text encoder that is not train"):
        encode(text_config(folder, **{"text.encoder": "bert", "text.mlp_width": 128}))
    with pytest.raises(UserError, match=r"needs the text encoder's weights: set config\.init_from"):
        encode(text_config(folder, init_from=""))


@pytest.mark.parametrize("encoder", ["clip", "sentence"])
def test_conditioners_pass_on_what_is_stored(encoder, folder):
    config = text_config(folder, **{"text.encoder": encoder})
    module, tokens = builders.build_conditioner(config), np.full((3, 12), 4, np.int32)
    init = jax.jit(module.init_with_output)
    expected, variables = init(jax.random.key(0), {"tokens": tokens})
    stored = {TEXT_CONTEXT: np.asarray(expected.context, np.float16) + 1}
    if expected.context_mask is not None:
        stored[TEXT_MASK] = np.asarray(expected.context_mask)
    found = module.apply(variables, {"tokens": tokens, **stored})
    assert found.context.dtype == np.float32
    np.testing.assert_array_equal(found.context, stored[TEXT_CONTEXT])
    assert (found.context_mask is None) == (encoder == "clip")
    null = {"stored": {"parts_0": {name: array[:1] for name, array in stored.items()}}}
    found = module.apply(variables | null, 5, method="null")
    np.testing.assert_array_equal(found.context, np.repeat(stored[TEXT_CONTEXT][:1], 5, 0))
