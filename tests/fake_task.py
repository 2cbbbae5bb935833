"""A task that has nothing of an image: the mean of a row of numbers, of which there are four or six."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from fcvit_jax.data.loader import Data

BEST = "r2"


class Numbers:
    """A source of so many examples, whose records are their numbers; one in three is of the second bucket."""

    def __init__(self, count):
        self.buckets = np.arange(count) % 3 // 2

    def __len__(self):
        return len(self.buckets)

    def read(self, indices):
        return indices

    def describe(self, index):
        return f"number {index}"


class Net(nn.Module):
    width: int = 8
    num_classes: int = 0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.width, dtype=self.dtype)(x[..., None])).mean(axis=1)
        return nn.Dense(1, dtype=self.dtype)(x)[:, 0].astype(jnp.float32)


def open_dataset(training=True, *, batch_size, workers=0, num_train=40, num_eval=29):
    train, evaluation = Numbers(num_train), Numbers(num_eval)
    buckets = {"train_buckets": train.buckets, "eval_buckets": evaluation.buckets}
    return Data(load_example, train if training else None, evaluation, (), batch_size, workers, **buckets)


def load_example(data, record, rng):
    x = np.random.default_rng(record).normal(size=(4, 6)[record % 3 // 2])
    y = x.mean()
    return {"x": np.float32(x if rng is None else x + rng.normal(0, 0.1, x.shape)), "y": np.float32(y)}


def create_model(name, num_classes=0, **fields):
    return Net(num_classes=num_classes, **fields)


def model_fields(name):
    return {"width", "num_classes", "dtype"}


def init_variables(model, key, jit=lambda function, *args: jax.jit(function)):
    return jit(model.init, key, jnp.zeros((1, 4)))(key, jnp.zeros((1, 4)))


def make_prepare(model, *, noise):
    return lambda key, batch: {**batch, "x": batch["x"] + noise * jax.random.normal(key, batch["x"].shape)}


def make_optimizer(steps_per_epoch, epochs, batch_size, steps, *, lr):
    return optax.adam(lr), optax.constant_schedule(lr)


def num_epochs(config):
    return config.train.epochs


def loss(model, variables, batch, key):
    error = model.apply(variables, batch["x"]) - batch["y"]
    return jnp.square(error).mean(), ({}, {"largest_error": jnp.abs(error).max()})


def eval_step(model, variables, batch):
    return {"guess": model.apply(variables, batch["x"]), "y": batch["y"], "mask": batch["mask"]}


def finish(outputs, data):
    guess, y = np.concatenate([np.stack([o["guess"], o["y"]])[:, o["mask"]] for o in outputs], axis=1)
    return {"r2": float(1 - np.square(guess - y).sum() / np.square(y - y.mean()).sum()), "count": len(y)}


def describe(result):
    return f"r2 {result['r2']:.3f}"
