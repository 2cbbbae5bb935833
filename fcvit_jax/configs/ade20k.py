"""Semantic segmentation of ADE20K with Semantic FPN: 40,000 updates of 32 crops, from a classifier's weights.

    python main.py --config=configs/ade20k.py --workdir=runs/ade --config.data.dataset=ade:PATH \
        --config.init_from=fcvit_b12.pth.tar

PATH is the folder ADEChallengeData2016. The original reports 43.3 % mIoU with fcvit_s12, and 45.5 % with fcvit_s24,
which configs/ade20k.py:fcvit_s24 takes. Every key can be overridden on the command line: --config.optim.lr=1e-4
"""

from ml_collections import ConfigDict, config_dict


def get_config(name: str = "fcvit_s12") -> ConfigDict:
    """The whole recipe of a backbone."""
    config = ConfigDict()
    config.task = "segmentation"
    config.seed = 42  # of the weights (unless from init_from), the data's order, augmentation and dropout
    config.init_from = config_dict.placeholder(str)  # weights to start from: a classifier's or a segmenter's
    config.resume_with_changes = False  # resume a run although its config or data differ
    config.compilation_cache = True  # keep compiled programs in <workdir>/, unless JAX has a folder for them

    model = config.model = ConfigDict()  # see fcvit_jax.create_segmenter; a config file may add fields of the backbone
    model.name = name  # of the backbone, a key of fcvit_jax.VARIANTS
    model.num_classes = 150  # must equal the dataset's
    model.neck_channels = 256  # of the feature pyramid network
    model.head_channels = 128  # of the head's convolutions
    model.head_dropout_rate = 0.1  # of whole channels, before the classifier
    model.drop_path_rate = 0.0  # of the last block; rises linearly from 0 at the first
    model.bn_group_size = 4  # images that share batch statistics in the backbone; 0: all, as in the head
    model.remat = False  # recompute blocks in the backward pass: less memory, more time
    model.layer_scale_init = 1e-6  # of weights from scratch; those of a classifier have their own
    model.dtype = "float32"  # of computation; "bfloat16" is faster on GPUs and TPUs

    data = config.data = ConfigDict()
    data.dataset = "ade:ADEChallengeData2016"  # "ade:PATH", "digit_scenes" or "synthetic": noise
    data.data_dir = "."  # the folder from which a relative PATH starts
    data.train_split = "training"  # a folder in images/ and annotations/
    data.eval_split = "validation"  # likewise
    data.zero_is_class = False  # 0 in a mask is the first class, not "other", which is ignored
    data.exif = False  # turn images as their EXIF orientation says
    data.batch_size = 32  # per update, over all devices and processes
    data.workers = -1  # decoding processes; -1: one fewer than cores; 0: decode in the training process
    data.prefetch = 1  # batches in each of a worker's two buffers
    data.on_broken = "error"  # a broken training image ends the run; "skip": another one takes its place
    data.crop_size = 512  # height and width of the crops of training in pixels
    data.long = 2048  # longer side, in pixels, that an image at scale 1 must not exceed; in evaluation too
    data.short = 512  # and shorter side
    data.scale = (0.5, 2.0)  # smallest and largest scale in training
    data.max_share = 0.75  # a crop of which one class has this share is drawn again
    data.flip = 0.5  # probability of a horizontal flip
    data.distortion = True  # change brightness, contrast, saturation and hue

    config.mixing = ConfigDict()  # images are not mixed

    optim = config.optim = ConfigDict()
    optim.lr = 2e-4  # of the first update
    optim.power = 0.9  # the rate falls to 0 as this power of the updates that are left
    optim.weight_decay = 1e-4  # on every parameter; multiplied by the rate
    optim.b1 = 0.9  # decay of the first moment
    optim.b2 = 0.999  # and of the second
    optim.eps = 1e-8  # added to the root of the second moment
    optim.freeze = ()  # paths of what is not trained, such as ("backbone",)

    train = config.train = ConfigDict()
    train.epochs = 64  # counts where train.steps is None
    train.steps = 40_000  # updates
    train.accumulate = 1  # number of parts that a batch is computed in, to save memory
    train.ema_decay = config_dict.placeholder(float)  # of the averaged weights; None: off
    train.ema_warmup = False  # begin with a smaller decay, for short runs
    train.log_every = 50  # steps between two lines of metrics.jsonl
    train.eval_every = 6  # epochs between two evaluations
    train.profile_steps = ()  # (first, last): write a trace of these steps by JAX's profiler; (): none

    checkpoint = config.checkpoint = ConfigDict()
    checkpoint.keep = 3  # how many of the newest to keep; the best is kept as well
    checkpoint.save_every = 1000  # steps between two checkpoints; every evaluation saves one as well

    mesh = config.mesh = ConfigDict()
    mesh.data = -1  # size of the mesh's first axis; -1: all devices that fsdp leaves
    mesh.fsdp = 1  # size of its second axis, over which the training state is split; batches are split over both
    return config.lock()
