"""The depthwise convolution: one op, several implementations, chosen by platform and size.

Forward, input gradient and weight gradient are bilinear maps, each the derivative of another, so the two rules below
give derivatives of every order in reverse mode. The choices in `_cpu_impl` and `_cuda_impl` come from
`benchmarks/depthwise.py`, that in `_tpu_impl` from `benchmarks/tpu_schedule.py`; figures are in docs/performance.md.
"""

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import PartitionSpec as P

IMPLS = ("lax", "shift", "banded", "toeplitz", "pallas")

_TERMS = 14  # products in a loop's body: more would spill registers, fewer read and write the sums too often
_CHANNELS = 16  # of a block: so few that a filter's row of eleven taps stays in registers
_LANES = 128  # a side of a TPU's matrix unit
_TPU_TAPS = 25  # of the smallest filter for which the matrix units are faster
_GPU_TAPS = 9  # of the smallest filter for which GPUs use the kernels; 3x3 is the smallest that was timed


def depthwise_conv(x: jax.Array, kernel: jax.Array, impl: str | None = None) -> jax.Array:
    """Convolves every channel with its own k x k filter: stride 1, zero padding k // 2, no bias.

    Example::

        depthwise_conv(jnp.ones((2, 56, 56, 32)), jnp.ones((11, 11, 32))).shape                     # (2, 56, 56, 32)

    Args:
      x: (N, H, W, C), float32 or bfloat16.
      kernel: (k, k, C), odd k; any float dtype, which its gradient shares. Sums are taken in float32.
      impl: one of `IMPLS` for all passes, or None for the best on the platform that the program is lowered for.
        "pallas" is as "lax" where no CUDA GPU is at hand, and in a program for several devices without its mesh in
        context (`jax.set_mesh`).

    Returns:
      (N, H, W, C), dtype of x. Reverse mode works to any order; forward mode raises JAX's TypeError for custom_vjp.

    Raises:
      ValueError: shapes that do not fit, even k, x without a float dtype, unknown impl.
    """
    if x.ndim != 4 or kernel.ndim != 3 or kernel.shape[0] != kernel.shape[1] or kernel.shape[0] % 2 == 0:
        raise ValueError(f"expected x (N, H, W, C) and kernel (k, k, C) with odd k, got {x.shape} and {kernel.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"expected x of a float dtype, got {x.dtype}")
    if x.shape[3] != kernel.shape[2]:
        raise ValueError(f"x has {x.shape[3]} channels, the kernel has {kernel.shape[2]}")
    if impl is not None and impl not in IMPLS:
        raise ValueError(f"unknown impl {impl!r}, choose one of {IMPLS}")
    x, kernel = vary_alike(x, kernel)
    # Taps that only ever meet the padding of a small map need no work.
    rows, cols = (max(0, kernel.shape[0] // 2 - size + 1) for size in x.shape[1:3])
    return _conv(x, kernel[rows : kernel.shape[0] - rows, cols : kernel.shape[1] - cols], impl)


def vary_alike(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Marks both, inside `jax.shard_map`, as varying over all axes that either varies over.

    The rules of a custom_vjp need that; the transpose then sums a gradient over the devices that share what it is of.
    """
    own, other = (jax.typeof(array).manual_axis_type.varying for array in (x, kernel))
    return lax.pcast(x, tuple(other - own), to="varying"), lax.pcast(kernel, tuple(own - other), to="varying")


def _cpu_impl(shape: tuple[int, ...], window: tuple[int, int]) -> str:
    """The fastest on a CPU: the one whose loop is shorter, over positions or over taps."""
    return "banded" if shape[1] * shape[2] <= window[0] * window[1] else "shift"


def _tpu_impl(shape: tuple[int, ...], window: tuple[int, int]) -> str:
    """The faster on a TPU by its compiler's schedules: the matrix units, unless filters are small or rows long."""
    return "toeplitz" if window[0] * window[1] >= _TPU_TAPS and shape[2] <= _LANES else "lax"


def _cuda_impl(shape: tuple[int, ...], window: tuple[int, int]) -> str:
    """The faster on a CUDA GPU: the kernels, unless filters are small."""
    return "pallas" if window[0] * window[1] >= _GPU_TAPS else "lax"


_CHOICES = {"cpu": _cpu_impl, "cuda": _cuda_impl, "tpu": _tpu_impl}


def _choose(impls: dict[str, Callable], impl: str | None, x: jax.Array, other: jax.Array, window: tuple[int, int]):
    """Runs one of `impls`, that for the platform if `impl` is None."""
    if impl is not None:
        return impls[impl](x, other)
    by_platform = {platform: impls[choice(x.shape, window)] for platform, choice in _CHOICES.items()}
    return lax.platform_dependent(x, other, **by_platform, default=impls["lax"])


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x: jax.Array, kernel: jax.Array, impl: str | None) -> jax.Array:
    return _choose(_FORWARD, impl, x, kernel, kernel.shape[:2])


def _conv_fwd(x, kernel, impl):
    return _conv(x, kernel, impl), (x, kernel)


def _conv_bwd(impl, residuals, g):
    x, kernel = residuals
    return _conv(g, kernel[::-1, ::-1], impl), _weight_grad(x, g, kernel.shape[:2], impl).astype(kernel.dtype)


_conv.defvjp(_conv_fwd, _conv_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _weight_grad(x: jax.Array, g: jax.Array, window: tuple[int, int], impl: str | None) -> jax.Array:
    """Sum x[n, h + i - p, w + j - p, c] * g[n, h, w, c] over n, h, w: (*window, C) in float32."""
    return _choose({name: partial(f, window=window) for name, f in _WEIGHT_GRAD.items()}, impl, x, g, window)


def _weight_grad_fwd(x, g, window, impl):
    return _weight_grad(x, g, window, impl), (x, g)


def _weight_grad_bwd(window, impl, residuals, t):
    x, g = residuals
    return _conv(g, t[::-1, ::-1], impl).astype(x.dtype), _conv(x, t, impl).astype(g.dtype)


_weight_grad.defvjp(_weight_grad_fwd, _weight_grad_bwd)


@jax.jit
def _lax(x: jax.Array, kernel: jax.Array) -> jax.Array:
    # Left to XLA, devices would exchange maps where `fsdp` splits the kernel.
    return _per_device(_lax_conv, x, kernel)


def _lax_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None].astype(x.dtype),
        window_strides=(1, 1),
        padding=[(size // 2, size // 2) for size in kernel.shape[:2]],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[3],
    )


@partial(jax.jit, static_argnames="window")
def _lax_weight_grad(x: jax.Array, g: jax.Array, window: tuple[int, int]) -> jax.Array:
    # Left to XLA (of JAX 0.10 to 0.12), a batch split over only some of several axes is wrongly summed over all.
    return _summed_over_devices(partial(_lax_taps, window=window), x, g)


def _lax_taps(x: jax.Array, g: jax.Array, window: tuple[int, int]) -> jax.Array:
    kernel = jnp.zeros_like(x, shape=(*window, x.shape[3]))
    return jax.linear_transpose(partial(_lax_conv, x), kernel)(g)[0].astype(jnp.float32)


@jax.jit
def _correlate(a: jax.Array, b: jax.Array) -> jax.Array:
    """Sum a[n, s + t, c] * b[n, t, c] over the positions t of b, for every s that fits; a batch of one is shared.

    A loop over blocks of t whose body is one fused, vectorised pass over the sums, so the program does not grow with b.
    """
    sizes = [a.shape[axis] - b.shape[axis] + 1 for axis in (1, 2)]
    col_blocks = -(-b.shape[2] // _TERMS)
    cols = -(-b.shape[2] // col_blocks)
    row_blocks = -(-b.shape[1] // max(1, _TERMS // cols))
    rows = -(-b.shape[1] // row_blocks)
    pad = ((0, 0), (0, row_blocks * rows - b.shape[1]), (0, col_blocks * cols - b.shape[2]), (0, 0))
    a, b = jnp.pad(a, pad), jnp.pad(b, pad)

    # XLA:CPU vectorises a fused dynamic slice only while it has one reader: slice once per term, not once per row.
    def window(array, row, col, height, width):
        start, size = (0, row, col, 0), (array.shape[0], height, width, array.shape[3])
        return lax.dynamic_slice(array, start, size, allow_negative_indices=False)

    def add_block(block, total):
        top, left = lax.div(block, col_blocks) * rows, lax.rem(block, col_blocks) * cols
        at = [(top + row, left + col) for row in range(rows) for col in range(cols)]
        return total + sum(window(a, *t, *sizes) * window(b, *t, 1, 1) for t in at)

    images = a.shape[0] if b.shape[0] == 1 else b.shape[0]
    total = jnp.zeros_like(a, jnp.float32, (images, *sizes, a.shape[3]))
    return lax.fori_loop(0, row_blocks * col_blocks, add_block, total)


def _pad(x: jax.Array, rows: int, cols: int) -> jax.Array:
    return jnp.pad(x.astype(jnp.float32), ((0, 0), (rows, rows), (cols, cols), (0, 0)))


def _by_channels(f: Callable[..., jax.Array], terms: int, out: jax.Array, *arrays: jax.Array) -> jax.Array:
    """Fills `out` with `f`, a sum of `terms` products, of each block of channels (the last axis) of the arrays."""
    channels = out.shape[-1]
    # XLA fuses a sum that fits one loop body with its neighbours; a loop over blocks would prevent that.
    if channels % _CHANNELS or terms <= _TERMS:
        return f(*arrays)

    def fill(i, out):
        at = {"start_index": i * _CHANNELS, "axis": -1, "allow_negative_indices": False}
        blocks = (lax.dynamic_slice_in_dim(array, slice_size=_CHANNELS, **at) for array in arrays)
        return lax.dynamic_update_slice_in_dim(out, f(*blocks), **at)

    return lax.fori_loop(0, channels // _CHANNELS, fill, out)


@jax.jit  # compiled once, also where the caller is not
def _shift(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The output summed over the taps, each a shifted copy of the padded map times a filter value."""
    height, width = kernel.shape[:2]

    def block(x, kernel):
        return _correlate(_pad(x, height // 2, width // 2), kernel[None].astype(jnp.float32)).astype(x.dtype)

    return _by_channels(block, height * width, jnp.zeros_like(x), x, kernel)


@partial(jax.jit, static_argnames="window")
def _shift_weight_grad(x: jax.Array, g: jax.Array, window: tuple[int, int]) -> jax.Array:
    """The taps summed over the positions; images stay apart until the end, so a sharded batch is reduced once."""
    height, width = window

    def block(x, g):
        return _correlate(_pad(x, height // 2, width // 2), g.astype(jnp.float32))

    total = jnp.zeros_like(x, jnp.float32, (x.shape[0], *window, x.shape[3]))
    return _by_channels(block, height * width, total, x, g).sum(0)


@jax.jit
def _banded(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Each channel's map times its banded (Toeplitz) matrix, whose rows are windows of the flipped filter."""
    height, width = x.shape[1:3]
    rows, cols = (size - 1 - taps // 2 for size, taps in zip((height, width), kernel.shape[:2], strict=True))

    def block(x, kernel):
        bands = _pad(kernel[None, ::-1, ::-1], rows, cols)
        return _correlate(bands, x[:, ::-1, ::-1].astype(jnp.float32)).astype(x.dtype)

    return _by_channels(block, height * width, jnp.zeros_like(x), x, kernel)


def _tiles(shape: tuple[int, ...], window: tuple[int, int]) -> tuple[int, int, int]:
    """A tile's rows, of some `_LANES` positions together; the map's tiles; how many tiles away a tap gets."""
    height, width = shape[1:3]
    tiles = -(-height // max(1, _LANES // width))
    rows = -(-height // tiles)
    return rows, tiles, min(tiles - 1, -(-(window[0] // 2) // rows))


def _to_tiles(x: jax.Array, rows: int, tiles: int) -> jax.Array:
    """(N, H, W, C) to (N, tiles, C * rows * W)."""
    n, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, tiles * rows - height), (0, 0), (0, 0)))
    return x.reshape(n, tiles, rows * width, channels).swapaxes(2, 3).reshape(n, tiles, channels * rows * width)


def _bands(rows: int, reach: int, width: int, window: tuple[int, int], dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Where tap i leads from row a, q tiles away, to row b: (q, a, b, i); tap j from column v to w: (v, w, j)."""
    q, a, b = jnp.ogrid[-reach : reach + 1, :rows, :rows]
    v, w = jnp.ogrid[:width, :width]
    i, j = q * rows + a - b + window[0] // 2, v - w + window[1] // 2
    return jax.nn.one_hot(i, window[0], dtype=dtype), jax.nn.one_hot(j, window[1], dtype=dtype)


def _batch_axes(x: jax.Array) -> tuple[str, ...]:
    """The axes of the mesh in context over which a batch can be split evenly; none without a mesh or on one device."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in mesh.auto_axes if mesh.shape[axis] > 1)
    return axes if axes and x.shape[0] % math.prod(mesh.shape[axis] for axis in axes) == 0 else ()


def _per_device(conv: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution, by every device of its own images where they can be split."""
    if not (axes := _batch_axes(x)):
        return conv(x, kernel)
    own = {"in_specs": (P(axes), P()), "out_specs": P(axes), "axis_names": set(axes), "check_vma": False}
    return jax.shard_map(conv, **own)(x, kernel)


def _summed_over_devices(taps: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, g: jax.Array) -> jax.Array:
    """The taps, summed over those that every device has from its own images where they can be split."""
    if not (axes := _batch_axes(x)):
        return taps(x, g)
    own = {"in_specs": P(axes), "out_specs": P(), "axis_names": set(axes), "check_vma": False}
    return jax.shard_map(lambda x, g: lax.psum(taps(x, g), axes), **own)(x, g)


@jax.jit
def _toeplitz(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Each channel's tiles of whole rows times the banded (Toeplitz) matrices that lead from tile to tile."""

    def conv(x, kernel):
        n, height, width, channels = x.shape
        rows, tiles, reach = _tiles(x.shape, kernel.shape)
        row_bands, col_bands = _bands(rows, reach, width, kernel.shape[:2], x.dtype)
        by_rows = jnp.einsum("qabi,ijc->qabjc", row_bands, kernel.astype(x.dtype))
        matrices = jnp.einsum("qabjc,vwj->qavcbw", by_rows, col_bands)
        y = lax.conv_general_dilated(
            _to_tiles(x, rows, tiles),
            matrices.reshape(2 * reach + 1, rows * width, -1),
            window_strides=(1,),
            padding=[(reach, reach)],
            dimension_numbers=("NHC", "HIO", "NHC"),
            feature_group_count=channels,
        )
        y = y.reshape(n, tiles, channels, rows * width).swapaxes(2, 3)
        return y.reshape(n, tiles * rows, width, channels)[:, :height]

    # XLA would send matrices from device to device, which are much larger than the filters.
    return _per_device(conv, x, kernel)


@partial(jax.jit, static_argnames="window")
def _toeplitz_weight_grad(x: jax.Array, g: jax.Array, window: tuple[int, int]) -> jax.Array:
    """The gradient of the matrices, summed along their bands."""

    def taps(x, g):
        width, channels = x.shape[2:]
        rows, tiles, reach = _tiles(x.shape, window)
        row_bands, col_bands = _bands(rows, reach, width, window, jnp.float32)
        matrices = lax.conv_general_dilated(
            _to_tiles(x, rows, tiles),
            _to_tiles(g, rows, tiles),
            window_strides=(1,),
            padding=[(reach, reach)],
            dimension_numbers=("CHN", "IHO", "HNC"),
            batch_group_count=channels,
            preferred_element_type=jnp.float32,
        )
        matrices = matrices.reshape(2 * reach + 1, rows, width, channels, rows, width)
        by_rows = jnp.einsum("qavcbw,vwj->qabjc", matrices, col_bands, precision="highest")
        return jnp.einsum("qabjc,qabi->ijc", by_rows, row_bands, precision="highest")

    return _summed_over_devices(taps, x, g)


# A primitive, so that only the lowering decides, which alone knows the device and whether the program is exported.
_pallas_p = Primitive("depthwise_pallas")


@_pallas_p.def_abstract_eval
def _pallas_shape(x, other, *, window):
    """`other` is the kernel, or the incoming gradient if `window` says which taps its sum is for."""
    shape, dtype = ((*window, x.shape[3]), jnp.float32) if window else (x.shape, x.dtype)
    sharding = x.sharding.update(spec=P(*[None] * len(shape)))  # of what each device holds in a `jax.shard_map`
    return ShapedArray(shape, dtype, sharding=sharding, manual_axis_type=x.manual_axis_type)


@_pallas_p.def_impl  # for `jax.disable_jit`
def _pallas_by_lax(x, other, *, window):
    return _lax_taps(x, other, window) if window else _lax_conv(x, other)


def _has_kernels(shape: tuple[int, ...], window: tuple[int, int]) -> bool:
    """Whether the GPUs, this version of JAX and maps of this shape go with the kernels."""
    try:
        from fcvit_jax.depthwise import kernels  # here, since JAX has announced to remove what it is written in

        gpus = jax.local_devices(backend="cuda")
    except (ImportError, RuntimeError):  # RuntimeError: no GPU, where a program is only compiled for one
        return False
    default = jax.config.jax_default_device or jax.local_devices()[0]  # whose kernels Pallas makes
    modern = default in (*gpus, "gpu", "cuda") and all(float(gpu.compute_capability) >= 8 for gpu in gpus)
    return modern and all(isinstance(size, int) for size in shape) and kernels.supports(shape, window)


def _is_whole(context: Any) -> bool:
    """Whether nothing of a program in this axis context is left for XLA to split between devices."""
    if hasattr(context, "num_devices"):
        return context.num_devices == 1
    manual = context.manual_axes | set(context.mesh.manual_axes)
    return all(size == 1 for axis, size in context.mesh.shape.items() if axis not in manual)


def _pallas_lowering(ctx, x, other, *, window):
    module, (maps, second) = ctx.module_context, ctx.avals_in
    # XLA cannot split a kernel between devices, and an exported program must outlive this version of JAX.
    whole, exported = _is_whole(module.axis_context), module.lowering_parameters.for_export
    if whole and not exported and _has_kernels(maps.shape, window or second.shape[:2]):
        from fcvit_jax.depthwise.kernels import forward, weight_grad

        run = partial(weight_grad, window=window) if window else forward
    else:
        run = partial(_pallas_by_lax, window=window)
        if not exported:
            spread = "the program is for several devices, without their mesh in context (jax.set_mesh)"
            reason = "this GPU, this version of JAX or maps of such sizes do not go with them" if whole else spread
            warnings.warn(f"Depthwise convolutions by cuDNN, much slower than the kernels: {reason}", stacklevel=2)
    return mlir.lower_fun(run, multiple_results=False)(ctx, x, other)


def _pallas_batch(args, dims, *, window):
    """Makes the mapped axis part of the channels, of which each is convolved by itself anyway."""
    size = next(arg.shape[dim] for arg, dim in zip(args, dims, strict=True) if dim is not None)
    args = [batching.bdim_at_front(arg, dim, size) for arg, dim in zip(args, dims, strict=True)]
    out = _pallas_p.bind(*(jnp.moveaxis(arg, 0, -2).reshape(*arg.shape[1:-1], -1) for arg in args), window=window)
    return out.reshape(*out.shape[:-1], size, -1), out.ndim - 1


mlir.register_lowering(_pallas_p, _pallas_lowering, platform="cuda")
mlir.register_lowering(_pallas_p, mlir.lower_fun(_pallas_by_lax, multiple_results=False))
batching.primitive_batchers[_pallas_p] = _pallas_batch


@jax.jit
def _pallas(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """By the kernels of `kernels` where a GPU runs it, else as `_lax`."""
    return _per_device(partial(_pallas_p.bind, window=None), x, kernel)


@partial(jax.jit, static_argnames="window")
def _pallas_weight_grad(x: jax.Array, g: jax.Array, window: tuple[int, int]) -> jax.Array:
    return _summed_over_devices(partial(_pallas_p.bind, window=window), x, g)


_FORWARD = {"lax": _lax, "shift": _shift, "banded": _banded, "toeplitz": _toeplitz, "pallas": _pallas}
_WEIGHT_GRAD = {
    "lax": _lax_weight_grad,
    "shift": _shift_weight_grad,
    "banded": _shift_weight_grad,
    "toeplitz": _toeplitz_weight_grad,
    "pallas": _pallas_weight_grad,
}
