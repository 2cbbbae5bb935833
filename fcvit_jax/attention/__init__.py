"""What a network's attention looks like in numbers: how much it depends on the query and the head, how sparse it is.

As a tool: `python -m fcvit_jax.attention --checkpoint deit_base --images photos/ --figure depth.png`.

With a the map of one query over the n tokens that it may attend to (of sum 1), every measure is a mean over images,
heads and queries:

- query_cosine: cosine of the maps of two queries; near 1 for any even attention, so read it beside the next and the
  entropy. 1 - 2 times the distance of GCNet (arXiv 1904.11492), less the pairs of a query with itself.
- query_correlation: Pearson correlation of the maps of two queries; 1: attention does not depend on the query.
- nmi: mutual information of query and key over the root of their entropies (arXiv 2305.00729); 0: likewise.
- head_correlation: correlation of two heads' maps, averaged over queries before; _per_query: only afterwards.
- entropy: -sum a log a / log n; 1: even, 0: one token.
- top_mass: the share of the largest tenth of the tokens, rounded up.
- gini: Gini's coefficient; 0: even.
- prefix_mass: the share of the class token (and the distillation token).

A map is constant whose deviation from its mean is at most 1e-6 of its norm; correlations leave such maps out.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcvit_jax.errors import UserError

# Those that say most, for tables; entropy and correlation beside the cosine, which is near 1 for any even attention.
TABLE = ("query_cosine", "query_correlation", "head_correlation", "entropy", "top_mass", "prefix_mass")
_CONSTANT = 1e-6  # a map is constant whose deviation from its mean is at most this share of its norm


def measures(attention: np.ndarray | jax.Array, prefix: int = 1) -> dict[str, float] | dict[str, np.ndarray]:
    """Measures the attention of one block.

    Queries are the patches alone. The names ending in "_all" take all tokens for keys, the others the patches alone,
    each map divided by its sum.

    Example::

        _, state = model.apply(variables, images, mutable=["intermediates"])
        attention = state["intermediates"]["block_11"]["attention"][0]            # (N, heads, T, T)
        measures(attention, model.prefix)["query_correlation"]                    # (N,)

    Args:
      attention: (heads, T, T) or (N, heads, T, T), float; rows are queries and sum to 1.
      prefix: class and distillation tokens, in front of the patches.

    Returns:
      "query_cosine", "query_cosine_all", "query_correlation", "nmi", "head_correlation", "head_correlation_per_query",
      "entropy", "entropy_all", "top_mass", "top_mass_all", "gini", "gini_all" and "prefix_mass": a float each, or (N,)
      float32; NaN where no two maps vary, which a correlation needs.

    Raises:
      UserError: the array has another shape, or no patch behind the prefix.
    """
    shape = np.shape(attention)
    if len(shape) not in (3, 4) or shape[-1] != shape[-2] or not 0 <= prefix < shape[-1]:
        raise UserError(f"Attention must be (N, heads, T, T) or (heads, T, T) with T > {prefix}, not {shape}.")
    found = _measures(jnp.asarray(attention, jnp.float32).reshape(-1, *shape[-3:]), prefix)
    return _as_given(found, whole=len(shape) == 4)


def map_measures(similarity: np.ndarray | jax.Array) -> dict[str, float] | dict[str, np.ndarray]:
    """Measures the maps of an FCViT's context, one for each head, which are the same for every query.

    For the sparsity a map, which has values of both signs, is shifted to a least value of 0 and divided by its sum.

    Args:
      similarity: (h, w, heads) or (N, h, w, heads), float, as sown in "intermediates".

    Returns:
      "head_correlation", "entropy", "top_mass" and "gini": a float each, or (N,) float32.

    Raises:
      UserError: the array has another shape.
    """
    shape = np.shape(similarity)
    if len(shape) not in (3, 4):
        raise UserError(f"Maps must be (N, h, w, heads) or (h, w, heads), not {shape}.")
    maps = jnp.asarray(similarity, jnp.float32).reshape(-1, shape[-3] * shape[-2], shape[-1]).swapaxes(1, 2)
    return _as_given(_map_measures(maps), whole=len(shape) == 4)


def _as_given(found: Mapping[str, jax.Array], whole: bool) -> dict[str, Any]:
    return {name: np.asarray(x) if whole else float(x[0]) for name, x in found.items()}


def _measures(attention: jax.Array, prefix: int) -> dict[str, jax.Array]:
    """`measures` of (N, heads, T, T)."""
    rows, patches = _views(attention, prefix)
    return _measures_of_views(rows, patches, _sorted(rows), _sorted(patches))


def _map_measures(maps: jax.Array) -> dict[str, jax.Array]:
    """`map_measures` of (N, heads, positions)."""
    shares = _shares(maps)
    return _measures_of_shares(maps, shares, _sorted(shares))


def _sorted(x: jax.Array) -> jax.Array | np.ndarray:
    """The last axis in ascending order; on CPUs by NumPy, which is a hundred times as fast there as XLA."""
    return np.sort(x, axis=-1) if {device.platform for device in x.devices()} == {"cpu"} else jnp.sort(x, axis=-1)


@functools.partial(jax.jit, static_argnums=1)
def _views(attention: jax.Array, prefix: int) -> tuple[jax.Array, jax.Array]:
    """The patches' maps over all tokens, (N, heads, patches, T), and over the patches alone, each of sum 1."""
    rows = attention[..., prefix:, :]
    patches = rows[..., prefix:]
    return rows, patches / patches.sum(-1, keepdims=True)


@jax.jit
def _measures_of_views(
    rows: jax.Array, patches: jax.Array, sorted_rows: jax.Array, sorted_patches: jax.Array
) -> dict[str, jax.Array]:
    units, varies = _standardised(patches)
    mean_units, mean_varies = _standardised(patches.mean(2))
    all_count = jnp.ones(patches.shape[:3])
    found = {
        "query_cosine": _mean_product(_normalised(patches), all_count),
        "query_cosine_all": _mean_product(_normalised(rows), all_count),
        "query_correlation": _mean_product(units, varies),
        "nmi": _nmi(patches),
        "head_correlation": _mean_product(mean_units, mean_varies)[:, None],
        "head_correlation_per_query": _mean_product(units.swapaxes(1, 2), varies.swapaxes(1, 2)),
        **_sparsity(patches, sorted_patches),
        **{f"{name}_all": x for name, x in _sparsity(rows, sorted_rows).items()},
        "prefix_mass": rows[..., : -patches.shape[-1]].sum(-1).mean(-1),
    }
    return {name: jnp.nanmean(x, axis=1) for name, x in found.items()}


@jax.jit
def _shares(maps: jax.Array) -> jax.Array:
    """Signed maps (N, heads, positions), shifted to a least value of 0, then of sum 1; even where they are constant."""
    _, varies = _standardised(maps)
    shifted = jnp.where(varies[..., None] > 0, maps - maps.min(-1, keepdims=True), 1)
    return shifted / shifted.sum(-1, keepdims=True)


@jax.jit
def _measures_of_shares(maps: jax.Array, shares: jax.Array, sorted_shares: jax.Array) -> dict[str, jax.Array]:
    return {"head_correlation": _mean_product(*_standardised(maps)), **_sparsity(shares, sorted_shares)}


def _normalised(maps: jax.Array) -> jax.Array:
    return maps / jnp.linalg.norm(maps, axis=-1, keepdims=True)


def _standardised(maps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Maps less their means and of norm 1 (constant ones: 0), (..., positions), and which vary: (...) of 0 and 1."""
    deviation = maps - maps.mean(-1, keepdims=True)
    norm = jnp.linalg.norm(deviation, axis=-1)
    varies = norm > _CONSTANT * jnp.linalg.norm(maps, axis=-1)
    return jnp.where(varies[..., None], deviation / norm[..., None], 0), varies.astype(jnp.float32)


def _mean_product(units: jax.Array, counted: jax.Array) -> jax.Array:
    """The mean product of two different vectors, from the norm of their sum: no pair is formed.

    Args:
      units: (..., vectors, positions), of norm 1, or 0 where not counted.
      counted: (..., vectors), 0 or 1.

    Returns:
      (...,); NaN where fewer than two vectors count.
    """
    count = counted.sum(-1)
    squares = jnp.square(units).sum((-2, -1))  # the count, but for rounding
    return (jnp.square(units.sum(-2)).sum(-1) - squares) / (count * (count - 1))


def _entropy(shares: jax.Array) -> jax.Array:
    """-sum p log p over the last axis, in nats."""
    return -jnp.sum(jnp.where(shares > 0, shares * jnp.log(jnp.where(shares > 0, shares, 1)), 0), axis=-1)


def _nmi(maps: jax.Array) -> jax.Array:
    """The mutual information of query and key over the root of their entropies; (..., queries, keys) -> (...,)."""
    keys = _entropy(maps.mean(-2))
    information = keys - _entropy(maps).mean(-1)
    # All queries attend to one key: its entropy is 0 but for rounding.
    return jnp.where(keys > _CONSTANT, information / jnp.sqrt(np.log(maps.shape[-2]) * jnp.abs(keys)), 0)


def _sparsity(shares: jax.Array, ascending: jax.Array) -> dict[str, jax.Array]:
    """Entropy, mass of the largest tenth and Gini's coefficient, means over maps: (..., maps, n) -> (...,) each."""
    n = shares.shape[-1]
    weights = jnp.asarray((2 * np.arange(1, n + 1) - n - 1) / n, jnp.float32)
    found = {
        "entropy": _entropy(shares) / np.log(n),
        "top_mass": ascending[..., n - -(-n // 10) :].sum(-1),
        "gini": (ascending * weights).sum(-1) / shares.sum(-1),
    }
    return {name: x.mean(-1) for name, x in found.items()}


@functools.partial(jax.jit, static_argnums=0)
def intermediates(model: Any, variables: Mapping[str, Any], images: jax.Array) -> dict[str, Any]:
    """What a network sows in "intermediates", its attention or similarity, for images as in `block_measures`."""
    return model.apply(variables, images, mutable=["intermediates"])[1].get("intermediates", {})


def block_measures(model: Any, variables: Mapping[str, Any], images: jax.Array) -> dict[str, dict[str, jax.Array]]:
    """Measures what every block of a network attends to; the attention of the batch stays on the device.

    Args:
      model: a `ViT`, or an `FCViT` with weighted context.
      variables: its variables.
      images: (N, H, W, 3), float, normalised. While they are measured, all blocks' attention takes depth * N * heads *
        T * T * 4 bytes: 0.7 GB for 32 images and vit_base_patch16_224.

    Returns:
      The measures, (N,) float32 each, by block, first blocks first: those of `measures` for "block_0", ...; those of
      `map_measures` for "stages_0_block_0/context1", ..., where maps have more than one position.

    Raises:
      UserError: the network has no attention and no similarity.
    """
    found = {}
    for path, x in jax.tree.leaves_with_path(intermediates(model, variables, images)):
        *_, owner, name = (key.key for key in path[:-1])  # the last is the place among what was sown by this name
        if name == "attention":
            found[owner] = _measures(x, model.prefix)
        elif name == "similarity" and x.shape[1] * x.shape[2] > 1:
            maps = x.reshape(x.shape[0], -1, x.shape[-1]).swapaxes(1, 2)
            found[f"{path[0].key}/{owner}"] = _map_measures(maps)
    if not found:
        raise UserError("This network has neither attention nor a weighted context: there is nothing to measure.")
    return {name: found[name] for name in sorted(found, key=_numbers)}


def _numbers(name: str) -> list[int]:
    """The numbers in a name, by which blocks follow each other: block_2 before block_10."""
    return [int(part) for part in "".join(c if c.isdigit() else " " for c in name).split()]


def summarise(batches: Sequence[Mapping[str, Mapping[str, np.ndarray]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Means and spreads over images.

    Args:
      batches: what `block_measures` gave for each batch, without what does not count, such as padding.

    Returns:
      {block: {measure: {"mean": ..., "std": ...}}}, the standard deviation that of the images; NaN are left out.
    """
    found = {}
    for block, names in batches[0].items():
        values = {
            name: np.concatenate([np.asarray(batch[block][name], np.float64) for batch in batches]) for name in names
        }
        kept = {name: x[~np.isnan(x)] for name, x in values.items()}
        found[block] = {
            name: {"mean": float(x.mean()), "std": float(x.std())} if x.size else {"mean": np.nan, "std": np.nan}
            for name, x in kept.items()
        }
    return found


def table(summary: Mapping[str, Mapping[str, Mapping[str, float]]], names: Sequence[str] = TABLE) -> str:
    """Sets the means and spreads as text, one line a block.

    Args:
      summary: as `summarise` gives it.
      names: of the measures wanted; those that there are not are left out.
    """
    names = [name for name in names if name in next(iter(summary.values()))]
    width = max(len("block"), *map(len, summary))
    lines = [f"{'block':<{width}}  " + "  ".join(f"{name:>17}" for name in names)]
    for block, values in summary.items():
        cells = (f"{values[name]['mean']:.3f} ± {values[name]['std']:.3f}" for name in names)
        lines.append(f"{block:<{width}}  " + "  ".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)
