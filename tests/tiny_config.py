"""A run of seconds with everything on: BatchNorm groups, drop-path, mixing, erasing, averages, evaluation, saves."""

from fcvit_jax.configs import digits


def get_config():
    config = digits.get_config()
    config.data.update(batch_size=16, train_split="train[:80]", eval_split="validation[:40]", flip=0.5)
    config.mixing.update(mixup_alpha=0.8, cutmix_alpha=1.0, erase_prob=0.25, group_size=8)
    config.optim.update(lr=1e-3, warmup_epochs=0, cooldown_epochs=1)
    config.train.update(epochs=3, eval_every=2, log_every=1, ema_decay=0.9)  # an epoch has 5 steps, so the run 20
    config.checkpoint.save_every = 4
    config.mesh.data = 1
    config.compilation_cache = False  # the tests share one
    with config.unlocked():
        config.model.update(depths=(1, 0, 0, 0), dims=(8, 8, 16, 16), kernel_sizes=(3,), context_heads=8)
        config.model.update(drop_path_rate=0.2, bn_group_size=8)
    return config
