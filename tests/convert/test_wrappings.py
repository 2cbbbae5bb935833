"""Weights as training scripts wrap them: found bit for bit, and what runs code refused."""

import argparse
import collections
import datetime
import os
import pathlib

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from fcvit_jax.convert.files import read
from fcvit_jax.errors import UserError

PLAIN = {"network.0.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "head.bias": np.ones(2, np.float32)}
AVERAGES = {name: x / 2 for name, x in PLAIN.items()}


def tensors(arrays, prefix=""):
    return {prefix + name: torch.from_numpy(x) for name, x in arrays.items()}


def assert_read(path, ema, expected):
    found, _ = read(path, ema)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x, strict=True)


OPTIMIZER = {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "ema": {"a": torch.ones(2)}}}
PREFIXES = ["", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "model.", "model._orig_mod.", "net."]
PREFIXES += ["student.", "_fsdp_wrapped_module._checkpoint_wrapped_module."]
KEYS = ["state_dict", "model", "model_state_dict", "model_state", "net", "module", "my_weights"]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("form", ["bare", "wrapped", "safetensors", "npz"])
def test_wrappers_of_the_network_are_taken_off(tmp_path, prefix, form):
    path = tmp_path / f"a.{form if form in ('safetensors', 'npz') else 'pth'}"
    arrays = {prefix + name: x for name, x in PLAIN.items()}
    if form == "safetensors":
        save_file(arrays, path)
    elif form == "npz":
        np.savez(path, **arrays)
    else:
        state_dict = tensors(PLAIN, prefix)
        torch.save({"state_dict": state_dict, "epoch": 3} if form == "wrapped" else state_dict, path)
    assert_read(path, None, PLAIN)


@pytest.mark.parametrize("key", KEYS)
def test_weights_lie_under_many_keys(tmp_path, key):
    content = {"epoch": 3, key: tensors(PLAIN), "mean": torch.zeros(3), **OPTIMIZER}
    for number, nested in enumerate((content, {"model": content}, {key: {"state_dict": tensors(PLAIN)}})):
        path = tmp_path / f"{number}.pth"
        torch.save(nested, path)
        assert_read(path, None, PLAIN)
        with pytest.raises(UserError, match="holds no exponential moving averages"):
            read(path, True)


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": tensors(PLAIN), "state_dict_ema": tensors(AVERAGES)},
        {"model": tensors(PLAIN), "model_ema": tensors(AVERAGES, "module.")},
        {"net": tensors(PLAIN), "ema": {"module": tensors(AVERAGES), "decay": 0.99}},
        {"student": tensors(PLAIN, "module."), "teacher": tensors(AVERAGES)},
        {"state_dict": tensors(PLAIN, "model.") | tensors(AVERAGES, "ema_model.module.")},
        tensors(PLAIN, "student.") | tensors(AVERAGES, "teacher."),
    ],
    ids=["timm", "deit", "nested", "dino", "lightning", "both"],
)
def test_averages_and_plain_weights_are_told_apart(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    assert_read(tmp_path / "a.pth", None, PLAIN)
    assert_read(tmp_path / "a.pth", True, AVERAGES)


@pytest.mark.parametrize(
    "content",
    [{"ema": tensors(AVERAGES)}, tensors(AVERAGES, "teacher."), {"n_averaged": 3} | tensors(AVERAGES, "ema.")],
)
def test_averages_alone_are_taken_and_said(tmp_path, caplog, content):
    torch.save(content, tmp_path / "a.pth")
    assert_read(tmp_path / "a.pth", None, AVERAGES)
    assert "averages alone" in caplog.text
    with pytest.raises(UserError, match="no plain weights"):
        read(tmp_path / "a.pth", False)


def test_averages_of_pytorch(tmp_path):
    torch.save({"n_averaged": torch.tensor(3), **tensors(AVERAGES, "module.")}, tmp_path / "a.pth")
    assert_read(tmp_path / "a.pth", True, AVERAGES)
    assert_read(tmp_path / "a.pth", None, AVERAGES)


def test_what_lies_beside_weights_does_no_harm(tmp_path):
    paths = argparse.Namespace(out=pathlib.Path("x"), there=pathlib.PureWindowsPath("c:/x"))
    numbers = [np.float64(71.2), np.float32(1), np.int64(3), np.bool_(True), np.arange(3), np.array(["a", "b"])]
    others = {"h": collections.defaultdict(list, {"a": [1]}), "c": collections.Counter("ab"), "f": frozenset("a")}
    times = [datetime.datetime.now(datetime.UTC), datetime.timedelta(1)]
    torch.save({"state_dict": tensors(PLAIN), "args": paths, "n": numbers, "o": others, "t": times}, tmp_path / "a.pth")
    assert_read(tmp_path / "a.pth", None, PLAIN)
    torch.save({**tensors(PLAIN), "epoch": 3, "arch": "x", "best": None, "lr": np.float64(1)}, tmp_path / "b.pth")
    assert_read(tmp_path / "b.pth", None, PLAIN)
    torch.save({"state_dict": PLAIN}, tmp_path / "c.pth")  # of NumPy's arrays
    assert_read(tmp_path / "c.pth", None, PLAIN)


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "call", [(os.mkdir, ("evil",)), (collections.defaultdict, (os.getcwd,)), (eval, ("1",)), (getattr, ("a", "upper"))]
)
def test_code_stays_refused(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": tensors(PLAIN), "x": Evil(*call)}, "a.pth")
    with pytest.raises(UserError, match=r"Refused to read a.pth: .* save its weights alone: torch.save"):
        read(pathlib.Path("a.pth"), None)
    assert os.listdir() == ["a.pth"]


def test_two_sets_of_weights_are_not_guessed_between(tmp_path):
    torch.save({"a": tensors(PLAIN), "b": tensors(AVERAGES)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"several sets of weights \(a, b\)"):
        read(tmp_path / "a.pth", None)


def test_weights_of_something_else_are_said_to_be_left_out(tmp_path, caplog):
    torch.save({**tensors(PLAIN, "model."), "criterion.weight": torch.ones(3)}, tmp_path / "a.pth")
    assert_read(tmp_path / "a.pth", None, PLAIN)
    assert "those under model are taken, not criterion.weight" in caplog.text
