"""Shared by the benchmarks: the training step, timing in turns, and a description of the machine."""

import argparse
import json
import platform
import time
from importlib.metadata import PackageNotFoundError, version

import jax
import jax.numpy as jnp
import numpy as np

from fcvit_jax.devices.cpu import tune_cpu
from fcvit_jax.devices.sharding import batch_sharding
from fcvit_jax.run.state import abstract_state, create_state, init_variables
from fcvit_jax.run.step import train_step
from fcvit_jax.tasks import classification, segmentation

tune_cpu()  # as main.py does

ITEM_BYTES = {"pred": 1, "u8": 1, "bf16": 2, "f32": 4, "s32": 4, "u32": 4}  # of the arrays in a program's text


def make_parser(description):
    """The command line that all benchmarks of the network have; `report` takes its arguments."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="PATH", help="write the figures, versions and machine here as well")
    return parser


def report(args, rows, **figures):
    """Writes the figures and the arguments of the benchmark, if --json is given."""
    if args.json:
        with open(args.json, "w") as file:
            json.dump({**figures, **vars(args), "rows": rows}, file, indent=1)


def repeated(call, wait=jax.block_until_ready):
    """A contestant: it makes several calls, which may return before their work is done, and waits for the last."""

    def run(calls):
        for _ in range(calls):
            result = call()
        wait(result)

    return run


def milliseconds(contestants, seconds):
    """[best, median] per call of each contestant, in turns: at least three each, until their seconds or 200 are over.

    On an accelerator a turn is ten calls before one wait: it works while the host prepares the next, as in training.
    """
    times = {name: [] for name in contestants}
    calls = 1 if jax.default_backend() == "cpu" else 10
    for run in contestants.values():
        run(1)
    for _ in range(200):
        for name, run in contestants.items():
            if len(times[name]) < 3 or calls * sum(times[name]) < 1e3 * seconds:
                start = time.perf_counter()
                run(calls)
                times[name].append(1e3 * (time.perf_counter() - start) / calls)
    return {name: [min(values), float(np.median(values))] for name, values in times.items()}


class Step:
    """The training step of a task's recipe, with drop-path, mixing, erasing and AdamW, for a variant and a mesh."""

    def __init__(self, name, batch_size, image_size, dtype, mesh, group_size=None, task=classification):
        self.task, self.mesh, self.image_size = task, mesh, image_size
        self.model = task.create_model(name, drop_path_rate=0.1, bn_group_size=group_size, dtype=jnp.dtype(dtype))
        self.tx, schedule = task.make_optimizer(1251, 300, batch_size, 300 * 1251)
        options = {"group_size": group_size or batch_size} if task is classification else {}
        self.static = {
            "model": self.model,
            "tx": self.tx,
            "schedule": schedule,
            "prepare": task.make_prepare(self.model, **options),
            "loss": task.loss,
            "group_size": group_size,
            "mesh": mesh,
        }
        images = (batch_size, image_size, image_size, 3)
        self.batch_shapes = {"image": (images, np.uint8), "label": ((batch_size,), np.int32)}
        if task is segmentation:
            self.batch_shapes |= {"label": (images[:3], np.uint8), "size": ((batch_size, 2), np.int32)}

    def abstract_state(self):
        return abstract_state(self.task.init_variables, self.model, self.tx, self.mesh, ema=False)

    def create_state(self):
        variables = init_variables(self.task.init_variables, self.model, self.mesh, seed=0)
        return create_state(variables, self.tx, self.abstract_state())

    def lower(self):
        rows = batch_sharding(self.mesh)
        batch = {name: jax.ShapeDtypeStruct(*shape, sharding=rows) for name, shape in self.batch_shapes.items()}
        return train_step.lower(self.abstract_state(), batch, jax.random.key(0), **self.static)

    def example_batch(self):
        """Noise, as NumPy arrays by name."""
        rng = np.random.default_rng(0)
        ends = {"image": (0, 256), "label": (0, self.model.num_classes), "size": (self.image_size, self.image_size + 1)}
        return {name: rng.integers(*ends[name], *shape) for name, shape in self.batch_shapes.items()}

    def runner(self, compiled):
        """A contestant that takes steps, from a state of its own."""
        state, key = self.create_state(), jax.random.key(0)
        batch = jax.device_put(self.example_batch(), batch_sharding(self.mesh))

        def step():
            nonlocal state
            state, metrics = compiled(state, batch, key)
            return metrics

        return repeated(step)


def about():
    """The machine and the versions that the figures are from."""
    versions = {}
    for package in ("jax", "torch", "timm"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {"device": jax.devices()[0].device_kind, "machine": platform.processor() or platform.machine(), **versions}
