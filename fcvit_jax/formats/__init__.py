"""What `fcvit_jax.export` writes and reads: checksums, the layout of the Hugging Face hub, and other programs."""
