"""Weights survive every conversion bit for bit, and what does not fit is refused whole."""

import argparse
import json
import logging
import os
import resource
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import torch_reference
from flax import traverse_util

from fcvit_jax import convert, optim
from fcvit_jax.configs import finetune
from fcvit_jax.convert import files
from fcvit_jax.convert.__main__ import main
from fcvit_jax.convert.fcvit import infer_model
from fcvit_jax.errors import UserError
from fcvit_jax.networks.fcvit import Backbone, FCViT, abstract_variables, create_model
from fcvit_jax.run.config import check_config
from fcvit_jax.tasks import classification

SIZES = {"depths": (1, 2), "dims": (16, 32), "mlp_ratios": (2, 1)}
OPTIONS = [
    {},
    {"competition": False},
    {"weighted_context": False},
    {"weighted_context": False, "competition": False},
    {"use_context": False},
    {"context_heads": 4, "context_reduction": 2},
    {"kernel_sizes": (7,)},
    {"kernel_sizes": (3, 5)},
    {"mix_reduction": 1},
    {"mix_reduction": 4, "mix_min_dim": 6},
    {"mlp_kernel_size": None},
    {"mlp_kernel_size": 5},
    {"spatial_attention": True, "channel_attention": True},
    {"layer_scale_init": None},
]


def original(**fields):
    """A state dict of the original, as float32 arrays."""
    torch.manual_seed(0)
    state_dict = torch_reference.FCViT(**{**SIZES, "num_classes": 7, **fields}).state_dict()
    return {name: torch.rand_like(x).numpy() if x.ndim else x.numpy() for name, x in state_dict.items()}


def tensors(state_dict):
    return {name: torch.from_numpy(x) for name, x in state_dict.items()}


def shapes(arrays):
    return {name: x.shape for name, x in arrays.items()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert actual[name].dtype == x.dtype, name
        np.testing.assert_array_equal(actual[name], x, err_msg=name)


def saved(path):
    return {name: x.numpy() for name, x in torch.load(path, weights_only=True).items()}


@pytest.mark.parametrize("options", [*OPTIONS, {"num_classes": 0}, {"pyramid": True}], ids=str)
def test_conversion_is_exact_and_shapes_tell_the_network(options):
    state_dict = original(**options)
    model = Backbone(**SIZES) if "pyramid" in options else FCViT(**{**SIZES, "num_classes": 7, **options})
    variables = convert.from_torch(state_dict, model)
    assert_same(convert.to_torch(variables, model), state_dict)
    assert infer_model(shapes(state_dict)) == model
    assert infer_model(shapes(traverse_util.flatten_dict(variables, sep="/"))) == model


def test_variants_are_recognised():
    module = torch_reference.FCViT((2, 2, 6, 2), (64, 128, 320, 512), (8, 8, 4, 4))
    assert infer_model(shapes(module.state_dict())) == create_model("fcvit_s12")


def test_files_round_trip(tmp_path):
    state_dict, averages = original(), {name: x / 2 if x.ndim else x for name, x in original().items()}
    content = {
        "epoch": 3,
        "arch": "fcvit_b12",
        "args": argparse.Namespace(lr=1e-3, opt="adamw", aa=None),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}]},
        "metric": 80.9,
        "state_dict": {f"module.{name}": x for name, x in tensors(state_dict).items()},
        "state_dict_ema": tensors(averages),
    }
    torch.save(content, tmp_path / "timm.pth.tar")
    for ema, expected in ((False, state_dict), (True, averages)):
        folder = tmp_path / f"ema={ema}"
        convert.convert(tmp_path / "timm.pth.tar", folder / "orbax", ema=ema)
        convert.convert(folder / "orbax", folder / "weights.npz")
        convert.convert(folder / "weights.npz", folder / "weights.pth")
        convert.convert(folder / "weights.npz", folder / "weights.pth.tar")
        assert_same(saved(folder / "weights.pth"), expected)
        wrapped = torch.load(folder / "weights.pth.tar", weights_only=True)["state_dict"]
        assert_same({name: x.numpy() for name, x in wrapped.items()}, expected)
        assert sorted(os.listdir(folder)) == ["orbax", "weights.npz", "weights.pth", "weights.pth.tar"]


@pytest.mark.parametrize("wrap", [dict, lambda x: {"model": x}, lambda x: {"state_dict_ema": x}])
def test_weights_are_found_in_a_file_of_the_original(tmp_path, wrap):
    state_dict = original()
    torch.save(wrap(tensors(state_dict)), tmp_path / "source.pth")
    convert.convert(tmp_path / "source.pth", tmp_path / "dest.pt")
    assert_same(saved(tmp_path / "dest.pt"), state_dict)


def test_averages_are_not_taken_for_plain_weights(tmp_path, caplog):
    torch.save({"state_dict_ema": tensors(original())}, tmp_path / "averages.pth")
    convert.load_pretrained(tmp_path / "averages.pth", FCViT(**SIZES, num_classes=7))
    assert "holds exponential moving averages alone: they are used" in caplog.text
    with pytest.raises(UserError, match="holds exponential moving averages alone .*, no plain weights"):
        convert.load_pretrained(tmp_path / "averages.pth", FCViT(**SIZES, num_classes=7), ema=False)


def test_metadata_makes_the_model_again(tmp_path):
    model = FCViT(**SIZES, num_classes=7, spatial_attention=True)
    torch.save(tensors(original(spatial_attention=True)), tmp_path / "a.pth")
    convert.convert(tmp_path / "a.pth", tmp_path / "a.npz")
    convert.convert(tmp_path / "a.npz", tmp_path / "b.npz")
    for name in ("a.npz", "b.npz"):
        _, metadata = files.read(tmp_path / name, ema=False)
        assert create_model(**metadata["model"]) == model


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_file_that_wants_to_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": tensors(original()), "args": Evil()}, "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth: it wants to run code when read \(posix\.mkdir\)"):
        convert.convert("evil.pth", "dest.npz")
    assert os.listdir() == ["evil.pth"]


def test_everything_that_does_not_fit_is_listed_and_nothing_written(tmp_path):
    state_dict = original()
    del state_dict["network.0.0.norm1.bias"], state_dict["network.2.1.token_mixer.dw2.weight"]
    state_dict["head.weight"] = np.zeros((7, 31), np.float32)
    state_dict["network.2.0.token_mixer.dw1.weight"] = np.zeros((32, 1, 9, 9), np.float32)
    state_dict["surprise"] = np.zeros(3, np.float32)
    torch.save(tensors(state_dict), tmp_path / "broken.pth")
    for dest in ("dest.npz", "dest.pth", "dest"):
        with pytest.raises(UserError) as error:
            convert.convert(tmp_path / "broken.pth", tmp_path / dest)
        assert str(error.value).splitlines()[1:] == [
            "  missing: network.0.0.norm1.bias (16,)",
            "  missing: network.2.1.token_mixer.dw2.weight (32, 1, 11, 11)",
            "  unexpected: surprise (3,)",
            "  misshaped: head.weight (7, 31), should be (7, 32)",
            "  misshaped: network.2.0.token_mixer.dw1.weight (32, 1, 9, 9), should be (32, 1, 11, 11)",
        ]
    assert os.listdir(tmp_path) == ["broken.pth"]


def test_our_files_are_checked_too(tmp_path):
    model = FCViT(**SIZES, num_classes=7)
    arrays = traverse_util.flatten_dict(convert.from_torch(original(), model), sep="/")
    arrays["params/surprise"] = arrays.pop("params/stem/conv/bias")
    arrays["params/norm/scale"] = np.zeros((3, 3), np.float32)
    np.savez(tmp_path / "broken.npz", **arrays)
    for load in (
        lambda: convert.load_pretrained(tmp_path / "broken.npz", model),
        lambda: convert.convert(tmp_path / "broken.npz", tmp_path / "dest.pth"),
    ):
        with pytest.raises(UserError, match=r"missing: params/stem/conv/bias \(16,\)\n.*surprise.*\n.*norm/scale"):
            load()
    with pytest.raises(UserError, match="missing: params/stem/conv/bias"):
        convert.to_torch(traverse_util.unflatten_dict(arrays, sep="/"), model)


def said(caplog):
    """What was logged, by us: Orbax has a warning of its own."""
    return [record.getMessage() for record in caplog.records if Path(record.pathname).parent.name == "convert"]


@pytest.mark.parametrize("name", ["weights.pth", "weights.npz", "orbax"])
def test_pretrained_weights_load_from_every_format(tmp_path, name, caplog):
    state_dict = original()
    torch.save(tensors(state_dict), tmp_path / "weights.pth")
    if name != "weights.pth":
        convert.convert(tmp_path / "weights.pth", tmp_path / name)
    model = FCViT(**SIZES, num_classes=7)
    assert_same(convert.to_torch(convert.load_pretrained(tmp_path / name, model), model), state_dict)
    assert not said(caplog)

    other = FCViT(**SIZES, num_classes=500)
    with caplog.at_level(logging.WARNING):
        loaded = convert.to_torch(convert.load_pretrained(tmp_path / name, other), other)
    assert said(caplog) == [f"{tmp_path / name} has 7 classes, the model 500: the head starts afresh."]
    head, bias = loaded.pop("head.weight"), loaded.pop("head.bias")
    assert head.shape == (500, 32) and abs(head.std() / 0.02 - 1) < 0.05 and not bias.any()
    assert_same(loaded, {key: x for key, x in state_dict.items() if not key.startswith("head")})

    caplog.clear()
    pyramid = Backbone(**SIZES)
    with caplog.at_level(logging.WARNING):
        loaded = convert.to_torch(convert.load_pretrained(tmp_path / name, pyramid), pyramid)
    assert said(caplog) == [f"{tmp_path / name} holds a classifier: the norms of the pyramid start afresh."]
    for i, dim in ((0, 16), (2, 32)):
        np.testing.assert_array_equal(loaded.pop(f"norm{i}.weight"), np.ones(dim))
        np.testing.assert_array_equal(loaded.pop(f"norm{i}.bias"), np.zeros(dim))
    assert_same(loaded, {key: x for key, x in state_dict.items() if not key.startswith(("head", "norm."))})

    without = FCViT(**SIZES, num_classes=0)
    assert "head" not in convert.load_pretrained(tmp_path / name, without)["params"]
    with pytest.raises(UserError, match="layer_scale"):
        convert.load_pretrained(tmp_path / name, FCViT(**SIZES, num_classes=7, layer_scale_init=None))
    with pytest.raises(
        UserError, match=r"another network than the model: depths \(.*has depths \(3, 3, 5, 2\), [^\n]*$"
    ):
        convert.load_pretrained(tmp_path / name, create_model("fcvit_tiny"))


def test_bad_files_are_user_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("damaged.pth", "damaged.npz"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 not what it seems")
    torch.save({"a": 1}, "numbers.pth")
    torch.save(tensors({"a": np.zeros(3, np.float32)}), "other.pth")
    torch.save(tensors(original()), "good.pth")
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "text.pth").write_text("hello")
    content = (tmp_path / "good.pth").read_bytes()
    (tmp_path / "short.pth").write_bytes(content[: len(content) // 4])
    (tmp_path / "photo.npz").write_bytes(b"\xff\xd8\xff\xe0")
    np.savez_compressed("packed.npz", a=np.arange(1000))
    packed = bytearray((tmp_path / "packed.npz").read_bytes())
    packed[55] = 255  # the first byte of what is compressed
    (tmp_path / "packed.npz").write_bytes(packed)
    np.savez("metadata.npz", **{convert.METADATA: "{"})
    np.savez("later.npz", **{convert.METADATA: json.dumps({"model": {"name": "fcvit_tiny", "new_option": 1}})})
    before = sorted(os.listdir())
    for source, dest, ema, message in (
        ("absent.pth", "dest.npz", False, "no file or folder absent.pth"),
        ("damaged.pth", "dest.npz", False, "damaged, or no file of PyTorch's\\.$"),
        ("text.pth", "dest.npz", False, "damaged, or no file of PyTorch's\\.$"),
        ("short.pth", "dest.npz", False, "damaged, or no file of PyTorch's\\.$"),
        ("damaged.npz", "dest.pth", False, "damaged, or no .npz\\.$"),
        ("photo.npz", "dest.pth", False, "damaged, or no .npz\\.$"),
        ("numbers.pth", "dest.npz", False, "a is a int, not a tensor"),
        ("other.pth", "dest.npz", False, "no weights of an FCViT"),
        ("good.pth", "dest.npz", True, "no exponential moving averages"),
        ("good.pth", "folder.npz", False, "Could not write folder.npz"),
        ("good.pth", "dest.safetensors", False, "dest.safetensors: the ending must be"),
        ("packed.npz", "dest.pth", False, "damaged, or no .npz\\.$"),
        ("metadata.npz", "dest.pth", False, "damaged, or no .npz\\.$"),
        ("later.npz", "dest.pth", False, "later.npz does not say which network it holds: .*new_option"),
    ):
        with pytest.raises(UserError, match=message):
            convert.convert(source, dest, ema=ema)
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("name", ["weights.pth", "weights.NPZ"])
def test_a_disk_that_is_full_leaves_nothing(tmp_path, name):
    torch.save(tensors(original()), tmp_path / "good.pth")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(UserError, match=f"Could not write .*{name}: .*File too large"):
            convert.convert(tmp_path / "good.pth", tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["good.pth"]


def test_averages_are_not_rounded_to_the_dtype_of_the_parameters(tmp_path):
    state_dict = original()
    torch.save(tensors(state_dict), tmp_path / "exact.pth")
    convert.convert(tmp_path / "exact.pth", tmp_path / "exact.npz")
    with np.load(tmp_path / "exact.npz") as file:
        arrays = dict(file)
    model = json.loads(str(arrays.pop(convert.METADATA)))["model"] | {"param_dtype": "bfloat16"}
    np.savez(tmp_path / "run.npz", **arrays, **{convert.METADATA: json.dumps({"model": model})})
    convert.convert(tmp_path / "run.npz", tmp_path / "again.pth")
    assert_same(saved(tmp_path / "again.pth"), state_dict)


def test_half_precision_becomes_float32(tmp_path):
    state_dict = {name: x.bfloat16().requires_grad_() if x.ndim else x for name, x in tensors(original()).items()}
    model = FCViT(**SIZES, num_classes=7)
    variables = convert.from_torch(state_dict, model)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {np.dtype("float32")}
    torch.save(state_dict, tmp_path / "half.pth")
    convert.convert(tmp_path / "half.pth", tmp_path / "whole.pth")
    assert_same(
        saved(tmp_path / "whole.pth"),
        {name: (x.detach().float() if x.ndim else x).numpy() for name, x in state_dict.items()},
    )


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(tensors(original()), tmp_path / "a.pth")
    main(["~/a.pth", "~/b.npz"])
    assert (tmp_path / "b.npz").is_file()
    assert capsys.readouterr().out == f"wrote the file {tmp_path / 'b.npz'}\n"
    with pytest.raises(SystemExit, match="^error: .* no moving averages"):
        main([str(tmp_path / "b.npz"), str(tmp_path / "c.pth"), "--ema"])
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match="pip install torch"):
        main([str(tmp_path / "a.pth"), str(tmp_path / "c.npz")])


def test_the_config_for_finetuning_fits_the_code():
    config = finetune.get_config()
    check_config(config, classification)
    model = create_model(**config.model)
    tx, _ = optim.make_optimizer(10, config.train.epochs, config.data.batch_size, **config.optim)
    params = abstract_variables(model)["params"]
    jax.eval_shape(tx.init, params)
    assert params["head"]["kernel"].shape == (512, 37)
