"""A narrow Mask R-CNN on scenes of scikit-learn's digits: nothing to download, minutes on a CPU.

python main.py --config=configs/digit_scenes_detection.py --workdir=runs/scenes
"""

from fcvit_jax.configs import coco


def get_config():
    """COCO's recipe with a small network from scratch; the scenes, new in every epoch, have 128 pixels."""
    config = coco.get_config("fcvit_tiny")
    config.data.update(dataset="digit_scenes", batch_size=8, workers=0, long=128, short=128, flip=0.0, max_objects=4)
    config.optim.update(lr=2e-3, decay_epochs=(5, 7), warmup_steps=100)
    config.train.update(epochs=8, eval_every=2)
    config.model.update(num_classes=10, neck_channels=32, box_channels=128, bn_group_size=0, mask_padding=False)
    with config.unlocked():
        config.model.update(depths=(1, 1, 1, 1), dims=(16, 32, 64, 64), mlp_ratios=(4, 4, 4, 4))
        config.model.update(train_nms_pre=64, train_proposals=64, nms_pre=64, proposals=64, max_detections=20)
        config.model.update(rpn_samples=64, roi_samples=32)
    config.model.layer_scale_init = 0.1  # a run this short has no time to grow it from 1e-6
    return config
