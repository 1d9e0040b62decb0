"""The conditioners' name tables, and text encoders from a folder."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from golden_utils import load, quick_jit
from safetensors.numpy import save_file

from ldm_jax.conditioners.clip import ClipText
from ldm_jax.conditioners.segmentation import SpatialRescaler
from ldm_jax.conditioners.sentence import SentenceEncoder
from ldm_jax.conditioners.text import TextTransformer
from ldm_jax.convert.text import (
    LAYERS,
    abstract_params,
    load_text_encoder,
    text_from_flax,
    text_module,
    text_to_flax,
)
from ldm_jax.errors import UserError

MODULES = {
    TextTransformer: TextTransformer(50, 64, 2, length=12),
    ClipText: ClipText(60, 32, 2, 4, 64, 12, "gelu", (58, 59), 59),
    SentenceEncoder: SentenceEncoder(40, 24, 2, 4, 48, length=8, positions=16),
    SpatialRescaler: SpatialRescaler(5, 3, use_bias=True),
}
CLIP_CONFIG = dict(
    model_type="clip_text_model",
    vocab_size=60,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=12,
    hidden_act="gelu",
    # What most published ones say, and is wrong.
    bos_token_id=0,
    eos_token_id=2,
    pad_token_id=1,
)
BERT_CONFIG = dict(
    model_type="bert",
    vocab_size=40,
    hidden_size=24,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=16,
)
LDMBERT_CONFIG = dict(
    model_type="ldmbert",
    vocab_size=50,
    d_model=64,
    encoder_layers=2,
    encoder_attention_heads=8,
    head_dim=64,
    encoder_ffn_dim=256,
    max_position_embeddings=12,
)


def random_params(module):
    draw, shapes = np.random.RandomState(0), abstract_params(module)
    return jax.tree.map(lambda s: draw.standard_normal(s.shape).astype(np.float32), shapes)


def assert_equal(params, other):
    params, other = flatten_dict(params), flatten_dict(other)
    assert params.keys() == other.keys()
    for path, value in params.items():
        np.testing.assert_array_equal(value, other[path], err_msg=str(path))


@pytest.mark.parametrize(
    ("kind", "layout"), LAYERS, ids=lambda part: getattr(part, "__name__", part)
)
def test_there_and_back_is_exact(kind, layout):
    module = MODULES[kind]
    params = random_params(module)
    theirs = text_from_flax(params, module, layout)
    assert len(theirs) == len(jax.tree.leaves(params))
    assert_equal(text_to_flax(theirs, module, layout), params)


def test_names_are_those_of_the_original():
    golden = load("bert_embedder")
    theirs = golden.weights()
    module = MODULES[TextTransformer]
    back = text_from_flax(text_to_flax(theirs, module, "compvis"), module, "compvis")
    head = {"transformer.to_logits.weight", "transformer.to_logits.bias"}
    assert back.keys() == theirs.keys() - head
    for name, value in back.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


@pytest.mark.parametrize("prefix", ["", "text_model.", "transformer.text_model."])
def test_clip_with_any_prefix(prefix):
    module, weights = MODULES[ClipText], load("clip_text_gelu").weights()
    theirs = {prefix + name: weight for name, weight in weights.items()}
    theirs[f"{prefix}embeddings.position_ids"] = np.arange(12)[None]
    for layout in ("compvis", "hf"):
        params = text_to_flax(theirs, module, layout)
        assert_equal(params, text_to_flax(weights, module, "hf"))
    assert "transformer.text_model.final_layer_norm.bias" in text_from_flax(
        params, module, "compvis"
    )


def test_bert_with_a_prefix_and_its_leftovers():
    module = MODULES[SentenceEncoder]
    params = random_params(module)
    plain = text_from_flax(params, module, "hf")
    theirs = {f"bert.{name}": weight for name, weight in plain.items()}
    theirs["bert.pooler.dense.weight"] = np.zeros((24, 24), np.float32)
    theirs["bert.embeddings.position_ids"] = np.arange(16)[None]
    assert_equal(text_to_flax(theirs, module, "hf"), params)
    with pytest.raises(UserError, match="twice"):
        text_to_flax(theirs | plain, module, "hf")


def test_misfits_are_listed():
    module = MODULES[TextTransformer]
    theirs = load("bert_embedder").weights()
    theirs["transformer.extra"] = theirs.pop("transformer.norm.bias")
    theirs["transformer.pos_emb.emb.weight"] = np.zeros((11, 64), np.float32)
    with pytest.raises(UserError) as error:
        text_to_flax(theirs, module, "compvis")
    for part in ("norm.bias missing", "extra unexpected", r"pos_emb.emb.weight (11, 64)"):
        assert part in str(error.value)
    with pytest.raises(UserError, match="'compvis' has no names for the weights of a Sentence"):
        text_to_flax({}, MODULES[SentenceEncoder], "compvis")


@pytest.mark.parametrize(
    ("kind", "config"),
    [(ClipText, CLIP_CONFIG), (SentenceEncoder, BERT_CONFIG), (TextTransformer, LDMBERT_CONFIG)],
    ids=lambda part: getattr(part, "__name__", ""),
)
def test_a_folder(kind, config, tmp_path):
    module = MODULES[kind]
    params = random_params(module)
    theirs = text_from_flax(params, module, "hf")
    # Half precision is widened.
    theirs = {name: np.ascontiguousarray(w.astype(np.float16)) for name, w in theirs.items()}
    save_file(theirs, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, weights = load_text_encoder(tmp_path, length=8)
    assert found == module
    assert_equal(weights, jax.tree.map(lambda w: w.astype(np.float16).astype(np.float32), params))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(weights))
    tokens = jnp.arange(8)[None]
    assert quick_jit(found.apply)({"params": weights}, {"tokens": tokens}).context.shape[:2] == (
        1,
        8,
    )


def test_a_whole_clip():
    whole = {"model_type": "clip", "text_config": CLIP_CONFIG | {"model_type": "any"}}
    assert text_module(whole) == MODULES[ClipText]
    theirs = text_from_flax(random_params(MODULES[ClipText]), MODULES[ClipText], "hf")
    more = {
        "vision_model.post_layernorm.bias": 0,
        "text_projection.weight": 0,
        "logit_scale": 0,
        "visual_projection.weight": 0,
    }
    text_to_flax(theirs | more, MODULES[ClipText], "hf")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5"}, "is a 't5': choose from clip_text_model, bert, ldmbert"),
        ([], "is a 'None'"),
        (BERT_CONFIG | {"hidden_act": "relu"}, "'relu'"),
        (BERT_CONFIG | {"layer_norm_eps": 1e-5}, "layer_norm_eps 1e-12"),
        (BERT_CONFIG | {"position_embedding_type": "relative_key"}, "absolute"),
        (CLIP_CONFIG | {"layer_norm_eps": 1e-6}, "1e-06"),
        (LDMBERT_CONFIG | {"encoder_ffn_dim": 64}, "four times"),
        ({"model_type": "bert"}, "lacks 'vocab_size'"),
    ],
)
def test_other_architectures_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        text_module(config)


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        load_text_encoder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        load_text_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(BERT_CONFIG))
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        load_text_encoder(tmp_path)


def test_diffusers_reads_what_is_exported(tmp_path):
    """LDMBert in PyTorch: the same output, whether it was read from us or we from it."""
    torch = pytest.importorskip("torch")
    pipeline = pytest.importorskip("diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion")
    module = MODULES[TextTransformer]
    params = random_params(module)
    params = jax.tree.map(lambda w: 0.3 * w, params)
    theirs = text_from_flax(params, module, "hf")
    theirs = {name: np.ascontiguousarray(weight) for name, weight in theirs.items()}
    save_file(theirs, tmp_path / "model.safetensors", metadata={"format": "pt"})
    pipeline.LDMBertConfig(**LDMBERT_CONFIG).save_pretrained(tmp_path)
    model = pipeline.LDMBertModel.from_pretrained(tmp_path).eval()
    tokens = np.random.RandomState(1).randint(0, 50, (2, 12))
    with torch.no_grad():
        want = model(torch.tensor(tokens))[0].numpy()
    ours = module.apply({"params": params}, jnp.asarray(tokens), method="encode")
    np.testing.assert_allclose(ours, want, atol=5e-5)
    model.save_pretrained(tmp_path)
    _, read = load_text_encoder(tmp_path)
    assert_equal(read, params)
