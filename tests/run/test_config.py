"""Configs: keys that nothing reads, sizes that do not fit, and folders of another run."""

import importlib
import json
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config
from ml_collections import ConfigDict

from fcvit_jax import configs, networks, optim, tasks
from fcvit_jax.augment import mixing
from fcvit_jax.configs import cifar10, cifar10_compare, fcvit_s12, fcvit_s24, fcvit_s48, fcvit_tiny, imagenet
from fcvit_jax.devices.storage import run_path
from fcvit_jax.errors import UserError
from fcvit_jax.networks.fcvit import create_model
from fcvit_jax.run.config import check_config, check_workdir, class_order, complete, write_config
from fcvit_jax.tasks import classification
from tests import fake_config

CONFIGS = [f"fcvit_jax.configs.{module.name}" for module in pkgutil.iter_modules(configs.__path__)]


@pytest.mark.parametrize("name", [*CONFIGS, "tiny_config"])
def test_the_configs_hold_what_is_read_and_nothing_else(name):
    config = importlib.import_module(name).get_config()
    check_config(config, tasks.load(config.task))


@pytest.mark.parametrize(
    "name", ["fcvit_b12", "vit_base_patch16_384", "deit_small_distilled_patch16_224", "convnext_tiny"]
)
def test_the_recipe_serves_every_network(name):
    config = imagenet.get_config(name)
    check_config(config, classification)
    model, usual = networks.create_model(**config.model), networks.settings(name)
    assert model.drop_path_rate == usual["drop_path_rate"]
    assert (config.data.image_size, config.data.crop_pct) == (usual["image_size"], usual["crop_pct"])
    assert ("bn_group_size" in config.model) == (name == "fcvit_b12")


@pytest.mark.parametrize("network", cifar10_compare.NETWORKS)
def test_the_networks_compared_have_as_many_parameters_and_one_recipe(network):
    config, usual = cifar10_compare.get_config(network), cifar10.get_config()
    check_config(config, classification)
    model = networks.create_model(**config.model)
    shapes = jax.eval_shape(lambda key: networks.init_variables(model, key), jax.random.key(0))
    assert 1.50e6 < sum(x.size for x in jax.tree.leaves(shapes["params"])) < 1.545e6
    others = [{key: x for key, x in c.to_dict().items() if key != "model"} for c in (config, usual)]
    assert others[0] == others[1]


def test_a_network_that_is_not_compared_is_refused():
    with pytest.raises(UserError, match="'resnet' is none of .* fcvit, without_context, convnext, vit"):
        cifar10_compare.get_config("resnet")


def test_a_part_of_the_config_is_what_one_function_takes():
    config = imagenet.get_config()
    assert create_model(**config.model).num_classes == 1000
    images, labels = jnp.zeros((2, 8, 8, 3), jnp.uint8), jnp.zeros(2, jnp.int32)
    assert jax.eval_shape(mixing.make(**config.mixing), jax.random.key(0), images, labels)[1].shape == (2, 1000)
    _, schedule = optim.make_optimizer(**config.optim)
    np.testing.assert_allclose(schedule(1251 * 100), 7.5025e-4, rtol=1e-6)


def test_the_recipe_is_the_published_one():
    """docs/recipe.md; the table of the variants is the README's."""
    recipe = {
        "model": {"num_classes": 1000, "bn_group_size": 128},
        "data": {"batch_size": 1024, "image_size": 224, "crop_scale": (0.08, 1.0), "crop_ratio": (3 / 4, 4 / 3)}
        | {"flip": 0.5, "rand_augment": (2, 9.0, 0.5)},
        "mixing": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mix_prob": 1.0, "switch_prob": 0.5}
        | {"smoothing": 0.1, "erase_prob": 0.25, "group_size": 128},
        "optim": {"lr": 1e-3, "lr_batch_size": 1024, "weight_decay": 0.05, "b1": 0.9, "b2": 0.999, "eps": 1e-8}
        | {"warmup_epochs": 5, "warmup_lr": 1e-6, "min_lr": 1e-6, "cooldown_epochs": 10, "per_step": False}
        | {"clip_norm": 0.0, "head_lr_multiplier": 1.0},
        "train": {"epochs": 300, "steps": None, "accumulate": 1, "ema_decay": None},
    }
    variants = {fcvit_tiny: (0.1, 0.9), fcvit_s12: (0.1, 0.9), fcvit_s24: (0.1, 0.95), fcvit_s48: (0.2, 0.95)}
    for module, (drop_path_rate, crop_pct) in variants.items():
        config = module.get_config()
        assert config.model.name == module.__name__.removeprefix("fcvit_jax.configs.")
        assert (config.model.drop_path_rate, config.data.crop_pct) == (drop_path_rate, crop_pct)
        for section, values in recipe.items():
            assert {key: config[section][key] for key in values} == values


def test_unknown_and_missing_keys_are_named():
    config = tiny_config.get_config()
    with config.unlocked():
        config.optim.weigth_decay = 0.1
        config.trian = 1
        config.model.share_blocks = True  # the steps do so in any case
        del config.train.epochs
        del config.optim.lr
        del config.mesh
    with pytest.raises(UserError) as info:
        check_config(config, classification)
    assert str(info.value).splitlines() == [
        "Unknown config key 'model.share_blocks': did you mean 'model.freeze_bn'?",
        "Unknown config key 'optim.weigth_decay': did you mean 'optim.weight_decay'?",
        "Unknown config key 'trian'.",
        "Config key 'mesh.data' is missing.",
        "Config key 'mesh.fsdp' is missing.",
        "Config key 'optim.lr' is missing.",
        "Config key 'train.epochs' is missing.",
    ]


@pytest.mark.parametrize("key", ["steps", "epochs", "log_every", "eval_every", "accumulate"])
def test_numbers_below_one_are_refused(key):
    config = tiny_config.get_config()
    config.train[key] = 0
    with pytest.raises(UserError, match=f"train.{key}=0 must be at least 1"):
        check_config(config, classification)


def test_a_warmup_of_averages_that_are_not_kept_is_refused():
    config = tiny_config.get_config()
    config.train.update(ema_decay=None, ema_warmup=True)
    with pytest.raises(UserError, match="train.ema_warmup=True needs a train.ema_decay"):
        check_config(config, classification)


@pytest.mark.parametrize("key", ["epochs", "log_every", "eval_every", "accumulate"])
def test_only_the_number_of_steps_may_be_left_out(key):
    config = tiny_config.get_config()
    config.train.steps = None
    check_config(config, classification)
    config.train[key] = None
    with pytest.raises(UserError, match=f"train.{key}=None must"):
        check_config(config, classification)


def test_what_json_cannot_hold_is_refused():
    config = tiny_config.get_config()
    with config.unlocked():
        config.model.param_dtype = jnp.bfloat16
    with pytest.raises(UserError, match="model.param_dtype=.*bfloat16.* cannot be written to config.json"):
        check_config(config, classification)


def test_another_config_is_refused_and_its_keys_named(tmp_path, capsys):
    config = tiny_config.get_config()
    check_workdir(config, tmp_path / "run")
    write_config(config, tmp_path / "run")
    check_workdir(config, tmp_path / "run")
    assert json.loads((tmp_path / "run/config.json").read_text())["optim"]["lr"] == config.optim.lr
    assert capsys.readouterr().out == ""

    config.optim.lr = 0.5
    config.data.workers = 3
    check_workdir(config, tmp_path / "run")
    assert "no checkpoint yet, so starting with changes" in capsys.readouterr().out
    (tmp_path / "run/checkpoints/20").mkdir(parents=True)
    with pytest.raises(UserError) as info:
        check_workdir(config, tmp_path / "run")
    assert str(info.value).splitlines() == [
        f"{tmp_path / 'run'} holds a run of another config:",
        "  data.workers: 0 -> 3",
        "  optim.lr: 0.001 -> 0.5",
        "Choose another --workdir, or go on with these changes: --config.resume_with_changes=True",
    ]
    config.resume_with_changes = True
    check_workdir(config, tmp_path / "run")
    assert "optim.lr: 0.001 -> 0.5" in capsys.readouterr().out


def test_what_changes_no_result_may_change(tmp_path, capsys):
    config = tiny_config.get_config()
    write_config(config, tmp_path)
    config.mesh.update(data=2, fsdp=4)
    config.data.update(workers=2, prefetch=3, data_dir="elsewhere")
    config.checkpoint.update(keep=1, save_every=7)
    config.train.log_every = 3
    config.compilation_cache = True
    check_workdir(config, tmp_path)
    assert "mesh.fsdp: 1 -> 4" in capsys.readouterr().out


def test_a_run_of_an_older_version_has_the_defaults_of_later_keys(tmp_path):
    config = tiny_config.get_config()
    old = json.loads(config.to_json())
    for key in ("task", "data.exif", "data.on_broken", "optim.freeze", "train.ema_warmup", "train.profile_steps"):
        section, _, name = key.rpartition(".")
        del (old[section] if section else old)[name]
    (tmp_path / "checkpoints/20").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(old))
    check_workdir(config, tmp_path)
    assert json.loads(complete(ConfigDict(old)).to_json()) == json.loads(config.to_json())
    other = complete(fake_config.get_config())  # of a task that does not know all of these keys
    assert "on_broken" not in other.data
    write_config(other, tmp_path)
    check_workdir(other, tmp_path)


def test_folders_that_are_no_good_are_refused(tmp_path):
    config = tiny_config.get_config()
    with pytest.raises(UserError, match="mount other buckets"):
        run_path("s3://bucket/run")
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(UserError, match="config.json is damaged"):
        check_workdir(config, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file cannot be written: File exists"):
        write_config(config, tmp_path / "file")


def test_classes_are_matched_by_name_where_the_names_are_the_same():
    assert class_order(["c", "a", "b"], ["a", "b", "c"]) == [1, 2, 0]
    assert class_order(["c", "a", "b"], ["a", "b", "d"]) is None
    assert class_order(["c", "a"], ["a", "c", "b"]) is None
    assert class_order(["a", "a", "b"], ["a", "b", "a"]) is None


def test_none_is_for_keys_that_may_be_off():
    for key in ("data.batch_size", "data.dataset", "optim.lr", "mixing.mixup_alpha", "train.epochs", "seed"):
        config = tiny_config.get_config().unlock()
        config.update_from_flattened_dict({key: None})
        with pytest.raises(UserError, match=f"{key}=None must have a value"):
            check_config(config, classification)


@pytest.mark.parametrize("text", ["", '{"task": "class', "[1, 2]", '{"a":' * 3000, "\udcff"])
def test_a_damaged_config_json_tells_how_to_keep_the_run(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match="config.json is damaged .* move this file away, and the same command goes on"):
        check_workdir(tiny_config.get_config(), tmp_path)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_name_that_the_file_system_does_not_take_is_told(tmp_path, name):
    with pytest.raises(UserError, match="cannot be used: "):
        run_path(tmp_path / name)
