"""ImageNet-1k with the recipe of the paper: 300 epochs and 10 of cool-down, with 1,024 images per update.

There is a config for each variant of FCViT; configs/imagenet.py:NAME takes any network, ViTs and ConvNeXts too:

    python main.py --config=configs/fcvit_s12.py --workdir=runs/s12 --config.data.data_dir=/data/tensorflow_datasets
    python main.py --config=configs/imagenet.py:convnext_tiny --workdir=runs/convnext

Every key can be overridden on the command line: --config.optim.lr=2e-3
"""

from ml_collections import ConfigDict, config_dict

from fcvit_jax import networks


def get_config(name: str = "fcvit_s12") -> ConfigDict:
    """The whole recipe of a variant of any network; docs/recipe.md says where each value comes from."""
    variant = networks.settings(name)
    config = ConfigDict()
    config.task = "classification"  # or the import path of a task of your own; fcvit_jax/tasks says what it must have
    config.seed = 42  # of the weights (unless from init_from), the data's order, augmentation, mixing and drop-path
    config.init_from = config_dict.placeholder(str)  # weights to start from: a checkpoint, .pth, .pth.tar or .npz
    config.resume_with_changes = False  # resume a run although its config or data differ
    config.compilation_cache = True  # keep compiled programs in <workdir>/compilation_cache, if JAX has no folder yet

    model = config.model = ConfigDict()  # see fcvit_jax.FCViT; a config file may add others of its attributes
    model.name = name  # a key of fcvit_jax.VARIANTS, the original's name, or the name of a ViT, DeiT or ConvNeXt
    model.num_classes = 1000  # must equal the dataset's
    model.drop_path_rate = variant["drop_path_rate"]  # of the last block; rises linearly from 0 at the first
    if "bn_group_size" in networks.model_fields(name):  # ViT and ConvNeXt have no batch statistics
        model.bn_group_size = 128  # images that share batch statistics; 0: all
    model.remat = False  # recompute blocks in the backward pass: less memory, more time
    model.dtype = "bfloat16"  # of computation; parameters, statistics, softmax and loss are float32

    data = config.data = ConfigDict()
    data.dataset = "imagenet2012"  # a TFDS name, "folder:PATH", "digits", or "synthetic": noise
    data.data_dir = "~/tensorflow_datasets"  # where TFDS keeps its datasets
    data.train_split = "train"  # of a TFDS dataset; "train[:10%]" takes a part of it
    data.eval_split = "validation"  # likewise
    data.batch_size = 1024  # per update, over all devices and processes
    # Height and width in pixels; they may differ: (192, 256), in a shell --config.data.image_size="(192, 256)"
    data.image_size = config_dict.FieldReference(variant["image_size"], field_type=object)
    data.workers = -1  # decoding processes; -1: one fewer than cores; 0: decode in the training process
    data.prefetch = 1  # batches in each of a worker's two buffers; docs/running.md says what shared memory they take
    data.on_broken = "error"  # a broken training image ends the run; "skip": another one takes its place
    data.exif = False  # turn images as their EXIF orientation says
    data.crop_scale = (0.08, 1.0)  # smallest and largest share of the image's area
    data.crop_ratio = (3 / 4, 4 / 3)  # smallest and largest width over height
    data.flip = 0.5  # probability of a horizontal flip
    data.rand_augment = (2, 9.0, 0.5)  # operations, magnitude and its standard deviation; (): off
    data.crop_pct = variant["crop_pct"]  # in evaluation: the shorter side becomes image_size / crop_pct

    mixing = config.mixing = ConfigDict()
    mixing.mixup_alpha = 0.8  # lambda is drawn from Beta(alpha, alpha); 0: no mixup
    mixing.cutmix_alpha = 1.0  # likewise
    mixing.mix_prob = 1.0  # probability that a group is mixed
    mixing.switch_prob = 0.5  # probability of cutmix rather than mixup
    mixing.smoothing = 0.1  # share of a label's mass that is spread over all classes
    mixing.erase_prob = 0.25  # probability that a rectangle of an image becomes noise
    mixing.group_size = 128  # images that share a draw; a smaller batch is one group

    optim = config.optim = ConfigDict()
    optim.lr = 1e-3  # for lr_batch_size images per update; scaled linearly with data.batch_size
    optim.lr_batch_size = 1024  # 0: no scaling
    optim.weight_decay = 0.05  # on parameters of two or more dimensions; multiplied by the rate
    optim.b1 = 0.9  # decay of the first moment
    optim.b2 = 0.999  # and of the second
    optim.eps = 1e-8  # added to the root of the second moment
    optim.warmup_epochs = 5  # counted within train.epochs
    optim.warmup_lr = 1e-6  # at the first step; not scaled with the batch
    optim.min_lr = 1e-6  # at the end of the cosine; not scaled either
    optim.cooldown_epochs = 10  # at min_lr, after train.epochs
    optim.per_step = False  # change the rate every step rather than every epoch
    optim.clip_norm = 0.0  # largest global norm of the gradients; 0: no clipping
    optim.head_lr_multiplier = 1.0  # factor on the updates of the head, for fine-tuning
    optim.freeze = ()  # paths of what is not trained, such as ("stem", "stages_0")

    train = config.train = ConfigDict()
    train.epochs = 300  # of the cosine
    train.steps = config_dict.placeholder(int)  # stop after this many updates; None: after all epochs
    train.accumulate = 1  # number of parts that a batch is computed in, to save memory
    train.ema_decay = config_dict.placeholder(float)  # of the averaged weights, such as 0.9998; None: off
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
