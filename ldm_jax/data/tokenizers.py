"""Captions to tokens, with a vocabulary from a folder: nothing is downloaded."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ldm_jax.errors import UserError

# For each kind of tokenizer, the files that it can be read from, the first set found first.
FILES = {
    "bert": (("tokenizer.json",), ("vocab.txt",)),
    "sentence": (("tokenizer.json",), ("vocab.txt",)),
    "clip": (
        ("vocab.json", "merges.txt"),
        ("tokenizer.json",),
        ("bpe_simple_vocab_16e6.txt.gz",),
    ),
}
CLIP_MERGES = 48894  # that make up a vocabulary of 49408 with 512 bytes and 2 special tokens
SHOWN = 300  # characters of what is cut off, in a message
START, END = "<|startoftext|>", "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Turns captions into tokens of a fixed number.

    Attributes:
        length: tokens of a caption, with those that mark its beginning and end.
        backend: the tokenizer of `transformers`.
    """

    length: int
    backend: Any

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """Returns tokens (B, length) int32: cut off, or padded at the end.

        BERT's captions end in [SEP] and are padded by [PAD]; CLIP's end in, and are padded by, the
        end token, as in Stable Diffusion v1.
        """
        return self.encode(captions)[0]

    def encode(self, captions: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        """Returns tokens as `__call__` does, and of each caption the end that is cut off, or ''."""
        found = self.backend(
            list(captions), padding="max_length", truncation=True, max_length=self.length
        )
        tokens = np.asarray(found["input_ids"], np.int32).reshape(-1, self.length)
        # Marks of the beginning and the end come from no characters.
        starts = [
            next(start for start, stop in encoding.overflowing[0].offsets if stop > 0)
            if encoding.overflowing
            else len(caption)
            for caption, encoding in zip(captions, found.encodings, strict=True)
        ]
        return tokens, [caption[i:] for caption, i in zip(captions, starts, strict=True)]

    def digest(self) -> str:
        """SHA-256, in hex, of the vocabulary and its numbers."""
        vocabulary = json.dumps(sorted(self.backend.get_vocab().items()))
        return hashlib.sha256(vocabulary.encode()).hexdigest()


def cut_notes(tokenizer: Tokenizer, captions: Sequence[str]) -> list[str]:
    """A line for each different caption that is too long, with the end that is cut off."""
    captions = list(dict.fromkeys(captions))
    notes = []
    for caption, cut in zip(captions, tokenizer.encode(captions)[1], strict=True):
        if cut:
            start, end = (json.dumps(text, ensure_ascii=False) for text in (caption[:40], cut))
            shown = end if len(end) <= SHOWN else f'{end[:SHOWN]} ..."'
            notes.append(
                f"warning: the prompt that begins {start} is longer than the {tokenizer.length} "
                f"tokens of this model: cut off is {shown}"
            )
    return notes


def load_tokenizer(kind: str, folder: str | os.PathLike[str], length: int) -> Tokenizer:
    """Reads a tokenizer of a text encoder.

    Args:
        kind: 'bert', 'clip' or 'sentence'.
        folder: holds `tokenizer.json` or `vocab.txt`; for 'clip' `vocab.json` and `merges.txt`,
            `tokenizer.json`, or OpenAI's `bpe_simple_vocab_16e6.txt.gz`.
        length: tokens of a caption.

    Raises:
        UserError: no such kind, none of its files is there or they cannot be read.
    """
    if kind not in FILES:
        raise UserError(f"no tokenizer '{kind}': choose from {', '.join(FILES)}")
    folder = pathlib.Path(folder)
    found = [names for names in FILES[kind] if all((folder / name).is_file() for name in names)]
    if not found:
        choices = ", or ".join(" and ".join(names) for names in FILES[kind])
        raise UserError(f"no tokenizer '{kind}' in {folder}: it must hold {choices}")
    try:
        backend = _read(kind, folder, found[0])
    except UserError:
        raise
    except Exception as error:  # the readers raise all kinds, bare Exception among them
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        names = " and ".join(found[0])
        raise UserError(f"{names} in {folder} cannot be read: {reason}") from error
    return Tokenizer(length, backend)


def _read(kind: str, folder: pathlib.Path, names: tuple[str, ...]) -> Any:
    transformers = _transformers()
    if names[0].endswith(".gz"):
        vocabulary, merges = read_clip_merges(folder / names[0])
        return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges)
    # Not the constructor with a file's name: it takes the vocabulary for empty.
    reader = transformers.CLIPTokenizer if kind == "clip" else transformers.BertTokenizer
    return reader.from_pretrained(folder, local_files_only=True)


def _transformers() -> Any:
    """Imports `transformers`, which takes seconds, without its advice to install PyTorch."""
    key = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        import transformers
    except ImportError as error:
        raise UserError("tokenizers need transformers: `pip install transformers`") from error
    finally:
        os.environ.pop(key) if before is None else os.environ.update({key: before})
    return transformers


def read_clip_merges(
    path: str | os.PathLike[str], count: int = CLIP_MERGES
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Reads OpenAI's `bpe_simple_vocab_16e6.txt.gz`: one merge of two symbols per line.

    Tokens are numbered: bytes, bytes that end a word, the results of the merges, start, end.

    Args:
        path: of the file; its first line is a comment.
        count: of the merges that are used; the file has more.

    Returns:
        The vocabulary and the merges, in order.

    Raises:
        UserError: it cannot be read or has fewer merges.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    merges = [tuple(line.split()) for line in lines[1 : count + 1]]
    if len(merges) < count or any(len(merge) != 2 for merge in merges):
        raise UserError(f"{path} does not hold {count} merges, two symbols in a line each")
    symbols = _byte_symbols()
    tokens = [*symbols, *(f"{s}</w>" for s in symbols), *("".join(m) for m in merges), START, END]
    return {token: number for number, token in enumerate(tokens)}, merges


def _byte_symbols() -> list[str]:
    """A visible character for each byte: itself if it is one, else the next above 255."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in visible] + [chr(256 + i) for i in range(256 - len(visible))]
