"""The training step, and the loop around it from a config to the last evaluation."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fcvit_jax import optim
from fcvit_jax.augment import mixing
from fcvit_jax.convert import load_pretrained, read_metadata
from fcvit_jax.data.loader import Data, eval_batches, open_dataset, train_batches
from fcvit_jax.devices.hosts import Feed, StopSignal, failing_together, say
from fcvit_jax.devices.sharding import MIN_SHARDED_SIZE, batch_sharding, global_batch, make_mesh, state_shardings
from fcvit_jax.errors import UserError
from fcvit_jax.evaluate import evaluate
from fcvit_jax.networks.fcvit import FCViT, create_model, create_saved
from fcvit_jax.run.checkpoint import Checkpointer, find_step, load_metadata, local_path
from fcvit_jax.run.config import (
    check_config,
    check_data,
    check_hosts,
    check_sizes,
    check_workdir,
    class_changes,
    write_config,
)
from fcvit_jax.run.record import (
    MetricsWriter,
    Progress,
    describe_accuracy,
    describe_end,
    describe_evaluation,
    describe_run,
)
from fcvit_jax.run.state import TrainState, abstract_state, create_state, init_variables

# The same for the same config, so that a second run of a process need not trace its step again.
_make_optimizer, _make_mix = functools.cache(optim.make_optimizer), functools.cache(mixing.make)
_NO_BEST = {"step": 0, "top1": -1.0}  # worse than any


@functools.partial(
    jax.jit,
    static_argnames=("model", "tx", "schedule", "mix", "mesh", "ema_decay", "accumulate"),
    donate_argnames="state",
)
def train_step(
    state: TrainState,
    batch: Mapping[str, jax.Array],
    key: jax.Array,
    *,
    model: FCViT,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    mix: Callable,
    mesh: Mesh,
    ema_decay: float | None = None,
    accumulate: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the weights.

    Args:
      state: the training state; its buffers are reused.
      batch: "image" (N, H, W, 3) uint8 and "label" (N,) int32, sharded over the mesh.
      key: the run's random key; the step is folded in here.
      model: the network.
      tx: the optimiser.
      schedule: its learning rate, step -> rate, to be reported.
      mix: (key, images, labels) -> (images float32, targets (N, num_classes) float32), as `mixing.make` makes it.
      mesh: the devices.
      ema_decay: decay of the moving averages, where the state holds them.
      accumulate: parts of the batch that go through the network one after the other, to save memory.

    Returns:
      The new state, and float32 scalars: "loss", "grad_norm" (before clipping), and "lr".
    """
    mix_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
    images, targets = mix(mix_key, batch["image"], batch["label"])

    params = state.params
    if mesh.size > 1:
        # XLA for GPUs would fuse a weight's update with its use by the backward pass, which then waits for the devices
        # to sum that weight's gradient: layer by layer, instead of all gradients at once.
        params = jax.lax.optimization_barrier(params)

    def loss_fn(params, images, targets, key):
        variables = {"params": params, "batch_stats": state.batch_stats}
        network = model.clone(share_blocks=True)
        logits, updates = network.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": key})
        return optax.softmax_cross_entropy(logits, targets).mean(), updates["batch_stats"]

    def one_part(images, targets, key):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # for the depthwise convolutions
            return jax.value_and_grad(loss_fn, has_aux=True)(params, images, targets, key)

    if accumulate == 1:
        (loss, batch_stats), grads = one_part(images, targets, dropout_key)
    else:
        # Each part takes whole BatchNorm groups: from every device its own, where it has enough of them.
        unit = model.bn_group_size or 1
        parts = [
            x.reshape(-1, accumulate, unit, *x.shape[1:]).swapaxes(0, 1).reshape(accumulate, -1, *x.shape[1:])
            for x in (images, targets)
        ]
        # Otherwise XLA would split the axis of the parts over the devices, and each would compute every part whole.
        parts = jax.lax.with_sharding_constraint(parts, batch_sharding(mesh, axis=1))
        keys = jax.random.split(dropout_key, accumulate)
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(one_part, images, targets, keys[0]))
        sums, _ = jax.lax.scan(
            lambda total, part: (jax.tree.map(jnp.add, total, one_part(*part)), None), zeros, (*parts, keys)
        )
        # All parts start from the same running statistics, so that their mean is what one large batch gives.
        (loss, batch_stats), grads = jax.tree.map(lambda x: x / accumulate, sums)

    # Sharded like the state that they update; otherwise fsdp would gather them once more, for their norm.
    grads = jax.lax.with_sharding_constraint(grads, state_shardings(grads, mesh))
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        ema = optim.update_ema(ema, {"params": params, "batch_stats": batch_stats}, ema_decay)
    state = TrainState(step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state, ema=ema)
    state = jax.lax.with_sharding_constraint(state, state_shardings(state, mesh))
    return state, {"loss": loss, "grad_norm": _global_norm(grads), "lr": schedule(state.step - 1)}


def _global_norm(grads: Any) -> jax.Array:
    """The root of the sum of all squares, () float32."""
    leaves = [g.astype(jnp.float32) for g in jax.tree.leaves(grads)]
    # Those that fsdp does not split are joined first, since XLA takes long to compile hundreds of sums.
    small = jnp.concatenate([jnp.zeros(1), *(g.ravel() for g in leaves if g.size < MIN_SHARDED_SIZE)])
    large = [g for g in leaves if g.size >= MIN_SHARDED_SIZE]
    return jnp.sqrt(jnp.stack([jnp.square(g).sum() for g in (small, *large)]).sum())


@contextmanager
def _kept_programs(folder: Path) -> Iterator[None]:
    """Has JAX keep compiled programs in a folder; afterwards, where it did before."""

    def use(path: str | None) -> None:
        jax.config.update("jax_compilation_cache_dir", path)
        compilation_cache.reset_cache()  # else JAX stays with the folder that it has

    before = jax.config.jax_compilation_cache_dir
    use(str(folder))
    try:
        yield
    finally:
        use(before)


def train_and_evaluate(config: ConfigDict, workdir: str | Path) -> dict[str, float]:
    """Trains a model, or resumes its training, and evaluates it every few epochs.

    Example::

        config = configs.digits.get_config()
        metrics = fcvit_jax.train_and_evaluate(config, "runs/digits")
        metrics["top1"]

    Args:
      config: as `configs/imagenet.py` lists it, key by key.
      workdir: the run's folder: config.json, metrics.jsonl, tensorboard/, checkpoints/, best/.

    Returns:
      "loss", "top1", "top5" (fractions) and "count" of the last evaluation; empty where there was none yet.

    Raises:
      UserError: the config, the data or the folder is not usable, or the run cannot go on; the message says why.
    """
    with failing_together():
        check_config(config)
        data = open_dataset(**config.data)
        mesh = make_mesh(**config.mesh)
        model = create_model(**config.model)
        tx, schedule = _make_optimizer(data.steps_per_epoch, config.train.epochs, data.batch_size, **config.optim)
        mix = _make_mix(model.num_classes, **config.mixing)
        check_sizes(data, mesh, model, config.train.accumulate)
        size, rows = (data.batch_size, data.image_size, data.image_size, 3), batch_sharding(mesh)
        images = jax.ShapeDtypeStruct(size, jnp.uint8, sharding=rows)
        labels = jax.ShapeDtypeStruct(size[:1], jnp.int32, sharding=rows)
        jax.eval_shape(mix, jax.random.key(0), images, labels)  # raises where the batch is no whole number of groups
        workdir = local_path(workdir)
        check_workdir(config, workdir)
    check_hosts(config, data)

    ema_decay = config.train.ema_decay
    abstract = abstract_state(model, tx, mesh, ema=ema_decay is not None)
    epochs = config.train.epochs + config.optim.cooldown_epochs
    total = epochs * data.steps_per_epoch if config.train.steps is None else config.train.steps
    eval_steps = config.train.eval_every * data.steps_per_epoch
    key, parts = jax.random.key(config.seed), config.train.accumulate
    fixed = dict(model=model, tx=tx, schedule=schedule, mix=mix, mesh=mesh, ema_decay=ema_decay, accumulate=parts)
    about = {
        "model": config.model.to_dict(),
        "class_names": list(data.class_names),
        "num_train": data.num_train,
        "num_eval": data.num_eval,
        "image_size": data.image_size,
        "crop_pct": data.crop_pct,
    }

    with ExitStack() as stack:
        checkpointer = stack.enter_context(closing(Checkpointer(workdir, **config.checkpoint)))
        if config.compilation_cache and jax.config.jax_compilation_cache_dir is None:
            stack.enter_context(_kept_programs(workdir / "compilation_cache"))
        say(describe_run(config, data, mesh, model, abstract, schedule, total))
        if restored := checkpointer.restore(abstract):
            state, metadata = restored
            step = int(state.step)
            if step > total:
                raise UserError(f"{workdir} is at step {step}, beyond the {total} steps of this config.")
            check_data(config, metadata, about)
            metadata |= about
            best = metadata["best"]["step"]
            if not checkpointer.has_best(best):
                # Not lost if it is of this step: the run was killed before it was written, or before it was noted.
                if best not in (0, step) and not checkpointer.has_best(step):
                    say(f"the best checkpoint, of step {best}, is gone: the best from step {step} on is kept")
                metadata["best"] = _NO_BEST
                if metadata["evaluated"]["step"] == step:
                    metadata["best"] = metadata["evaluated"]
                    checkpointer.save(state, metadata, best=True)
            say(f"resuming at step {step} of {total}")
        else:
            if config.init_from:
                with failing_together():
                    variables = load_pretrained(config.init_from, model)
                    names = read_metadata(config.init_from).get("class_names", ())
                say(f"starting from the weights of {config.init_from}")
                changes = class_changes(names, data.class_names)
                if changes and len(names) == data.num_classes:
                    say("\n".join(["its head too, although the classes are others:", *changes]))
            else:
                batch = {"image": images, "label": labels}
                # The step is compiled while the weights are drawn. No `with`: Ctrl-C would wait for the compiler.
                compiler = ThreadPoolExecutor(1)
                compiled = compiler.submit(lambda: train_step.lower(abstract, batch, key, **fixed).compile())
                variables = init_variables(model, mesh, config.seed)
                compiled.result()
                compiler.shutdown()
            state, step = create_state(variables, tx, abstract), 0
            metadata = {**about, "evaluated": {"step": 0}, "best": _NO_BEST}

        with failing_together():
            write_config(config, workdir)
            writer = MetricsWriter(workdir, step, metadata["evaluated"]["step"], data.steps_per_epoch)
        stop = stack.enter_context(StopSignal())
        stack.enter_context(closing(writer))
        batches = train_batches(data, config.seed, step, total - step, jax.process_index(), jax.process_count())
        feed = stack.enter_context(closing(Feed(batches, total - step)))
        progress = stack.enter_context(closing(Progress(writer, step, total, data.batch_size, config.train.log_every)))
        while True:
            is_best = False
            is_eval = step == total or (step > 0 and step % eval_steps == 0)
            if is_eval and metadata["evaluated"]["step"] != step and not stop.received:
                try:
                    result = _evaluate(data, parts, model, state.eval_variables, mesh, stop.watch)
                except UserError:  # a broken image, on all hosts alike: once it is replaced, the run goes on from here
                    checkpointer.save(state, metadata)
                    checkpointer.wait()
                    raise
                if not stop.received:
                    metadata["evaluated"] = {"step": step, **result}
                    writer.write(step, {f"eval/{name}": value for name, value in result.items()})
                    is_best = result["top1"] > metadata["best"]["top1"]
                    if is_best:
                        metadata["best"] = metadata["evaluated"]
                    say(describe_evaluation(metadata, step / data.steps_per_epoch))
            if step:
                checkpointer.save(state, metadata)
            if is_best:
                checkpointer.save(state, metadata, best=True)
            if step == total or stop.received:
                break

            progress.resume()
            ahead = None  # metrics are read when the next step is under way: the device never waits for the host
            until = min(total, *(step - step % every + every for every in (eval_steps, checkpointer.save_every)))
            while step < until and not stop.received:
                with progress.waiting():
                    batch = next(feed)
                state, metrics = train_step(state, global_batch(batch, mesh), key, **fixed)
                step += 1
                # On a CPU the step is done by now, on an accelerator it has only begun.
                done = time.perf_counter() if metrics["loss"].is_ready() else None
                del batch  # else the last one, in memory that a worker shares, outlives the loader
                if ahead:
                    _report(*ahead, progress, checkpointer)
                ahead = (step, metrics, done)
                stop.poll()
            if ahead:
                _report(*ahead, progress, checkpointer)
            feed.check()
        checkpointer.wait()

    if metadata["evaluated"]["step"] < total:
        say(f"stopped at step {step} of {total}; the same command goes on from here")
    else:
        say(describe_end(metadata, workdir))
    return {name: value for name, value in metadata["evaluated"].items() if name != "step"}


def evaluate_checkpoint(config: ConfigDict, workdir: str | Path, which: str = "checkpoints") -> dict[str, float]:
    """Evaluates a checkpoint of a run.

    Args:
      config: the run's.
      workdir: the run's folder.
      which: "checkpoints" for the newest, "best" for the best, or "checkpoints/STEP".

    Returns:
      "loss", "top1", "top5" (fractions) and "count".

    Raises:
      UserError: the config or the data is not usable, or there is no such checkpoint.
    """
    with failing_together():
        check_config(config)
        data = open_dataset(training=False, **config.data)
        mesh = make_mesh(**config.mesh)
        model = create_model(**config.model)
        check_sizes(data, mesh, model, config.train.accumulate, training=False)
        path = find_step(local_path(workdir) / which)
        metadata = load_metadata(path)
        classes = create_saved(path, metadata).num_classes
        if classes != model.num_classes:
            raise UserError(
                f"{path} has {classes} classes, the dataset {model.num_classes}: evaluate on data with the checkpoint's"
                f" classes, or fine-tune it on these data, with --config.init_from={path}."
            )
        # A converted checkpoint has no names.
        if changes := class_changes(metadata.get("class_names", data.class_names), data.class_names):
            say("\n".join([f"the classes of {path} -> those of the data:", *changes]))
        for name, used in {"image_size": data.image_size, "crop_pct": data.crop_pct}.items():
            if metadata.get(name, used) != used:
                say(f"{path} is of a run with data.{name}={metadata[name]}; this evaluation is with {used}")
        # In float32, as the run evaluates its averages.
        variables = load_pretrained(path, model.clone(param_dtype=jnp.float32))
    check_hosts(config, data)
    variables = jax.device_put(variables, state_shardings(variables, mesh))
    result = _evaluate(data, config.train.accumulate, model, variables, mesh)
    say(f"{path}: {describe_accuracy(result)}, loss {result['loss']:.4f}, over {result['count']} examples")
    return result


def _evaluate(
    data: Data, parts: int, model: FCViT, variables: Mapping[str, Any], mesh: Mesh, watch: Callable = iter
) -> dict[str, float]:
    # What training computes in parts would not fit in memory whole.
    data = dataclasses.replace(data, batch_size=data.batch_size // parts)
    batches = eval_batches(data, jax.process_index(), jax.process_count())
    with closing(Feed(batches, data.num_eval_batches)) as feed:
        result = evaluate(model, variables, watch(feed), mesh)
        feed.check()
    return result


def _report(
    step: int, metrics: Mapping[str, jax.Array], done: float | None, progress: Progress, checkpointer: Checkpointer
) -> None:
    """Passes the metrics of a step on, where its numbers are good; `done` as in `Progress.update`."""
    values = {f"train/{name}": float(value) for name, value in jax.device_get(metrics).items()}
    if not all(map(math.isfinite, values.values())):
        numbers = ", ".join(f"{name.removeprefix('train/')} {value}" for name, value in values.items())
        raise UserError(
            f"Step {step}: {numbers}. This state was not saved; {checkpointer.describe_newest()}.\n"
            "Try a lower --config.optim.lr, a longer warm-up (optim.warmup_epochs), clipped gradients "
            "(optim.clip_norm=1.0) or model.dtype=float32, with --config.resume_with_changes=True to go on from there."
        )
    progress.update(step, values, done)
