"""The vocabulary that comes with the package covers every caption of a scene."""

import numpy as np
import pytest

from ldm_jax.data import scenes_vocabulary as vocabulary
from ldm_jax.data.scenes import MAX_OBJECTS, RELATIONS, load_things, open_scenes, with_article
from ldm_jax.data.tokenizers import load_tokenizer

UNKNOWN = vocabulary.SPECIAL.index("[UNK]")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bert", vocabulary.FOLDER, vocabulary.LENGTH)


def counts(tokens):
    return (tokens != vocabulary.PAD_TOKEN).sum(-1)


def test_the_file_is_what_the_function_makes(tokenizer):
    text = (vocabulary.FOLDER / "vocab.txt").read_text(encoding="utf-8")
    words = vocabulary.make_vocabulary()
    assert text == "\n".join(words) + "\n"
    assert len(words) == len(set(words)) == vocabulary.SIZE == len(tokenizer.backend)


def test_the_empty_caption_is_the_null_condition(tokenizer):
    padding = [vocabulary.PAD_TOKEN] * (vocabulary.LENGTH - len(vocabulary.NULL_TOKENS))
    assert tokenizer([""]).tolist() == [[*vocabulary.NULL_TOKENS, *padding]]


def test_all_that_captions_are_made_of_is_known(tokenizer):
    """Captions are phrases of objects, joined: every phrase and every relation is tried."""
    phrases = {with_article(thing.name) for things in load_things().values() for thing in things}
    assert len(phrases) > 300
    relations = [f"a cat {relation} a bus" for pair in RELATIONS for relation in pair]
    tokens = tokenizer([*sorted(phrases), *relations, "a cat, a bus and a bat"])
    assert not (tokens == UNKNOWN).any()
    assert (tokenizer(["a spaceport"]) == UNKNOWN).any()  # so that the test could fail

    # The longest caption lists the longest phrases, with a comma or 'and' between two of them.
    lengths = np.sort(counts(tokenizer(sorted(phrases))) - 2)
    assert 2 + lengths[-MAX_OBJECTS:].sum() + MAX_OBJECTS - 1 <= vocabulary.LENGTH


@pytest.mark.parametrize("split", ["train[:300]", "test[:300]"])
def test_captions_are_told_apart_and_none_is_cut_off(tokenizer, split):
    scenes = open_scenes(split)
    captions = [scenes[i]["text"] for i in range(len(scenes))]
    tokens = tokenizer(captions)
    assert not (tokens == UNKNOWN).any()
    assert counts(tokens).max() < vocabulary.LENGTH
    assert len(np.unique(tokens, axis=0)) == len(set(captions))
