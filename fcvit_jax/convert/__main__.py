"""`python -m fcvit_jax.convert SOURCE DEST [--ema]`."""

from fcvit_jax.convert import main

if __name__ == "__main__":
    main()
