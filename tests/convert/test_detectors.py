"""MMSegmentation's checkpoints <-> our segmenter, and a segmenter that starts from a classifier or a pyramid."""

import json
import logging
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import torch
import torch_reference
from equality import assert_same, tensors
from flax import traverse_util
from helpers import said

from fcvit_jax import convert
from fcvit_jax.convert.weights import infer
from fcvit_jax.errors import UserError
from fcvit_jax.networks.fcvit import Backbone, FCViT, abstract_variables, create_backbone, create_model
from fcvit_jax.networks.semantic_fpn import create_segmenter

DATA = Path(__file__).parent.parent / "data"
SIZES = {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32), "mlp_ratios": (2, 2, 1, 1)}


def segmenter(**fields):
    return create_segmenter(
        "fcvit_tiny", **{**SIZES, "num_classes": 7, "neck_channels": 12, "head_channels": 6, **fields}
    )


def numbers(shapes, seed=0):
    """A state dict of random numbers."""
    rng = np.random.default_rng(seed)
    return {
        name: np.array(0, np.int64) if name.endswith("tracked") else rng.normal(0, 1, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def full(model):
    """A whole checkpoint's state dict, of random numbers, by MMSegmentation's names."""
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_variables(model))
    return numbers({name: x.shape for name, x in convert.to_torch(zeros, model).items()})


def original(**fields):
    """A state dict of the original's classifier, or of its pyramid."""
    shapes = torch_reference.FCViT(**{**SIZES, "num_classes": 5, **fields}).state_dict()
    return numbers({name: tuple(x.shape) for name, x in shapes.items()}, seed=1)


def test_conversion_of_an_mmsegmentation_checkpoint_is_exact_and_shapes_tell_the_network():
    with np.load(DATA / "segmentation_small.npz") as file:
        meta = json.loads(str(file["meta"]))
        state_dict = {name[3:]: file[name].astype(np.float32) for name in file if name.startswith("sd/")}
    sizes = {"depths": meta["layers"], "dims": meta["embed_dims"]}
    sizes |= {key: meta[key] for key in ("mlp_ratios", "num_classes", "neck_channels", "head_channels")}
    model = create_segmenter("fcvit_tiny", **sizes)
    variables = convert.from_torch(state_dict, model)
    assert_same(convert.to_torch(variables, model), state_dict)
    assert infer(state_dict) == model
    assert infer(traverse_util.flatten_dict(variables, sep="/")) == model


@pytest.mark.parametrize("name", ["tiny", "s12"])
def test_names_and_shapes_are_those_of_the_original_at_full_size(name):
    with np.load(DATA / f"segmentation_{name}_full.npz") as file:
        shapes = dict(zip(file["keys"].tolist(), map(tuple, map(json.loads, file["shapes"].tolist())), strict=True))
    model = create_segmenter(f"fcvit_{name}")
    assert {key: x.shape for key, x in full(model).items()} == shapes
    assert infer({key: np.broadcast_to(0, shape) for key, shape in shapes.items()}) == model


def test_files_round_trip(tmp_path, caplog):
    model = segmenter(spatial_attention=True, head_dropout_rate=0.0)
    state_dict = full(model)
    content = {
        "meta": {"mmseg_version": "0.19.0", "CLASSES": ("wall", "sky"), "PALETTE": [[120, 120, 120]], "iter": 40000},
        "state_dict": tensors(state_dict),
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 2e-4}]},
    }
    torch.save(content, tmp_path / "iter_40000.pth")
    convert.convert(tmp_path / "iter_40000.pth", tmp_path / "weights.npz")
    convert.convert(tmp_path / "weights.npz", tmp_path / "orbax")
    convert.convert(tmp_path / "orbax", tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert_same({name: x.numpy() for name, x in again.items()}, state_dict)
    with caplog.at_level(logging.WARNING):
        for name in ("iter_40000.pth", "weights.npz", "orbax"):
            variables = convert.load_pretrained(tmp_path / name, model, partial=False)
            assert_same(convert.to_torch(variables, model), state_dict)
    assert not said(caplog)
    # What acts only in training is not in the weights.
    assert create_segmenter(**convert.read_metadata(tmp_path / "orbax")["model"]) == segmenter(spatial_attention=True)


@pytest.mark.parametrize("pyramid", [False, True])
@pytest.mark.parametrize("name", ["weights.pth", "weights.npz", "orbax"])
def test_a_segmenter_starts_from_a_classifier_or_a_pyramid(tmp_path, name, pyramid, caplog):
    state_dict = original(pyramid=pyramid)
    torch.save({"state_dict": tensors(state_dict)}, tmp_path / "weights.pth")
    if name != "weights.pth":
        convert.convert(tmp_path / "weights.pth", tmp_path / name)
    model, path = segmenter(), tmp_path / name
    with caplog.at_level(logging.WARNING):
        loaded = convert.load_pretrained(path, model)
    what, norms = ("a feature pyramid", "") if pyramid else ("a classifier", "the norms of the pyramid, ")
    assert said(caplog) == [f"{path} holds {what}: {norms}the neck and the head start afresh."]
    if name == "weights.npz":
        chex.assert_trees_all_equal(convert.load_pretrained(path, model), loaded)
    assert jax.tree.map(np.shape, loaded) == jax.tree.map(lambda x: x.shape, abstract_variables(model))

    backbone = {key: x for key, x in convert.to_torch(loaded, model).items() if key.startswith("backbone.")}
    expected = {f"backbone.{key}": x for key, x in state_dict.items() if not key.startswith(("head.", "norm."))}
    if not pyramid:
        for i, dim in zip((0, 2, 4, 6), SIZES["dims"], strict=True):
            expected |= {f"backbone.norm{i}.weight": np.ones(dim), f"backbone.norm{i}.bias": np.zeros(dim)}
    assert_same(backbone, expected)
    kernel = loaded["params"]["neck"]["output_0"]["kernel"]
    assert (
        abs(kernel.std() / (2 / (9 * 12)) ** 0.5 - 1) < 0.1 and not loaded["params"]["neck"]["output_0"]["bias"].any()
    )
    assert (loaded["batch_stats"]["head"]["level_3_step_2"]["norm"]["var"] == 1).all()

    with pytest.raises(UserError, match=r"holds a [a-z ]*: it does not hold the whole model, a segmenter\.$"):
        convert.load_pretrained(path, model, partial=False)


def test_other_classes_get_a_new_classifier(tmp_path, caplog):
    state_dict, path = full(segmenter()), tmp_path / "weights.pth"
    torch.save(tensors(state_dict), path)
    with caplog.at_level(logging.WARNING):
        loaded = convert.to_torch(convert.load_pretrained(path, segmenter(num_classes=3)), segmenter(num_classes=3))
    assert said(caplog) == [f"{path} has 7 classes, the model 3: the classifier starts afresh."]
    kernel = loaded.pop("decode_head.conv_seg.weight")
    assert kernel.shape == (3, 6, 1, 1) and 0.3 < np.abs(kernel).max() <= 6**-0.5
    loaded.pop("decode_head.conv_seg.bias")
    assert_same(loaded, {key: x for key, x in state_dict.items() if "conv_seg" not in key})
    with pytest.raises(UserError, match="has 7 classes, the model 3: it does not hold the whole model"):
        convert.load_pretrained(path, segmenter(num_classes=3), partial=False)


def test_a_file_of_another_network_is_refused_in_one_line(tmp_path):
    torch.save(tensors(full(segmenter())), tmp_path / "segmenter.pth")
    convert.convert(tmp_path / "segmenter.pth", tmp_path / "segmenter.npz")
    torch.save(tensors(original(pyramid=True)), tmp_path / "pyramid.pth")
    for source, model, message in (
        ("segmenter.pth", FCViT(**SIZES), "holds a segmenter: a classifier is needed here."),
        ("segmenter.npz", FCViT(**SIZES), "holds a segmenter: a classifier is needed here."),
        ("segmenter.npz", Backbone(**SIZES), "holds a segmenter: a feature pyramid is needed here."),
        ("pyramid.pth", FCViT(**SIZES), "holds a feature pyramid: a classifier is needed here."),
        ("segmenter.pth", create_segmenter("fcvit_tiny"), "holds another network than the model: depths (1, 2, 1, 1)"),
        ("segmenter.npz", create_segmenter("fcvit_tiny"), "holds another network than the model: depths (1, 2, 1, 1)"),
    ):
        with pytest.raises(UserError) as error:
            convert.load_pretrained(tmp_path / source, model)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_tensors_that_do_not_fit_are_listed():
    model = segmenter()
    state_dict = full(model)
    del state_dict["decode_head.scale_heads.3.4.bn.bias"]
    state_dict["neck.lateral_convs.0.conv.weight"] = np.zeros((12, 9, 1, 1), np.float32)
    with pytest.raises(UserError) as error:
        convert.from_torch(state_dict, model)
    assert str(error.value).splitlines()[1:] == [
        "  missing: decode_head.scale_heads.3.4.bn.bias (6,)",
        "  misshaped: neck.lateral_convs.0.conv.weight (12, 9, 1, 1), should be (12, 8, 1, 1)",
    ]
    with pytest.raises(UserError, match="no weights of a segmenter"):
        infer({name: x for name, x in state_dict.items() if not name.startswith("neck.fpn")})


def test_classifiers_and_pyramids_are_told_from_segmenters():
    assert infer(original()) == create_model("fcvit_tiny", **SIZES, num_classes=5)
    assert infer(original(pyramid=True)) == create_backbone("fcvit_tiny", **SIZES)
