"""A TFDS builder for the 1,797 handwritten digits that ship with scikit-learn: real images that need no download."""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from fcvit_jax.errors import UserError, log


class Digits(tfds.core.GeneratorBasedBuilder):
    """8x8 grey PNG images of ten classes: every sixth for validation (299), the others for training (1,498)."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="The test set of the UCI Optical Recognition of Handwritten Digits data, from scikit-learn.",
            homepage="https://archive.ics.uci.edu/dataset/80",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            disable_shuffling=True,  # keeps scikit-learn's order, so that a record can be found there
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager
        return {
            "train": self._generate_examples(validation=False),
            "validation": self._generate_examples(validation=True),
        }

    def _generate_examples(self, validation: bool) -> Iterator[tuple[int, dict[str, Any]]]:
        from sklearn.datasets import load_digits  # slow to import, and only needed to write the records

        digits = load_digits()
        pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # scikit-learn's levels are 0..16
        for index, (image, label) in enumerate(zip(pixels, digits.target, strict=True)):
            if (index % 6 == 5) == validation:
                file = io.BytesIO()
                Image.fromarray(image).save(file, "png")
                # Encoded here, since TFDS would need TensorFlow to encode it.
                yield index, {"image": file.getvalue(), "label": int(label)}


def prepare(data_dir: str) -> Digits:
    """Returns the builder of the digits. Writes their records first, if they are not there.

    Several processes may call this at the same time: each writes its own folder, and the first to finish renames it.

    Args:
      data_dir: folder of TFDS data; the records go to `digits/1.0.0` in it.

    Raises:
      UserError: the folder cannot be written.
    """
    builder = Digits(data_dir=data_dir, file_format="array_record")
    if builder.data_path.exists():  # then it is complete, since it is written elsewhere and renamed
        return builder
    log.info("writing scikit-learn's digits as PNG records to %s", builder.data_dir)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(None):  # TFDS would print that it downloads
            builder.download_and_prepare()
    except OSError as error:
        if not builder.data_path.exists():  # otherwise another process was faster
            raise UserError(f"data.data_dir={data_dir} cannot be written: {error.strerror}") from error
    return Digits(data_dir=data_dir, file_format="array_record")
