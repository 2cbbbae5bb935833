"""The weights in what training scripts write: under which key they lie, and which wrappers their names begin with."""

import numbers
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fcvit_jax.errors import UserError, log

# Names of modules that wrap others without being part of the network: DataParallel, torch.compile, FSDP.
_WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Keys and first parts of names that say that weights lie there; earlier ones are preferred.
_PLAIN = ("state_dict", "model_state_dict", "model_state", "model", "module", "network", "net", "student")
_PREFIXES = ("model", "net", "student")
_AVERAGES = re.compile(r"(^|[_.])(ema|swa|avg|averaged?|averages|teacher|shadow)([_.]|$)")
_OTHERS = re.compile(r"optim|sched|scaler|loss|criterion|^amp$|rng")
_DEPTH = 3  # of dicts in dicts in which weights are looked for


def unwrap(
    path: Path, content: Mapping[str, Any], ema: bool | None, is_tensor: Callable[[Any], bool]
) -> dict[str, Any]:
    """Finds a state dict in what a file holds, and takes wrappers off its names.

    Args:
      path: of the file, to be named.
      content: what it holds: a state dict, or dicts with one in them.
      ema: True: the exponential moving averages; False: the plain weights; None: the latter, if there are any.
      is_tensor: whether a value is an array of any kind.

    Returns:
      Tensors by the names that they have in the network itself.

    Raises:
      UserError: there are no such weights, or there are several and no telling which is meant.
    """
    found = dict(_state_dicts(content, is_tensor))
    averages = [key for key in found if _AVERAGES.search(key)]
    plain = [key for key in found if key not in averages]
    first, second = (averages, plain) if ema else (plain, averages)
    key = _choose(path, first or second)
    tensors = {}
    for name, x in (found[key] if key is not None else content).items():
        if is_tensor(x):
            tensors[_WRAPPERS.sub("", name)] = x
        elif key is None or not isinstance(x, numbers.Number | str | Mapping | None):
            raise UserError(f"{path}: {name} is a {type(x).__name__}, not a tensor.")
    tensors, prefix = _without_prefixes(path, tensors, ema)
    source = next((name for name in (key, prefix) if name and _AVERAGES.search(name)), None)
    if ema and source is None:
        raise UserError(f"{path} holds no exponential moving averages (such as state_dict_ema).")
    if source and ema is False:
        raise UserError(f"{path} holds exponential moving averages alone ({source}), no plain weights.")
    if source and ema is None:
        log.warning("%s holds exponential moving averages alone: they are used.", path)
    return tensors


def _state_dicts(
    content: Mapping[str, Any], is_tensor: Callable[[Any], bool], key: str = "", depth: int = 0
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The dicts with tensors of modules, whose names have dots, by their keys, joined by dots; "" is the outermost."""
    if any(is_tensor(x) and "." in str(name) for name, x in content.items()):
        yield key, content
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Mapping) and not _OTHERS.search(name) and depth < _DEPTH:
            yield from _state_dicts(value, is_tensor, f"{key}.{name}" if key else name, depth + 1)


def _choose(path: Path, keys: list[str]) -> str | None:
    """The key that most likely holds the weights; None if there is no key."""

    def rank(key: str) -> int:
        first = key.partition(".")[0]
        return len(_PLAIN) + 1 if not key else _PLAIN.index(first) if first in _PLAIN else len(_PLAIN)

    best = [key for key in keys if rank(key) == min(map(rank, keys))]
    if len(best) > 1:
        raise UserError(f"{path} holds several sets of weights ({', '.join(best)}): save the one that you want alone.")
    return best[0] if best else None


def _without_prefixes(path: Path, tensors: dict[str, Any], ema: bool | None) -> tuple[dict[str, Any], str]:
    """Tensors by names without the parts that say in which object the network lay; and these parts."""
    # What PyTorch's AveragedModel counts says that these are averages.
    taken = ["n_averaged"] if tensors.pop("n_averaged", None) is not None else []
    while True:
        firsts = sorted({name.partition(".")[0] for name in tensors if "." in name})
        averages = [first for first in firsts if _AVERAGES.search(first)]
        plain = [first for first in _PREFIXES if first in firsts]
        chosen = [*averages, *plain] if ema else [*plain, *averages]
        if not chosen:
            return tensors, ".".join(taken)
        inside = {name.partition(".")[2]: x for name, x in tensors.items() if name.startswith(f"{chosen[0]}.")}
        others = [name for name in tensors if name.partition(".")[0] not in chosen]
        if others:
            log.warning("%s: of its weights those under %s are taken, not %s", path, chosen[0], ", ".join(others[:5]))
        tensors = inside
        taken.append(chosen[0])


def is_array(x: Any) -> bool:
    """Whether a value is an array of NumPy's."""
    return isinstance(x, np.ndarray)
