"""A run of seconds of the task in fake_task.py: two shapes of batches, no labels, no batch statistics, no averages."""

from ml_collections import ConfigDict, config_dict


def get_config():
    config = ConfigDict({"task": "tests.fake_task", "seed": 3, "resume_with_changes": False})
    config.update(compilation_cache=False, init_from=config_dict.placeholder(str))
    config.model = {"name": "fake", "num_classes": 0}
    config.data = {"batch_size": 8, "workers": 0, "num_train": 40, "num_eval": 29}  # 4 and 2 batches an epoch, of 40
    config.mixing = {"noise": 0.01}
    config.optim = {"lr": 0.01}
    config.train = {"epochs": 4, "accumulate": 1, "log_every": 1, "eval_every": 2, "profile_steps": ()}
    config.train.update(steps=config_dict.placeholder(int), ema_decay=config_dict.placeholder(float))
    config.checkpoint = {"keep": 3, "save_every": 5}
    config.mesh = {"data": 1, "fsdp": 1}
    return config.lock()
