"""A small Mask R-CNN of MMDetection's: its weights, a batch of two images, and what came out; see `DATA`'s names.

The second image is smaller than the canvas. The samples that the losses are taken over are recorded, too.
"""

import json
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util

import fcvit_jax
from fcvit_jax.convert.fcvit import layout, original_names
from fcvit_jax.convert.layouts import to_ours
from fcvit_jax.networks.boxes import Samples
from fcvit_jax.networks.objects import Objects

DATA = np.load(Path(__file__).parent / "data" / "detection" / "detector_small.npz")
META = json.loads(str(DATA["meta"]))
PLACES = 5  # for objects; the images have 4 and 3

NETWORK = {
    "num_classes": META["ncls"],
    "neck_channels": META["fpn"],
    "box_channels": META["fc"],
    "depths": META["layers"],
    "dims": META["dims"],
    "mlp_ratios": META["ratios"],
}
DETECTOR = fcvit_jax.create_detector(
    "fcvit_tiny",
    **NETWORK,
    train_nms_pre=META["pre"][0],
    nms_pre=META["pre"][1],
    train_proposals=META["post"][0],
    proposals=META["post"][1],
    rpn_samples=META["rpn_num"],
    roi_samples=META["rcnn_num"],
    max_detections=META["max_dets"],
    finest_size=META["finest"],
    share_blocks=True,
    roi_chunk=24,  # several chunks, of which some have no positives and no boxes of some levels
)
# Our paths of the heads and MMDetection's names of them, written down here once more.
HEADS = {
    **{f"neck/lateral_{i}": f"neck.lateral_convs.{i}.conv" for i in range(4)},
    **{f"neck/output_{i}": f"neck.fpn_convs.{i}.conv" for i in range(4)},
    "rpn/conv": "rpn_head.rpn_conv",
    "rpn/logits": "rpn_head.rpn_cls",
    "rpn/deltas": "rpn_head.rpn_reg",
    **{f"box_head/hidden_{i}": f"roi_head.bbox_head.shared_fcs.{i}" for i in range(2)},
    "box_head/logits": "roi_head.bbox_head.fc_cls",
    "box_head/deltas": "roi_head.bbox_head.fc_reg",
    **{f"mask_head/conv_{i}": f"roi_head.mask_head.convs.{i}.conv" for i in range(4)},
    "mask_head/doubling": "roi_head.mask_head.upsample",
    "mask_head/logits": "roi_head.mask_head.conv_logits",
}


def kernel_of(x, path, shape):
    """MMDetection's tensor as our kernel of a shape."""
    if path == "box_head/hidden_0":  # channel after channel of a map of 7x7
        return np.transpose(x.reshape(-1, shape[2], 7, 7), (2, 3, 1, 0))
    if path == "mask_head/doubling":
        return np.transpose(x, (2, 3, 0, 1))
    return np.transpose(x, (2, 3, 1, 0)).reshape(shape) if x.ndim == 4 else x.T


def tree(prefix):
    """What the file has of every tensor ("sd/": the weights, "grad/": their gradients) as our variables."""
    abstract = jax.eval_shape(lambda: DETECTOR.init(jax.random.key(0), IMAGES))
    flat = traverse_util.flatten_dict(abstract, sep="/")
    inner = {path: path.replace("/backbone", "") for path in flat if "/backbone/" in path}
    names = original_names({inner[path]: flat[path].shape for path in inner})
    found = {}
    for path, x in flat.items():
        if path in inner:
            name = f"{prefix}backbone.{names[inner[path]]}"
            if name in DATA:  # running averages have no gradients
                found[path] = to_ours(DATA[name].astype(np.float32), layout(inner[path]))
        else:
            place, leaf = path.removeprefix("params/").rsplit("/", 1)
            name = f"{prefix}{HEADS[place]}.{'weight' if leaf == 'kernel' else 'bias'}"
            theirs = DATA[name].astype(np.float32)
            found[path] = kernel_of(theirs, place, x.shape) if leaf == "kernel" else theirs
        assert path not in found or found[path].shape == x.shape
    return traverse_util.unflatten_dict(found, sep="/")


def nhwc(name):
    return np.moveaxis(DATA[name], 1, -1).astype(np.float32)


def bits(name, width):
    return np.unpackbits(DATA[name], axis=-1)[..., :width].astype(bool)


def of_images(key, dtype):
    return np.array([image[key] for image in META["images"]], dtype)


IMAGES = nhwc("images_nchw")
SIZES, PADDED = of_images("img_shape", np.int32), of_images("pad_shape", np.int32)
SCALE_FACTORS = of_images("scale_factor", np.float32)


def batch_of_objects():
    """The objects in their first places; what is in the others must not matter."""
    boxes, labels = np.full((2, PLACES, 4), np.nan, np.float32), np.full((2, PLACES), 3, np.int32)
    valid, masks = np.zeros((2, PLACES), bool), np.ones((2, PLACES, 128, 160), bool)
    for i in range(2):
        number = len(DATA[f"gt_boxes{i}"])
        boxes[i, :number], labels[i, :number] = DATA[f"gt_boxes{i}"], DATA[f"gt_labels{i}"]
        valid[i, :number] = True
        height, width = PADDED[i]
        masks[i, :number] = False
        masks[i, :number, :height, :width] = bits(f"gt_masks{i}", width)
    return Objects(boxes, labels, valid, masks)


def _samples(positives, negatives, objects, number):
    place = np.arange(number)
    index = np.concatenate([positives, negatives])
    valid = place < len(index)
    return Samples(
        np.pad(index, (0, number - len(index))),
        np.pad(objects, (0, number - len(objects))),
        place < len(positives),
        valid,
    )


def recorded_samples():
    """The anchors and the boxes that the losses were taken over."""
    anchors, rois = [], []
    for i in range(2):
        positives, negatives = DATA[f"train/rpn_pos{i}"], DATA[f"train/rpn_neg{i}"]
        objects = DATA[f"train/rpn_assigned{i}"][positives] - 1
        anchors.append(_samples(positives, negatives, objects, META["rpn_num"]))
        number = len(DATA[f"gt_boxes{i}"])
        # Ours count the unused places of objects, too.
        positives, negatives = (
            np.where(index < number, index, index + PLACES - number)
            for index in (DATA[f"train/rcnn_pos{i}"], DATA[f"train/rcnn_neg{i}"])
        )
        rois.append(_samples(positives, negatives, DATA[f"train/rcnn_pos_gt{i}"], META["rcnn_num"]))
    return [jax.tree.map(lambda *x: np.stack(x), *images) for images in (anchors, rois)]
