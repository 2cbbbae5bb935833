"""The depthwise convolution as CUDA C++ (kernels.cu), which NVRTC compiles while a program is lowered.

The PTX becomes part of the program, in a custom call that XLA's CUDA plugins have in JAX 0.10 to 0.12 without promising
to keep it. So it needs neither Triton nor a CUDA toolkit. It was not run on a GPU.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcvit_jax.depthwise import nvrtc

_SOURCE = Path(__file__).with_name("kernels.cu")
_SHARED = 48 << 10  # bytes of shared memory that every GPU gives a block without being asked for more
_SHARED_OF_ALL = 164 << 10  # of a multiprocessor of an A100, the least of the GPUs that the plans are made for
_REGISTERS = 1 << 16  # of a multiprocessor
_MOST_REGISTERS = 200  # of a thread; the limit is 255
_BLOCKS = 1024  # of the weight gradient: some turns on every GPU, and not too many partial sums
_SUMMED = 32  # taps to a block of the second stage


@dataclass(frozen=True)
class _Tile:
    """The part of maps that a block handles; kernels.cu says what the fields are."""

    rows: int
    cols: int
    strips: int
    images: int
    vector: int
    groups: int
    slices: int

    def lanes(self, kh: int, grad: bool) -> int:
        """Threads that have work."""
        return self.groups * (self.slices * kh if grad else self.rows * self.strips * self.images)


@dataclass(frozen=True)
class Plan:
    """A kernel for maps of one shape, and how it is launched.

    Attributes:
      macros: of kernels.cu, by name.
      blocks, threads: of the launch; threads are those of a block.
      shared: bytes of shared memory of a block.
    """

    macros: dict[str, int]
    blocks: int
    threads: int
    shared: int


def _shared(tile: _Tile, shape: tuple[int, ...], window: tuple[int, int], grad: bool) -> int:
    above, beside = (
        0 if tiled == size else taps // 2
        for tiled, size, taps in zip((tile.rows, tile.cols), shape[1:3], window, strict=True)
    )
    source = (tile.rows + 2 * above) * (tile.cols * tile.strips + 2 * beside)
    positions = tile.images * (source + (tile.rows * tile.cols if grad else 0))
    if grad:  # the sums of the slices, later on
        positions = max(positions, (tile.slices - 1) * window[0] * window[1])
    return positions * tile.groups * tile.vector * 4


def _registers(tile: _Tile, kw: int, grad: bool) -> int:
    values = kw + min(tile.cols, kw) if grad else kw + tile.cols
    return max(96, -(-(tile.vector * values + 40) // 8) * 8)  # copying a tile needs up to 96


@functools.cache
def _products(cols: int, kw: int, margin: int) -> int:
    """Products of a row of `cols` positions and `kw` taps; without a margin, only those on the map."""
    return cols * kw if margin else sum(max(0, cols - abs(tap - kw // 2)) for tap in range(kw))


@functools.cache
def _turns(height: int, kh: int, rows: int, lines: int) -> float:
    """Of the rows of taps, the share that meets the map, for a warp that has `lines` rows of a tile."""
    half, met, warps = kh // 2, 0, 0
    for top in range(0, height, rows):
        for first in range(top, top + rows, lines):
            last = min(first + lines, top + rows, height) - 1
            met += max(0, min(kh, height + half - first) - max(0, half - last)) if first < height else 0
            warps += 1
    return met / (warps * kh)


@functools.cache
def _grad_turns(height: int, kh: int, lines: int) -> float:
    """Of the rows of a map, the share that meets the taps, for a warp that has `lines` rows of taps."""
    half, firsts = kh // 2, range(0, kh, lines)
    lasts = (min(first + lines, kh) - 1 for first in firsts)
    met = sum(min(height, height + half - a) - max(0, half - b) for a, b in zip(firsts, lasts, strict=True))
    return met / (len(firsts) * height)


def _cost(tile: _Tile, shape: tuple[int, ...], window: tuple[int, int], grad: bool) -> float:
    """An estimate of the cycles of a multiprocessor for all maps, divided by the number of maps.

    A multiprocessor has four schedulers, each of which issues an instruction to one of its warps in a cycle, and its
    shared memory gives 128 bytes. Not compared with a GPU.
    """
    _, height, width, channels = shape
    kh, kw = window
    margin = 0 if tile.cols == width else kw // 2
    sources, products = tile.cols + 2 * margin, _products(tile.cols, kw, margin)
    beside = tile.cols if grad else kw  # loads besides those of the sources; neighbours load the same
    issued = tile.vector * products + sources + beside + (36 if grad else 8)  # the last: indices, as compiled
    issued, loaded = issued / 4, tile.vector * (sources + beside / 4)
    line = max(issued, loaded) + min(issued, loaded) / 4  # neither hides the other wholly
    if grad:
        lines = tile.rows * tile.images / tile.slices * _grad_turns(height, kh, max(1, 32 // tile.groups))
    else:
        lanes = tile.groups * tile.strips * tile.images  # with the same row
        lines = kh * _turns(height, kh, tile.rows, max(1, 32 // lanes)) + tile.cols * (tile.vector + 2) / 4 / line
    warps = -(-tile.lanes(kh, grad) // 32)
    copied = _shared(tile, shape, window, grad) / (4 * tile.vector) / 32  # vectors to each thread of a warp
    copy = copied * (8 + 1.5 * tile.vector) / 4
    tiles = -(-height // tile.rows) * -(-width // (tile.cols * tile.strips)) / tile.images
    tiles *= -(-channels // (tile.vector * tile.groups))
    # With few warps, schedulers wait for loads. Filters with few taps are bound by memory, so loads are what counts.
    wanted = 16 if kh * kw < 25 else 6
    return (warps * lines * line + copy) * tiles * max(1.0, wanted / (warps * _resident(tile, shape, window, grad)))


def _threads(tile: _Tile, kh: int, grad: bool) -> int:
    return -(-tile.lanes(kh, grad) // 32) * 32


def _resident(tile: _Tile, shape: tuple[int, ...], window: tuple[int, int], grad: bool) -> int:
    """Blocks that a multiprocessor runs at once."""
    by_shared = _SHARED_OF_ALL // (_shared(tile, shape, window, grad) + 1024)  # 1 KB of each is the system's
    threads = -(-_threads(tile, window[0], grad) // 128) * 128  # registers are given to four warps at a time
    return min(by_shared, _REGISTERS // (_registers(tile, window[1], grad) * threads))


def _tiles(shape: tuple[int, ...], itemsize: int, grad: bool) -> Iterator[_Tile]:
    """Tiles that suit maps of this shape (N, H, W, C)."""
    n, height, width, channels = shape
    few = (1, 2, 4, 8, 16)
    for vector, groups in itertools.product((2, 4), few):
        # A position's channels fill a sector of 32 bytes, or are all that there are; more than a line is no use.
        if not min(32, channels * itemsize) <= vector * groups * itemsize <= 128 or vector * groups >= 2 * channels > 8:
            continue
        for cols in range(1, min(width, 28) + 1):
            for strips in (1,) if grad else few:
                if cols * (strips - 1) >= width:
                    break
                for rows in {-(-height // parts) for parts in range(-(-height // 28), height + 1)}:
                    whole = rows == height and cols * strips >= width
                    for images in few if whole else (1,):
                        if images < 2 * n:
                            for slices in few if grad else (1,):
                                yield _Tile(rows, cols, strips, images, vector, groups, slices)


@functools.cache
def _plan(shape: tuple[int, ...], window: tuple[int, int], dtype: Any, grad: bool) -> Plan | None:
    """The plan with the least cost; None if none fits."""

    def fits(tile):
        if _threads(tile, window[0], grad) > 384 or _shared(tile, shape, window, grad) > _SHARED:
            return False
        # While one block copies its tile, another computes.
        return _registers(tile, window[1], grad) <= _MOST_REGISTERS and _resident(tile, shape, window, grad) > 1

    tiles = filter(fits, _tiles(shape, dtype.itemsize, grad))
    tile = min(tiles, key=lambda tile: _cost(tile, shape, window, grad), default=None)
    if tile is None:
        return None
    n, height, width, channels = shape
    channel_tiles = -(-channels // (tile.vector * tile.groups))
    blocks = -(-height // tile.rows) * -(-width // (tile.cols * tile.strips)) * -(-n // tile.images)
    if grad:
        blocks = min(blocks, -(-_BLOCKS // channel_tiles))
    threads = _threads(tile, window[0], grad)
    macros = {"N": n, "HEIGHT": height, "WIDTH": width, "CHANNELS": channels, "KH": window[0], "KW": window[1]}
    macros |= {"BFLOAT16": int(dtype == jnp.bfloat16), "WEIGHT_GRAD": int(grad), "THREADS": threads}
    macros |= {"MIN_BLOCKS": _resident(tile, shape, window, grad), "PARTS": blocks if grad else 1}
    macros |= {name.upper(): value for name, value in asdict(tile).items()}
    return Plan(macros, blocks * channel_tiles, threads, _shared(tile, shape, window, grad))


def plan(shape: tuple[int, ...], window: tuple[int, int], dtype: Any, grad: bool) -> Plan | None:
    """How the kernels handle maps of a shape.

    Args:
      shape: (N, H, W, C).
      window: rows and columns of taps.
      dtype: of the maps.
      grad: for the weight gradient, not for the convolution.

    Returns:
      The plan; None if there is none: for empty maps, other dtypes than float32 and bfloat16, filters that are wider
      than registers allow, and sizes beyond 32 bits.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.bfloat16) or not 0 < math.prod(shape) or math.prod(shape[1:]) >= 2**31:
        return None
    found = _plan(tuple(shape), tuple(window), dtype, grad)
    return found if found and found.blocks < 2**31 and math.prod(window) * shape[3] < 2**31 else None


def supports(shape: tuple[int, ...], window: tuple[int, int], dtype: Any) -> bool:
    """Whether there are kernels for all passes of maps of this shape (N, H, W, C) with a window of (h, w) taps."""
    return all(plan(shape, window, dtype, grad) for grad in (False, True))


@functools.cache
def _compile(macros: tuple[tuple[str, int], ...]) -> str:
    return nvrtc.compile_to_ptx(_SOURCE.read_text(), _SOURCE.name, dict(macros))


def _call(name: str, plan: Plan, launch: tuple[int, int, int], out: tuple[tuple[int, ...], Any], *arrays: jax.Array):
    blocks, threads, shared = launch
    result = jax.ShapeDtypeStruct(*out, manual_axis_type=jax.typeof(arrays[0]).manual_axis_type)
    sizes = {"grid_x": blocks, "grid_y": 1, "grid_z": 1, "block_x": threads, "block_y": 1, "block_z": 1}
    attributes = {key: np.int32(size) for key, size in {**sizes, "shared_mem_bytes": shared}.items()}
    ptx = _compile(tuple(plan.macros.items()))
    call = jax.ffi.ffi_call("__gpu$xla.gpu.ptx", result)
    return call(*arrays, name=name, kernel_type="ptx", kernel_data=ptx, **attributes)


def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves x (N, H, W, C) with kernel (kh, kw, C), by sums in float32; the result has the dtype of x."""
    chosen = plan(x.shape, kernel.shape[:2], x.dtype, grad=False)
    launch = chosen.blocks, chosen.threads, chosen.shared
    kernel = kernel.astype(x.dtype).astype(jnp.float32)
    return _call("depthwise_forward", chosen, launch, (x.shape, x.dtype), x, kernel)


def weight_grad(x: jax.Array, g: jax.Array, window: tuple[int, int]) -> jax.Array:
    """x and g (N, H, W, C) to float32 taps (*window, C), in two stages whose sums are always in the same order."""
    chosen = plan(x.shape, window, x.dtype, grad=True)
    taps = (*window, x.shape[3])
    parts = (chosen.macros["PARTS"], *taps), jnp.float32
    launch = chosen.blocks, chosen.threads, chosen.shared
    sums = _call("depthwise_weight_grad", chosen, launch, parts, x, g.astype(x.dtype))
    second = -(-math.prod(taps) // _SUMMED), 8 * _SUMMED, 8 * _SUMMED * 4
    return _call("depthwise_sum", chosen, second, (taps, jnp.float32), sums)
