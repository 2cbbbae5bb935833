"""What several test files use: a small checkpoint, a training state, and what tools print and draw."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from fcvit_jax.devices.sharding import state_shardings
from fcvit_jax.networks.fcvit import abstract_variables, create_model
from fcvit_jax.networks.normalize import normalize
from fcvit_jax.run.checkpoint import Checkpointer, save_variables
from fcvit_jax.run.state import TrainState

# Uses what `export` has written, by JAX alone.
ELSEWHERE = """
import json, sys
import jax, numpy
program = jax.export.deserialize(open("out/model.jax_export", "rb").read())
about = json.load(open("out/model.json"))
images = numpy.load("images.npy")
assert images.shape[1] == images.shape[2] == about["image_size"]
numpy.savez("logits.npz", one=program.call(images[:1]), all=program.call(images))
assert not {"fcvit_jax", "flax", "orbax"} & set(sys.modules), "not by JAX alone"
"""


TINY = {
    "name": "fcvit_tiny",
    "num_classes": 3,
    "depths": [1, 0, 0, 1],
    "dims": [16, 16, 16, 32],
    "mlp_ratios": [2, 1, 1, 1],
    "kernel_sizes": [3, 5],
    "bn_group_size": 64,
}
METADATA = {"model": TINY, "class_names": ["ant", "bee", "cat"], "image_size": 40, "crop_pct": 0.8}


def tiny_variables(seed=0, **options):
    """Random variables, of which scales and variances are near 1: a fresh block would change nothing."""
    model = create_model(**TINY | options)
    shapes = abstract_variables(model)
    rng = np.random.default_rng(seed)

    def values(path, leaf):
        name = path[-1].key
        x = rng.normal(0, 0.1 if name in ("bias", "mean") else 0.3, leaf.shape)
        return (np.exp(x) if name == "var" else x + 1 if "scale" in name else x).astype(np.float32)

    return jax.tree_util.tree_map_with_path(values, shapes)


def save_tiny(path):
    """Writes a small checkpoint to a new folder."""
    save_variables(path, tiny_variables(), METADATA)
    return path


def save_images(folder, count, seed=0):
    """Writes PNG images of different sizes with smooth random content."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
        small.resize((60 + 9 * i, 50), Image.BICUBIC).save(path)
    return paths


def exit_of(main, *argv):
    """What a tool exits with: a status, or the message that it dies with."""
    with pytest.raises(SystemExit) as exit:
        main([str(arg) for arg in argv])
    return exit.value.code


def expected_logits(images):
    """Of the tiny checkpoint for uint8 images."""
    return np.asarray(jax.jit(create_model(**TINY).apply)(tiny_variables(), normalize(images)))


def said(caplog):
    """What `convert` logged: Orbax has a warning of its own."""
    return [r.getMessage() for r in caplog.records if Path(r.pathname).parent.name == "convert"]


def assert_nothing_is_cut_off(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box = figure.get_tightbbox(canvas.get_renderer())
    width, height = figure.get_size_inches()
    assert min(box.x0, box.y0) >= 0 and box.x1 <= width and box.y1 <= height, box


def make_state(mesh, step, seed=0):
    """A small training state with averages, whose values are those of the seed."""
    rng = np.random.default_rng(seed)
    params = {"a": {"kernel": rng.normal(size=(40, 64)), "bias": rng.normal(size=7)}}
    params = jax.tree.map(jnp.float32, params)
    batch_stats = {"norm": {"mean": jnp.float32(rng.normal(size=3))}}
    state = TrainState(
        step=jnp.int32(step),
        variables={"params": params, "batch_stats": batch_stats},
        opt_state=jax.tree.map(lambda x: x + jnp.ones_like(x), optax.adamw(1e-3).init(params)),
        ema=jax.tree.map(lambda x: 2 * x, {"params": params, "batch_stats": batch_stats}),
    )
    return jax.device_put(state, state_shardings(state, mesh))


def save_states(workdir, states, metadata):
    """Writes a checkpoint of each state, and returns the folder."""
    checkpointer = Checkpointer(workdir)
    for state in states:
        checkpointer.save(state, metadata)
    checkpointer.wait()
    checkpointer.close()
    return workdir


def abstract(state, mesh):
    """The shapes, dtypes and shardings of a state."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, state_shardings(state, mesh)
    )


def restore(workdir, state, mesh):
    """What a run would start from that has such a state."""
    checkpointer = Checkpointer(workdir)
    try:
        return checkpointer.restore(abstract(state, mesh))
    finally:
        checkpointer.close()


def contents(folder):
    """All files with what is in them, and all folders."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
