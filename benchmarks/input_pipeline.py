"""Time the input pipeline with one and two workers, beside PyTorch's DataLoader and tf.data where they are installed.

Example:
  python -m benchmarks.input_pipeline --quick --json input_pipeline.json
  python -m benchmarks.input_pipeline imagenet2012 --data-dir /data/tensorflow_datasets
  python -m benchmarks.input_pipeline --task segmentation --images 256

fcvit_jax is `loader.train_batches`. torch is a DataLoader that calls the same transform for every image; the benchmark
checks that its batches hold the same pixels. tf.data, for classification alone, does less: it decodes and crops in one
op, resizes (bicubic with antialiasing) and flips, without RandAugment. Its files are in memory, and its workers are
threads.

The contestants take turns, so that a busy machine slows all of them equally. Each turn starts new workers, and is timed
from the moment when all of them deliver. The table has the best turn, the JSON all of them. Per core means per worker.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import multiprocessing
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from fcvit_jax.data import loader
from fcvit_jax.tasks import classification, segmentation

SEED = 0
WORKERS = (1, 2)
PACKAGES = ("grain", "pillow", "opencv-python-headless", "torch", "tensorflow-cpu")


@dataclasses.dataclass(frozen=True)
class TorchDataset:
    """PyTorch's view of the training split; a key is (epoch, index), so that an image is augmented as in our loader."""

    opened: loader.Data

    def __getitem__(self, key):
        epoch, index = key
        (record,) = self.opened.train.read([index])
        rng = np.random.default_rng([SEED, epoch, index])
        example = self.opened.load_example(self.opened, record, rng)
        return {name: np.array(x) for name, x in example.items()}  # copies, since PyTorch warns of read-only arrays


def batch_keys(opened):
    """The keys of every batch, in the order of our loader."""
    for epoch in itertools.count():
        for rows in loader.train_order(opened, SEED, epoch).tolist():
            yield [(epoch, index) for index in rows]


def torch_batches(opened, workers):
    from torch.utils.data import DataLoader  # not at the top: Grain's workers import this file, and need no torch

    return iter(DataLoader(TorchDataset(opened), batch_sampler=batch_keys(opened), num_workers=workers))


def time_fcvit_jax(opened, workers, images):
    opened = dataclasses.replace(opened, workers=workers)
    with contextlib.closing(loader.train_batches(opened, SEED, 0, 1_000_000_000)) as batches:
        return images_per_second(batches, opened, workers, images)


def time_torch(opened, workers, images):
    return images_per_second(torch_batches(opened, workers), opened, workers, images)


def time_tf_data(opened, threads, images):
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")

    def load(encoded):
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(encoded),
            tf.zeros((1, 0, 4)),
            aspect_ratio_range=opened.options["augmentation"]["crop_ratio"],
            area_range=opened.options["augmentation"]["crop_scale"],
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        image = tf.image.decode_and_crop_jpeg(encoded, tf.concat([begin[:2], size[:2]], 0), channels=3)
        image = tf.image.resize(image, [opened.options["image_size"]] * 2, "bicubic", antialias=True)
        return tf.image.random_flip_left_right(tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8))

    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    batches = (
        tf.data.Dataset.from_tensor_slices(read_jpegs(opened, images))
        .repeat()
        .map(load, num_parallel_calls=threads)
        .batch(opened.batch_size, drop_remainder=True)
        .prefetch(2)
        .with_options(options)
    )
    return images_per_second(batches.as_numpy_iterator(), opened, threads, images)


def read_jpegs(opened, count):
    """The first images of the epoch, without the few of another format that ImageNet has."""
    indices = loader.train_order(opened, SEED, 0).ravel()[:count].tolist()
    return [encoded for encoded, _ in opened.train.read(indices) if encoded.startswith(b"\xff\xd8")]


def images_per_second(batches, opened, workers, images):
    """The rate after two batches of each worker: by then all have started, and their queues are equally full."""
    for _ in range(2 * workers):
        next(batches)
    steps = -(-images // opened.batch_size)
    start = time.perf_counter()
    for _ in range(steps):
        next(batches)
    return steps * opened.batch_size / (time.perf_counter() - start)


def check_pixels(opened):
    """Checks that PyTorch's first batch equals ours."""
    (ours,) = loader.train_batches(opened, SEED, 0, 1)
    theirs = next(torch_batches(opened, 0))
    for name, x in ours.items():
        np.testing.assert_array_equal(theirs[name], x)


def write_photos(paths, width, height):
    """Writes JPEGs of noise with a photograph's spectrum, contrast and colour; 500 x 375 pixels have 100 kB."""
    rng = np.random.default_rng(SEED)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf  # no mean
    for path in paths:
        spectrum = np.fft.rfft2(rng.standard_normal((height, width, 3)), axes=(0, 1)) / frequency[..., None] ** 1.2
        noise = np.fft.irfft2(spectrum, (height, width), axes=(0, 1))
        noise = 5 * noise[..., :1] + noise  # the channels share most of it
        pixels = (120 + noise / noise.std() * 55).clip(0, 255).astype(np.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=92)


def write_classification(folder, count):
    """Writes a folder of images of a class, one of them for validation; returns the name of the dataset."""
    paths = [folder / ("train" if number < count else "val") / "noise" / f"{number}.jpg" for number in range(count + 1)]
    write_photos(paths, 500, 375)
    return f"folder:{folder}"


def write_segmentation(folder, count):
    """Writes images of ADE20K's usual size with masks of 150 classes in patches; returns the name of the dataset."""
    splits = ["training"] * count + ["validation"]
    write_photos([folder / "images" / split / f"{i}.jpg" for i, split in enumerate(splits)], 683, 512)
    rng = np.random.default_rng(SEED)
    for number, split in enumerate(splits):
        path = folder / "annotations" / split / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 151, (8, 11), np.uint8)).resize((683, 512), Image.NEAREST).save(path)
    (folder / "classes.txt").write_text("".join(f"class {i}\n" for i in range(150)))
    return f"ade:{folder}"


TASKS = {"classification": (classification, write_classification), "segmentation": (segmentation, write_segmentation)}


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def take_turns(contestants, opened, images, turns):
    """Images per second of every turn, by contestant and number of workers."""
    rates = {(name, workers): [] for name in contestants for workers in WORKERS}
    for _, workers, (name, run) in itertools.product(range(turns), WORKERS, contestants.items()):
        rates[name, workers].append(run(opened, workers, images))
    return rates


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "dataset",
        nargs="?",
        metavar="DATASET",
        help="as config.data.dataset; by default 256 images are made, of 500 x 375 pixels (segmentation: 683 x 512)",
    )
    parser.add_argument("--task", choices=TASKS, default="classification")
    parser.add_argument("--data-dir", default="~/tensorflow_datasets", metavar="PATH", help="where TFDS keeps its data")
    parser.add_argument("--eval-split", default="validation", metavar="SPLIT", help="of a TFDS dataset; not timed")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="default: 32")
    parser.add_argument("--images", type=int, metavar="N", help="timed in each turn; default: 2048, or 128 if quick")
    parser.add_argument("--turns", type=int, metavar="N", help="of each contestant; default: 3, or 1 if quick")
    parser.add_argument("--quick", action="store_true", help="one turn of few images: checks that it works, not rates")
    parser.add_argument("--json", metavar="PATH", help="write the figures, versions and machine here as well")
    args = parser.parse_args()
    images = args.images or (128 if args.quick else 2048)
    turns = args.turns or (1 if args.quick else 3)
    task, write = TASKS[args.task]

    with contextlib.ExitStack() as stack:
        dataset = args.dataset
        if dataset is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            dataset = write(Path(folder), 32 if args.quick else 256)
        opened = task.open_dataset(
            dataset=dataset, data_dir=args.data_dir, eval_split=args.eval_split, batch_size=args.batch_size
        )
        contestants = {"fcvit_jax": time_fcvit_jax}
        if importlib.util.find_spec("torch"):
            check_pixels(opened)
            contestants["torch"] = time_torch
        else:
            print("Without torch, which is not installed: see requirements-dev.txt")
        if args.task != "classification":
            pass  # tf.data has no such transform
        elif not importlib.util.find_spec("tensorflow"):
            print("Without tf.data, since tensorflow is not installed: see requirements-dev.txt")
        elif not read_jpegs(opened, args.batch_size):
            print("Without tf.data: the images are not JPEGs, the only format that decode_and_crop_jpeg reads")
        else:
            # In a separate process: PyTorch forks its workers, which TensorFlow's threads do not survive.
            pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
            contestants["tf.data"] = lambda *arguments: pool.submit(time_tf_data, *arguments).result()
        rates = take_turns(contestants, opened, images, turns)

    best = {key: max(values) for key, values in rates.items()}
    print(f"{'':12}{'workers':>8}{'images/s':>10}{'per core':>10}{'/ 1 worker':>12}{'fcvit_jax / it':>16}")
    for (name, workers), rate in best.items():
        scaling, ratio = rate / best[name, 1], best["fcvit_jax", workers] / rate
        print(f"{name:12}{workers:8}{rate:10.1f}{rate / workers:10.1f}{scaling:12.2f}{ratio:16.2f}")
    if args.json:
        about = {
            "machine": platform.processor() or platform.machine(),
            "cores": loader.available_cores(),
            **{
                name: version(name) for name in ("grain", "pillow", "opencv-python-headless", "torch", "tensorflow-cpu")
            },
            "task": args.task,
            "dataset": args.dataset,
            "batch_size": args.batch_size,
            "images": images,
        }
        rows = [
            {"loader": name, "workers": workers, "images_per_second": values}
            for (name, workers), values in rates.items()
        ]
        with open(args.json, "w") as file:
            json.dump({**about, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
