"""Measures attention block by block: `python -m fcvit_jax.attention --checkpoint deit_base --images photos/`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from fcvit_jax.attention import block_measures, summarise, table
from fcvit_jax.errors import UserError, exit_on_error
from fcvit_jax.figures import check_format, save
from fcvit_jax.figures.attention import draw_depth
from fcvit_jax.networks.normalize import normalize
from fcvit_jax.predict import CHECKPOINT_HELP, find_images, read_image
from fcvit_jax.run.results import as_json
from fcvit_jax.run.saved import load


def measure_images(checkpoint: str, paths: Sequence[Path], batch_size: int) -> dict[str, dict[str, dict[str, float]]]:
    """Measures a checkpoint's network on images that are read as evaluation reads them.

    Args:
      checkpoint: as in `run.saved.load`.
      paths: of the images.
      batch_size: images at a time.

    Returns:
      As `summarise`.

    Raises:
      UserError: the checkpoint or an image cannot be read, or the network has nothing to measure.
    """
    _, model, variables, metadata = load(checkpoint)
    variables = jax.device_put(variables)
    size = min(batch_size, len(paths))
    batches = []
    for start in tqdm(range(0, len(paths), size), checkpoint, leave=False, unit="batch", disable=None):
        images = [read_image(path, metadata) for path in paths[start : start + size]]
        # Filled up to one size, so that one program serves all batches.
        batch = np.stack(images + images[:1] * (size - len(images)))
        found = block_measures(model, variables, normalize(batch, model.mean, model.std))
        # Not by jax.device_get of the whole, which would sort the blocks by their names: block_10 before block_2.
        batches.append({block: {k: np.asarray(x)[: len(images)] for k, x in y.items()} for block, y in found.items()})
    return summarise(batches)


def _report(args: argparse.Namespace) -> None:
    if args.batch_size < 1 or args.limit < 1:
        raise UserError("--batch-size and --limit must be at least 1.")
    if args.figure:
        check_format(args.figure)  # before minutes of work
    paths = find_images(args.images)
    # Evenly from all of them: a folder's images follow each other by class.
    paths = [paths[i * len(paths) // args.limit] for i in range(args.limit)] if args.limit < len(paths) else paths
    summaries = {}
    for checkpoint in args.checkpoint:
        summary = summaries[checkpoint] = measure_images(checkpoint, paths, args.batch_size)
        if args.json:
            print(as_json({"checkpoint": checkpoint, "images": len(paths), "blocks": summary}), flush=True)
        else:
            print(
                f"{checkpoint}: mean and standard deviation over {len(paths)} images\n\n{table(summary)}\n", flush=True
            )
    if args.figure:
        save(draw_depth(summaries), args.figure)
        if not args.json:
            print(f"wrote {args.figure}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fcvit_jax.attention",
        description="Measure, block by block, how much a network's attention depends on the query and on the head, and "
        "how sparse it is: a table, one JSON object for each checkpoint, a figure over depth.",
        epilog="example: python -m fcvit_jax.attention --checkpoint vit_b deit_b --figure depth.png --images photos/",
    )
    parser.add_argument("--checkpoint", required=True, nargs="+", help=f"one or more, each {CHECKPOINT_HELP}")
    parser.add_argument("--images", required=True, nargs="+", type=Path, metavar="IMAGE|FOLDER")
    parser.add_argument("--limit", type=int, default=1000, metavar="N", help="at most so many images (default: 1000)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at a time (default: 32)")
    parser.add_argument("--json", action="store_true", help="print all measures as JSON instead of tables")
    parser.add_argument(
        "--figure", type=Path, metavar="FILE", help="draw the measures over depth: .png, .pdf, .svg, ..."
    )
    args = parser.parse_args(argv)
    with exit_on_error():
        _report(args)


if __name__ == "__main__":
    main()
