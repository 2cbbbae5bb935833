"""Training images that are broken: `data.on_broken="skip"` puts others in their place."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from fcvit_jax import augment
from fcvit_jax.data import loader, reading
from fcvit_jax.errors import UserError, log
from fcvit_jax.tasks import classification, segmentation

BROKEN = {"a/3.jpg": "truncated", "b/0.jpg": "some text", "b/4.jpg": "gone"}


@pytest.fixture
def folder(tmp_path):
    """Twelve training images of two classes, of which three will be broken, and two to evaluate."""
    rng = np.random.default_rng(0)
    for split, count in {"train": 6, "val": 1}.items():
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (12, 10, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.jpg")
    return tmp_path


def opened(folder, **options):
    fixed = dict(dataset=f"folder:{folder}", batch_size=4, image_size=8, rand_augment=(), on_broken="skip")
    return classification.open_dataset(**fixed | options)


def spoil(folder):
    """Breaks three images, after the folder was opened: of one of them the file is gone."""
    jpeg = folder / "train/a/3.jpg"
    jpeg.write_bytes(jpeg.read_bytes()[:-200])
    (folder / "train/b/0.jpg").write_text("some text")
    (folder / "train/b/4.jpg").unlink()


def collect(batches):
    batches = list(batches)
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def files(folder):
    return [folder / "train" / name / f"{i}.jpg" for name in "ab" for i in range(6)]


def test_another_image_of_the_epoch_takes_the_place_of_a_broken_one(folder, caplog):
    data, paths = opened(folder), files(folder)
    whole = collect(loader.train_batches(data, 3, 0, 6))
    spoil(folder)
    mended = collect(loader.train_batches(data, 3, 0, 6))
    broken, chosen = {paths.index(folder / "train" / name) for name in BROKEN}, []
    for epoch in range(2):
        order = loader.train_order(data, 3, epoch).ravel().tolist()
        for place, index in enumerate(order):
            row = 12 * epoch + place
            if index not in broken:
                np.testing.assert_array_equal(mended["image"][row], whole["image"][row])
                assert mended["label"][row] == whole["label"][row]
                continue

            def drawn(other, seed=(3, epoch, index)):
                rng = np.random.default_rng(seed)
                return augment.train_transform(paths[other].read_bytes(), rng, 8, rand_augment=())

            good = [other for other in order if other not in broken]
            (other,) = [other for other in good if np.array_equal(mended["image"][row], drawn(other))]
            assert mended["label"][row] == other // 6
            chosen.append(other)
    assert len(chosen) == 6 and len(set(chosen)) > 2  # not the same every time
    # Each is named once, though it turns up in both epochs.
    assert sorted(message.split(".jpg")[0][-3:] for message in caplog.messages) == ["a/3", "b/0", "b/4"]
    assert caplog.messages[-1].endswith("(3 broken so far)")


def test_workers_hosts_and_restarts_change_nothing(folder, caplog):
    data = opened(folder)
    spoil(folder)
    whole = collect(loader.train_batches(data, 5, 0, 6))
    said = set(caplog.messages)
    shares = [list(loader.train_batches(data, 5, 0, 6, process, 2)) for process in range(2)]
    for step, halves in enumerate(zip(*shares, strict=True)):
        for key in whole:
            joined = np.concatenate([half[key] for half in halves])
            np.testing.assert_array_equal(joined, whole[key][4 * step : 4 * step + 4])
    caplog.clear()
    in_workers = collect(loader.train_batches(dataclasses.replace(data, workers=2), 5, 2, 4))
    for key in whole:
        np.testing.assert_array_equal(in_workers[key], whole[key][8:])
    assert len(caplog.messages) == len(said) == 3  # though workers have read them


def test_a_run_may_begin_with_a_broken_image(folder):
    (folder / "train/a/0.jpg").write_text("some text")
    (shapes,) = loader.batch_shapes(opened(folder))
    assert shapes["image"].shape == (4, 8, 8, 3)
    with pytest.raises(UserError, match=r"a/0.jpg: not a readable image: .*data\.on_broken=skip"):
        loader.batch_shapes(opened(folder, on_broken="error"))


def test_it_ends_where_everything_is_broken(folder):
    data = opened(folder)
    for path in files(folder)[1:]:
        path.write_text("some text")
    left = collect(loader.train_batches(data, 0, 0, 3))
    assert (left["label"] == 0).all()  # the only image that is left serves for all
    files(folder)[0].write_text("some text")
    with pytest.raises(UserError, match=r".jpg: not a readable image: .*; and none of 12 others"):
        list(loader.train_batches(data, 0, 0, 3))


def test_the_tries_are_limited(folder, monkeypatch):
    monkeypatch.setattr(loader, "MOST_TRIES", 2)
    data = opened(folder)
    for path in files(folder):
        path.write_text("some text")
    with pytest.raises(UserError, match="none of 2 others"):
        list(loader.train_batches(data, 0, 0, 3))


def test_evaluation_counts_every_image_and_so_refuses_a_broken_one(folder):
    (folder / "val/a/0.jpg").write_text("some text")
    with pytest.raises(UserError, match="val/a/0.jpg: not a readable image"):
        list(loader.eval_batches(opened(folder)))


class MisLabelled:
    """Twelve images without a class."""

    def __len__(self):
        return 12

    def read(self, indices):
        return [(b"", 7) for _ in indices]

    def describe(self, index):
        return f"image {index}"


def test_what_is_wrong_but_not_broken_stays_an_error(folder, monkeypatch):
    data = dataclasses.replace(opened(folder), train=MisLabelled())
    with pytest.raises(UserError, match="its label 7 is none of the 2 classes"):
        list(loader.train_batches(data, 0, 0, 1))

    def fail(path):
        raise UserError(f"{path} cannot be read: Input/output error")  # of a disk, which may recover

    monkeypatch.setattr("fcvit_jax.data.sources.read_file", fail)
    with pytest.raises(UserError, match="Input/output error"):
        list(loader.train_batches(opened(folder), 0, 0, 1))


def test_only_error_and_skip_are_known(folder):
    with pytest.raises(UserError, match="data.on_broken='ignore' must be 'error' or 'skip'"):
        opened(folder, on_broken="ignore")


def test_a_damaged_record_is_replaced(imagenet_mini, tmp_path, caplog):
    shutil.copytree(imagenet_mini, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "imagenet2012" / "5.1.0" / "imagenet2012-train.array_record-00000-of-00001"
    content = bytearray(path.read_bytes())
    content[20000] ^= 1
    path.write_bytes(content)
    options = dict(dataset="imagenet2012", data_dir=str(tmp_path), batch_size=40, image_size=32, on_broken="skip")
    (batch,) = loader.train_batches(classification.open_dataset(**options), 0, 0, 1)
    assert batch["image"].shape == (40, 32, 32, 3)
    (said,) = [message for message in caplog.messages if "takes its place" in message]
    assert "of imagenet2012 train cannot be read: Corrupted" in said


@pytest.fixture
def pairs(tmp_path):
    """Eight training images with masks of two classes, and one to evaluate; each has a colour of its own."""
    (tmp_path / "classes.txt").write_text("a\nb\n")
    for split, count in {"training": 8, "validation": 1}.items():
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (40, 40), (20 * i, 0, 0)).save(tmp_path / f"images/{split}/{i}.png")
            Image.new("L", (40, 40), 1 + i % 2).save(tmp_path / f"annotations/{split}/{i}.png")
    return tmp_path


def open_pairs(path, **options):
    fixed = dict(crop_size=32, long=40, short=40, scale=(1.0, 1.0), max_share=1.0, flip=0.0, distortion=False)
    return segmentation.open_dataset(dataset=f"ade:{path}", batch_size=3, on_broken="skip", **fixed | options)


def cut(path):
    """Leaves the header."""
    path.write_bytes(path.read_bytes()[:50])


def test_segmentation_replaces_broken_images_and_masks_together(pairs, caplog):
    data = open_pairs(pairs)
    cut(pairs / "images/training/2.png")
    cut(pairs / "annotations/training/5.png")
    (pairs / "images/training/6.png").unlink()
    batches = collect(loader.train_batches(data, 0, 0, 8))
    seen = batches["image"][:, 16, 16, 0] // 20
    assert set(seen) == {0, 1, 3, 4, 7}
    np.testing.assert_array_equal(batches["label"][:, 16, 16], seen % 2)
    assert len([message for message in caplog.messages if "takes its place" in message]) == 3


def test_segmentation_leaves_out_what_has_no_header_and_names_it(pairs, caplog):
    (pairs / "images/training/0.png").write_text("some text")
    cut(pairs / "annotations/training/7.png")  # among the masks that are looked at first
    (pairs / "annotations/training/1.png").write_bytes(b"")
    data = open_pairs(pairs)
    assert data.num_train == 6
    (said,) = [message for message in caplog.messages if "left out" in message]
    assert "2 images" in said and "images/training/0.png" in said and "annotations/training/1.png" in said
    with pytest.raises(UserError, match="cannot be read as images: 0.png"):
        segmentation.open_dataset(dataset=f"ade:{pairs}", batch_size=3, crop_size=32)
    (pairs / "images/validation/0.png").write_text("some text")
    with pytest.raises(UserError, match="validation: 1 file cannot be read as images: 0.png"):
        open_pairs(pairs)


def test_each_process_names_what_it_could_not_read(monkeypatch, capsys):
    """Of all else the first process speaks alone."""
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    log.warning("what every process knows")
    assert reading.name_broken(set(), ({}, ["a.jpg: broken"])) == {}
    assert capsys.readouterr().err == "warning: a.jpg: broken; another example takes its place (1 broken so far)\n"
