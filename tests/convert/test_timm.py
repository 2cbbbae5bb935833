"""Weights of ViTs and ConvNeXts survive the way from and to timm's names; other published names come to timm's."""

import re
from pathlib import Path

import chex
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import torch_convnext
import torch_vit
from equality import assert_close, nhwc
from flax import traverse_util
from safetensors.numpy import load_file, save_file
from timm_equality import variables_of, weights_of

from fcvit_jax import convert
from fcvit_jax.convert import convnext, files, vit
from fcvit_jax.convert.layouts import to_theirs
from fcvit_jax.errors import UserError
from fcvit_jax.networks.convnext import ConvNeXt, create_convnext
from fcvit_jax.networks.fcvit import FCViT, abstract_variables, create_backbone
from fcvit_jax.networks.normalize import MEAN
from fcvit_jax.networks.vit import ViT, create_vit
from fcvit_jax.run import saved

DATA = Path(__file__).parent.parent / "data" / "attention"
VIT = {"dim": 64, "depth": 2, "heads": 1, "patch_size": 4, "image_size": 12, "num_classes": 3}
CONVNEXT = {"depths": (1, 2, 0, 1), "dims": (4, 8, 12, 16), "num_classes": 3}
VITS = [{}, {"distilled": True}, {"layer_scale_init": 1e-5, "mlp_ratio": 3}]
CONVNEXTS = [{}, {"layer_scale_init": None}]
NETWORKS = [
    *((ViT(**VIT, **options), torch_vit.ViT(**VIT | options), vit) for options in VITS),
    *(
        (ConvNeXt(**CONVNEXT, **options), torch_convnext.ConvNeXt(**CONVNEXT, **options), convnext)
        for options in CONVNEXTS
    ),
]


def shapes(arrays):
    return {name: x.shape for name, x in arrays.items()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(actual[name], x, err_msg=name)


@pytest.mark.parametrize(("model", "theirs", "family"), NETWORKS)
def test_conversion_is_exact_and_shapes_tell_the_network(model, theirs, family):
    weights = weights_of(theirs, 0)
    flat = traverse_util.flatten_dict(variables_of(weights, model, family), sep="/")
    names = family.original_names(flat)
    assert_same({names[path]: to_theirs(x, family.layout(path)) for path, x in flat.items()}, weights)
    assert family.infer_model(shapes(weights)) == model
    assert family.infer_model(shapes(flat)) == model
    recognise = {vit: vit.is_vit, convnext: convnext.is_convnext}
    for other, recognises in recognise.items():
        assert recognises(weights) == recognises(flat) == (other is family)
    headless = {name: x.shape for name, x in weights.items() if not re.match(r"head(_dist)?\.(fc|weight|bias)", name)}
    assert family.infer_model(headless) == model.clone(num_classes=0)


def test_variants_are_recognised():
    base = {**VIT, "dim": 768, "depth": 12, "patch_size": 16, "image_size": 224, "num_classes": 1000}
    assert vit.infer_model(shapes(torch_vit.ViT(**base, distilled=False).state_dict())) == create_vit(
        "deit_base_patch16_224"
    )
    tiny = torch_convnext.ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768), 1000)
    assert convnext.infer_model(shapes(tiny.state_dict())) == create_convnext("convnext_tiny")


@pytest.mark.parametrize("name", ["hf_vit", "hf_deit_distilled"])
def test_files_of_hugging_face_give_its_outputs(name):
    with np.load(DATA / "hf_expected.npz") as file:
        expected = {key.removeprefix(f"{name}/"): x for key, x in file.items() if key.startswith(name)}
    weights, metadata = files.read(DATA / f"{name}.safetensors", None)
    assert metadata == {}
    weights = vit.timm_names(weights)
    model = vit.infer_model(shapes(weights), heads=3)
    variables = variables_of(weights, model, vit)
    images = nhwc(expected["images_nchw"].astype(np.float32))
    run = jax.jit(lambda v, x: model.apply(v, x, method="all_logits", mutable=["intermediates"]))
    logits, state = run(variables, images)
    for i in range(model.depth):
        attention = state["intermediates"][f"block_{i}"]["attention"][0]
        np.testing.assert_allclose(attention, expected[f"attn{i}"], rtol=0, atol=1e-5)
    for what, x in zip(("logits_cls", "logits_dist") if model.distilled else ("logits",), logits, strict=True):
        assert_close(x, expected[what], what)
    assert_close(sum(logits) / len(logits), expected["logits"], "logits")


# timm's name -> the name in a file of Dinov2's or of ConvNeXt's authors.
DINOV2 = (
    (r"^(cls_token|mask_token)", r"embeddings.\1"),
    (r"^pos_embed", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"^blocks", "encoder.layer"),
    (r"attn\.proj", "attention.output.dense"),
    (r"ls(\d)\.gamma", r"layer_scale\1.lambda1"),
    (r"^norm\.", "layernorm."),
)
AUTHORS = (
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
    (r"\.blocks\.", "."),
    (r"conv_dw", "dwconv"),
    (r"mlp\.fc", "pwconv"),
    (r"^head\.norm", "norm"),
    (r"^head\.fc", "head"),
)


def renamed(weights, rows):
    found = {}
    for name, x in weights.items():
        for pattern, replacement in rows:
            name = re.sub(pattern, replacement, name)
        found[name] = x
    return found


def test_dinov2_and_pretraining_leave_tensors_out_and_say_so(caplog):
    fields = {**VIT, "layer_scale_init": 1e-5}
    weights = {name: x for name, x in weights_of(torch_vit.ViT(**fields), 0).items() if not name.startswith("head")}
    theirs = renamed(weights, DINOV2) | {"embeddings.mask_token": np.zeros((1, 64), np.float32)}
    for name in [name for name in theirs if "qkv" in name]:
        for part, x in zip(("query", "key", "value"), np.split(theirs.pop(name), 3), strict=True):
            theirs[name.replace("attn.qkv", f"attention.attention.{part}")] = x
    with caplog.at_level("WARNING", "fcvit_jax"):
        assert_same(vit.timm_names(theirs), weights)
        assert "mask_token" in caplog.text
        assert_same(vit.timm_names(weights | {"pre_logits.fc.weight": np.zeros(3)}), weights)
        assert "pre_logits.fc.weight" in caplog.text
    assert vit.infer_model(shapes(weights)) == ViT(**{**fields, "num_classes": 0})


def test_the_authors_convnext_comes_to_timms_names():
    weights = weights_of(torch_convnext.ConvNeXt(**CONVNEXT), 0)
    theirs = renamed(weights, AUTHORS)
    assert {"downsample_layers.3.1.weight", "stages.1.1.pwconv2.bias", "norm.weight", "head.weight"} <= theirs.keys()
    assert convnext.is_convnext(theirs)
    assert_same(convnext.timm_names(theirs), weights)
    assert_same(convnext.timm_names(weights), weights)


def test_networks_that_are_none_of_these_are_refused_in_a_line():
    weights = weights_of(torch_vit.ViT(**VIT), 0)
    cases = {
        r"DeiT III": (lambda x: vit.infer_model(shapes(x)), weights | {"pos_embed": weights["pos_embed"][:, 1:]}),
        r"8 rows.* square": (
            lambda x: vit.infer_model(shapes(x)),
            weights | {"dist_token": weights["cls_token"], "pos_embed": np.zeros((1, 8, 64))},
        ),
        r"cls_token": (lambda x: vit.infer_model(shapes(x)), {k: x for k, x in weights.items() if k != "cls_token"}),
        r"heads": (lambda x: vit.infer_model(shapes(x)), weights | {"cls_token": np.zeros((1, 1, 48))}),
        r"stem\.0": (lambda x: convnext.infer_model(shapes(x)), weights),
    }
    for pattern, (read, arrays) in cases.items():
        with pytest.raises(UserError, match=pattern) as error:
            read(arrays)
        assert "\n" not in str(error.value)


def test_weights_for_images_that_are_not_square(caplog):
    model = ViT(**{**VIT, "image_size": (3 * VIT["patch_size"], 7 * VIT["patch_size"])})
    square = weights_of(torch_vit.ViT(**VIT), 0)
    resized = vit.fit_positions(square, model)
    theirs = torch_vit.ViT(**VIT)
    theirs.load_state_dict({name: torch.from_numpy(x) for name, x in square.items()})
    np.testing.assert_allclose(resized["pos_embed"][0], theirs.positions((3, 7)).detach().numpy()[0], atol=1e-5)
    assert "resized to 3 x 7" in caplog.text
    # Once they are the network's own, they stay, and come back as they were.
    variables = convert.from_torch(resized, model)
    assert_same(convert.to_torch(variables, model), resized)
    assert vit.fit_positions(resized, model)["pos_embed"] is resized["pos_embed"]
    with pytest.raises(UserError, match="22 rows, is no square grid"):
        vit.infer_model({name: x.shape for name, x in resized.items()})
    # As many patches as a square has: they are believed to be the network's own, and a warning says so.
    caplog.clear()
    model = ViT(**{**VIT, "image_size": (VIT["patch_size"], 9 * VIT["patch_size"])})
    assert vit.fit_positions(square, model)["pos_embed"] is square["pos_embed"]
    assert "taken for those of 1 x 9" in caplog.text


def test_positions_are_resized_to_the_models_grid(caplog):
    weights = weights_of(torch_vit.ViT(**VIT), 0)
    flat = traverse_util.flatten_dict(variables_of(weights, ViT(**VIT), vit), sep="/")
    larger = ViT(**{**VIT, "image_size": 20})
    theirs = torch_vit.ViT(**VIT)
    theirs.load_state_dict({name: torch.from_numpy(x) for name, x in weights.items()})
    expected = theirs.positions((5, 5)).detach().numpy()
    with caplog.at_level("WARNING", "fcvit_jax"):
        assert_close(vit.fit_positions(weights, larger)["pos_embed"], expected, "positions")
        assert_close(vit.fit_positions(flat, larger)["params/pos_embed"], expected[0], "positions")
        assert caplog.text.count("3 x 3 patches are resized to 5 x 5") == 2
    assert_same(vit.fit_positions(weights, ViT(**VIT)), weights)


def test_safetensors_are_read(tmp_path):
    path = tmp_path / "weights.safetensors"
    weights = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "half": np.ones(3, np.float16)}
    save_file(weights | {"b": weights["a"].astype(ml_dtypes.bfloat16)}, path, {"about": '{"class_names": ["x"]}'})
    found, metadata = files.read(path, None)
    assert metadata == files.read_metadata(path) == {"class_names": ["x"]}
    assert found["b"].dtype == np.float32
    assert_same(found, weights | {"b": weights["a"]})
    assert_same(load_file(DATA / "hf_vit.safetensors"), files.read(DATA / "hf_vit.safetensors", None)[0])
    with pytest.raises(UserError, match="moving averages"):
        files.read(path, ema=True)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="damaged"):
        files.read(path, None)


@pytest.mark.parametrize(("model", "theirs", "family"), NETWORKS)
def test_state_dicts_convert_and_files_of_them_round_trip(model, theirs, family, tmp_path):
    weights = weights_of(theirs, 0)
    variables = convert.from_torch({name: torch.from_numpy(x) for name, x in weights.items()}, model)
    assert_same(convert.to_torch(variables, model), weights)
    source, npz, pth = (tmp_path / name for name in ("model.safetensors", "model.npz", "model.pth"))
    save_file(weights, source)
    convert.convert(source, npz)
    convert.convert(npz, pth)
    assert_same({name: x.numpy() for name, x in torch.load(pth, weights_only=True).items()}, weights)
    expected = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(variables)}
    for path in (source, npz, pth):
        found = convert.load_pretrained(path, model)
        assert_same({jax.tree_util.keystr(place): x for place, x in jax.tree.leaves_with_path(found)}, expected)


def test_the_metadata_name_the_nearest_variant_or_the_one_that_is_given(tmp_path, caplog):
    source, dest = tmp_path / "model.safetensors", tmp_path / "model.npz"
    sizes = {"dim": 192, "depth": 12, "heads": 3, "patch_size": 16, "image_size": 224, "num_classes": 2}
    save_file(weights_of(torch_vit.ViT(**sizes), 0), source)
    with caplog.at_level("WARNING", "fcvit_jax"):
        convert.convert(source, dest)
        assert "mean" in caplog.text
    assert convert.read_metadata(dest)["model"] == {"name": "deit_tiny_patch16_224", "num_classes": 2}
    convert.convert(source, dest, name="vit_tiny_patch16_224")
    assert convert.read_metadata(dest)["model"] == {"name": "vit_tiny_patch16_224", "num_classes": 2}
    with pytest.raises(UserError, match="fit the model"):
        convert.convert(source, dest, name="vit_small_patch16_224")
    half, metadata = (saved.load(f"{source}:vit_tiny_patch16_224")[i] for i in (1, 3))
    assert half.mean == half.std == (0.5, 0.5, 0.5) and metadata["crop_pct"] == 0.9
    assert saved.load(source).model.mean == MEAN


def test_what_tells_deit_and_dinov2_apart_from_vit_needs_no_name(tmp_path, caplog):
    for i, options in enumerate(VITS[1:]):
        save_file(weights_of(torch_vit.ViT(**VIT | options), 0), tmp_path / f"{i}.safetensors")
        with caplog.at_level("WARNING", "fcvit_jax"):
            assert convert.load_network(tmp_path / f"{i}.safetensors")[0].mean == MEAN
    assert "mean" not in caplog.text


def test_a_file_of_another_task_is_refused(tmp_path):
    backbone = create_backbone("fcvit_tiny", depths=(1,), dims=(16,), mlp_ratios=(1,), kernel_sizes=(3,))
    variables = jax.tree.map(lambda x: np.ones(x.shape, np.float32), abstract_variables(backbone))
    np.savez(tmp_path / "pyramid.npz", **traverse_util.flatten_dict(variables, sep="/"))
    with pytest.raises(UserError, match="pyramid.npz holds a feature pyramid, [^\n]*classification"):
        saved.load(tmp_path / "pyramid.npz")


def test_pretrained_weights_get_new_heads_and_positions_and_nothing_else(caplog):
    model = ViT(dim=24, depth=2, heads=3, patch_size=8, image_size=40, num_classes=7, distilled=True)
    path = DATA / "hf_deit_distilled.safetensors"
    with caplog.at_level("WARNING", "fcvit_jax"):
        params = convert.load_pretrained(path, model)["params"]
    assert "5 classes, the model 7" in caplog.text and "3 x 3 patches are resized to 5 x 5" in caplog.text
    same = convert.load_pretrained(path, model.clone(num_classes=5, image_size=24))["params"]
    assert params["head"]["kernel"].shape == params["head_dist"]["kernel"].shape == (24, 7)
    assert params["pos_embed"].shape == (27, 24)
    np.testing.assert_array_equal(params["pos_embed"][:2], same["pos_embed"][:2])
    kept = [name for name in same if name not in ("head", "head_dist", "pos_embed")]
    chex.assert_trees_all_equal([params[name] for name in kept], [same[name] for name in kept])


def test_other_networks_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    weights = weights_of(torch_vit.ViT(**VIT), 0)
    save_file(weights, path)
    for model, message in (
        (ViT(**{**VIT, "depth": 3}), r"another network.* depth 2.* depth 3[^\n]*$"),
        (ConvNeXt(**CONVNEXT), "Vision Transformer: a ConvNeXt is needed"),
        (FCViT(num_classes=3, depths=(1,), dims=(16,), mlp_ratios=(1,)), "Vision Transformer: a classifier is needed"),
    ):
        with pytest.raises(UserError, match=message):
            convert.load_pretrained(path, model)
    broken = {name: x for name, x in weights.items() if name != "norm.bias"} | {"extra": np.zeros(2, np.float32)}
    save_file(broken | {"blocks.0.mlp.fc1.bias": np.zeros(3, np.float32)}, path)
    with pytest.raises(UserError) as error:
        convert.load_pretrained(path, ViT(**VIT))
    for problem in ("missing: norm.bias (64,)", "unexpected: extra (2,)", "misshaped: blocks.0.mlp.fc1.bias (3,)"):
        assert problem in str(error.value)
