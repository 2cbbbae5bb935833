"""Batches: order, sharding and evaluation; what a user is told about bad data; workers that fail or are killed."""

import dataclasses
import errno
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from imagenet_mini import jpeg, prepare_code
from PIL import Image
from tensorflow_datasets.core.utils import gcs_utils

from fcvit_jax import augment
from fcvit_jax.data import loader, sources
from fcvit_jax.errors import UserError
from fcvit_jax.tasks import classification


def collect(batches):
    """Stacks what batches hold: {"image": (batches, b, ...), ...}."""
    batches = list(batches)
    return {key: np.stack([batch[key] for batch in batches]) for key in batches[0]}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def test_workers_hosts_and_restarts_change_nothing(digits_dir):
    def opened(workers):
        return classification.open_dataset(
            dataset="digits", data_dir=digits_dir, batch_size=400, image_size=12, workers=workers, rand_augment=None
        )

    dataset = opened(workers=0)
    assert dataset.steps_per_epoch == 3
    reference = collect(loader.train_batches(dataset, seed=3, start_step=0, num_steps=7))  # into the third epoch
    evaluation = collect(loader.eval_batches(dataset))
    assert reference["image"].dtype == np.uint8 and evaluation["mask"].sum() == 299

    shares = [collect(loader.train_batches(dataset, 3, 0, 7, process_index=p, process_count=2)) for p in range(2)]
    assert_same({key: np.concatenate([share[key] for share in shares], axis=1) for key in reference}, reference)
    for workers, start in ((0, 2), (1, 2), (2, 1)):
        restarted = collect(loader.train_batches(opened(workers), 3, start, 7 - start))
        assert_same(restarted, {key: value[start:] for key, value in reference.items()})
    assert_same(collect(loader.eval_batches(opened(workers=2))), evaluation)


def test_seed_and_epoch_change_order_and_augmentation(digits_dir):
    dataset = classification.open_dataset(dataset="digits", data_dir=digits_dir, batch_size=1498, image_size=8)

    def by_first_pixels(batch):
        return sorted(image.tobytes() for image in batch["image"])

    first, second = loader.train_batches(dataset, seed=0, start_step=0, num_steps=2)
    (other,) = loader.train_batches(dataset, seed=1, start_step=0, num_steps=1)
    for batch in (second, other):
        assert (batch["label"] != first["label"]).mean() > 0.8
        assert len(set(by_first_pixels(batch)) & set(by_first_pixels(first))) < 500


@dataclasses.dataclass
class Numbers:
    """A source whose labels are the indices."""

    size: int

    def __len__(self):
        return self.size

    def read(self, indices):
        return [(b"", index) for index in indices]


@pytest.mark.parametrize("size, batch_size, processes", [(23, 4, 1), (23, 6, 3), (7, 6, 2), (5, 5, 5), (24, 6, 2)])
def test_every_example_exactly_once(digits_dir, monkeypatch, size, batch_size, processes):
    ones = np.ones((2, 2, 3), np.uint8)
    monkeypatch.setattr(augment, "train_transform", lambda *args, **kwargs: ones)
    monkeypatch.setattr(augment, "eval_transform", lambda *args, **kwargs: ones)
    dataset = dataclasses.replace(
        classification.open_dataset(dataset="digits", data_dir=digits_dir, batch_size=batch_size, image_size=2),
        train=Numbers(size),
        eval=Numbers(size),
        class_names=("",) * size,
    )
    steps = dataset.steps_per_epoch
    epochs = np.concatenate(
        [collect(loader.train_batches(dataset, 0, 0, 3 * steps, i, processes))["label"] for i in range(processes)],
        axis=1,
    ).reshape(3, steps * batch_size)
    assert steps == size // batch_size
    assert all(len(set(epoch)) == len(epoch) for epoch in epochs.tolist())
    assert size < 6 or len({tuple(epoch) for epoch in epochs.tolist()}) == 3

    evaluated = [collect(loader.eval_batches(dataset, i, processes)) for i in range(processes)]
    assert {share["mask"].shape for share in evaluated} == {(-(-size // batch_size), batch_size // processes)}
    assert sorted(np.concatenate([share["label"][share["mask"]] for share in evaluated])) == list(range(size))


def test_imagenet_is_read_without_tensorflow(imagenet_mini_dirs):
    data_dir = imagenet_mini_dirs / "array_record"
    code = f"""
import sys
from fcvit_jax.data import loader
from fcvit_jax.tasks import classification
if __name__ == "__main__":
    options = dict(dataset="imagenet2012", batch_size=8, image_size=32)
    dataset = classification.open_dataset(data_dir={str(data_dir)!r}, **options)
    labels = {{int(label) for batch in loader.train_batches(dataset, 0, 0, 5) for label in batch["label"]}}
    (batch,) = list(loader.eval_batches(dataset))[:1]
    print(dataset.num_train, dataset.num_eval, dataset.num_classes, dataset.class_names[277], sorted(labels))
    assert not [name for name in sys.modules if name.split(".")[0] == "tensorflow"]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == "40 21 1000 n02119022 [0, 1, 277, 999]".split()


def test_imagenet_pixels_are_those_of_the_files(imagenet_mini):
    dataset = classification.open_dataset(dataset="imagenet2012", data_dir=imagenet_mini, batch_size=21, image_size=32)
    (batch,) = loader.eval_batches(dataset)
    with tarfile.open(os.path.join(imagenet_mini, "downloads", "manual", "ILSVRC2012_img_val.tar")) as tar:
        files = [tar.extractfile(name).read() for name in tar.getnames()]
    expected = [augment.eval_transform(file, 32, 0.9).tobytes() for file in files]
    assert sorted(expected) == sorted(image.tobytes() for image in batch["image"])


def test_a_dataset_that_is_not_prepared_gets_the_commands(imagenet_mini, tmp_path):
    with pytest.raises(UserError) as error:
        classification.open_dataset(dataset="imagenet2012", data_dir=str(tmp_path), batch_size=8)
    message = str(error.value)
    assert f'python -c "{prepare_code(tmp_path, "array_record")}"' in message  # what the fixture ran
    assert f"mkdir -p {tmp_path}/downloads/manual" in message and "ILSVRC2012_img_train.tar" in message
    assert "pip install tensorflow-cpu" in message


def test_tfrecord_gets_the_conversion_and_its_result_is_read(imagenet_mini_dirs, tmp_path):
    with pytest.raises(UserError, match="stored as tfrecord") as error:
        classification.open_dataset(dataset="imagenet2012", data_dir=str(imagenet_mini_dirs / "tfrecord"), batch_size=8)
    folder = imagenet_mini_dirs / "tfrecord" / "imagenet2012" / "5.1.0"
    assert "-m tensorflow_datasets.scripts.convert_format --out_file_format=array_record" in str(error.value)
    assert f"--dataset_version_dir={folder}" in str(error.value)

    # What that command does: it adds files, and their format to the description.
    converted = tmp_path / "imagenet2012" / "5.1.0"
    shutil.copytree(folder, converted)
    shutil.copytree(imagenet_mini_dirs / "array_record" / "imagenet2012" / "5.1.0", tmp_path / "new")
    for path in (tmp_path / "new").glob("*.array_record*"):
        path.rename(converted / path.name)
    info = json.loads((converted / "dataset_info.json").read_text())
    (converted / "dataset_info.json").write_text(json.dumps(info | {"alternativeFileFormats": ["array_record"]}))
    assert classification.open_dataset(dataset="imagenet2012", data_dir=str(tmp_path), batch_size=8).num_train == 40


class Texts(tfds.core.GeneratorBasedBuilder):
    """A dataset without images."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=1)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": [(0, {"text": "x", "label": 0})]}

    def _generate_examples(self):
        raise NotImplementedError


class Masks(tfds.core.GeneratorBasedBuilder):
    """A dataset with a second image, which is none."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {name: tfds.features.Image() for name in ("image", "mask")}
        features["label"] = tfds.features.ClassLabel(num_classes=2)
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples() for split in ("train", "validation")}

    def _generate_examples(self):
        for label in (0, 1):
            yield label, {"image": jpeg(np.random.default_rng(label)), "mask": b"broken", "label": label}


def test_other_images_of_a_record_are_not_decoded(tmp_path):
    Masks(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    dataset = classification.open_dataset(dataset="masks", data_dir=str(tmp_path), batch_size=2, image_size=8)
    (batch,) = loader.eval_batches(dataset)
    assert sorted(batch["label"]) == [0, 1]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(dataset="imagnet2012"), r"Dataset imagnet2012 not found.*similar: imagenet2012.*in .*: .*imagenet2012"),
        (dict(dataset="imagenet2012:1.2.3"), "imagenet2012 cannot be loaded at version 1.2.3"),
        (
            dict(eval_split="val"),
            r"data.eval_split=val: Unknown split 'val'.* imagenet2012 has train, validation, test",
        ),
        (dict(train_split="train[:x]"), r"data.train_split=train\[:x\]"),
        (dict(eval_split="test"), "data.eval_split=test of imagenet2012 has no labels"),
        (dict(dataset="folder:/nowhere"), "/nowhere must have a folder train"),
        (dict(batch_size=41), "40 training images, less than one batch: data.batch_size is 41"),
        (dict(batch_size=0), "data.batch_size=0 must be"),
        (dict(workers=-2), "data.workers=-2 must be at least -1"),
        (dict(crop_pct=1.5), "crop_pct"),
    ],
)
def test_bad_config(imagenet_mini, change, message, monkeypatch):
    monkeypatch.setattr(gcs_utils, "exists", pytest.fail)  # TFDS would wait for a bucket of Google's
    with pytest.raises(UserError, match=message):
        classification.open_dataset(**dict(dataset="imagenet2012", data_dir=imagenet_mini, batch_size=8) | change)


@pytest.mark.parametrize("cores, workers", [(1, 1), (2, 1), (6, 5)])
def test_workers_for_all_cores_but_one(monkeypatch, cores, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(cores), raising=False)
    assert classification.open_dataset(dataset="synthetic", batch_size=4, workers=-1).workers == workers


def test_a_dataset_without_images(tmp_path):
    Texts(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    with pytest.raises(UserError, match="texts lacks the features image .* it has label, text"):
        classification.open_dataset(dataset="texts", data_dir=str(tmp_path), batch_size=8)


def test_batches_that_cannot_be(digits_dir):
    dataset = classification.open_dataset(dataset="digits", data_dir=digits_dir, batch_size=9, image_size=8)
    with pytest.raises(UserError, match="data.batch_size=9 must be a multiple of the 2 processes"):
        loader.train_batches(dataset, 0, 0, 1, process_index=0, process_count=2)


def test_a_broken_record_is_named(imagenet_mini, tmp_path, monkeypatch):
    shutil.copytree(imagenet_mini, tmp_path, dirs_exist_ok=True)
    arguments = dict(dataset="imagenet2012", data_dir=str(tmp_path), batch_size=40, image_size=32)
    path = tmp_path / "imagenet2012" / "5.1.0" / "imagenet2012-train.array_record-00000-of-00001"
    content = bytearray(path.read_bytes())
    content[20000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"record \d+ of imagenet2012 train cannot be read: Corrupted"):
        next(loader.train_batches(classification.open_dataset(**arguments), 0, 0, 1))

    def refuse(*args):
        raise UserError("broken JPEG")

    monkeypatch.setattr(augment, "eval_transform", refuse)
    name = r"record 0 of imagenet2012 validation \(ILSVRC2012_val_\d+.JPEG\)"
    with pytest.raises(UserError, match=f"{name}: not a readable image: broken JPEG"):
        next(loader.eval_batches(classification.open_dataset(**arguments)))


def test_a_bug_is_not_taken_for_a_broken_image(folder, monkeypatch):
    def fail(*args):
        raise ValueError("a bug")

    monkeypatch.setattr(augment, "eval_transform", fail)
    with pytest.raises(ValueError, match="^a bug") as error:
        list(loader.eval_batches(open_folder(folder)))
    assert not isinstance(error.value, UserError)


@pytest.fixture
def folder(tmp_path):
    """Two classes of two images in train and val, with a file name of each suffix."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, files in {"dog": ("b.jpg", "a.JPEG"), "cat": ("d.png", "c.WebP")}.items():
            (tmp_path / split / name).mkdir(parents=True)
            for file in files:
                image = Image.fromarray(rng.integers(0, 256, (10, 12, 3), np.uint8))
                image.save(tmp_path / split / name / file, file.split(".")[1].lower().replace("jpg", "jpeg"))
            (tmp_path / split / name / "notes.txt").write_text("no image")
    return tmp_path


def open_folder(folder, **options):
    return classification.open_dataset(**dict(dataset=f"folder:{folder}", batch_size=2, image_size=8) | options)


def test_images_are_cut_and_augmented_as_the_options_say(folder):
    augmentation = dict(crop_scale=(0.3, 0.5), crop_ratio=(0.5, 0.8), flip=1.0, rand_augment=(3, 5.0, 0.0))
    dataset = open_folder(folder, crop_pct=0.5, workers=0, **augmentation)
    files = ["cat/c.WebP", "cat/d.png", "dog/a.JPEG", "dog/b.jpg"]
    evaluated = collect(loader.eval_batches(dataset))["image"].reshape(4, 8, 8, 3)
    trained = collect(loader.train_batches(dataset, 3, 0, 2))["image"].reshape(4, 8, 8, 3)
    for place, index in enumerate(loader.train_order(dataset, 3, 0).ravel().tolist()):
        expected = augment.eval_transform((folder / "val" / files[index]).read_bytes(), 8, 0.5)
        np.testing.assert_array_equal(evaluated[index], expected)
        rng = np.random.default_rng([3, 0, index])
        expected = augment.train_transform((folder / "train" / files[index]).read_bytes(), rng, 8, **augmentation)
        np.testing.assert_array_equal(trained[place], expected)


def test_folder(folder, caplog):
    (folder / "val").rename(folder / "validation")
    (folder / "validation" / ".cache").mkdir()
    (folder / "validation" / "readme.txt").touch()
    (folder / "validation" / "dog" / "more.jpg").mkdir()
    (folder / "validation" / "dog" / "absent.jpg").symlink_to("nothing")
    (folder / "validation" / "cat" / "._c.jpg").write_bytes(b"what macOS leaves on other file systems")
    dataset = open_folder(folder, batch_size=4, train_split="train[:9]")
    ignored, train, validation = caplog.messages
    assert "data.train_split=train[:9]" in ignored
    assert train.startswith(f"{folder / 'train'}: ") and train.endswith("not cat/notes.txt, dog/notes.txt")
    assert validation.startswith(f"{folder / 'validation'}: ")
    assert validation.endswith("not cat/notes.txt, dog/absent.jpg, dog/more.jpg, dog/notes.txt, readme.txt")
    assert dataset.class_names == ("cat", "dog") and (dataset.num_train, dataset.num_eval) == (4, 4)
    (batch,) = loader.eval_batches(dataset)
    files = [folder / "validation" / name for name in ("cat/c.WebP", "cat/d.png", "dog/a.JPEG", "dog/b.jpg")]
    np.testing.assert_array_equal(batch["label"], [0, 0, 1, 1])
    np.testing.assert_array_equal(batch["image"], [augment.eval_transform(file.read_bytes(), 8) for file in files])


def test_a_folder_may_hold_images_of_many_formats(tmp_path):
    """Of several frames the first counts."""
    colours = [(200, 30, 60), (0, 0, 255)]
    first, second = (Image.new("RGB", (40, 40), colour) for colour in colours)
    names = ["a.bmp", "b.tif", "c.TIFF", "d.gif", "e.jfif", "f.jpe", "g.png"]
    for split in ("train", "val"):
        (tmp_path / split / "red").mkdir(parents=True)
        for name in names:
            more = {"save_all": True, "append_images": [second]} if name[0] in "bcd" else {}
            kind = {"format": "JPEG", "quality": 100} if name[0] in "ef" else more
            first.save(tmp_path / split / "red" / name, **kind)
    data = open_folder(tmp_path, batch_size=7)
    (batch,) = loader.eval_batches(data)
    assert batch["mask"].all()
    np.testing.assert_allclose(batch["image"], np.broadcast_to(colours[0], batch["image"].shape), atol=2)


def test_classes_are_in_natural_order(tmp_path):
    for split, name in itertools.product(("train", "val"), ("10", "9", "b2", "B10", "a")):
        (tmp_path / split / name).mkdir(parents=True)
        (tmp_path / split / name / "1.jpg").touch()
    assert sources.open_folder(str(tmp_path))[2] == ("9", "10", "a", "b2", "B10")


def test_bad_folders(folder):
    (folder / "validation").mkdir()
    with pytest.raises(UserError, match=f"^{folder} must have a folder train, and one of val and validation"):
        open_folder(folder)
    (folder / "validation").rmdir()
    (folder / "train" / "empty").mkdir()
    with pytest.raises(UserError, match="train has class folders without any image .*: empty$"):
        open_folder(folder)
    (folder / "train" / "empty").rename(folder / "train" / "bird")  # which is not in val, and may be so
    shutil.copy(folder / "val" / "cat" / "d.png", folder / "train" / "bird")
    (folder / "val" / "cat").rename(folder / "val" / "cats")
    with pytest.raises(UserError, match="different classes: only the first has bird, cat, only the second has cats"):
        open_folder(folder)
    shutil.rmtree(folder / "train")
    (folder / "train").mkdir()
    with pytest.raises(UserError, match="train has no class folders"):
        open_folder(folder)


def test_a_class_may_have_no_validation_images(folder, caplog):
    for name in ("ant", "bird"):
        shutil.copytree(folder / "train" / "cat", folder / "train" / name)
    (folder / "val" / "bird").mkdir()
    dataset = open_folder(folder, batch_size=4)
    assert dataset.class_names == ("ant", "bird", "cat", "dog") and (dataset.num_train, dataset.num_eval) == (8, 4)
    (said,) = [message for message in caplog.messages if "no images of" in message]
    assert said == f"{folder / 'val'} has no images of 2 of the 4 classes: ant, bird; metrics are over the others"
    (batch,) = loader.eval_batches(dataset)
    np.testing.assert_array_equal(batch["label"], [2, 2, 3, 3])
    (batch,) = loader.train_batches(open_folder(folder, batch_size=8), 0, 0, 1)
    assert sorted(batch["label"]) == [0, 0, 1, 1, 2, 2, 3, 3]

    assert open_folder(folder, training=False).class_names == dataset.class_names
    (folder / "train" / "cat").rename(folder / "train" / "cats")  # of other data
    assert open_folder(folder, training=False).class_names == ("bird", "cat", "dog")
    shutil.rmtree(folder / "train")
    assert open_folder(folder, training=False).class_names == ("bird", "cat", "dog")
    for name in ("cat", "dog"):
        shutil.rmtree(folder / "val" / name)
    with pytest.raises(UserError, match="val has no image .* in a class folder"):
        open_folder(folder, training=False)


def test_evaluation_needs_no_training_images(folder, imagenet_mini):
    shutil.rmtree(folder / "train")
    of_folder = open_folder(folder, training=False)
    of_tfds = open_folder(folder, training=False, dataset="imagenet2012", data_dir=imagenet_mini, train_split="none")
    for dataset, classes, num_eval in ((of_folder, 2, 4), (of_tfds, 1000, 21)):
        assert (dataset.num_classes, dataset.num_train, dataset.num_eval) == (classes, 0, num_eval)
        assert sum(batch["mask"].sum() for batch in loader.eval_batches(dataset)) == num_eval
        with pytest.raises(UserError, match="were opened for evaluation alone"):
            loader.train_batches(dataset, 0, 0, 1)
    (folder / "val").rename(folder / "test")
    with pytest.raises(UserError, match=f"^{folder} must have one of val and validation"):
        open_folder(folder, training=False)


def test_a_broken_file_is_named(folder):
    (folder / "val" / "dog" / "b.jpg").write_bytes(b"some text")
    (folder / "train" / "dog" / "b.jpg").write_bytes(b"some text")
    dataset = open_folder(folder, batch_size=4)
    with pytest.raises(UserError, match=f"^{folder}/val/dog/b.jpg: not a readable image: "):
        list(loader.eval_batches(dataset))
    with pytest.raises(UserError, match=f"^{folder}/train/dog/b.jpg: not a readable image: "):
        list(loader.train_batches(dataset, 0, 0, 1))


def test_a_tiny_image_works_and_a_missing_one_is_named(folder):
    Image.new("L", (1, 1), 7).save(folder / "train" / "dog" / "b.jpg")
    dataset = open_folder(folder, batch_size=4)
    (batch,) = loader.train_batches(dataset, 0, 0, 1)
    assert batch["image"].shape == (4, 8, 8, 3)
    (folder / "val" / "dog" / "b.jpg").unlink()
    with pytest.raises(UserError, match=f"{folder}/val/dog/b.jpg cannot be read: No such file"):
        list(loader.eval_batches(dataset))


def test_synthetic():
    dataset = classification.open_dataset(dataset="synthetic", batch_size=4, image_size=8)
    assert (dataset.num_train, dataset.num_classes, dataset.steps_per_epoch) == (1_281_167, 1000, 320_291)
    train = collect(loader.train_batches(dataset, 0, 100, 3, process_index=1, process_count=2))
    assert train.keys() == {"image", "label"} and train["image"].shape == (3, 2, 8, 8, 3)
    assert collect(loader.eval_batches(dataset))["mask"].all()
    part = dataclasses.replace(dataset, batch_size=2)  # as evaluation takes it with train.accumulate=2
    assert collect(loader.eval_batches(part))["mask"].shape == (part.num_eval_batches, 2) == (2, 2)


@pytest.mark.parametrize(
    "number, said",
    [
        (signal.SIGKILL, "A process that decodes images died: .* exit code -9. .*data.workers"),
        (signal.SIGBUS, "A process that decodes images found no room in the shared memory"),  # how Linux tells it
    ],
)
def test_a_worker_that_fails_or_dies_ends_the_run(folder, number, said):
    dataset = open_folder(folder, workers=2, prefetch=1)
    batches = loader.train_batches(dataset, 0, 0, 100_000)
    next(batches)
    os.kill(multiprocessing.active_children()[0].pid, number)
    with pytest.raises(UserError, match=said):
        for _ in batches:
            pass
    assert not multiprocessing.active_children()

    (folder / "train" / "dog" / "b.jpg").write_bytes(b"some text")
    with pytest.raises(UserError, match="dog/b.jpg"):
        list(loader.train_batches(dataset, 0, 0, 100))
    assert not multiprocessing.active_children()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Grain's, as it is deleted
def test_workers_that_the_system_does_not_start_are_told_in_a_line(folder, monkeypatch):
    def refuse(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
    with pytest.raises(UserError, match="cannot be started: No space left on device. .*data.workers.*shm-size"):
        next(loader.train_batches(open_folder(folder, workers=2), 0, 0, 100))


def test_workers_end_with_a_killed_parent(folder):
    script = folder / "script.py"
    script.write_text(f"""
import contextlib, multiprocessing, time
from fcvit_jax.data import loader
from fcvit_jax.tasks import classification

def main():
    dataset = classification.open_dataset(dataset="folder:{folder}", batch_size=2, image_size=8, workers=1)
    batches = loader.train_batches(dataset, 0, 0, 1_000_000)
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(batches):
        next(batches)
        print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
        for batch in batches:
            time.sleep(0.01)

if __name__ == "__main__":
    main()
""")
    process = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    (worker,) = process.stdout.readline().split()
    process.kill()
    _, stderr = process.communicate(timeout=60)  # the pipes close when the worker ends too
    assert "Traceback" not in stderr, stderr
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{worker}") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{worker}")
