"""Mask R-CNN (He et al., 2017) over a pyramid of features, as MMDetection 2.19 trains and evaluates it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from fcvit_jax.depthwise.spread import per_device
from fcvit_jax.errors import UserError, check_range
from fcvit_jax.networks import boxes as box_lib
from fcvit_jax.networks import rpn
from fcvit_jax.networks.boxes import Samples
from fcvit_jax.networks.chunks import in_chunks
from fcvit_jax.networks.fcvit import Backbone, create_backbone
from fcvit_jax.networks.fpn import FPN, OverBackbone, init_around_backbone
from fcvit_jax.networks.masks import crop_masks
from fcvit_jax.networks.objects import Detections, Objects
from fcvit_jax.networks.roi_align import pyramid_roi_align
from fcvit_jax.networks.roi_heads import STDS, BoxHead, MaskHead, mask_loss, roi_losses, sample_rois, select
from fcvit_jax.networks.rpn import RPN, Levels, Proposals

Maps = Sequence[jax.Array]


class MaskRCNN(OverBackbone, nn.Module):
    """A detector: boxes, classes and masks of the objects in images; made by `create_detector`.

    Example::

        detector = fcvit_jax.create_detector("fcvit_s12", num_classes=80)
        variables = jax.jit(detector.init)(jax.random.key(0), images)             # (N, H, W, 3) float, normalised
        found = detector.apply(variables, images)                                 # Detections
        losses, updates = detector.apply(                                         # in training
            variables, images, objects, sizes, key, method="losses", mutable=["batch_stats"]
        )

    Images lie at the top left of a canvas that the batch shares; `sizes` are theirs. The losses are averages over
    groups of images, which are those that share batch statistics (`bn_group_size` of the backbone).

    Attributes:
      backbone: the network that gives the pyramid: images -> four maps of strides 4, 8, 16 and 32.
      num_classes: kinds of objects.
      neck_channels: of the feature pyramid network, the RPN and the mask head.
      box_channels: of the box head's hidden layers.
      masks: whether there is a mask branch.
      mask_padding: training, too, sees each image as if it were alone; False: padding takes part in all statistics over
        positions, as in the original's training.
      train_nms_pre: boxes of each level that take part in the suppression that gives proposals, in training.
      train_proposals: proposals of an image in training.
      nms_pre: as `train_nms_pre`, in evaluation.
      proposals: as `train_proposals`, in evaluation.
      rpn_samples: anchors of an image that the RPN is trained on, at most half of them positive.
      roi_samples: boxes of an image that the heads are trained on, at most a quarter of them positive.
      score_threshold: what the score of a detection must be above.
      nms_threshold: the highest intersection over union of two detections of a class.
      max_detections: of an image.
      finest_size: the finest map has the features of boxes whose sqrt(area) is below twice this many pixels.
      roi_chunk: boxes of an image whose features are computed at once, and half as many masks; fewer take less memory.
    """

    backbone: Backbone
    num_classes: int = 80
    neck_channels: int = 256
    box_channels: int = 1024
    masks: bool = True
    mask_padding: bool = True
    train_nms_pre: int = 2000
    train_proposals: int = 1000
    nms_pre: int = 1000
    proposals: int = 1000
    rpn_samples: int = 256
    roi_samples: int = 512
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    max_detections: int = 100
    finest_size: float = 56
    roi_chunk: int = 32

    def setup(self) -> None:
        dtypes = {"dtype": self.backbone.dtype, "param_dtype": self.backbone.param_dtype}
        xavier = nn.initializers.xavier_uniform()
        self._neck = FPN(self.neck_channels, kernel_init=xavier, name="neck", **dtypes)
        self._rpn = RPN(self.neck_channels, name="rpn", **dtypes)
        self._box_head = BoxHead(self.num_classes, self.box_channels, name="box_head", **dtypes)
        if self.masks:
            self._mask_head = MaskHead(self.num_classes, self.neck_channels, name="mask_head", **dtypes)

    def __call__(
        self, images: jax.Array, sizes: jax.Array | None = None, scale_factors: jax.Array | None = None
    ) -> Detections:
        """What is in the images, each as if it were alone: padding beyond the next multiple of 32 pixels is ignored.

        Args:
          images: (N, H, W, 3), float, normalised, with zeros around the images.
          sizes: (N, 2) int32, height and width in pixels of each image on the canvas; None: as large as the canvas.
          scale_factors: (N, 4) float32, pixels of the canvas per pixel of the original image along x, y, x and y; None:
            the images are the original ones.

        Returns:
          `max_detections` places for each image.
        """
        padded = None if sizes is None else box_lib.padded_size(sizes)
        maps = self.neck(images, sizes=padded)
        if sizes is None:
            sizes = jnp.broadcast_to(jnp.array(images.shape[1:3]), (len(images), 2))
        return self.detect(maps, sizes, scale_factors, padded)

    def neck(self, images: jax.Array, train: bool = False, sizes: jax.Array | None = None) -> tuple[jax.Array, ...]:
        """The feature pyramid.

        Args:
          images: (N, H, W, 3), float, normalised.
          train: batch statistics, dropout and drop-path as in training.
          sizes: (N, 2) int32, height and width in pixels of the part of the canvas, from its top left, that each image
            has: results are then those of the image alone, and 0 beyond it. None: all of it.

        Returns:
          Five maps (N, ceil(H / s), ceil(W / s), neck_channels), with s = 4, 8, 16, 32 and 64.
        """
        cells = None if sizes is None else -(-sizes // 4)
        maps = self._neck(self.backbone(images, train, sizes), cells)
        return (*maps, maps[-1][:, ::2, ::2])

    def rpn(self, images: jax.Array, train: bool = False, sizes: jax.Array | None = None) -> Levels:
        """For each of the five maps of `neck`, whose arguments it has: logits (N, h, w, 3) and deltas (N, h, w, 12)."""
        return self._rpn(self.neck(images, train, sizes))

    def rpn_head(self, maps: Maps) -> Levels:
        """As `rpn`, of the maps."""
        return self._rpn(maps)

    def box_head(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(R, 7, 7, C) -> float32 logits (R, num_classes + 1), background last, and deltas (R, 4 * num_classes)."""
        return self._box_head(features)

    def mask_head(self, features: jax.Array) -> jax.Array:
        """(R, 14, 14, C) -> logits (R, 28, 28, num_classes), float32."""
        if not self.masks:
            raise UserError("This detector has no mask branch: create it with masks=True.")
        return self._mask_head(features)

    def losses(
        self, images: jax.Array, objects: Objects, sizes: jax.Array, key: jax.Array, train: bool = True
    ) -> dict[str, jax.Array]:
        """The losses of a batch, as `sampled_losses` gives them, with samples drawn from a key.

        Args:
          images: (N, H, W, 3), float, normalised, with zeros around the images.
          objects: what is in them.
          sizes: (N, 2) int32, height and width in pixels of each image on the canvas.
          key: random key.
          train: batch statistics, dropout and drop-path as in training.
        """
        padded = box_lib.padded_size(sizes) if self.mask_padding else None
        maps = self.neck(images, train, padded)
        levels = self.rpn_head(maps)
        found = rpn.propose(levels, sizes, pre=self.train_nms_pre, number=self.train_proposals, padded=padded)
        of_anchors, of_rois = self.draw_samples(levels, found, objects, sizes, key)
        return self.sampled_losses(maps, levels, found, objects, of_anchors, of_rois, padded)

    def draw_samples(
        self, levels: Levels, found: Proposals, objects: Objects, sizes: jax.Array, key: jax.Array
    ) -> tuple[Samples, Samples]:
        """Draws what `sampled_losses` are taken over: samples of anchors and of boxes.

        Args:
          levels, found: as in `sampled_losses`.
          objects, sizes, key: as in `losses`; objects without width or height are left out.
        """
        has_area = (objects.boxes[..., 2:] > objects.boxes[..., :2]).all(-1)
        objects = objects._replace(valid=objects.valid & has_area)
        keys = jax.random.split(key, (2, len(sizes)))
        draw = jax.vmap(functools.partial(rpn.sample_anchors, number=self.rpn_samples), (0, None, 0, 0, 0))
        inside = rpn.inside(levels, box_lib.padded_size(sizes))
        of_anchors = draw(keys[0], rpn.anchors(levels), inside, objects.boxes, objects.valid)
        draw = jax.vmap(functools.partial(sample_rois, number=self.roi_samples))
        of_rois = draw(keys[1], found.boxes, found.valid, objects.boxes, objects.valid)
        return of_anchors, of_rois

    def sampled_losses(
        self,
        maps: Maps,
        levels: Levels,
        found: Proposals,
        objects: Objects,
        of_anchors: Samples,
        of_rois: Samples,
        padded: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """The losses for given samples.

        Args:
          maps: as `neck` gives them.
          levels: as `rpn_head` gives them.
          found: proposals of each image, as `rpn.propose` gives them.
          objects: what is in the images.
          of_anchors: of each image, (N, rpn_samples); `index` is that of the anchor.
          of_rois: of each image, (N, roi_samples), positives in the first quarter; `index` is a row of the objects'
            boxes followed by the proposals'.
          padded: as in `detect`.

        Returns:
          "loss", the sum of its parts "rpn_class_loss", "rpn_box_loss", "class_loss", "box_loss" and, where masks are
          trained, "mask_loss"; and "class_accuracy", from 0 to 1, of the sampled boxes; each () float32.
        """
        logits, deltas = rpn.flatten(levels)
        loss_of_anchors = jax.vmap(rpn.losses, (0, 0, None, 0, 0))
        entropy, distance, number = loss_of_anchors(logits, deltas, rpn.anchors(levels), of_anchors, objects.boxes)
        losses = {"rpn_class_loss": self._mean(entropy, number), "rpn_box_loss": self._mean(distance, number)}

        candidates = jnp.concatenate([objects.boxes, found.boxes], 1)
        rois = jax.lax.stop_gradient(jnp.take_along_axis(candidates, of_rois.index[..., None], 1))
        logits, deltas = self._classify(self._features(maps, rois, 7, padded))
        sums = jax.vmap(roi_losses)(logits, deltas, rois, of_rois, objects.boxes, objects.labels)
        losses["class_loss"] = self._mean(sums.class_loss, sums.number)
        losses["box_loss"] = self._mean(sums.box_loss, sums.number)

        if self.masks:
            if objects.masks is None:
                raise UserError("The batch has no masks: create the detector with masks=False to train boxes alone.")
            of_masks = jax.tree.map(lambda x: x[:, : self.roi_samples // 4], of_rois)
            losses["mask_loss"] = self._mask_loss(maps, rois[:, : self.roi_samples // 4], of_masks, objects, padded)
        total = sum(losses.values())
        return {"loss": total, **losses, "class_accuracy": self._mean(sums.correct, sums.number)}

    def _mask_loss(
        self, maps: Maps, rois: jax.Array, samples: Samples, objects: Objects, padded: jax.Array | None
    ) -> jax.Array:
        positive = samples.positive & samples.valid
        labels = jnp.take_along_axis(objects.labels, samples.object, 1)
        logits = self._masks(self._features(maps, rois, 14, padded, positive), labels, positive)

        def targets(masks, boxes, index, rows, columns):
            return crop_masks(masks, boxes, index, rows=rows, columns=columns, chunk=self.roi_chunk) >= 0.5

        targets = jax.vmap(targets)(objects.masks, rois, samples.object, objects.rows, objects.columns)
        return self._mean(*jax.vmap(mask_loss)(logits, targets, positive))

    def detect(
        self, maps: Maps, sizes: jax.Array, scale_factors: jax.Array | None = None, padded: jax.Array | None = None
    ) -> Detections:
        """What is in images, given the maps of `neck`.

        Args:
          maps: as `neck` gives them.
          sizes: (N, 2) int32, height and width in pixels of each image.
          scale_factors: as in `__call__`.
          padded: (N, 2) int32, the sizes with which the maps were made, if not the canvas.
        """
        if scale_factors is None:
            scale_factors = jnp.ones((len(sizes), 4))
        levels = self.rpn_head(maps)
        found = rpn.propose(levels, sizes, pre=self.nms_pre, number=self.proposals, padded=padded)
        logits, deltas = self._classify(self._features(maps, found.boxes, 7, padded, found.valid))
        deltas = deltas.reshape(*logits.shape[:2], self.num_classes, 4)
        scores = jax.nn.softmax(logits)[..., :-1]
        decode = jax.vmap(lambda rois, deltas, size, scale: box_lib.decode(rois[:, None], deltas, STDS, size) / scale)
        candidates = decode(found.boxes, deltas, sizes, scale_factors)
        thresholds = {"score_threshold": self.score_threshold, "nms_threshold": self.nms_threshold}
        index, scores, valid = select(candidates, scores, found.valid, number=self.max_detections, **thresholds)
        candidates = candidates.reshape(len(sizes), -1, 4)
        boxes = jnp.where(valid[..., None], jnp.take_along_axis(candidates, index[..., None], 1), 0)
        labels = jnp.where(valid, index % self.num_classes, 0)
        masks = None
        if self.masks:
            features = self._features(maps, boxes * scale_factors[:, None], 14, padded, valid)
            masks = jax.nn.sigmoid(self._masks(features, labels, valid))
        return Detections(boxes, scores, labels, valid, masks)

    def _features(
        self, maps: Maps, boxes: jax.Array, size: int, padded: jax.Array | None, used: jax.Array | None = None
    ) -> jax.Array:
        """Of the boxes (N, R, 4) in the places that are used (N, R): (N, R, size, size, C)."""

        def pool(rows, _):
            maps, boxes, padded, used = rows
            options = {"finest_size": self.finest_size, "chunk": self.roi_chunk}
            return pyramid_roi_align(maps, boxes, size=size, image_size=padded, used=used, **options)

        return per_device(pool, (tuple(maps[:4]), boxes, padded, used), ())

    def _classify(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`box_head` of features (N, R, 7, 7, C): logits (N, R, num_classes + 1), deltas (N, R, 4 * num_classes)."""
        outputs = self.box_head(features.reshape(-1, *features.shape[2:]))
        return tuple(x.reshape(*features.shape[:2], -1) for x in outputs)

    def _masks(self, features: jax.Array, labels: jax.Array, used: jax.Array) -> jax.Array:
        """Logits (N, R, 28, 28) of the mask of each box's class.

        Args:
          features: (N, R, 14, 14, C).
          labels: (N, R) int.
          used: (N, R) bool; chunks of places that no image uses are left out, and have zeros.
        """
        if self.is_initializing():
            logits = self.mask_head(features.reshape(-1, *features.shape[2:])).reshape(*labels.shape, 28, 28, -1)
            return jnp.take_along_axis(logits, labels[..., None, None, None], -1)[..., 0]
        head, variables = self._mask_head.unbind()

        def apply(variables, features, labels):
            logits = head.apply(variables, features.reshape(-1, *features.shape[2:]), labels.reshape(-1))
            return logits.reshape(*labels.shape, *logits.shape[1:])

        def of_device(rows, variables):
            def of_chunk(features, labels, used):
                nothing = jnp.zeros((*labels.shape, 28, 28), jnp.float32)
                return jax.lax.cond(used.any(), lambda: apply(variables, features, labels), lambda: nothing)

            return in_chunks(of_chunk, -(-self.roi_chunk // 2), *rows)

        return per_device(of_device, (features, labels, used), variables)

    def _mean(self, sums: jax.Array, numbers: jax.Array) -> jax.Array:
        """The mean over groups of images of sums / numbers, each (N,), both added up over the images of a group."""
        size = self.backbone.bn_group_size or len(sums)
        sums, numbers = (x.reshape(-1, size).sum(1) for x in (sums, numbers))
        return (sums / jnp.maximum(numbers, 1)).mean()


def init_decoder(model: MaskRCNN, key: jax.Array) -> dict[str, Any]:
    """Draws the initial weights of neck and heads alone: {"params": {"neck": ..., "rpn": ..., ...}}."""

    def touch(model):
        channels = [info["channels"] for info in model.backbone.feature_info]
        maps = model._neck([jnp.zeros((1, 8 >> i, 8 >> i, c)) for i, c in enumerate(channels)])
        model._rpn(maps)
        model.box_head(jnp.zeros((1, 7, 7, model.neck_channels)))
        if model.masks:
            model.mask_head(jnp.zeros((1, 14, 14, model.neck_channels)))

    return model.init(key, method=touch)


def init_variables(
    model: MaskRCNN, key: jax.Array, jit: Callable = lambda function, *args: jax.jit(function)
) -> dict[str, Any]:
    """Draws the initial weights of a detector, its backbone's block by block; see `fcvit.init_variables`."""
    return init_around_backbone(model, init_decoder, key, jit)


def create_detector(
    name: str,
    num_classes: int = 80,
    *,
    neck_channels: int = 256,
    box_channels: int = 1024,
    masks: bool = True,
    **fields,
) -> MaskRCNN:
    """Makes a Mask R-CNN over a backbone, with the original's sizes by default.

    Example::

        detector = create_detector("fcvit_s12", num_classes=80, bn_group_size=4)

    Args:
      name: of the backbone, as in `create_backbone`.
      num_classes: kinds of objects, at least 1.
      neck_channels: of the feature pyramid network, the RPN and the mask head.
      box_channels: of the box head's hidden layers.
      masks: whether there is a mask branch.
      **fields: other attributes of `MaskRCNN`, and those of the backbone, as in `create_backbone`.

    Raises:
      UserError: the name is unknown, or a value is not allowed.
    """
    check_range("model", 1, num_classes=num_classes, neck_channels=neck_channels, box_channels=box_channels)
    ours = {key: fields.pop(key) for key in MaskRCNN.__dataclass_fields__ if key in fields and key != "backbone"}
    detector = MaskRCNN(create_backbone(name, **fields), num_classes, neck_channels, box_channels, masks, **ours)
    counts = ("train_nms_pre", "train_proposals", "nms_pre", "proposals", "max_detections", "finest_size", "roi_chunk")
    check_range("model", 1, **{key: getattr(detector, key) for key in counts})
    check_range("model", 4, rpn_samples=detector.rpn_samples, roi_samples=detector.roi_samples)
    check_range("model", 0, score_threshold=detector.score_threshold, nms_threshold=detector.nms_threshold)
    return detector
