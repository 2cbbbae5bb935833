"""Folders of images and masks: what is read, the rule of the labels, and what a user is told about bad files."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcvit_jax.data import ade20k, image_files, pairing, palettes
from fcvit_jax.errors import UserError

NAMES = ("wall", "sky", "tree")
MASK = np.array([[0, 1, 2, 3], [3, 255, 1, 0]], np.uint8)


def save(file, pixels, mode=None, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if mode == "P":
        image.putpalette([(255 - i) % 256 for i in range(3 * 2 ** options.get("bits", 8))])
    image.save(file, **options)


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.fixture
def folder(tmp_path):
    """Two images a split, 4x2 pixels, three classes."""
    for split in ("training", "validation"):
        for name in ("a", "b"):
            save(tmp_path / "images" / split / f"{name}.jpg", np.full((2, 4, 3), 200, np.uint8))
            save(tmp_path / "annotations" / split / f"{name}.png", MASK)
    rows = [f"{i + 1}\t0.1\t5\t5\t{name}" for i, name in enumerate(("wall", "sky", "tree, plant"))]
    (tmp_path / "objectInfo3.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]))
    return tmp_path


def labels(pairs):
    return [found.tolist() for _, found in pairs.read(range(len(pairs)))]


def refused(folder, *words, **options):
    """Opens a folder or reads its training masks; the message must be one line with these words."""
    with pytest.raises(UserError) as error:
        for split in ade20k.open_folder(str(folder), **options)[:2]:
            labels(split)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_labels_are_the_values_minus_1_and_what_was_0_is_ignored(folder):
    opened = ade20k.open_folder(str(folder))
    assert opened.class_names == NAMES and opened.notes == [] and len(opened.train) == len(opened.eval) == 2
    train = pickle.loads(pickle.dumps(opened.train))
    assert labels(train) == [[[255, 0, 1, 2], [2, 255, 0, 255]]] * 2
    encoded, found = next(train.read([1]))
    assert encoded == Path(train.describe(1)).read_bytes() and train.describe(1).endswith("images/training/b.jpg")
    assert found.dtype == np.uint8 and train.sizes.tolist() == [[4, 2], [4, 2]]


def test_zero_can_be_a_class(folder):
    (folder / "objectInfo3.txt").unlink()
    (folder / "classes.txt").write_text("ground\nwall\nsky\ntree\n")
    opened = ade20k.open_folder(str(folder), zero_is_class=True)
    assert opened.class_names == ("ground", *NAMES)
    assert labels(opened.eval) == [MASK.tolist()] * 2


def test_training_split_may_be_absent_and_another_evaluated(folder):
    (folder / "images" / "training").rename(folder / "images" / "test")
    (folder / "annotations" / "training").rename(folder / "annotations" / "test")
    opened = ade20k.open_folder(str(folder), training=False, eval_split="test")
    assert opened.train is None and "test" in opened.eval.describe(0)
    refused(folder, "data.train_split=training", "test, validation")
    refused(folder, "data.eval_split=tset", training=False, eval_split="tset")


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", ["P", "L"])
def test_masks_of_few_bits_and_palettes_hold_indices(tmp_path, bits, mode):
    values = np.arange(2**bits, dtype=np.uint8).reshape(2, -1)
    file = tmp_path / "mask.png"
    if mode == "P":
        save(file, values, "P", bits=bits)
    elif bits in (1, 8):
        save(file, values.astype(bool) if bits == 1 else values)
    else:
        file.write_bytes(grey_png(values, bits))
    assert file.read_bytes()[24] == bits
    np.testing.assert_array_equal(ade20k.decode_mask(file.read_bytes()), values)


def grey_png(values, bits):
    """A grey PNG of few bits, which Pillow cannot write: the palette's, without the palette and with another type."""
    import zlib

    file = io.BytesIO()
    image = Image.fromarray(values)
    image.putpalette([0, 0, 0] * 2**bits)
    image.save(file, "png", bits=bits)
    encoded = file.getvalue()
    header = encoded[12:25] + b"\0" + encoded[26:29]
    at = encoded.index(b"PLTE") - 4
    length = int.from_bytes(encoded[at : at + 4], "big") + 12
    return encoded[:12] + header + zlib.crc32(header).to_bytes(4, "big") + encoded[33:at] + encoded[at + length :]


@pytest.mark.parametrize("image_ending, mask_ending", [("", "_mask"), ("_leftImg8bit", "_gtFine_labelTrainIds")])
def test_names_may_differ_by_an_ending(folder, image_ending, mask_ending):
    for kind, ending, suffix in (("images", image_ending, ".jpg"), ("annotations", mask_ending, ".png")):
        for name in ("a", "b"):
            file = folder / kind / "training" / f"{name}{suffix}"
            target = folder / kind / "training" / "town" / f"{name}_0{'12'[name == 'b']}{ending}{suffix}"
            target.parent.mkdir(exist_ok=True)
            file.rename(target)
    opened = ade20k.open_folder(str(folder))
    assert [Path(mask).name for mask in opened.train.masks] == [f"a_01{mask_ending}.png", f"b_02{mask_ending}.png"]
    assert len(opened.notes) == 1 and mask_ending in opened.notes[0]


def test_equal_names_are_no_endings():
    names = ["x_1.jpg", "y_1.jpg"]
    pairs, *endings = pairing.match(names, ["x_1.png", "y_1.png"], "", "")
    assert endings == ["", ""] and pairs == [("x_1.jpg", "x_1.png"), ("y_1.jpg", "y_1.png")]


def test_images_without_masks_and_masks_without_images(folder):
    for index in range(7):
        save(folder / "images" / "training" / f"more{index}.jpg", np.zeros((2, 4, 3), np.uint8))
    save(folder / "annotations" / "training" / "alone.png", MASK)
    refused(folder, "7 images", "more0.jpg, more1.jpg, more2.jpg, more3.jpg, more4.jpg and 2 more", "1 mask", "alone")
    (folder / "images" / "training" / "b.png").write_bytes(b"")
    refused(folder, "b.jpg", "b.png", "two files")


def test_hidden_and_other_files_are_not_taken(folder):
    for name in ("._a.jpg", "Thumbs.db", "notes.txt"):
        (folder / "images" / "training" / name).write_bytes(b"?")
    assert len(ade20k.open_folder(str(folder)).train) == 2


def test_masks_of_another_size(folder):
    save(folder / "annotations" / "validation" / "b.png", MASK[:, :3])
    refused(folder, "1 mask", "b.png (3x2 for 4x2)", "another size")


def test_values_beyond_the_classes(folder):
    save(folder / "annotations" / "training" / "b.png", np.array([[0, 1, 4, 9], [3, 255, 1, 0]], np.uint8))
    refused(folder, "training/b.png", "4, 9", "1 to 3")
    (folder / "objectInfo3.txt").unlink()
    (folder / "classes.txt").write_text("wall\nsky\ntree\n")
    refused(folder, "3", "0 to 2", "data.zero_is_class=False", zero_is_class=True)


def test_values_are_checked_in_every_mask(folder):
    for index in range(40):
        save(folder / "images" / "training" / f"more{index:02}.jpg", np.zeros((2, 4, 3), np.uint8))
        mask = MASK + (index == 31) * 4
        save(folder / "annotations" / "training" / f"more{index:02}.png", mask.astype(np.uint8))
    train = ade20k.open_folder(str(folder)).train
    (bad,) = [index for index, mask in enumerate(train.masks) if "more31" in mask]
    with pytest.raises(UserError, match="more31.png holds 4, 5, 6, 7,"):
        train.labels(bad)


@pytest.mark.parametrize(
    "pixels, name, words",
    [
        (np.stack([MASK] * 3, -1), "a.png", ("colour", "getchannel(0)")),
        (MASK.astype(np.uint16), "a.png", ("16 bits", "astype(np.uint8)")),
        (np.stack([MASK] * 2, -1), "a.png", ("(LA)",)),
        (MASK, "a.jpg", ("JPEG", "PNG")),
    ],
)
def test_masks_that_hold_no_indices(folder, pixels, name, words):
    (folder / "annotations" / "training" / "a.png").unlink()
    save(folder / "annotations" / "training" / name, pixels)
    refused(folder, "1 mask", f": {name}", *words)


def test_masks_of_0_and_255(folder):
    for name in ("a", "b"):
        save(folder / "annotations" / "training" / f"{name}.png", np.where(MASK > 1, 255, 0).astype(np.uint8))
    refused(folder, "0 and 255", "write 1", "data.zero_is_class=True")
    (folder / "objectInfo3.txt").unlink()
    (folder / "classes.txt").write_text("ground\nroad\n")
    refused(folder, "0 and 255", "write 1", zero_is_class=True)


def test_masks_of_zeros_and_of_0_and_1(folder):
    (folder / "objectInfo3.txt").unlink()
    (folder / "classes.txt").write_text("ground\nroad\n")
    for value in (0, 1):
        for split in ("training", "validation"):
            for name in ("a", "b"):
                save(folder / "annotations" / split / f"{name}.png", (MASK == 1).astype(np.uint8) * value)
        if value == 0:
            refused(folder, "only 0", "data.zero_is_class=True")
    opened = ade20k.open_folder(str(folder))
    assert len(opened.notes) == 2 and all("data.zero_is_class=True" in note for note in opened.notes)
    assert not ade20k.open_folder(str(folder), zero_is_class=True).notes


def test_a_class_may_be_absent_from_validation(folder):
    for name in ("a", "b"):
        save(folder / "annotations" / "validation" / f"{name}.png", np.minimum(MASK, 2))
    opened = ade20k.open_folder(str(folder))
    assert opened.eval.num_classes == 3 and not opened.notes


def test_unreadable_files(folder):
    image = folder / "images" / "training" / "a.jpg"
    image.write_bytes(b"no image")
    refused(folder, "images/training", "1 file", "a.jpg")
    save(image, np.zeros((2, 4, 3), np.uint8))
    mask = folder / "annotations" / "training" / "b.png"
    mask.write_bytes(mask.read_bytes()[:-30])
    refused(folder, "training/b.png", "cannot be read")
    mask.write_bytes(b"")
    refused(folder, "annotations/training", "b.png")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_exif(folder, orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)
    pixels = np.repeat(np.repeat(pixels[::16, ::16], 16, 0), 16, 1)
    image = folder / "images" / "training" / "a.jpg"
    save(image, pixels, exif=exif(orientation), quality=100)
    turned = image_files.decode(image.read_bytes(), exif=True)
    stored = image_files.decode(image.read_bytes())
    # The definition: which side of the scene the first row and the first column of the file are.
    upright = {
        1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1], 5: stored.swapaxes(0, 1),
        6: stored.swapaxes(0, 1)[:, ::-1], 7: stored.swapaxes(0, 1)[::-1, ::-1], 8: stored.swapaxes(0, 1)[::-1],
    }  # fmt: skip
    np.testing.assert_array_equal(turned, upright[orientation])
    assert stored.shape == (32, 64, 3)

    mask = folder / "annotations" / "training" / "a.png"
    save(mask, np.ones((32, 64), np.uint8))  # as the file is stored
    opened = ade20k.open_folder(str(folder))
    assert len(opened.notes) == (orientation > 1) and opened.train.sizes[0].tolist() == [64, 32]
    if orientation >= 5:
        refused(folder, "another size", "data.exif=False", exif=True)
        save(mask, np.ones((64, 32), np.uint8))
        refused(folder, "a.png (32x64 for 64x32)", "data.exif=True")
    opened = ade20k.open_folder(str(folder), exif=True)
    assert not opened.notes and tuple(opened.train.sizes[0]) == turned.shape[1::-1]


def test_names_of_classes(folder):
    info = folder / "objectInfo3.txt"
    text = info.read_text()
    info.write_text(text.replace("2\t", "7\t", 1))
    refused(folder, "counts from 1")
    info.write_text(text)
    refused(folder, "counts from 0", zero_is_class=True)
    (folder / "objectInfo4.txt").write_text(text)
    refused(folder, "one objectInfo*.txt", "objectInfo3.txt", "objectInfo4.txt")
    (folder / "objectInfo4.txt").unlink()
    info.unlink()
    refused(folder, "classes.txt", "objectInfo")
    (folder / "classes.txt").write_text("\n")
    refused(folder, "no class name")
    (folder / "classes.txt").write_text("\n".join(map(str, range(255))))
    refused(folder, "255 classes", "254")


def test_colours(folder):
    np.testing.assert_array_equal(ade20k.open_folder(str(folder)).palette, palettes.distinct(3))
    palette = folder / "palette.txt"
    palette.write_text("0 0 0 0 other\n2 4 5 6 sky\n1 1 2 3\n3 7 8 9 tree, plant\n")
    assert ade20k.open_folder(str(folder)).palette.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    for wrong in ("1 1 2 3\n2 4 5 6\n", "1 1 2 3\n2 4 5 6\n3 7 8 300\n", "1 1 2 3\n2 4 5 6\n3 red\n"):
        palette.write_text(wrong)
        refused(folder, "palette.txt")
    palette.unlink()
    (folder / "objectInfo3.txt").unlink()
    (folder / "classes.txt").write_text("\n".join(map(str, range(150))))
    found = ade20k.open_folder(str(folder)).palette
    assert found.shape == (150, 3) and found[:2].tolist() == [[120, 120, 120], [180, 120, 120]]


def test_chosen_colours_are_distinct_and_stay():
    colours = palettes.distinct(254)
    assert colours.dtype == np.uint8 and len(set(map(tuple, colours.tolist()))) == 254
    np.testing.assert_array_equal(palettes.distinct(12), colours[:12])
    for sight in (palettes.PROTANOPIA, palettes.DEUTERANOPIA):  # no two of a dozen look alike without red or green
        seen = palettes._lab(palettes._linear(colours[:12].astype(float)) @ np.transpose(sight))
        gaps = np.linalg.norm(seen[:, None] - seen, axis=-1)[np.triu_indices(12, 1)]
        assert gaps.min() > 20
