"""Images of a data set with the conditions that a model takes, in memory: to be judged by."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ldm_jax import config as config_lib
from ldm_jax import workdir as files
from ldm_jax.data import folder, tar_source
from ldm_jax.data.bad import TolerantSource
from ldm_jax.data.captions import CaptionedSource
from ldm_jax.data.order import epoch_order
from ldm_jax.data.pipeline import epoch_batches
from ldm_jax.data.sources import Source, open_source
from ldm_jax.data.table import split_rows
from ldm_jax.data.task_fields import passed_on
from ldm_jax.errors import UserError
from ldm_jax.preflight import open_data
from ldm_jax.training.latents import task_transform

# What images take for guided sampling, where there is no conditioner.
UNCONDITIONAL = ("masked_image", "mask")
_BATCH_SIZE = 64  # examples at a time


class Examples(NamedTuple):
    """N examples, made as training makes them, without augmentation.

    Attributes:
        images: (N, R, R, 3) uint8.
        fields: those of the model's conditions by name, (N, ...), but for 'masked_image', which
            follows from the image and 'mask', and 'noise_level', which is 0; also 'segmentation'
            of a model of layouts, if the data have maps of the classes of their boxes.
        captions: the first one of each, for a model of texts; else none.
        names: of the examples.
        label_names: names of classes, or None.
        num_labels: number of classes, 0 without labels.
        map_classes: the class in a map that stands for each label, where both are known.
        ground: the class in a map that is none of an object, where the data say so.
    """

    images: np.ndarray
    fields: dict[str, np.ndarray]
    captions: tuple[str, ...]
    names: tuple[str, ...]
    label_names: tuple[str, ...] | None
    num_labels: int
    map_classes: tuple[int, ...] | None
    ground: int | None = None


def choose_data(config: ConfigDict, source: str, split: str) -> tuple[ConfigDict, str]:
    """The config with the data that are asked for, and the split of them that is held out.

    `source` '' is the config's own, `split` '' what the config holds out, or else trains on; of
    another source, 'train'.
    """
    config = ConfigDict(config).copy_and_resolve_references()
    if source and source != config.data.source:
        config.data.update(source=source, where="", split="train")
        return config, split or "train"
    return config, split or config.first_stage.eval.split or config.data.split


@dataclasses.dataclass(frozen=True)
class ExampleReader:
    """An opened split of a data set, of which some examples are read at a time.

    Attributes:
        config: of the model, with the data to read and the fields that are made of them.
        workdir: of the model.
        source: of all examples.
        captioned: whether the model reads texts.
        map_classes: see `Examples`.
        total: examples of the split, of which `source` may be some.
    """

    config: ConfigDict
    workdir: pathlib.Path
    source: Source
    captioned: bool
    map_classes: tuple[int, ...] | None
    total: int

    def __len__(self) -> int:
        return len(self.source)

    def only(self, rows: Sequence[int]) -> ExampleReader:
        """A reader of the examples at these places alone, which become 0, 1, 2, ..."""
        return dataclasses.replace(self, source=_Chosen(self.source, rows))

    def read(
        self,
        rows: Sequence[int],
        reduce: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] | None = None,
    ) -> Examples:
        """Reads the examples at the places `rows`, which may come more than once.

        What is drawn for an example, such as its hole, follows from its place. Another example
        takes the place of one that cannot be read, as in training; `Examples.names` says which.

        Args:
            rows: places in the source, at least one.
            reduce: what is kept of the arrays (B, ...) of some examples, as soon as they are read.

        Raises:
            UserError: more examples than config.data.max_bad allows cannot be read or lack a
                field.
        """
        config, source = self.config, self.source
        parts, places = [], []
        for batch in epoch_batches(
            self._tolerant,
            _WithoutMasked(task_transform(config)),
            _BATCH_SIZE,
            rows=rows,
            fields=(*passed_on(config.data.fields), *(("tokens",) if self.captioned else ())),
            replace=True,
            threads=config.data.threads,
        ):
            kept = {name: array[batch["valid"]] for name, array in batch.items()}
            places += kept["index"].tolist()
            parts.append((reduce or dict)(kept))
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        captions: list[str] = []
        if self.captioned:
            captions = arrays["tokens"][:, 0].tolist()
            arrays["tokens"] = files.training_tokenizer(self.workdir, config)[0](captions)
        return Examples(
            arrays["image"],
            {name: arrays[name] for name in arrays if name not in ("image", "index", "valid")},
            tuple(captions),
            tuple(source.name(i) for i in places),
            source.label_names,
            source.num_labels,
            self.map_classes if "segmentation" in arrays else None,
            getattr(source, "segmentation_ground", None),
        )

    @functools.cached_property
    def _tolerant(self) -> TolerantSource:
        """The source that is read: as in training, a share of it may be bad."""
        data, read = self.config.data, self.source
        if self.captioned:
            read = CaptionedSource(read, data.caption, _first)
        return TolerantSource(read, data.max_bad, None, self.total)


def open_examples(
    config: ConfigDict, workdir: pathlib.Path, split: str, names: Sequence[str] | None = None
) -> ExampleReader:
    """Opens a split of the config's data.

    Args:
        config: of the model, with the data to read.
        workdir: of the model.
        split: of the data.
        names: of the model's classes, of which the data's are found by name where they have any;
            None takes the data's numbers as they are.

    Raises:
        UserError: no such data, a field that the model needs is missing, or the data have a class
            that the model has not.
    """
    config = ConfigDict(config).copy_and_resolve_references()
    fields = [field for part in config.conditioners for field in config_lib.FIELDS[part]]
    config.data.split, config.data.low_res.noise = split, 0.0
    made = tuple(field for field in fields if field not in ("tokens", "noise_level"))
    config.data.fields = made if fields else UNCONDITIONAL
    source = open_data(config, workdir)
    numbered = names and source.label_names and {"label", "boxes"} & set(config.data.fields)
    if numbered and source.label_names != tuple(names):
        source = _Renumbered(source, names, config.data.fields)
    classes = _map_classes(source)
    if classes is not None and "boxes" in fields and "segmentation" not in fields:
        config.data.fields += ("segmentation",)
        config.segmentation.num_classes = len(source.segmentation_names)
    return ExampleReader(config, workdir, source, "tokens" in fields, classes, len(source))


def read_examples(
    config: ConfigDict,
    workdir: pathlib.Path,
    split: str,
    count: int = 0,
    names: Sequence[str] | None = None,
    reduce: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] | None = None,
) -> Examples:
    """Reads `count` examples (0: all) of a split of the config's data, drawn evenly from all of it.

    The draw is the same every time; the examples are in the order of the source. The other
    arguments are those of `open_examples` and `ExampleReader.read`, which raise UserError.
    """
    reader = open_examples(config, workdir, split, names)
    rows = np.sort(epoch_order(0, 0, len(reader))[: count or len(reader)]).tolist()
    return reader.only(rows).read(range(len(rows)), reduce)


def choose_rows(seed: int, start: int, count: int, total: int) -> list[int]:
    """Places in a source of `total` examples, drawn without putting back, epoch after epoch.

    The n-th draw is a function of seed and n alone.

    Args:
        seed: of the draw.
        start: number of the first draw that is wanted.
        count: of draws.
        total: of examples.
    """
    draws = (divmod(number, total) for number in range(start, start + count))
    return [int(epoch_order(seed, epoch, total)[place]) for epoch, place in draws]


def fingerprint(spec: str) -> str:
    """Tells whether a source's files are others than before; '' where it has none of its own."""
    if spec.startswith("folder:"):
        return folder.fingerprint(pathlib.Path(spec[7:]).expanduser())
    return tar_source.fingerprint(spec[4:]) if spec.startswith("tar:") else ""


def count_trained(config: ConfigDict, names: Sequence[str], split: str) -> int:
    """How many examples of a split of the config's data, of these names, are trained on too.

    Of tfds, whose examples are named by their place in the split, all count unless the splits share
    none for certain.
    """
    data = config.data
    if data.source.startswith("tfds:"):
        return 0 if _disjoint(split, data.split) else len(names)
    source = open_source(data.source, split=data.split, where=data.where, label="")
    trained = {source.name(i) for i in range(len(source))}
    return sum(name in trained for name in names)


def _disjoint(a: str, b: str) -> bool:
    """Whether two splits share no example: other names, or slices in percent that do not meet."""
    if a.partition("[")[0] != b.partition("[")[0]:
        return True
    if not ("%" in a and "%" in b):
        return False
    name, places = a.partition("[")[0], [str(i) for i in range(100)]
    rows = (set(split_rows(places, [name] * 100, split, "the set")) for split in (a, b))
    return not set.intersection(*rows)


def _first(captions: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """The first caption itself, where a tokenizer would give tokens."""
    return np.array([captions[0]]), [""]


class _Chosen:
    """Some of the examples of a source."""

    def __init__(self, source: Source, rows: Sequence[int]) -> None:
        self._source, self._rows = source, rows
        self.columns = source.columns
        self.label_names, self.num_labels = source.label_names, source.num_labels
        self.segmentation_ground = getattr(source, "segmentation_ground", None)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict:
        return self._source[self._rows[index]]

    def name(self, index: int) -> str:
        return self._source.name(self._rows[index])


class _Renumbered:
    """A source whose classes have the numbers of a model's, by their names.

    The names are those of 'label', or else of 'boxes'.

    Raises:
        UserError: the model has no class of a name.
    """

    def __init__(self, source: Source, names: Sequence[str], fields: Sequence[str]) -> None:
        unknown = [name for name in source.label_names if name not in names]
        if unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise UserError(
                f"the data have the class '{unknown[0]}'{more}, which the model has not: choose "
                f"another --source, of {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
            )
        self._source, self._boxes = source, "label" not in fields
        self._number = [names.index(name) for name in source.label_names]
        self.columns, self.label_names, self.num_labels = source.columns, tuple(names), len(names)
        self.segmentation_names = getattr(source, "segmentation_names", None)
        self.segmentation_ground = getattr(source, "segmentation_ground", None)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        example = dict(self._source[index])
        if self._boxes:
            example["boxes"] = [
                box | {"label": self._number[box["label"]]} for box in example["boxes"]
            ]
        else:
            example["label"] = self._number[example["label"]]
        return example

    def name(self, index: int) -> str:
        return self._source.name(index)


class _WithoutMasked:
    """A transform that leaves out the field 'masked_image': four times the bytes of the image."""

    def __init__(self, transform) -> None:
        self.draw, self._transform = transform.draw, transform

    def apply(self, example: dict, draw) -> dict[str, np.ndarray]:
        arrays = self._transform.apply(example, draw)
        return {name: x for name, x in arrays.items() if name != "masked_image"}


def _map_classes(source: Source) -> tuple[int, ...] | None:
    """Which class of a source's maps each of its labels is, by their names."""
    maps, labels = getattr(source, "segmentation_names", None), source.label_names
    if not (maps and labels and set(labels) <= set(maps)):
        return None
    return tuple(maps.index(name) for name in labels)
