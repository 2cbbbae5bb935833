"""Trains or evaluates a network: `python main.py --config=configs/digits.py --workdir=runs/digits`."""

from fcvit_jax.__main__ import start

if __name__ == "__main__":
    start()
