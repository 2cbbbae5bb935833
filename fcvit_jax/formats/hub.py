"""Weights and a card in the layout of the Hugging Face hub, and reading them from there or from such a folder.

The layout is `model.safetensors` (the variables by path), `config.json` (the metadata of the checkpoint) and
`README.md` (the card).
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fcvit_jax.errors import UserError, printable
from fcvit_jax.formats import checksums
from fcvit_jax.run.results import parse_object
from fcvit_jax.sizes import describe_size

PREFIX = "hf-hub:"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
_PIPELINES = {"segmentation": "image-segmentation", "detection": "object-detection"}
_MAX_NAMES = 20  # classes that the card lists


def local(source: str | Path) -> str | Path:
    """The path of weights: `hf-hub:owner/name` is downloaded, or taken from the hub's cache; others are as they are.

    `HF_ENDPOINT` names another server. Every wait has a deadline: `HF_HUB_DOWNLOAD_TIMEOUT`, 10 seconds by default.

    Args:
      source: any path, or `hf-hub:owner/name`, or `hf-hub:owner/name@revision`.

    Returns:
      The source itself; for the hub's weights a folder in its cache.

    Raises:
      UserError: the package huggingface_hub is not installed, or the weights cannot be downloaded.
    """
    if not str(source).startswith(PREFIX):
        return source
    name, _, revision = str(source).removeprefix(PREFIX).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{source} is no name on the hub: it must be {PREFIX}OWNER/NAME.")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise UserError(f'To read {source}: pip install "fcvit-jax[hub]", or huggingface_hub.') from error
    try:
        config = Path(hf_hub_download(name, CONFIG, revision=revision or None))
        # The other files of the same commit: the repository may change meanwhile.
        commit = config.parent.name
        hf_hub_download(name, WEIGHTS, revision=commit)
        try:
            hf_hub_download(name, checksums.NAME, revision=commit)
        except LocalEntryNotFoundError:  # which means that the hub was not reached
            raise
        except EntryNotFoundError:
            pass  # others' repositories have none
    # Versions of the package raise the errors of different network libraries.
    except Exception as error:
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise UserError(f"{source} cannot be read: {printable(reason)}") from error
    return config.parent


def is_layout(folder: Path) -> bool:
    """Whether this is a folder with weights in the hub's layout."""
    return (folder / WEIGHTS).is_file()


def read_metadata(folder: Path) -> dict[str, Any] | None:
    """What `config.json` of a folder says of the weights; None if there is none, or it is not of fcvit_jax.

    Raises:
      UserError: it cannot be read.
    """
    path = folder / CONFIG
    try:
        metadata = parse_object(path.read_text())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}.") from error
    if not isinstance(metadata.get("model"), dict):
        return None
    names = metadata.get("class_names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} is damaged: its class_names are no list of names.")
    return metadata


def check(folder: Path) -> None:
    """Compares the weights of a folder with their checksum, where it has one; the rest may be edited.

    Raises:
      UserError: the weights were changed.
    """
    if (folder / checksums.NAME).is_file():
        checksums.check(folder, (WEIGHTS,))


def make(weights: bytes, about: Mapping[str, Any], metadata: Mapping[str, Any], result: str) -> dict[str, bytes]:
    """The files of the layout.

    Args:
      weights: the content of `model.safetensors`.
      about: what the metadata say of the network.
      metadata: all of the checkpoint's.
      result: the last evaluation in a line; "" if there was none.

    Returns:
      Contents by name.
    """
    config = json.dumps(about, indent=2) + "\n"
    return {WEIGHTS: weights, CONFIG: config.encode(), "README.md": _card(metadata, result).encode()}


def _card(metadata: Mapping[str, Any], result: str) -> str:
    """The model card: a header in YAML for the hub, then what is known of the network, in Markdown."""
    task, names = metadata.get("task", "classification"), metadata["class_names"]
    pipeline = _PIPELINES.get(task, "image-classification" if names else "image-feature-extraction")
    about = {
        "Network": f"`{metadata['model']['name']}` (all its arguments are in `{CONFIG}`)",
        "Task": task,
        "Classes": _listed(names),
        "Images": f"{describe_size(metadata['image_size'])} pixels" if task == "classification" else "",
        "Trained on": f"{metadata['num_train']:,} images" if "num_train" in metadata else "",
        "Evaluated on": f"{metadata['num_eval']:,} images" if "num_eval" in metadata else "",
        "Last evaluation": result,
    }
    lines = "\n".join(f"- {key}: {value}" for key, value in about.items() if value)
    return _TEMPLATE.format(pipeline=pipeline, name=metadata["model"]["name"], about=lines)


def _listed(names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(f"`{printable(name).replace('`', '')}`" for name in names[:_MAX_NAMES])
    return f"{len(names)}: {shown}" + (f", ... (all are in `{CONFIG}`)" if len(names) > _MAX_NAMES else "")


_TEMPLATE = """---
library_name: fcvit-jax
license: unknown
pipeline_tag: {pipeline}
tags:
- jax
- flax
- vision
---

# {name}

{about}

Before you publish these weights, replace `license: unknown` above by the licence that you give them, and say here on
which data they were trained.

## Use

With the packages `fcvit-jax` and `huggingface_hub`; a folder with these files works in place of `hf-hub:OWNER/NAME`.

```bash
python -m fcvit_jax.predict --checkpoint hf-hub:OWNER/NAME photos/
```

```python
from fcvit_jax import predict

model, variables, metadata = predict.load("hf-hub:OWNER/NAME")  # variables for model.apply
```
"""
