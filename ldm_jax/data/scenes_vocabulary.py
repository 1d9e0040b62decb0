"""The vocabulary of the captions of scenes, in BERT's format, which comes with the package.

A vocabulary of every language has tens of thousands of words, and a small model would spend most of
its weights on words that it never sees. Captions of scenes are made of a few hundred.
"""

from __future__ import annotations

import pathlib
import re

from ldm_jax.data.scenes import JOINING, load_things, with_article

NAME = "scenes"  # as config.text.tokenizer
FOLDER = pathlib.Path(__file__).with_name("assets") / "scenes_vocab"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SIZE = 432  # tokens
PAD_TOKEN = SPECIAL.index("[PAD]")
NULL_TOKENS = (SPECIAL.index("[CLS]"), SPECIAL.index("[SEP]"))  # those of the empty caption
LENGTH = 40  # tokens that the longest possible caption has room in; it has 39


def make_vocabulary() -> list[str]:
    """The tokens in the order of their numbers, without repetition: what vocab.txt must hold.

    Objects of the test scenes are among them, though they are not trained on.
    """
    phrases = [with_article(thing.name) for things in load_things().values() for thing in things]
    # As BERT cuts text: words of letters and digits, and every other sign on its own.
    words = re.findall(r"\w+|[^\w\s]", " ".join((*phrases, *JOINING)))
    return [*SPECIAL, *sorted(set(words))]
