"""Mask R-CNN on COCO, objects and their masks: 12 epochs in batches of 32 images, from a classifier's weights.

    python main.py --config=configs/coco.py --workdir=runs/coco --config.data.dataset=coco:PATH \
        --config.init_from=fcvit_b12.pth.tar

PATH has the folders train2017, val2017 and annotations. The original reports 42.3 box AP and 38.6 mask AP with
fcvit_s12, and 44.1 and 39.9 with fcvit_s24, which configs/coco.py:fcvit_s24 takes. configs/coco.py:fcvit_s12,3x trains
for 36 epochs. Every key can be overridden on the command line: --config.model.masks=False trains boxes alone.
"""

from ml_collections import ConfigDict, config_dict

SCHEDULES = {"1x": (12, (8, 11)), "3x": (36, (27, 33))}  # epochs, and from which on the rate is a tenth


def get_config(options: str = "") -> ConfigDict:
    """The whole recipe: options are a backbone's name (fcvit_s12) and a schedule (1x), with a comma between them."""
    options = [option for option in options.split(",") if option]
    epochs, decay_epochs = SCHEDULES[next((option for option in options if option in SCHEDULES), "1x")]
    config = ConfigDict()
    config.task = "detection"
    config.seed = 42  # of the weights (unless from init_from), the data's order, flips, samples and drop-path
    config.init_from = config_dict.placeholder(str)  # weights to start from: a classifier's or a detector's
    config.resume_with_changes = False  # resume a run although its config or data differ
    config.compilation_cache = True  # keep compiled programs in <workdir>/, unless JAX has a folder for them

    model = config.model = ConfigDict()  # see fcvit_jax.create_detector; a config file may add other fields of it
    model.name = next((option for option in options if option not in SCHEDULES), "fcvit_s12")  # of the backbone
    model.num_classes = 80  # must equal the dataset's
    model.masks = True  # train and evaluate masks too; boxes alone otherwise
    model.mask_padding = True  # training ignores padding, as evaluation does; False: it takes part, as in the original
    model.neck_channels = 256  # of the feature pyramid network, the RPN and the mask head
    model.box_channels = 1024  # of the box head's hidden layers
    model.drop_path_rate = 0.0  # of the last block; rises linearly from 0 at the first
    model.bn_group_size = 4  # images that share batch statistics, and over which losses are averaged first; 0: all
    model.freeze_bn = False  # keep the batch statistics that init_from has
    model.remat = False  # recompute blocks in the backward pass: less memory, more time
    model.layer_scale_init = 1e-6  # of weights from scratch; those of a classifier have their own
    model.dtype = "float32"  # of computation; "bfloat16" is faster on GPUs and TPUs

    data = config.data = ConfigDict()
    data.dataset = "coco:coco"  # "coco:PATH", "digit_scenes" or "synthetic": noise
    data.data_dir = "."  # the folder from which a relative PATH starts
    data.train_split = "train2017"  # a folder of images, with annotations/instances_train2017.json
    data.eval_split = "val2017"  # likewise
    data.masks = model.get_ref("masks")  # as model.masks, which sets this too
    data.empty_images = False  # train on images without objects too
    data.exif = False  # turn images as their EXIF orientation says
    data.batch_size = 32  # per update, over all devices and processes
    data.workers = -1  # decoding processes; -1: one fewer than cores; 0: decode in the training process
    data.prefetch = 1  # batches in each of a worker's two buffers
    data.on_broken = "error"  # a broken training image ends the run; "skip": another one takes its place
    data.long = 1333  # longer side, in pixels, that a resized image must not exceed
    data.short = 800  # and shorter side
    data.flip = 0.5  # probability of a horizontal flip
    data.max_objects = 100  # of an image in training; more are left out
    data.results = config_dict.placeholder(str)  # a file for the detections of an evaluation, in COCO's format

    config.mixing = ConfigDict()  # images are not mixed

    optim = config.optim = ConfigDict()
    optim.lr = 2e-4  # after the warm-up; for batches of any size
    optim.decay_epochs = decay_epochs  # from each of these epochs on, counted from 0, the rate is a tenth
    optim.warmup_steps = 500  # updates over which the rate rises
    optim.warmup_factor = 1e-3  # share of the rate at the first update
    optim.weight_decay = 1e-4  # on every parameter; multiplied by the rate
    optim.b1 = 0.9  # decay of the first moment
    optim.b2 = 0.999  # and of the second
    optim.eps = 1e-8  # added to the root of the second moment
    optim.freeze = ()  # paths of what is not trained, such as ("backbone",)

    train = config.train = ConfigDict()
    train.epochs = epochs
    train.steps = config_dict.placeholder(int)  # stop after this many updates; None: after all epochs
    train.accumulate = 1  # number of parts that a batch is computed in, to save memory
    train.ema_decay = config_dict.placeholder(float)  # of the averaged weights; None: off
    train.ema_warmup = False  # begin with a smaller decay, for short runs
    train.log_every = 50  # steps between two lines of metrics.jsonl
    train.eval_every = 1  # epochs between two evaluations
    train.profile_steps = ()  # (first, last): write a trace of these steps by JAX's profiler; (): none

    checkpoint = config.checkpoint = ConfigDict()
    checkpoint.keep = 3  # how many of the newest to keep; the best is kept as well
    checkpoint.save_every = 1000  # steps between two checkpoints; every evaluation saves one as well

    mesh = config.mesh = ConfigDict()
    mesh.data = -1  # size of the mesh's first axis; -1: all devices that fsdp leaves
    mesh.fsdp = 1  # size of its second axis, over which the training state is split; batches are split over both
    return config.lock()
