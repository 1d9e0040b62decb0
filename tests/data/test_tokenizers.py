"""Tokenizers from folders, with vocabularies of a few words."""

import gzip
import json

import numpy as np
import pytest

from ldm_jax.conditioners.text import empty_text
from ldm_jax.data.tokenizers import cut_notes, load_tokenizer, read_clip_merges
from ldm_jax.errors import UserError

BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "car", "##s", ",", "cafe"]
MERGES = ["c a", "ca r</w>", "r e", "re d</w>"]


def save_bert(folder):
    (folder / "vocab.txt").write_text("\n".join(BERT) + "\n", encoding="utf-8")


def save_clip(folder, merges=MERGES):
    """Writes the vocabulary as transformers does; returns it."""
    path = folder / "merges.gz"
    path.write_bytes(gzip.compress("\n".join(["# version", *merges, ""]).encode()))
    vocabulary, pairs = read_clip_merges(path, len(merges))
    path.unlink()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    return vocabulary


@pytest.mark.parametrize("kind", ["bert", "sentence"])
def test_bert(kind, tmp_path):
    save_bert(tmp_path)
    tokens = load_tokenizer(kind, tmp_path, 6)(["A red Café", "cars, red cars", "", "blue"])
    assert tokens.dtype == np.int32
    want = [[2, 5, 6, 10, 3, 0], [2, 7, 8, 9, 6, 3], [2, 3, 0, 0, 0, 0], [2, 1, 3, 0, 0, 0]]
    np.testing.assert_array_equal(tokens, want)


def test_bert_from_the_newer_file_ignores_the_length_in_it(tmp_path):
    save_bert(tmp_path)
    backend = load_tokenizer("bert", tmp_path, 6).backend
    backend.backend_tokenizer.enable_padding(length=9)
    backend.backend_tokenizer.enable_truncation(3)
    newer = tmp_path / "newer"
    newer.mkdir()
    backend.backend_tokenizer.save(str(newer / "tokenizer.json"))
    tokens = load_tokenizer("bert", newer, 6)(["a red car"])
    np.testing.assert_array_equal(tokens, [[2, 5, 6, 7, 3, 0]])


def test_clip_is_padded_by_its_end_token(tmp_path):
    vocabulary = save_clip(tmp_path)
    start, end = len(vocabulary) - 2, len(vocabulary) - 1
    texts = ["Red car", "  car ", "", "red " * 9, "d!"]
    tokens = load_tokenizer("clip", tmp_path, 6)(texts)
    car, red = vocabulary["car</w>"], vocabulary["red</w>"]
    want = [
        [start, red, car, end, end, end],
        [start, car, end, end, end, end],
        [start, end, end, end, end, end],
        [start, red, red, red, red, end],
        [start, vocabulary["d</w>"], vocabulary["!</w>"], end, end, end],
    ]
    np.testing.assert_array_equal(tokens, want)
    assert vocabulary["!"] == 0 and vocabulary["!</w>"] == 256 and vocabulary["ca"] == 512
    assert len(vocabulary) == 512 + len(MERGES) + 2


def test_clip_from_the_original_file(tmp_path):
    # A vocabulary of the real size: merges of two bytes, the first of which matter here.
    symbols = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256))]
    pairs = [f"{a} {b}" for a in symbols for b in (*symbols, *(f"{s}</w>" for s in symbols))]
    lines = ["# version", *MERGES, *(pair for pair in pairs if pair not in MERGES), ""]
    path = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    tokens = load_tokenizer("clip", tmp_path, 5)(["red car"])
    np.testing.assert_array_equal(tokens, [[49406, 515, 513, 49407, 49407]])


def test_the_empty_caption_is_the_null_condition(tmp_path):
    """The tokens of '' are those that a model's `null` encodes: null_tokens, padded."""
    save_bert(tmp_path)
    words = save_clip(tmp_path)
    ends = len(words) - 2, len(words) - 1
    for kind, null_tokens, pad in (("bert", (2, 3), 0), ("clip", ends, ends[1])):
        expected = empty_text(null_tokens, pad, 6)
        np.testing.assert_array_equal(load_tokenizer(kind, tmp_path, 6)([""]), expected)


@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_what_is_cut_off_is_quoted(kind, tmp_path):
    save_bert(tmp_path)
    save_clip(tmp_path)
    tokenizer = load_tokenizer(kind, tmp_path, 5)
    captions = ["red car", "Red car, red  CARS and more", "", "car red car"]
    tokens, cut = tokenizer.encode(captions)
    np.testing.assert_array_equal(tokens, tokenizer(captions))
    assert cut == ["", "red  CARS and more", "", ""]
    (note,) = cut_notes(tokenizer, captions * 2)
    assert note.endswith('longer than the 5 tokens of this model: cut off is "red  CARS and more"')
    (note,) = cut_notes(tokenizer, ["red\n" * 500])
    assert "\n" not in note and len(note) < 500


@pytest.mark.parametrize(
    ("kind", "files", "message"),
    [
        ("bpe", {}, "choose from bert, sentence, clip"),
        ("bert", {}, "tokenizer.json, or vocab.txt"),
        ("clip", {"vocab.json": b"{}"}, "vocab.json and merges.txt"),
        ("clip", {"vocab.json": b"{", "merges.txt": b""}, "cannot be read"),
        ("bert", {"tokenizer.json": b"[1]"}, "cannot be read"),
        ("bert", {"vocab.txt": b"\xff\xfe"}, "cannot be read"),
        ("clip", {"bpe_simple_vocab_16e6.txt.gz": b"no gzip"}, "cannot be read"),
        ("clip", {"bpe_simple_vocab_16e6.txt.gz": gzip.compress(b"#\na b\n")}, "48894 merges"),
    ],
)
def test_refusals(kind, files, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(kind, tmp_path, 77)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer 'bert' in .*elsewhere"):
        load_tokenizer("bert", tmp_path / "elsewhere", 77)
