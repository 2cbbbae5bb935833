"""Draws attention, similarity, curves of runs, segmentations and detections: `python -m fcvit_jax.visualize TOOL`."""

import argparse
import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fcvit_jax import tasks
from fcvit_jax.devices import storage
from fcvit_jax.errors import UserError, exit_on_error
from fcvit_jax.figures import check_format, detection, save, segmentation
from fcvit_jax.figures.attention import attention_of, draw_heads, draw_queries, query_maps
from fcvit_jax.figures.curves import draw_curves, read_metrics
from fcvit_jax.figures.similarity import draw_similarity, head_correlation, similarity_maps
from fcvit_jax.networks.vit import ViT
from fcvit_jax.predict import CHECKPOINT_HELP, find_images, load, read_image
from fcvit_jax.run.results import best_metric, parse_object
from fcvit_jax.sizes import describe_size

_MAX_IMAGES = 32  # in one picture


def _find_images(paths: Sequence[Path]) -> list[Path]:
    paths = find_images(paths)
    if len(paths) > _MAX_IMAGES:
        raise UserError(f"{len(paths)} images do not fit a picture: choose at most {_MAX_IMAGES}.")
    return paths


def _similarity(args: argparse.Namespace) -> Figure:
    model, variables, metadata = load(args.checkpoint)
    paths = _find_images(args.images)
    images = [read_image(path, metadata) for path in paths]
    if len({image.shape for image in images}) > 1:
        raise UserError(
            "These images are of several sizes, which this network takes as they are: give those of one size."
        )
    block, maps = similarity_maps(model, variables, np.stack(images), args.block)
    correlations = [head_correlation(image_maps) for image_maps in maps]
    for path, value in zip(paths, correlations, strict=True):
        print(f"{path}: correlation between heads {value:.3f}")
    mean = float(np.mean([value for value in correlations if not np.isnan(value)] or [np.nan]))
    print(f"mean correlation between the maps of two heads, {block}: {mean:.3f}")
    place = f"{block}, {maps.shape[1]} x {maps.shape[2]} positions"
    title = f"Token-global similarity in {place}\nmean correlation between heads r = {mean:.2f}"
    return draw_similarity(images, maps, [path.name for path in paths], title)


def _points(queries: Sequence[str], size: tuple[int, int]) -> list[tuple[float, float] | None]:
    """What --query says: x and y as fractions of an image of a size (height, width), or None for the class token."""
    points = []
    for query in queries or [f"{size[0] // 2},{size[1] // 2}"]:
        found = re.fullmatch(r"(\d+),(\d+)", query)
        if query != "class" and not found:
            raise UserError(f"--query={query} must be y,x in pixels, such as 80,120, or class.")
        y, x = map(int, found.groups()) if found else (0, 0)
        if y >= size[0] or x >= size[1]:
            seen = describe_size(size)
            raise UserError(f"--query={query} is outside the image, of which the network sees {seen} pixels.")
        points.append(((x + 0.5) / size[1], (y + 0.5) / size[0]) if found else None)
    return points


def _patch(point: tuple[float, float] | None, grid: tuple[int, int]) -> tuple[int, int] | None:
    """Row and column of the patch that a point lies in."""
    return None if point is None else (int(point[1] * grid[0]), int(point[0] * grid[1]))


def _queries(args: argparse.Namespace) -> Figure:
    """Figure 1 of the paper: one head's maps for every query and every network."""
    paths = _find_images(args.images)
    maps, shown, points = {}, None, None
    for checkpoint in args.checkpoint:
        model, variables, metadata = load(checkpoint)
        images = [read_image(path, metadata) for path in paths]
        if shown is None:
            shown, points = images, _points(args.query, images[0].shape[:2])
        if len(images) * len(points) > _MAX_IMAGES:
            raise UserError(f"{len(images)} images with {len(points)} queries each do not fit a picture.")
        drawn = []
        with _naming(checkpoint):
            for image in images:  # one by one: all attention of a large network on many images would fill the memory
                block, attention = attention_of(model, variables, image[None], args.block)
                heads, grid = attention.shape[1], _grid(model, image)
                head = heads if args.head is None else args.head
                if not 1 <= head <= heads:
                    raise UserError(f"There is no head {head}: choose from 1 to {heads}.")
                drawn += [query_maps(attention[0, head - 1], grid, _patch(p, grid), model.prefix) for p in points]
        maps[f"{checkpoint}, {block}, head {head}"] = drawn
    return draw_queries([image for image in shown for _ in points], points * len(shown), maps, "Where queries look")


def _heads(args: argparse.Namespace) -> Figure:
    """Figure 3 of the paper: all heads of one network beside all heads of another."""
    paths = _find_images(args.images)
    if len(paths) > 1 or len(args.checkpoint) > 1 or len(args.query) > 1 or args.head is not None:
        raise UserError("--beside draws all heads, for one image, one --checkpoint and one --query.")
    maps, queries, shown, point = {}, {}, None, None
    for checkpoint, block in ((args.checkpoint[0], args.block), (args.beside, None)):
        model, variables, metadata = load(checkpoint)
        image = read_image(paths[0], metadata)
        if shown is None:
            shown, [point] = image, _points(args.query, image.shape[:2])
        with _naming(checkpoint):
            if isinstance(model, ViT):
                block, attention = attention_of(model, variables, image[None], block)
                patch = _patch(point, _grid(model, image))
                drawn = query_maps(attention[0], _grid(model, image), patch, model.prefix)
            else:
                block, similarity = similarity_maps(model, variables, image[None], block)
                patch, drawn = None, similarity[0].transpose(2, 0, 1)
        name = f"{checkpoint}, {block}"
        maps[name], queries[name] = drawn, patch
    return draw_heads(shown, maps, queries, f"All heads on {paths[0].name}")


def _grid(model: ViT, image: np.ndarray) -> tuple[int, int]:
    return image.shape[0] // model.patch_size, image.shape[1] // model.patch_size


@contextlib.contextmanager
def _naming(checkpoint: str) -> Iterator[None]:
    """Adds to a UserError which of several networks it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{checkpoint}: {error}") from error


def _attention(args: argparse.Namespace) -> Figure:
    return _heads(args) if args.beside else _queries(args)


def _metric(workdir: Path, lines: Sequence[Mapping[str, float]]) -> str:
    """The metric by which a run, of whose record these are the lines, chooses its best checkpoint."""
    try:
        task = parse_object(storage.read_text(workdir / "config.json")).get("task", "classification")
    except (OSError, ValueError) as error:
        raise UserError(f"{workdir / 'config.json'} cannot be read: {error}; give folders of runs.") from error
    return best_metric(tasks.load(task), {name.removeprefix("eval/") for line in lines for name in line})


def _curves(args: argparse.Namespace) -> Figure:
    runs = {str(workdir): read_metrics(workdir) for workdir in map(storage.as_path, args.workdirs)}
    metrics = {_metric(storage.as_path(workdir), lines) for workdir, lines in runs.items()}
    if len(metrics) > 1:
        raise UserError(
            f"These runs have different main metrics ({', '.join(sorted(metrics))}): draw the runs of each task apart."
        )
    return draw_curves(runs, metrics.pop())


def main(argv: list[str] | None = None) -> None:
    prog = "python -m fcvit_jax.visualize"
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Draw attention, similarity, curves of runs, segmentations or detections. Each has its own --help.",
        epilog=f"example: {prog} curves runs/digits --output curves.png",
    )
    tools = parser.add_subparsers(required=True, metavar="attention|similarity|curves|segmentation|detections")
    for add in (_add_attention, _add_similarity, _add_curves, _add_segmentation, _add_detections):
        add(tools, prog).add_argument("--output", required=True, type=Path, help="the picture: .png, .pdf, .svg, ...")
    args = parser.parse_args(argv)
    with exit_on_error():
        check_format(args.output)  # before minutes of work
        save(args.draw(args), args.output)
        print(f"wrote {args.output}")


def _add_attention(tools: Any, prog: str) -> argparse.ArgumentParser:
    tool = tools.add_parser(
        "attention",
        help="the attention of a ViT's queries",
        description="Draw one head's attention for some queries on top of the images (figure 1 of the paper). With "
        "--beside, draw all heads of two networks (figure 3); of an FCViT, the maps of its last context.",
        epilog=f"example: {prog} attention --checkpoint deit.pth --query 60,80 --query class a.png --output maps.png",
    )
    tool.add_argument(
        "--checkpoint", required=True, action="append", help=f"{CHECKPOINT_HELP}; several times: a column each"
    )
    tool.add_argument("images", nargs="+", type=Path, metavar="IMAGE|FOLDER", help="a folder: all images beneath it")
    tool.add_argument(
        "--query",
        action="append",
        default=[],
        metavar="Y,X|class",
        help="a pixel, counted from the top left of the image as the first network gets it, or the class token; may "
        "be given several times (default: the centre)",
    )
    tool.add_argument("--block", help="such as block_3, of the first network with --beside (default: the last)")
    tool.add_argument("--head", type=int, metavar="N", help="from 1 (default: the last)")
    tool.add_argument("--beside", metavar="CHECKPOINT", help="another network: all heads of both, for one image")
    tool.set_defaults(draw=_attention)
    return tool


def _add_similarity(tools: Any, prog: str) -> argparse.ArgumentParser:
    tool = tools.add_parser(
        "similarity",
        help="the similarity maps of an FCViT's heads",
        description="Draw each head's similarity between every position and the image's mean, on top of the images.",
        epilog=f"example: {prog} similarity --checkpoint runs/digits a.png b.png --output similarity.png",
    )
    tool.add_argument("--checkpoint", required=True, help=CHECKPOINT_HELP)
    tool.add_argument("images", nargs="+", type=Path, metavar="IMAGE|FOLDER", help="a folder: all images below it")
    tool.add_argument("--block", help="such as stages_2_block_0; default: the last with more than one position")
    tool.set_defaults(draw=_similarity)
    return tool


def _add_curves(tools: Any, prog: str) -> argparse.ArgumentParser:
    tool = tools.add_parser(
        "curves",
        help="loss, learning rate and main metric of runs",
        description="Draw loss, learning rate and the main metric of runs, such as top-1.",
        epilog=f"example: {prog} curves runs/a runs/b --output curves.png",
    )
    tool.add_argument("workdirs", nargs="+", type=Path, metavar="WORKDIR", help="a run's folder")
    tool.set_defaults(draw=_curves)
    return tool


def _add_segmentation(tools: Any, prog: str) -> argparse.ArgumentParser:
    tool = tools.add_parser(
        "segmentation",
        help="what a segmenter gets right and wrong",
        description="Draw images of the validation set beside their labels, the predictions and the errors.",
        epilog=f"example: {prog} segmentation --checkpoint runs/scenes --output segmentation.png",
    )
    _add_examples(tool)
    tool.set_defaults(draw=segmentation.from_arguments)
    return tool


def _add_detections(tools: Any, prog: str) -> argparse.ArgumentParser:
    tool = tools.add_parser(
        "detections",
        help="what a detector finds and misses",
        description="Draw images of the validation set with their objects, beside those that were found.",
        epilog=f"example: {prog} detections --checkpoint runs/scenes --output detections.png",
    )
    _add_examples(tool)
    tool.add_argument("--threshold", type=float, default=0.3, metavar="SCORE", help="the least score to draw (0.3)")
    tool.set_defaults(draw=detection.from_arguments)
    return tool


def _add_examples(tool: argparse.ArgumentParser) -> None:
    tool.add_argument("--checkpoint", required=True, help=CHECKPOINT_HELP)
    tool.add_argument("--dataset", help="as config.data.dataset (default: that of the checkpoint's run)")
    tool.add_argument("--first", type=int, default=0, metavar="N", help="number of the first image (0)")
    tool.add_argument("--count", type=int, default=4, metavar="N", help="how many images (4)")


if __name__ == "__main__":
    main()
