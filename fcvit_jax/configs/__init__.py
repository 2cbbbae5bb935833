"""The recipes: `get_config()` of each file returns a config for `fcvit_jax.train_and_evaluate`."""
