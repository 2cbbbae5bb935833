"""The depthwise convolution as Pallas kernels for CUDA GPUs, which keep their sums in registers.

Each program is one warp. Each thread handles two or four channels of one segment of a row, so every filter tap is
reused for that many products, and every input value is loaded and converted once per row of taps.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

_VALUES = 112  # sums per thread in the forward pass: more would not fit the registers
_ROWS = 14  # rows of a map that one program of the weight gradient sums
_TAPS = 21  # most taps in a row of the filter: more sums would not fit the registers


@dataclass(frozen=True)
class _Plan:
    """How maps (N, H, W, C) are divided among programs: each handles `block` channels of `lanes` segments of rows.

    Attributes:
      vector: channels that each thread handles.
    """

    n: int
    height: int
    width: int
    channels: int
    vector: int = 4

    @property
    def cols(self) -> int:
        return max(cols for cols in range(1, _VALUES // self.vector + 1) if self.width % cols == 0)

    @property
    def parts(self) -> int:
        return self.width // self.cols

    @property
    def elements(self) -> int:
        return 32 * self.vector  # per program: a warp has 32 threads

    @property
    def block(self) -> int:
        return math.gcd(self.channels, self.elements)

    @property
    def lanes(self) -> int:
        return self.elements // self.block

    @property
    def groups(self) -> int:
        return pl.cdiv(self.n * self.parts, self.lanes)

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.height, _ROWS)

    def partial_sums(self, window: tuple[int, int]) -> tuple[int, ...]:
        return self.groups * self.chunks, *window, self.channels

    def place(self, group: jax.Array, block: jax.Array) -> "_Place":
        part = group * self.lanes + lax.broadcasted_iota(jnp.int32, (self.lanes, self.block), 0)
        channel = block * self.block + lax.broadcasted_iota(jnp.int32, (self.lanes, self.block), 1)
        total = self.n * self.parts
        real = None if total % self.lanes == 0 else part < total
        part = _within(part, total)
        image, first = part // self.parts, part % self.parts * self.cols
        start = (image * (self.height * self.width) + first) * self.channels + channel
        return _Place(self, start, first, channel, real)


@dataclass(frozen=True)
class _Place:
    """Where the elements (lanes, block) of a program lie in maps that are flat in memory.

    Attributes:
      start: index of the segment's first position, in row 0 of its image.
      first: column of that position.
      channel: index of the channel.
      real: mask that is False for the padding elements of the last program (they recompute the last segment); None if
        there is no padding.
    """

    plan: _Plan
    start: jax.Array
    first: jax.Array
    channel: jax.Array
    real: jax.Array | None

    def at(self, row: jax.Array) -> jax.Array:
        """Index of the first position of the segment in a row."""
        return self.start + _within(row, self.plan.height) * (self.plan.width * self.plan.channels)

    def products(self, ref: jax.Array, row: jax.Array, taps: int, interpret: bool) -> Iterator[tuple]:
        """Yields (value, column, tap) for each product in a row; values beyond the edge of the map are 0 or skipped."""
        cols, half, at = self.plan.cols, taps // 2, self.at(row)
        for source in range(cols) if self.plan.parts == 1 else range(-half, cols + half):
            inside = None
            if not 0 <= source < cols:
                inside = self.first >= -source if source < 0 else self.first < self.plan.width - source
            value = _load(ref, at + source * self.plan.channels, interpret, inside)
            for tap in range(taps):
                if 0 <= (col := source + half - tap) < cols:
                    yield value, col, tap


def _within(index: jax.Array, size: int) -> jax.Array:
    """Tells the compiler that the index is below `size`, so that adding a column to it costs no instruction."""
    return jnp.clip(index, 0, size - 1)


def _asm(asm: str, constraints: str, pack: int, *args: jax.Array) -> jax.Array:
    out = [jax.ShapeDtypeStruct(args[0].shape, jnp.float32)]
    return triton.elementwise_inline_asm(asm, args=args, constraints=constraints, pack=pack, result_shape_dtypes=out)[0]


def _load(ref: jax.Array, at: jax.Array, interpret: bool, mask: jax.Array | None = None) -> jax.Array:
    value = triton.load(ref.at[at], mask=mask, other=None if mask is None else 0)
    if interpret or value.dtype != jnp.bfloat16:
        return value.astype(jnp.float32)
    # Converts two values with two instructions; the compiler would use three.
    return _asm("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", 2, value)


def _fma(a: jax.Array, b: jax.Array, c: jax.Array, interpret: bool) -> jax.Array:
    if interpret:
        return a * b + c
    # The compiler would not fuse the product and the sum; that takes 1.5 times as long.
    return _asm("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", 1, a, b, c)


def _call(body: Callable, grid: tuple[int, ...], out: tuple[int, Any], interpret: bool, *maps: jax.Array) -> jax.Array:
    call = pl.pallas_call(
        body,
        grid=grid,
        out_shape=jax.ShapeDtypeStruct((out[0],), out[1], manual_axis_type=jax.typeof(maps[0]).manual_axis_type),
        compiler_params=triton.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name=body.__name__,
    )
    return call(*(x.reshape(-1) for x in maps))


def _forward_plan(shape: tuple[int, ...]) -> _Plan:
    """Four channels per thread if each segment is then a whole row, else two: segments also load values beside them."""
    return _Plan(*shape, vector=4 if shape[2] <= _VALUES // 4 else 2)


def supports(shape: tuple[int, ...], window: tuple[int, int]) -> bool:
    """Whether the kernels can take maps of this shape (N, H, W, C) with a window of (h, w) taps.

    Channels must be a multiple of 16, rows must divide into segments, and indices must fit 32 bits.
    """
    plan = _Plan(*shape)
    indices = max(math.prod(shape), math.prod(plan.partial_sums(window)))
    fits = 0 < indices < 2**31 and max(plan.groups * plan.chunks, plan.height) < 2**16  # a grid's second axis
    return fits and window[1] <= _TAPS and plan.block >= 16 and (plan.parts == 1 or plan.cols >= 4)


def forward(x: jax.Array, kernel: jax.Array, interpret: bool = False) -> jax.Array:
    """Convolves x (N, H, W, C) with kernel (kh, kw, C): each thread sums its segment of a row, tap by tap."""
    plan = _forward_plan(x.shape)
    height, (kh, kw) = plan.height, kernel.shape[:2]

    def depthwise_forward(x_ref, kernel_ref, out_ref):
        place, row = plan.place(pl.program_id(0), pl.program_id(2)), pl.program_id(1)

        def tap_row(i, sums):
            sums = list(sums)
            at = _within(i, kh) * (kw * plan.channels) + place.channel
            taps = [_load(kernel_ref, at + j * plan.channels, interpret) for j in range(kw)]
            for value, col, j in place.products(x_ref, row + i - kh // 2, kw, interpret):
                sums[col] = _fma(value, taps[j], sums[col], interpret)
            return tuple(sums)

        zeros = tuple(jnp.zeros(place.start.shape, jnp.float32) for _ in range(plan.cols))
        low, high = jnp.maximum(0, kh // 2 - row), jnp.minimum(kh, height + kh // 2 - row)  # rows on the map
        at = place.at(row)
        for col, total in enumerate(lax.fori_loop(low, high, tap_row, zeros)):
            triton.store(out_ref.at[at + col * plan.channels], total.astype(x.dtype))

    grid = (plan.groups, height, plan.channels // plan.block)
    kernel = kernel.astype(x.dtype).astype(jnp.float32)
    return _call(depthwise_forward, grid, (x.size, x.dtype), interpret, x, kernel).reshape(x.shape)


def weight_grad(x: jax.Array, g: jax.Array, window: tuple[int, int], interpret: bool = False) -> jax.Array:
    """x and g (N, H, W, C) to float32 taps (*window, C): each thread sums one row of taps over its segment of rows."""
    plan = _Plan(*x.shape)
    height, chunks, (kh, kw) = plan.height, plan.chunks, window
    parts = plan.partial_sums(window)

    def depthwise_weight_grad(x_ref, g_ref, out_ref):
        # The row of taps varies first, so that programs of the same maps run together.
        i, chunk, block = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        place, first = plan.place(chunk // chunks, block), chunk % chunks * _ROWS

        def map_row(row, sums):
            sums, at = list(sums), place.at(row)
            gs = [_load(g_ref, at + col * plan.channels, interpret, place.real) for col in range(plan.cols)]
            for value, col, j in place.products(x_ref, row + i - kh // 2, kw, interpret):
                sums[j] = _fma(value, gs[col], sums[j], interpret)
            return tuple(sums)

        zeros = tuple(jnp.zeros(place.start.shape, jnp.float32) for _ in range(kw))
        low = jnp.maximum(first, kh // 2 - i)
        high = jnp.minimum(jnp.minimum(first + _ROWS, height), height + kh // 2 - i)
        channel = block * plan.block + lax.iota(jnp.int32, plan.block)
        for j, total in enumerate(lax.fori_loop(low, high, map_row, zeros)):
            triton.store(out_ref.at[((chunk * kh + i) * kw + j) * plan.channels + channel], total.sum(0))

    grid = (kh, plan.groups * chunks, plan.channels // plan.block)
    sums = _call(depthwise_weight_grad, grid, (math.prod(parts), jnp.float32), interpret, x, g)
    return sums.reshape(parts).sum(0)
