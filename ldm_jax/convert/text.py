"""Names of the conditioners' weights in other code's files, and text encoders from a folder.

| layout | whose files | TextTransformer | ClipText | SentenceEncoder | SpatialRescaler |
| --- | --- | --- | --- | --- | --- |
| compvis | `cond_stage_model` of the original code | x | x | | x |
| hf | `text_encoder` or `bert` of diffusers, folders of transformers | x | x | x | |

What those files hold and ours do not is dropped when reading: the text transformer's unused logit
head (`to_logits`), BERT's pooler and the numbers of the positions. It is not made up when writing,
as none of it has an influence: the original code reads its checkpoints with `strict=False`, and
`from_pretrained` of the others fills the gap with a warning at most.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from ldm_jax.conditioners.clip import ClipText
from ldm_jax.conditioners.segmentation import SpatialRescaler
from ldm_jax.conditioners.sentence import EPSILON, SentenceEncoder
from ldm_jax.conditioners.text import TextTransformer
from ldm_jax.convert.reader import open_checkpoint
from ldm_jax.convert.tables import (
    Layer,
    StateDict,
    from_flax,
    make_table,
    short,
    to_flax,
    within,
)
from ldm_jax.errors import UserError
from ldm_jax.nn.encoder import ACTIVATIONS

# The logit head, the numbers of positions, BERT's pooler and heads, the rest of a whole CLIP.
LEFTOVERS = re.compile(
    r"(transformer\.)?to_logits\.\w+|(.*\.)?position_ids|(bert\.)?pooler\..+|cls\..+"
    r"|vision_model\..+|(visual|text)_projection\.weight|logit_scale"
)
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
# What the config of a whole CLIP may leave out: transformers writes only what differs.
CLIP_DEFAULTS = {"hidden_size": 512, "intermediate_size": 2048}
CLIP_DEFAULTS |= {"num_hidden_layers": 12, "num_attention_heads": 8}
# A name that begins with one of these is taken to be without it.
PREFIXES = {ClipText: r"^(transformer\.)?(text_model\.)?", SentenceEncoder: r"^(bert\.)?"}

COMPVIS_ENDS = {
    "embed/tokens": Layer("token_emb.weight"),
    "embed/positions": Layer("pos_emb.emb.weight"),
    "norm_out": Layer("norm"),
}
COMPVIS_ATTENTION = {
    "norm_0": Layer("0"),
    **{name: Layer(f"1.to_{name}", "linear") for name in ("q", "k", "v", "out")},
}
COMPVIS_MLP = {
    "norm_1": Layer("0"),
    "mlp_in": Layer("1.net.0.0", "linear"),
    "mlp_out": Layer("1.net.2", "linear"),
}
LDMBERT_ENDS = {
    "embed/tokens": Layer("embed_tokens.weight"),
    "embed/positions": Layer("embed_positions.weight"),
    "norm_out": Layer("layer_norm"),
}
PROJECTIONS = {name: Layer(f"self_attn.{name}_proj", "linear") for name in ("q", "k", "v", "out")}
LDMBERT_LAYER = {
    **PROJECTIONS,
    "norm_0": Layer("self_attn_layer_norm"),
    "norm_1": Layer("final_layer_norm"),
    "mlp_in": Layer("fc1", "linear"),
    "mlp_out": Layer("fc2", "linear"),
}
CLIP_ENDS = {
    "embed/tokens": Layer("embeddings.token_embedding.weight"),
    "embed/positions": Layer("embeddings.position_embedding.weight"),
    "norm_out": Layer("final_layer_norm"),
}
CLIP_LAYER = {
    **PROJECTIONS,
    "norm_0": Layer("layer_norm1"),
    "norm_1": Layer("layer_norm2"),
    "mlp_in": Layer("mlp.fc1", "linear"),
    "mlp_out": Layer("mlp.fc2", "linear"),
}
BERT_ENDS = {
    "embed/tokens": Layer("word_embeddings.weight"),
    "embed/positions": Layer("position_embeddings.weight"),
    "token_types": Layer("token_type_embeddings.weight"),
    "norm_in": Layer("LayerNorm"),
}
BERT_LAYER = {
    "q": Layer("attention.self.query", "linear"),
    "k": Layer("attention.self.key", "linear"),
    "v": Layer("attention.self.value", "linear"),
    "out": Layer("attention.output.dense", "linear"),
    "norm_0": Layer("attention.output.LayerNorm"),
    "mlp_in": Layer("intermediate.dense", "linear"),
    "mlp_out": Layer("output.dense", "linear"),
    "norm_1": Layer("output.LayerNorm"),
}


def compvis_text_layers(module: TextTransformer) -> dict[str, Layer]:
    """Our path to the layer of their BERTEmbedder: attention and MLP are counted as layers."""
    layers = within("", "transformer", COMPVIS_ENDS)
    for i in range(module.depth):
        place = "transformer.attn_layers.layers"
        layers |= within(f"layers_{i}", f"{place}.{2 * i}", COMPVIS_ATTENTION)
        layers |= within(f"layers_{i}", f"{place}.{2 * i + 1}", COMPVIS_MLP)
    return layers


def ldmbert_layers(module: TextTransformer) -> dict[str, Layer]:
    """Our path to the layer of diffusers' LDMBertModel."""
    layers = within("", "model", LDMBERT_ENDS)
    for i in range(module.depth):
        layers |= within(f"layers_{i}", f"model.layers.{i}", LDMBERT_LAYER)
    return layers


def clip_layers(module: ClipText) -> dict[str, Layer]:
    """Our path to the layer of transformers' CLIPTextModel, without `text_model`."""
    layers = dict(within("", "", CLIP_ENDS))
    for i in range(module.depth):
        layers |= within(f"layers_{i}", f"encoder.layers.{i}", CLIP_LAYER)
    return layers


def bert_layers(module: SentenceEncoder) -> dict[str, Layer]:
    """Our path to the layer of transformers' BertModel, without `bert`."""
    layers = within("", "embeddings", BERT_ENDS)
    for i in range(module.depth):
        layers |= within(f"layers_{i}", f"encoder.layer.{i}", BERT_LAYER)
    return layers


def rescaler_layers(module: SpatialRescaler) -> dict[str, Layer]:
    """Our path to the layer of their SpatialRescaler; our only layer has no path."""
    return {"": Layer(("channel_mapper",), "conv1x1")}


LAYERS = {
    (TextTransformer, "compvis"): compvis_text_layers,
    (TextTransformer, "hf"): ldmbert_layers,
    (ClipText, "compvis"): lambda m: within("", "transformer.text_model", clip_layers(m)),
    (ClipText, "hf"): lambda m: within("", "text_model", clip_layers(m)),
    (SentenceEncoder, "hf"): bert_layers,
    (SpatialRescaler, "compvis"): rescaler_layers,
}


def text_to_flax(state_dict: StateDict, module: nn.Module, layout: str) -> dict:
    """Weights of their conditioner as the params of `module`.

    Args:
        state_dict: their names, in the original's layout without `cond_stage_model`.
        module: a TextTransformer, ClipText, SentenceEncoder or SpatialRescaler.
        layout: 'compvis' or 'hf', see the table above.

    Raises:
        UserError: names are missing, unexpected or of the wrong shape, and lists them; or there is
            no such layout.
    """
    layers = _layers(module, layout)
    kept = {name: w for name, w in state_dict.items() if not LEFTOVERS.fullmatch(name)}
    if type(module) in PREFIXES:  # the prefixes come and go with the version of the writer
        prefix = PREFIXES[type(module)]
        kept = _without_prefix(prefix, kept)
        layers = {
            path: Layer(tuple(re.sub(prefix, "", name) for name in layer.theirs), layer.kind)
            for path, layer in layers.items()
        }
    abstract = flatten_dict(abstract_params(module))
    return to_flax(kept, make_table(layers, abstract), abstract)


def _without_prefix(prefix: str, state_dict: StateDict) -> dict[str, Any]:
    found = {}
    for name, weight in state_dict.items():
        short = re.sub(prefix, "", name)
        if short in found:
            raise UserError(f"these weights hold '{short}' twice, with and without a prefix")
        found[short] = weight
    return found


def text_from_flax(params: Mapping[str, Any], module: nn.Module, layout: str) -> dict[str, Any]:
    """The params of `module` under their names: the inverse of `text_to_flax`.

    What we have no weights for (see the top of this file) is left out.

    Raises:
        UserError: no such layout.
    """
    return from_flax(params, make_table(_layers(module, layout), flatten_dict(params)))


def abstract_params(module: nn.Module) -> dict:
    """The shapes of a conditioner's params."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    batch = {getattr(module, "field", "tokens"): tokens}
    if isinstance(module, SpatialRescaler):
        side = round(max(1.0, module.scale**-module.stages))
        batch = {"segmentation": jnp.zeros((1, side, side), jnp.int32)}
    return jax.eval_shape(module.init, jax.random.key(0), batch).get("params", {})


def _layers(module: nn.Module, layout: str) -> dict[str, Layer]:
    if (type(module), layout) not in LAYERS:
        name = type(module).__name__
        raise UserError(
            f"the layout '{layout}' has no names for the weights of a {name}: it has no such part"
        )
    return LAYERS[type(module), layout](module)


def text_module(config: Mapping[str, Any], length: int = 77) -> nn.Module:
    """The module that a text encoder's `config.json` (as transformers writes it) describes.

    Args:
        config: of a CLIP text model, a whole CLIP, a BERT or an LDMBert.
        length: tokens of a prompt, for a BERT; the others take all their positions.

    Raises:
        UserError: another architecture, or a variant of these that we do not have.
    """
    kind = config.get("model_type") if isinstance(config, Mapping) else None
    if kind == "clip":
        part = CLIP_DEFAULTS | config.get("text_config", {})
        return text_module(part | {"model_type": "clip_text_model"})
    if kind not in MODULES:
        raise UserError(
            f"no text encoder of ours is a {short(str(kind))}: choose from {', '.join(MODULES)}"
        )
    try:
        return MODULES[kind](config, length)
    except KeyError as error:
        raise UserError(f"the config of this {kind} lacks {error}") from error


def load_text_encoder(folder: str | os.PathLike[str], length: int = 77) -> tuple[nn.Module, dict]:
    """Reads a text encoder's folder as transformers writes it: `config.json` and the weights.

    Args:
        folder: holds `model.safetensors`, its `.index.json`, or `pytorch_model.bin`.
        length: tokens of a prompt, for a BERT; the others take all their positions.

    Returns:
        The module and its params, float32.

    Raises:
        UserError: a file is missing or unreadable, or it is another architecture.
    """
    folder = pathlib.Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"no text encoder in {folder}: it has no config.json") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read: {error}") from error
    module = text_module(config, length)
    found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        raise UserError(f"no weights of a text encoder in {folder}: it has no {WEIGHTS[0]}")
    params = text_to_flax(open_checkpoint(found[0]), module, "hf")
    return module, jax.tree.map(np.asarray, params)


def _clip(config: Mapping[str, Any], length: int) -> ClipText:
    del length
    if config.get("layer_norm_eps", 1e-5) != 1e-5:
        raise UserError(f"layer_norm_eps {short(config['layer_norm_eps'])} of a CLIP must be 1e-5")
    vocab_size = config.get("vocab_size", 49408)
    return ClipText(
        vocab_size=vocab_size,
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_width=config["intermediate_size"],
        length=config.get("max_position_embeddings", 77),
        activation=_activation(config.get("hidden_act", "quick_gelu")),
        # Not those of the config: in most published ones they are wrong. The vocabulary ends in
        # the token that begins a text and the one that ends and pads it.
        null_tokens=(vocab_size - 2, vocab_size - 1),
        pad_token=vocab_size - 1,
    )


def _bert(config: Mapping[str, Any], length: int) -> SentenceEncoder:
    if _activation(config.get("hidden_act", "gelu")) != "gelu":
        raise UserError("a BERT with another activation than gelu cannot be used")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise UserError("a BERT with other than absolute positions cannot be used")
    if config.get("layer_norm_eps", EPSILON) != EPSILON or config.get("type_vocab_size", 2) != 2:
        raise UserError("a BERT must have layer_norm_eps 1e-12 and type_vocab_size 2")
    return SentenceEncoder(
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_width=config["intermediate_size"],
        length=min(length, config["max_position_embeddings"]),
        positions=config["max_position_embeddings"],
        pad_token=config.get("pad_token_id", 0),
    )


def _ldmbert(config: Mapping[str, Any], length: int) -> TextTransformer:
    del length
    if config.get("activation_function", "gelu") != "gelu" or config.get("scale_embedding"):
        raise UserError("an LDMBert must have the activation gelu and embeddings without a scale")
    if config["encoder_ffn_dim"] != 4 * config["d_model"]:
        raise UserError("an LDMBert must have an encoder_ffn_dim of four times d_model")
    return TextTransformer(
        vocab_size=config["vocab_size"],
        width=config["d_model"],
        depth=config["encoder_layers"],
        heads=config["encoder_attention_heads"],
        head_dim=config["head_dim"],
        length=config["max_position_embeddings"],
        pad_token=config.get("pad_token_id", 0),
    )


MODULES = {"clip_text_model": _clip, "bert": _bert, "ldmbert": _ldmbert}


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise UserError(
            f"no activation {short(name)} in a text encoder: choose from {', '.join(ACTIVATIONS)}"
        )
    return name
