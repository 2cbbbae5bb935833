"""The builder of the digits: what it writes, and that several processes may write at once."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from fcvit_jax.data import digits

SKIP = {"image": tfds.decode.SkipDecoding()}


def test_records_are_the_digits_of_scikit_learn(digits_dir):
    builder = digits.prepare(digits_dir)
    expected = load_digits()
    validation = np.arange(1797) % 6 == 5
    for split, members, size in (("train", ~validation, 1498), ("validation", validation, 299)):
        records = builder.as_data_source(split, decoders=SKIP)
        images = [Image.open(io.BytesIO(record["image"])) for record in records]
        assert len(records) == size
        assert {(image.format, image.mode, image.size) for image in images} == {("PNG", "L", (8, 8))}
        np.testing.assert_array_equal(np.stack(images), np.rint(expected.images[members] * 255 / 16))
        np.testing.assert_array_equal([record["label"] for record in records], expected.target[members])


def test_writing_is_said_once(tmp_path, capfd):
    digits.prepare(str(tmp_path))
    said = capfd.readouterr()
    assert said.out == f"writing scikit-learn's digits as PNG records to {tmp_path}/digits/1.0.0\n" and not said.err
    digits.prepare(str(tmp_path))
    assert capfd.readouterr() == ("", "")


def test_another_process_may_be_faster(tmp_path, monkeypatch):
    generate = digits.Digits._generate_examples

    def overtaken(self, validation):
        monkeypatch.undo()
        digits.prepare(str(tmp_path))
        return generate(self, validation)

    monkeypatch.setattr(digits.Digits, "_generate_examples", overtaken)
    assert len(digits.prepare(str(tmp_path)).as_data_source("validation", decoders=SKIP)) == 299
    assert [folder.name for folder in (tmp_path / "digits").iterdir()] == ["1.0.0"]
