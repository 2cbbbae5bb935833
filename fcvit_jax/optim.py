"""Learning-rate schedules, AdamW with the recipe's rules of weight decay, and the moving average of the weights."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fcvit_jax.errors import UserError, check_range
from fcvit_jax.freezing import freeze as freeze_under


def make_schedule(
    base_lr: float = 1e-3,
    steps_per_epoch: int = 1251,
    epochs: int = 300,
    warmup_epochs: int = 5,
    warmup_lr: float = 1e-6,
    min_lr: float = 1e-6,
    cooldown_epochs: int = 10,
    per_step: bool = False,
) -> optax.Schedule:
    """Makes the learning rate as a function of the step: a linear warm-up, a cosine, and a constant at the end.

    By default the rate is constant within an epoch, as in the original: in epoch e, counted from 0, it is

        e < warmup_epochs:  warmup_lr + (base_lr - warmup_lr) * e / warmup_epochs
        e < epochs:         min_lr + (base_lr - min_lr) * (1 + cos(pi * e / epochs)) / 2
        later:              min_lr

    The cosine begins at epoch 0, not after the warm-up, so the rate never reaches base_lr. With `per_step` the rate is
    continuous and reaches base_lr. At step s, with w = warmup_epochs * steps_per_epoch and
    n = epochs * steps_per_epoch, it is

        s < w:              warmup_lr + (base_lr - warmup_lr) * s / w
        s < n:              min_lr + (base_lr - min_lr) * (1 + cos(pi * (s - w) / (n - w))) / 2
        later:              min_lr

    Both are within a relative 1e-6 of these values, in float32 and under `jax.jit`.

    Example::

        schedule = make_schedule(steps_per_epoch=1251)
        schedule(1251 * 100)                                # 7.5025e-4, the rate in epoch 100

    Args:
      base_lr: the rate that the warm-up leads to.
      steps_per_epoch: updates in an epoch.
      epochs: epochs until the cosine ends, including the warm-up.
      warmup_epochs: epochs of warm-up.
      warmup_lr: rate of the first step.
      min_lr: rate at the end of the cosine.
      cooldown_epochs: epochs at min_lr after the cosine. After the last epoch the rate stays as it is.
      per_step: change the rate at every step.

    Raises:
      UserError: a value is out of its range, or the warm-up is longer than `epochs`.
    """
    check_range("optim", 1, steps_per_epoch=steps_per_epoch, epochs=epochs)
    check_range("optim", 0, base_lr=base_lr, warmup_lr=warmup_lr, min_lr=min_lr)
    check_range("optim", 0, warmup_epochs=warmup_epochs, cooldown_epochs=cooldown_epochs)
    if warmup_epochs > epochs:
        raise UserError(f"optim.warmup_epochs={warmup_epochs} is more than the {epochs} epochs of the run; lower it.")

    if per_step:
        warmup_steps, steps = warmup_epochs * steps_per_epoch, epochs * steps_per_epoch

        def schedule(step):
            warmup = warmup_lr + (base_lr - warmup_lr) * (step / max(warmup_steps, 1))
            # Written as sin(x)^2, which equals (1 + cos(pi - 2x)) / 2 and keeps its precision near the end.
            left = jnp.maximum(steps - step, 0) / max(steps - warmup_steps, 1)
            cosine = min_lr + (base_lr - min_lr) * jnp.sin(jnp.pi / 2 * left) ** 2
            return jnp.where(step < warmup_steps, warmup, cosine)

        return schedule

    epoch = np.arange(epochs + cooldown_epochs)
    warmup = warmup_lr + (base_lr - warmup_lr) * epoch / max(warmup_epochs, 1)
    cosine = min_lr + (base_lr - min_lr) * (1 + np.cos(np.pi * np.minimum(epoch / epochs, 1))) / 2
    rates = np.where(epoch < warmup_epochs, warmup, cosine).astype(np.float32)
    return lambda step: jnp.asarray(rates)[jnp.int32(jnp.minimum(step // steps_per_epoch, len(rates) - 1))]


def make_poly_schedule(base_lr: float = 2e-4, steps: int = 40_000, power: float = 0.9) -> optax.Schedule:
    """Makes segmentation's learning rate as a function of the step: a polynomial that falls to 0, without warm-up.

    At step s it is base_lr * (1 - s / steps) ** power, within a relative 1e-6, in float32 and under `jax.jit`. Later
    it is 0.

    Example::

        schedule = make_poly_schedule()
        schedule(20_000)                                    # 1.0718e-4

    Args:
      base_lr: the rate of the first step.
      steps: updates of the whole run.
      power: 1 makes the rate fall linearly.

    Raises:
      UserError: a value is out of its range.
    """
    check_range("optim", 0, base_lr=base_lr, power=power)
    check_range("optim", 1, steps=steps)
    # 1 - step / steps would lose precision near the end.
    return lambda step: base_lr * (jnp.maximum(steps - step, 0) / steps) ** power


def make_step_schedule(
    base_lr: float = 2e-4,
    steps_per_epoch: int = 3665,
    decay_epochs: Sequence[int] = (8, 11),
    warmup_steps: int = 500,
    warmup_factor: float = 1e-3,
) -> optax.Schedule:
    """Makes detection's learning rate as a function of the step: a tenth from each of some epochs on, after a warm-up.

    At step s of epoch e, counted from 0, it is

        base_lr * 0.1 ** (number of decay_epochs that are at most e) * (warmup_factor + (1 - warmup_factor) * s / w)

    with w = warmup_steps; the last factor is 1 from step w on. Within a relative 1e-6, in float32 and under `jax.jit`.

    Example::

        schedule = make_step_schedule()
        schedule(249)                                       # 9.97e-5

    Args:
      base_lr: the rate after the warm-up.
      steps_per_epoch: updates in an epoch.
      decay_epochs: from which epochs on the rate is a tenth of what it was; as many as there are.
      warmup_steps: updates over which the rate rises; 0: none.
      warmup_factor: share of the rate at the first step.

    Raises:
      UserError: a value is out of its range.
    """
    check_range("optim", 0, base_lr=base_lr, warmup_steps=warmup_steps, warmup_factor=warmup_factor)
    check_range("optim", 1, steps_per_epoch=steps_per_epoch)
    if any(epoch < 1 for epoch in decay_epochs) or list(decay_epochs) != sorted(set(decay_epochs)):
        raise UserError(f"optim.decay_epochs={tuple(decay_epochs)} must be rising numbers of epochs, such as (8, 11).")
    decays = np.array(decay_epochs, np.int32) * steps_per_epoch

    def schedule(step):
        step = jnp.asarray(step)
        decayed = base_lr * 0.1 ** (step[..., None] >= decays).sum(-1)
        warmup = warmup_factor + (1 - warmup_factor) * step / max(warmup_steps, 1)
        return decayed * jnp.where(step < warmup_steps, warmup, 1)

    return schedule


def make_optimizer(
    steps_per_epoch: int = 1251,
    epochs: int = 300,
    batch_size: int = 1024,
    steps: int | None = None,
    *,
    lr: float = 1e-3,
    lr_batch_size: int | None = 1024,
    weight_decay: float = 0.05,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    warmup_epochs: int = 5,
    warmup_lr: float = 1e-6,
    min_lr: float = 1e-6,
    cooldown_epochs: int = 10,
    per_step: bool = False,
    clip_norm: float | None = None,
    head_lr_multiplier: float = 1.0,
    freeze: Sequence[str] = (),
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Makes AdamW and its schedule. The rate `lr` is for `lr_batch_size` images and is scaled to the batch.

    Weight decay is decoupled and is multiplied by the current rate. It acts on parameters of two or more dimensions. It
    does not act on biases, layer scales, the affine parameters of norms and contexts, or a ViT's tokens and position
    embedding.

    Example::

        tx, schedule = make_optimizer(steps_per_epoch=1251, epochs=300, batch_size=1024)     # ImageNet's, the defaults
        state = tx.init(params)

    Args:
      steps_per_epoch: updates in an epoch.
      epochs: epochs until the cosine ends; the run is `cooldown_epochs` longer.
      batch_size: images in an update, over all devices.
      steps: updates of the whole run. It is ignored: a run that stops early has the schedule of the whole run.
      lr: learning rate at the top of the schedule, for `lr_batch_size` images.
      lr_batch_size: the rate used is lr * batch_size / lr_batch_size; None or 0: lr itself.
      weight_decay: an update subtracts the rate times this times the weight.
      b1, b2: decay of the first and second moments.
      eps: added to the root of the second moment.
      warmup_epochs, warmup_lr, min_lr, cooldown_epochs, per_step: as in `make_schedule`; these rates are not scaled.
      clip_norm: the largest global norm of the gradients; None or 0: no clipping.
      head_lr_multiplier: factor on the updates of the parameters under "head", including their decay.
      freeze: paths of parameters that are not trained, see `freezing.frozen`.

    Returns:
      The gradient transformation, and the schedule (step -> rate, float32).

    Raises:
      UserError: a value is out of its range; `init` raises it if `head_lr_multiplier` is set and there is no "head",
        and as `freezing.freeze`.
    """
    del steps
    check_range("optim", 0, lr=lr, weight_decay=weight_decay, head_lr_multiplier=head_lr_multiplier)
    check_range("optim", 1e-30, eps=eps)  # with 0, the update of a parameter without gradient is 0 / 0
    optional = {"lr_batch_size": lr_batch_size, "clip_norm": clip_norm}
    check_range("optim", 0, **{key: value for key, value in optional.items() if value is not None})
    check_range("optim", 0, below=1, b1=b1, b2=b2)
    base_lr = scale_lr(lr, lr_batch_size, batch_size)
    for name, value in {"warmup_lr": warmup_lr, "min_lr": min_lr}.items():
        if value > base_lr:
            raise UserError(
                f"optim.{name}={value} is above the learning rate, {base_lr:.3g} for {batch_size} images; lower it."
            )

    schedule = make_schedule(
        base_lr, steps_per_epoch, epochs, warmup_epochs, warmup_lr, min_lr, cooldown_epochs, per_step
    )
    parts = [
        # The optimiser's state is the same with and without clipping, so that a run may switch it on.
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        optax.adamw(schedule, b1, b2, eps, weight_decay=weight_decay, mask=decay_mask),
    ]
    if head_lr_multiplier != 1:
        parts.append(optax.masked(optax.scale(head_lr_multiplier), _in_head))
    return freeze_under(optax.chain(*parts), freeze), schedule


def adamw_for_all(
    schedule: optax.Schedule, weight_decay: float, b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
    """Makes AdamW that decays every parameter, as segmentation and detection have it.

    Args:
      schedule: step -> rate.
      weight_decay: an update removes this share of every parameter, times the rate: of norms, biases and scales too.
      b1, b2: decay of the first and second moments.
      eps: added to the root of the second moment.

    Raises:
      UserError: a value is out of its range.
    """
    check_range("optim", 0, weight_decay=weight_decay)
    check_range("optim", 1e-30, eps=eps)  # with 0, a parameter without gradient becomes 0 / 0
    check_range("optim", 0, below=1, b1=b1, b2=b2)
    return optax.adamw(schedule, b1, b2, eps, weight_decay=weight_decay)


def scale_lr(lr: float, lr_batch_size: int | None, batch_size: int) -> float:
    """Scales a rate for `lr_batch_size` images per update to `batch_size` images; None or 0: returns it as it is."""
    return lr * batch_size / lr_batch_size if lr_batch_size else lr


def decay_mask(params: Any) -> Any:
    """Which parameters decay: those of two or more dimensions that are no biases and no positions.

    DeiT and timm spare the position embedding of a ViT, and its tokens, which have one dimension here.

    Args:
      params: a tree of arrays.

    Returns:
      A tree of bool like `params`.
    """
    spared = ("bias", "pos_embed")
    return jax.tree.map_with_path(
        lambda path, p: p.ndim > 1 and not jax.tree_util.keystr(path, simple=True).endswith(spared), params
    )


def update_ema(ema: Any, new: Any, decay: float, updates: jax.Array | None = None) -> Any:
    """Updates an exponential moving average, as the original does without warm-up or bias correction.

    Args:
      ema: a pytree of float32 arrays.
      new: a pytree of arrays like `ema`, of any float dtype.
      decay: weight of the old average.
      updates: how many there were before. None: no warm-up. Otherwise the decay is min(decay, (1 + updates) /
        (10 + updates)), as in TensorFlow and timm: 0.1 at first, and 0.9998 only after 45,000 updates. So the average
        of a short run is not mostly of its first weights.

    Returns:
      decay * ema + (1 - decay) * new, float32.
    """
    share = 1 - decay if updates is None else jnp.maximum(1 - decay, 9 / (10 + updates))
    return optax.incremental_update(optax.tree.cast(new, jnp.float32), ema, share)


def _in_head(params: dict[str, Any]) -> dict[str, bool]:
    if "head" not in params:
        raise UserError("optim.head_lr_multiplier is set, but the model has no parameters under 'head'; leave it at 1.")
    return {name: name == "head" for name in params}
