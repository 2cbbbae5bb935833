"""`python -m fcvit_jax.convert SOURCE DEST [--ema] [--name=VARIANT]`."""

import argparse
from pathlib import Path

from fcvit_jax.convert import convert
from fcvit_jax.errors import exit_on_error


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fcvit_jax.convert",
        description=convert.__doc__.splitlines()[0],
        epilog="example: python -m fcvit_jax.convert fcvit_b12.pth.tar converted.npz",
    )
    parser.add_argument(
        "source", help=".pth, .pth.tar, .safetensors, .npz, or the folder of a run or an Orbax checkpoint"
    )
    parser.add_argument("dest", help=".pth, .pt, .pth.tar, .npz, or a new folder for an Orbax checkpoint")
    parser.add_argument(
        "--ema", action="store_true", default=None, help="read the averages; the default for a run that kept them"
    )
    parser.add_argument("--name", help="of the variant, such as vit_base_patch16_224, where the weights leave it open")
    args = parser.parse_args(argv)
    with exit_on_error():
        convert(args.source, args.dest, ema=args.ema, name=args.name)
    dest = Path(args.dest).expanduser()
    print(f"wrote the {'folder' if dest.is_dir() else 'file'} {dest}")


if __name__ == "__main__":
    main()
