"""What `benchmarks.train_step --task detection` times: Mask R-CNN here, and torchvision's over the same pyramid."""

import sys
from collections import OrderedDict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Step
from fcvit_jax.data import loader
from fcvit_jax.networks.fcvit import VARIANTS
from fcvit_jax.networks.normalize import normalize_inside
from fcvit_jax.tasks import detection

try:
    import torch
    import torchvision
except (ImportError, RuntimeError):  # the latter where it was built for another PyTorch
    torchvision = None


def read_batch(args):
    """A batch of COCO's recipe: noise with seven rectangles in each image, NumPy arrays by name."""
    height, width = args.image_size
    sizes = {"long": max(height, width), "short": min(height, width)}
    data = detection.open_dataset(dataset="synthetic", batch_size=args.batch_size, **sizes)
    (batch,) = loader.train_batches(data, seed=0, start_step=0, num_steps=1)
    return {name: np.asarray(x) for name, x in batch.items()}


def spread(logits, images):
    """By what to multiply the weights of the classes, and what to add to the background's bias.

    New weights find nothing, and the mask head would have nothing to do. With these, 300 scores of each image are above
    the threshold of 0.05, so that about as many objects are found as may be. Logits are (boxes of all images, classes),
    the background's last.
    """
    scale = 3 / logits[:, :-1].std()
    low, high = -30.0, 30.0
    for _ in range(40):
        middle = (low + high) / 2
        odds = np.exp(scale * logits + np.append(np.zeros(logits.shape[1] - 1), middle))
        above = (odds[:, :-1] / odds.sum(1, keepdims=True) > 0.05).sum()
        low, high = (middle, high) if above > 300 * images else (low, middle)
    return scale, middle


class DetectionStep(Step):
    """The training step of COCO's recipe with AdamW, for a backbone and a batch, from uint8 images."""

    def __init__(self, name, args, mesh):
        self.model = detection.create_model(name, bn_group_size=0, dtype=jnp.dtype(args.dtype))
        self.tx, schedule = detection.make_optimizer(3665, 12, args.batch_size, 12 * 3665)
        self.task, self.mesh, self.batch = detection, mesh, read_batch(args)
        self.static = {
            "model": self.model,
            "tx": self.tx,
            "schedule": schedule,
            "prepare": detection.make_prepare(self.model),
            "loss": detection.loss,
            "mesh": mesh,
        }
        self.batch_shapes = {key: (x.shape, x.dtype) for key, x in self.batch.items()}

    def example_batch(self):
        return self.batch

    def detect(self, variables, images, sizes):
        return detection.detect(self.model, variables, images, sizes, jnp.ones((len(images), 4)))

    def inputs(self):
        """The arguments of `detect`, with weights that find objects."""
        variables = self.create_state().eval_variables
        images, sizes = jnp.asarray(self.batch["image"]), jnp.asarray(self.batch["size"])

        @jax.jit
        def logits(variables):
            pixels = normalize_inside(images, sizes, self.model.mean, self.model.std)
            of_classes = {"capture_intermediates": lambda module, _: module.path == ("box_head", "logits")}
            _, state = self.model.apply(variables, pixels, sizes, mutable=["intermediates"], **of_classes)
            return state["intermediates"]["box_head"]["logits"]["__call__"][0]

        scale, background = spread(np.asarray(logits(variables)), len(images))
        classes = variables["params"]["box_head"]["logits"]
        classes["kernel"] = scale * classes["kernel"]
        classes["bias"] = (scale * classes["bias"]).at[-1].add(background)
        return variables, images, sizes


def torch_network(name):
    """torchvision's Mask R-CNN with COCO's numbers over the PyTorch FCViT of the tests."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from torch_reference import FCViT
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

    class Pyramid(torch.nn.Module):
        out_channels = 256

        def __init__(self):
            super().__init__()
            self.backbone = FCViT(**VARIANTS[name], pyramid=True)
            self.neck = FeaturePyramidNetwork(VARIANTS[name]["dims"], self.out_channels, LastLevelMaxPool())

        def forward(self, x):
            return self.neck(OrderedDict((str(i), x) for i, x in enumerate(self.backbone(x))))

    sides, levels = (32, 64, 128, 256, 512), ["0", "1", "2", "3"]
    return MaskRCNN(
        Pyramid(),
        81,
        rpn_anchor_generator=AnchorGenerator(tuple((side,) for side in sides), ((0.5, 1.0, 2.0),) * len(sides)),
        rpn_pre_nms_top_n_train=2000,
        rpn_post_nms_top_n_train=1000,
        rpn_pre_nms_top_n_test=1000,
        rpn_post_nms_top_n_test=1000,
        box_roi_pool=MultiScaleRoIAlign(levels, 7, 0),
        mask_roi_pool=MultiScaleRoIAlign(levels, 14, 0),
    )


def torch_calls(name, args, device):
    """Forward pass and step of torchvision's, without its own resizing: it gets normalised images of the same size."""
    from torchvision.models.detection.image_list import ImageList

    batch, network = read_batch(args), torch_network(name).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4, weight_decay=1e-4, fused=device == "cuda")
    pixels = torch.tensor(batch["image"] / 64 - 2, dtype=torch.float32, device=device).permute(0, 3, 1, 2).contiguous()
    sizes = [tuple(size) for size in batch["size"].tolist()]
    bits, width = batch["masks"], pixels.shape[3]
    masks = np.unpackbits(bits, axis=3)[:, :, :, :width]
    targets = [
        {
            "boxes": torch.tensor(batch["boxes"][i][used], device=device),
            "labels": torch.tensor(batch["labels"][i][used] + 1, dtype=torch.int64, device=device),
            "masks": torch.tensor(masks[i][used], device=device),
        }
        for i, used in enumerate(batch["valid"])
    ]

    def results(targets):
        maps = network.backbone(pixels)
        proposals, losses = network.rpn(ImageList(pixels, sizes), maps, targets)
        found, others = network.roi_heads(maps, proposals, sizes, targets)
        return found, losses | others

    def autocast():
        return torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16")

    classes = network.roi_heads.box_predictor.cls_score
    handle = classes.register_forward_hook(lambda module, args, out: logits.append(out.float().cpu().numpy()))
    logits = []
    with torch.inference_mode():
        network.eval()
        results(None)
        handle.remove()
        scale, background = spread(np.roll(logits[0], -1, 1), len(sizes))  # torchvision's background comes first
    with torch.no_grad():
        classes.weight *= scale
        classes.bias *= scale
        classes.bias[0] += background

    def forward():
        network.eval()
        with torch.inference_mode(), autocast():
            results(None)

    def step():
        network.train()
        optimizer.zero_grad()
        with autocast():
            losses = results(targets)[1]
        sum(losses.values()).backward()
        optimizer.step()

    return forward, step
