"""Sources of labelled images: TFDS records and folders of image files. Records are (encoded image, label).

Every source here is a `loader.Source`.
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fcvit_jax.augment.images import IMAGE_SUFFIXES, is_image_file
from fcvit_jax.data import digits
from fcvit_jax.data.image_files import read_file
from fcvit_jax.devices import storage
from fcvit_jax.errors import Unreadable, UserError, log


@dataclasses.dataclass(frozen=True)
class Records:
    """One split of a TFDS dataset, in array_record files."""

    dataset: str
    split: str
    source: Sequence

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: Sequence[int]) -> Iterator[tuple[bytes, int]]:
        try:
            examples = self.source.__getitems__(indices)  # reads in parallel, which is faster for remote files
        except Exception as error:  # it may be of any type, and does not say which record is at fault
            examples = list(map(self._read_one, indices))
            log.warning(
                "%s %s: reading records together failed (%s), one by one worked", self.dataset, self.split, error
            )
        return ((example["image"], example["label"]) for example in examples)

    def describe(self, index: int) -> str:
        file_name = self._read_one(index).get("file_name", b"").decode()
        return f"record {index} of {self.dataset} {self.split}" + (f" ({file_name})" if file_name else "")

    def _read_one(self, index: int) -> dict[str, Any]:
        try:
            return self.source[index]
        except Exception as error:
            raise Unreadable(f"record {index} of {self.dataset} {self.split} cannot be read: {error}") from error


class Files:
    """One split of a folder: the class folders in it.

    Args:
      folder: the split's folder.
      classes: the file names of each class, by its name. A class's place in the mapping is its label.
    """

    def __init__(self, folder: str, classes: Mapping[str, Sequence[str]]):
        self.folder = folder
        self.labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(files) for files in classes.values()])
        # One bytes object for all names: a million Python strings would take three times the memory in every worker.
        names = [os.fsencode(f"{name}/{file}") for name, files in classes.items() for file in files]
        self._names = b"".join(names)
        self._ends = np.cumsum([len(name) for name in names])

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Sequence[int]) -> Iterator[tuple[bytes, int]]:
        for index in indices:
            yield read_file(self.describe(index)), int(self.labels[index])

    def describe(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.path.join(self.folder, os.fsdecode(self._names[start : self._ends[index]]))


def open_builder(name: str, data_dir: str, choices: str) -> tfds.core.DatasetBuilder:
    """Opens a TFDS dataset that was prepared as array_record.

    Args:
      name, data_dir: as in `open_tfds`.
      choices: what `data.dataset` may be, for a message.

    Raises:
      UserError: as `open_tfds`.
    """
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except (ValueError, AssertionError, ImportError) as error:  # no such dataset, configuration, version or package
        known = tfds.list_builders(with_community_datasets=False)  # of others it would ask a bucket of Google's
        near = difflib.get_close_matches(name, ["digits", "synthetic", *known])
        there = sorted(storage.names(storage.as_path(data_dir)))
        raise UserError(
            f"{str(error).strip().splitlines()[0]} data.dataset is {choices}"
            f" (similar: {', '.join(near) or 'none'}; in {data_dir}: {', '.join(there) or 'nothing'})"
        ) from error
    if not builder.data_path.exists():
        is_local = storage.is_local(data_dir)
        raise UserError(_how_to_prepare(builder, name, data_dir) if is_local else _how_to_copy(name, data_dir))
    builder = tfds.builder_from_directory(builder.data_path)  # also knows formats that a conversion has added
    if "array_record" not in {file_format.value for file_format in builder.info.available_file_formats()}:
        raise UserError(_how_to_convert(builder))
    return builder


def open_tfds(
    name: str, data_dir: str, train_split: str | None, eval_split: str
) -> tuple[Records | None, Records, tuple[str, ...]]:
    """Opens two splits of a TFDS dataset without importing TensorFlow. It prepares the digits if they are not there.

    Args:
      name: "digits" or a TFDS name, "NAME/CONFIG:VERSION" included.
      data_dir: where TFDS keeps its data.
      train_split, eval_split: TFDS splits or slices of them. If train_split is None, no training split is opened.

    Returns:
      The training split (or None), the evaluation split, and the class names.

    Raises:
      UserError: the dataset is unknown, not prepared, not stored as array_record, or has no images and labels; or a
        split is missing. The message says what exists, or gives the commands that help.
    """
    if name == "digits":
        if not storage.is_local(data_dir) and not storage.is_folder(storage.as_path(data_dir) / name):
            raise UserError(_how_to_copy(name, data_dir))
        builder = digits.prepare(data_dir)
    else:
        builder = open_builder(name, data_dir, "digits, synthetic, folder:PATH or a TFDS name")
    features = dict(builder.info.features.items())
    image, label = features.get("image"), features.get("label")
    if not isinstance(image, tfds.features.Image) or not isinstance(label, tfds.features.ClassLabel):
        raise UserError(
            f"{name} lacks the features image (one image) and label (a class): it has {', '.join(sorted(features))}"
        )

    def open_split(key: str, split: str) -> Records:
        records = Records(name, split, open_records(builder, name, key, split))
        if next(records.read([0]))[1] < 0:
            raise UserError(f"data.{key}={split} of {name} has no labels")
        return records

    train = None if train_split is None else open_split("train_split", train_split)
    return train, open_split("eval_split", eval_split), tuple(label.names)


def open_records(builder: tfds.core.DatasetBuilder, name: str, key: str, split: str) -> Sequence:
    """The records of a split, whose images are encoded.

    Args:
      builder: from `open_builder`.
      name: of the dataset.
      key: of the config, under "data".
      split: its value, a TFDS split or a slice of one.

    Raises:
      UserError: there is no such split.
    """
    images = [name for name, feature in builder.info.features.items() if isinstance(feature, tfds.features.Image)]
    try:
        decoders = {name: tfds.decode.SkipDecoding() for name in images}  # of masks too, which are not used
        return builder.as_data_source(split, decoders=decoders, file_format="array_record")
    except ValueError as error:
        known = ", ".join(builder.info.splits)
        raise UserError(f"data.{key}={split}: {str(error).splitlines()[0].rstrip('.')}. {name} has {known}") from error


def _how_to_prepare(builder: tfds.core.DatasetBuilder, name: str, data_dir: str) -> str:
    lines = [
        f"{name} is not prepared in {data_dir}. Prepare it once (only this needs TensorFlow):",
        "  pip install tensorflow-cpu",
    ]
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        lines += [
            f"  mkdir -p {data_dir}/downloads/manual",
            f"  # put the files there: {' '.join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())}",
        ]
    lines += [
        '  python -c "import tensorflow_datasets as tfds;'
        f" tfds.builder('{name}', data_dir='{data_dir}', file_format='array_record').download_and_prepare()\"",
    ]
    return "\n".join(lines)


def _how_to_copy(name: str, data_dir: str) -> str:
    return (
        f"{name} is not in {data_dir}. Give data.data_dir a local folder: the dataset is prepared there, or a message"
        f" says how. Then copy it: gcloud storage cp -r FOLDER/{re.split('[/:]', name)[0]} {data_dir}/"
    )


def _how_to_convert(builder: tfds.core.DatasetBuilder) -> str:
    return f"""{builder.data_path} is stored as {builder.info.file_format.value}, which has no random access.
Add array_record files to it (only this needs TensorFlow and Beam; Beam goes to a folder of its own):
  pip install tensorflow-cpu && pip install --target=beam apache-beam
  PYTHONPATH=beam python -m tensorflow_datasets.scripts.convert_format --out_file_format=array_record \\
    --dataset_version_dir={builder.data_path}"""


def open_folder(path: str, training: bool = True) -> tuple[Files | None, Files, tuple[str, ...]]:
    """Opens a folder with train/CLASS/IMAGE and val/CLASS/IMAGE (or validation/). Class 2 comes before class 10.

    A class may have no images in val; a message names such classes. Then its folder is empty, or there is none.

    Args:
      path: the folder; images end as `augment.IMAGE_SUFFIXES` says, in any case.
      training: False: the folder train need not exist. If it does and has all classes of val, the classes are its.

    Returns:
      The training split (or None), the evaluation split, and the class names.

    Raises:
      UserError: a folder is missing, a class of train is empty, or val has classes that train has not, or no image.
    """
    train = os.path.join(path, "train")
    evaluation = [os.path.join(path, name) for name in ("val", "validation") if os.path.isdir(os.path.join(path, name))]
    if (training and not os.path.isdir(train)) or len(evaluation) != 1:
        raise UserError(f"{path} must have {'a folder train, and ' if training else ''}one of val and validation")
    (evaluation,) = evaluation
    train_classes = _list_images(train) if training else {}
    if empty := {name for name, files in train_classes.items() if not files}:
        kinds = ", ".join(IMAGE_SUFFIXES)
        raise UserError(f"{train} has class folders without any image ({kinds}) directly in them: {_first(empty)}")
    found = _list_images(evaluation)
    if training and not found.keys() <= train_classes.keys():
        raise UserError(
            f"{train} and {evaluation} have different classes:"
            f" only the first has {_first(train_classes.keys() - found.keys())},"
            f" only the second has {_first(found.keys() - train_classes.keys())}."
            f" Every class of {evaluation} needs a folder in {train}."
        )
    names = list(train_classes) if training else _list_classes(train) if os.path.isdir(train) else []
    names = names if found.keys() <= set(names) else list(found)
    eval_classes = {name: found.get(name, []) for name in names}
    if without := [name for name, files in eval_classes.items() if not files]:
        if len(without) == len(names):
            raise UserError(f"{evaluation} has no image ({', '.join(IMAGE_SUFFIXES)}) directly in a class folder")
        log.info(
            "%s has no images of %d of the %d classes: %s; metrics are over the others",
            *(evaluation, len(without), len(names), _first(without)),
        )
    return Files(train, train_classes) if training else None, Files(evaluation, eval_classes), tuple(names)


def _list_classes(folder: str) -> list[str]:
    """The folders in a folder, in natural order."""
    return sorted((entry.name for entry in _visible(folder) if entry.is_dir()), key=_natural_order)


def _list_images(folder: str) -> dict[str, list[str]]:
    """The images in each class folder, of which there must be some; a warning says what else there is."""
    classes = _list_classes(folder)
    if not classes:
        raise UserError(f"{folder} has no class folders")
    images, others = {}, [entry.name for entry in _visible(folder) if not entry.is_dir()]
    for name in classes:
        taken = {entry.name: is_image_file(entry) for entry in _visible(os.path.join(folder, name))}
        images[name] = sorted(file for file, is_image in taken.items() if is_image)
        others += [f"{name}/{file}" for file, is_image in taken.items() if not is_image]
    if others:
        kinds = ", ".join(IMAGE_SUFFIXES)
        log.warning("%s: only images (%s) directly in a class folder are read, not %s", folder, kinds, _first(others))
    return images


def _visible(folder: str) -> list[os.DirEntry]:
    try:
        return [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error


def _natural_order(name: str) -> tuple:
    """A sort key that compares numbers in names by value, as timm does: class 2 comes before class 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())], name


def _first(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "none"
