"""MMDetection's checkpoints <-> our detector, and a detector that starts from other weights."""

import logging

import detection_golden as golden
import jax
import numpy as np
import pytest
import torch
import torch_reference
from detection_golden import DATA
from equality import assert_same, tensors
from flax import traverse_util
from helpers import said

import fcvit_jax
from fcvit_jax import convert
from fcvit_jax.convert import detectors
from fcvit_jax.convert.layouts import their_shape
from fcvit_jax.convert.weights import abstract_weights, infer
from fcvit_jax.errors import UserError
from fcvit_jax.networks.fcvit import abstract_variables

SIZES = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "mlp_ratios": (2, 2, 1, 1)}
STATE_DICT = {name[3:]: DATA[name].astype(np.float32) for name in DATA if name.startswith("sd/")}
DETECTOR = fcvit_jax.create_detector("fcvit_tiny", **golden.NETWORK)


def detector(**fields):
    return fcvit_jax.create_detector(
        "fcvit_tiny", **{**SIZES, "num_classes": 3, "neck_channels": 8, "box_channels": 6, **fields}
    )


def numbers(model):
    """A whole checkpoint's state dict, of random numbers, by MMDetection's names."""
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.normal(0, 1, x.shape).astype(np.float32), abstract_variables(model))
    return convert.to_torch(variables, model)


def test_conversion_is_exact_and_shapes_tell_the_network():
    variables = convert.from_torch(STATE_DICT, DETECTOR)
    flat = traverse_util.flatten_dict(variables, sep="/")
    assert_same(flat, traverse_util.flatten_dict(golden.tree("sd/"), sep="/"))
    assert_same(convert.to_torch(variables, DETECTOR), STATE_DICT)
    assert infer(STATE_DICT) == infer(flat) == DETECTOR
    without = {name: x for name, x in STATE_DICT.items() if "mask_head" not in name}
    assert infer(without) == DETECTOR.clone(masks=False)
    with pytest.raises(UserError, match="no weights of a detector"):
        infer({name: x for name, x in STATE_DICT.items() if "fc_cls" not in name})


@pytest.mark.parametrize("name, number", [("fcvit_b12", 510), ("fcvit_b24", 942)])
def test_names_and_shapes_are_those_of_the_original_at_full_size(name, number):
    shapes = {path: x.shape for path, x in abstract_weights(fcvit_jax.create_detector(name)).items()}
    theirs = {
        name: their_shape(shapes[path], detectors.layout(path))
        for path, name in detectors.original_names(shapes).items()
    }
    # Theirs has the four counts of batches, too.
    assert len(theirs) + 4 == number
    expected = {
        "neck.lateral_convs.2.conv.weight": (256, 320, 1, 1),
        "neck.fpn_convs.3.conv.weight": (256, 256, 3, 3),
        "rpn_head.rpn_conv.weight": (256, 256, 3, 3),
        "rpn_head.rpn_cls.weight": (3, 256, 1, 1),
        "rpn_head.rpn_reg.bias": (12,),
        "roi_head.bbox_head.fc_cls.weight": (81, 1024),
        "roi_head.bbox_head.fc_reg.weight": (320, 1024),
        "roi_head.bbox_head.shared_fcs.0.weight": (1024, 12544),
        "roi_head.bbox_head.shared_fcs.1.weight": (1024, 1024),
        "roi_head.mask_head.convs.3.conv.weight": (256, 256, 3, 3),
        "roi_head.mask_head.upsample.weight": (256, 256, 2, 2),
        "roi_head.mask_head.conv_logits.weight": (80, 256, 1, 1),
        "backbone.norm6.weight": (512,),
    }
    assert {key: theirs.get(key) for key in expected} == expected


def test_files_round_trip(tmp_path, caplog):
    model = detector()
    state_dict = numbers(model)
    content = {"meta": {"epoch": 12, "CLASSES": ("person",)}, "state_dict": tensors(state_dict), "amp": {}}
    torch.save(content, tmp_path / "epoch_12.pth")
    convert.convert(tmp_path / "epoch_12.pth", tmp_path / "weights.npz")
    convert.convert(tmp_path / "weights.npz", tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert_same({name: x.numpy() for name, x in again.items()}, state_dict)
    assert fcvit_jax.create_detector(**convert.read_metadata(tmp_path / "weights.npz")["model"]) == model
    with caplog.at_level(logging.WARNING):
        variables = convert.load_pretrained(tmp_path / "weights.npz", model, partial=False)
    assert not said(caplog)
    assert_same(convert.to_torch(variables, model), state_dict)
    with pytest.raises(UserError, match="holds a detector: a feature pyramid is needed here"):
        convert.load_pretrained(tmp_path / "weights.npz", model.backbone)


@pytest.mark.parametrize(
    "meta, expected",
    [
        ({"CLASSES": ("a", "b", "c")}, ["a", "b", "c"]),
        ({"dataset_meta": {"classes": ["a", "b", "c"]}}, ["a", "b", "c"]),
        ({"CLASSES": ("a", "b")}, None),
        ("text", None),
    ],
)
def test_names_of_classes_are_kept(tmp_path, meta, expected):
    torch.save({"meta": meta, "state_dict": tensors(numbers(detector()))}, tmp_path / "epoch_12.pth")
    convert.convert(tmp_path / "epoch_12.pth", tmp_path / "weights.npz")
    assert convert.read_metadata(tmp_path / "weights.npz").get("class_names") == expected


@pytest.mark.parametrize("masks", [True, False])
def test_a_mask_head_is_left_out_or_starts_afresh(tmp_path, caplog, masks):
    state_dict, path = numbers(detector(masks=not masks)), tmp_path / "weights.pth"
    torch.save(tensors(state_dict), path)
    model = detector(masks=masks, num_classes=5)
    with caplog.at_level(logging.WARNING):
        loaded = convert.to_torch(convert.load_pretrained(path, model), model)
    what = ("has no mask head", "starts afresh") if masks else ("has a mask head, the model none", "is left out")
    last = "the last layers of the heads start afresh"
    assert said(caplog) == [f"{path} has 3 classes, the model 5 and {what[0]}: {last}, the mask head {what[1]}."]
    assert {name for name in loaded if name not in state_dict} == {x for x in loaded if masks and "mask_head" in x}
    kept = [x for x in loaded if x in state_dict and "fc_" not in x]
    assert_same({x: loaded[x] for x in kept}, {x: state_dict[x] for x in kept})


def test_other_classes_get_new_last_layers(tmp_path, caplog):
    state_dict, path = numbers(detector()), tmp_path / "weights.pth"
    torch.save(tensors(state_dict), path)
    model = detector(num_classes=5)
    with caplog.at_level(logging.WARNING):
        loaded = convert.to_torch(convert.load_pretrained(path, model), model)
    assert said(caplog) == [f"{path} has 3 classes, the model 5: the last layers of the heads start afresh."]
    fresh = {name for name, x in loaded.items() if x.shape != state_dict[name].shape}
    assert fresh == {
        f"roi_head.{layer}.{leaf}"
        for layer in ("bbox_head.fc_cls", "bbox_head.fc_reg", "mask_head.conv_logits")
        for leaf in ("weight", "bias")
    }
    assert_same(*({name: x for name, x in tree.items() if name not in fresh} for tree in (loaded, state_dict)))


@pytest.mark.parametrize("pyramid", [False, True])
def test_a_detector_starts_from_a_classifier_or_a_pyramid(tmp_path, pyramid, caplog):
    shapes = torch_reference.FCViT(**SIZES, num_classes=5, pyramid=pyramid).state_dict()
    rng = np.random.default_rng(1)
    state_dict = {name: np.array(rng.normal(0, 1, tuple(x.shape)), np.float32) for name, x in shapes.items()}
    path, model = tmp_path / "weights.pth", detector()
    torch.save(tensors(state_dict), path)
    with caplog.at_level(logging.WARNING):
        loaded = convert.load_pretrained(path, model)
    what, norms = ("a feature pyramid", "") if pyramid else ("a classifier", "the norms of the pyramid, ")
    assert said(caplog) == [f"{path} holds {what}: {norms}the neck and the heads start afresh."]
    assert jax.tree.map(np.shape, loaded) == jax.tree.map(lambda x: x.shape, abstract_variables(model))
    backbone = convert.to_torch(loaded, model)
    for name, x in state_dict.items():
        if not name.startswith(("head.", "norm.")) and not name.endswith("tracked"):
            np.testing.assert_array_equal(backbone[f"backbone.{name}"], x, err_msg=name)
    assert 0.008 < loaded["params"]["rpn"]["conv"]["kernel"].std() < 0.012
