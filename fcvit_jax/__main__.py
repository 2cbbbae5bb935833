"""Trains or evaluates a network: `python -m fcvit_jax --config=configs/digits.py --workdir=runs/digits`.

In a clone of the repository, `python main.py` does the same.
"""

import functools
import os
import re
import sys
import traceback
from pathlib import Path

from absl import app, flags, logging

try:
    from ml_collections import config_flags
except ModuleNotFoundError:
    sys.exit('error: training needs more packages than the networks do: pip install "fcvit-jax[train]"')

from fcvit_jax.errors import exit_on_error

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "The config file, such as configs/digits.py; --config.KEY=VALUE overrides a key. configs/imagenet.py has them all. "
    "If there is no such file, a recipe of that name which fcvit_jax brings is taken.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's folder, on a disk or gs://BUCKET/FOLDER; a run that it holds is resumed."
)
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "eval: evaluate a checkpoint of the run.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "For --mode=eval, what to take of --workdir: checkpoints (the newest; default), checkpoints/STEP, best.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if the environment does not give it.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "The number of processes; with --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "The number of this process, from 0; with --coordinator.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}: flags are written --name=value")
    if _MODE.value == "train" and _CHECKPOINT.value:
        raise app.UsageError("--checkpoint goes with --mode=eval: training resumes from the newest checkpoint")
    with exit_on_error():
        run()


def run() -> None:
    """Does what the flags say.

    Raises:
      UserError: on a mistake that the user can fix.
      SystemExit: a signal has stopped the run before its end; with 130 after Ctrl-C, 143 after SIGTERM.
    """
    # Grain's workers import this file again, and need none of this.
    from fcvit_jax.devices.cpu import tune_cpu
    from fcvit_jax.devices.hosts import exit_within, start_distributed
    from fcvit_jax.devices.limits import check_limits
    from fcvit_jax.devices.shared_memory import start_tracker
    from fcvit_jax.evaluate import evaluate_checkpoint
    from fcvit_jax.run.checkpoint import silence_orbax
    from fcvit_jax.train import train_and_evaluate

    try:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # at absl's own default Orbax logs every file
            silence_orbax()
        check_limits()
        start_tracker()  # before tqdm does, which starts one that a hang-up ends
        tune_cpu()
        start_distributed(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        if _MODE.value == "train":
            stops = []
            train_and_evaluate(_CONFIG.value, _WORKDIR.value, on_stop=stops.append)
            if stops:
                sys.exit(128 + stops[0])  # for `main.py && next`
        else:
            evaluate_checkpoint(_CONFIG.value, _WORKDIR.value, _CHECKPOINT.value or "checkpoints")
    except Exception:
        exit_within(30)
        raise


def _with_recipes(argv: list[str]) -> list[str]:
    """The arguments, in which a --config that is no file is replaced by the recipe of that name, if there is one."""
    recipes = Path(__file__).parent / "configs"

    def find(match: re.Match) -> str:
        recipe = recipes / f"{Path(match[2]).stem}.py"
        return f"{match[1]}{recipe}{match[3]}" if recipe.is_file() and not Path(match[2]).exists() else match[0]

    return [re.sub(r"^(--?config=)([^:]+)(:.*|)$", find, arg) for arg in argv]


def _without_nones(argv: list[str]) -> tuple[list[str], list[str]]:
    """The arguments without those like --config.KEY=None, which ml_collections takes for a text; and these keys."""
    kept, last = [], {}
    for arg in argv:
        override = re.match(r"--?config\.([\w.]+)=(.*)", arg, re.DOTALL)
        if override:
            last[override[1]] = override[2]  # of several, the last counts
        if not override or override[2] != "None":
            kept.append(arg)
    return kept, [key for key, value in last.items() if value == "None"]


def parse_flags(argv: list[str]) -> list[str]:
    """Parses as absl does, and turns what ml_collections raises about a --config it cannot load or override into text.

    Raises:
      SystemExit: with a message.
    """
    argv, nones = _without_nones(_with_recipes(argv))
    sys.argv = argv  # where ml_collections looks for what to override
    try:
        rest = app.parse_flags_with_usage(argv)
        _CONFIG.value.keys()  # a file that could not be loaded raises when it is first used
        for key in nones:
            *sections, name = key.split(".")
            setattr(functools.reduce(getattr, sections, _CONFIG.value), name, None)
        return rest
    except (AttributeError, KeyError, OSError) as error:
        while error.args and isinstance(error.args[0], Exception):
            error = error.args[0]
        text = str(error.args[0]) if error.args else ""
        if isinstance(error, OSError):  # of many lines, the last of which is the system's
            sys.exit(
                f"error: --config cannot be read: {text.splitlines()[-1].strip()} (the current folder is {os.getcwd()})"
            )
        raised = traceback.extract_tb(error.__traceback__)[-1]
        # ml_collections says what key is missing; Python itself, what is wrong in a config file, and of which object.
        if "ml_collections" not in raised.filename or getattr(error, "obj", None) is not None:
            where = f"{raised.filename}, line {raised.lineno}"
            sys.exit(f"error: --config cannot be read: {type(error).__name__}: {text} ({where})")
        if any(arg.startswith("--config.model.") for arg in argv) and "Did you mean" not in text:
            text += "\nFields of the model that the config does not set go into a config file, as in configs/digits.py."
        sys.exit(f"error: no such config key: {text}")


def start() -> None:
    """Runs the program with the arguments of the command line."""
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    start()
