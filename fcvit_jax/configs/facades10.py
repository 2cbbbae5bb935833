"""A narrow Mask R-CNN on 508 photographs of buildings, 10 classes: twenty minutes on two CPU cores.

    python main.py --config=configs/facades10.py --workdir=runs/facades --config.data.dataset=coco:PATH \
        --config.init_from=runs/cifar10/best

PATH is a folder laid out like COCO's. Without `init_from` the run starts from new weights.
"""

from fcvit_jax.configs import cifar10, coco


def get_config():
    """COCO's recipe with the network of configs/cifar10.py; images have 480 pixels, and up to 122 objects."""
    config = coco.get_config("fcvit_tiny")
    config.data.update(dataset="coco:facades10", batch_size=4, long=480, short=480, max_objects=128)
    config.optim.update(lr=1e-3, warmup_steps=100)
    config.train.eval_every = 2
    config.checkpoint.save_every = 200
    config.model.update(num_classes=10, neck_channels=64, box_channels=256)
    with config.unlocked():
        config.model.update(cifar10.NETWORK)
        config.model.update(train_nms_pre=500, train_proposals=500, nms_pre=500, proposals=500)
        config.model.update(rpn_samples=256, roi_samples=128)
    return config
