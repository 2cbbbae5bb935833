"""Weights of the PyTorch original <-> our variables, and the files that hold either.

As a tool, `python -m fcvit_jax.convert SOURCE DEST [--ema]`; see `convert`.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from fcvit_jax.convert.files import METADATA, import_torch, read, read_metadata, write_whole
from fcvit_jax.convert.pretrained import load_pretrained
from fcvit_jax.convert.weights import FAMILIES, Network, fields_of, fit, from_torch, infer, kind_of, to_torch
from fcvit_jax.devices.storage import as_path, local_path
from fcvit_jax.errors import UserError, log
from fcvit_jax.networks.fcvit import with_fields
from fcvit_jax.networks.vit import ViT

__all__ = ["METADATA", "convert", "from_torch", "load_network", "load_pretrained", "read_metadata", "to_torch"]


def load_network(
    source: str | Path, *, ema: bool | None = None, name: str | None = None
) -> tuple[Network, dict[str, Any], dict[str, Any]]:
    """Loads the network that a file holds weights of, whoever wrote it.

    Example::

        model, variables, metadata = load_network("vit_base.safetensors", name="vit_base_patch16_224")

    Args:
      source, ema: as in `load_pretrained`.
      name: of the variant, for what no shape tells: ViT and DeiT differ in the mean of their images alone.

    Returns:
      The network that the file names or that is inferred from the shapes; its variables, float32 NumPy arrays; and what
      the file says of itself, with "model", the arguments of the function that makes the network.

    Raises:
      UserError: the source cannot be read, holds another network, or there is no variant of this name.
    """
    weights, metadata = read(as_path(source), ema)
    if "model" in metadata:
        try:
            model = FAMILIES[kind_of(weights)].create(**metadata["model"])
        except TypeError as error:
            raise UserError(f"{source} does not say which network it holds: {error}") from error
    else:
        model = infer(weights)
        if len(metadata.get("class_names", ())) != getattr(model, "num_classes", 0):  # those of other data
            metadata.pop("class_names", None)
        if name is not None:
            model = FAMILIES[type(model)].create(name, num_classes=model.num_classes)
        # Distillation is DeiT's, and layer scales are DINOv2's, which has DeiT's mean.
        elif isinstance(model, ViT) and not model.distilled and model.layer_scale_init is None:
            log.warning(
                "%s does not say the mean of its images: that of DeiT is taken; name the variant if it is a ViT.",
                source,
            )
    # In float32, in which a run evaluates its averages, whatever the dtype of its parameters.
    variables = fit(weights, with_fields(model, param_dtype=np.float32))
    task = FAMILIES[type(model)].task
    about = {"model": _arguments(model)} | ({} if task == "classification" else {"task": task})
    return model, variables, about | metadata


def convert(source: str | Path, dest: str | Path, *, ema: bool | None = None, name: str | None = None) -> None:
    """Converts a file of weights; the network is the one that the file names, or is inferred from the shapes.

    Nothing is written on an error.

    Args:
      source: as in `load_pretrained`.
      dest: the file's ending chooses its format: .pth or .pt (a state dict), .pth.tar ({"state_dict": ...}), .npz
        (arrays by our paths, "params/stem/conv/kernel", float32); otherwise a new folder for an Orbax checkpoint. The
        latter two carry metadata: "model", the arguments of the function that makes the network, "task" for a
        segmenter, and any that the source has.
      ema: as in `load_pretrained`.
      name: as in `load_network`.

    Raises:
      UserError: the source cannot be read or holds another network, or the destination cannot be written.
    """
    dest = local_path(dest)
    model, variables, metadata = load_network(source, ema=ema, name=name)
    ending = dest.name.lower()
    if ending.endswith((".pt", ".pth", ".pth.tar")):
        torch = import_torch()
        state_dict = {key: torch.from_numpy(x) for key, x in to_torch(variables, model).items()}
        content = io.BytesIO()  # torch hides the system's error where it cannot write
        torch.save({"state_dict": state_dict} if ending.endswith(".tar") else state_dict, content)
        write_whole(dest, lambda file: file.write(content.getbuffer()))
    elif ending.endswith(".npz"):
        arrays = traverse_util.flatten_dict(variables, sep="/")
        write_whole(dest, lambda file: np.savez(file, **arrays, **{METADATA: json.dumps(metadata)}))
    elif dest.suffix.lower() in (".safetensors", ".ckpt", ".bin", ".tar", ".gz", ".zip", ".h5"):
        raise UserError(f"{dest}: the ending must be .pth, .pt, .pth.tar or .npz, or none for a folder.")
    else:
        from fcvit_jax.run import checkpoint

        checkpoint.save_variables(dest, variables, metadata)


def _arguments(model: Network) -> dict[str, Any]:
    """The arguments of the function that makes the model, as JSON can hold them: the nearest variant and the rest."""
    fields = fields_of(model)

    def changed(variant: str) -> dict[str, Any]:
        usual = fields_of(FAMILIES[type(model)].create(variant))
        return {name: x for name, x in fields.items() if x != usual[name]}

    nearest = min(FAMILIES[type(model)].variants, key=lambda variant: len(changed(variant)))
    return {"name": nearest} | changed(nearest)
