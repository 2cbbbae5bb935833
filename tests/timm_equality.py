"""Compares ViT and ConvNeXt with the same network in PyTorch, whose tensors have timm's names."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from equality import assert_close, formula_weights
from flax import traverse_util

from fcvit_jax.convert.layouts import to_ours


def abstract(model):
    """The shapes of a model's parameters by path; any size of image will do."""
    side = getattr(model, "patch_size", 32)
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return traverse_util.flatten_dict(
        jax.eval_shape(model.clone(share_blocks=True).init, jax.random.key(0), images), sep="/"
    )


def variables_of(weights, model, family):
    """Our variables of weights by timm's names; `family` is the module of `fcvit_jax.convert` that knows them."""
    paths = abstract(model)
    names = family.original_names(paths)
    assert sorted(names.values()) == sorted(weights)
    flat = {path: to_ours(np.asarray(weights[names[path]], np.float32), family.layout(path)) for path in paths}
    assert {path: x.shape for path, x in flat.items()} == {path: x.shape for path, x in paths.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def weights_of(module, seed):
    """Weights for a PyTorch network, by name; the positions are large enough to matter."""
    weights = formula_weights({name: tuple(x.shape) for name, x in module.state_dict().items()}, seed)
    if "pos_embed" in weights:
        weights["pos_embed"] *= np.float32(weights["pos_embed"].size ** 0.5 / 2)
    return weights


def assert_network_equals(model, theirs, family, shape, seed):
    """Compares the logits, and the gradients of a random sum of them by every parameter and by the images.

    Args:
      model: our network.
      theirs: the same in PyTorch.
      family: the module of `fcvit_jax.convert` for such networks.
      shape: of the images, (N, H, W, 3).
      seed: of the weights, the images and the sum.
    """
    weights = weights_of(theirs, seed)
    theirs.load_state_dict({name: torch.from_numpy(x) for name, x in weights.items()})
    theirs.double()
    rng = np.random.default_rng(seed)
    images = rng.normal(0, 1, shape).astype(np.float32)
    cotangent = rng.normal(0, 1, (shape[0], model.num_classes)).astype(np.float32)

    @jax.jit
    def run(variables, images):
        logits, vjp = jax.vjp(model.apply, variables, images)
        return logits, *vjp(cotangent)

    variables = variables_of(weights, model, family)
    logits, grads, image_grad = run(variables, images)
    x = torch.from_numpy(np.moveaxis(images, -1, 1)).double().requires_grad_()
    their_logits = theirs(x)
    their_logits.backward(torch.from_numpy(cotangent).double())

    assert_close(logits, their_logits.detach(), "logits")
    assert_close(image_grad, np.moveaxis(x.grad.numpy(), 1, -1), "gradient of the images", 2e-5)
    expected = variables_of({name: x.grad for name, x in theirs.named_parameters()}, model, family)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    for (path, grad), right in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        # A key's bias adds the same to a query's logits of all tokens: its gradient is zero but for rounding.
        error = np.abs(grad - right).max() / max(np.abs(right).max(), 1e-3 * largest)
        assert error <= 2e-5, f"gradient of {name}: {error:.2e} of the largest value apart"


def assert_fresh_weights(variables, model, stds, constants=()):
    """Compares initial weights with the shapes of a model, and how far they spread with `stds`, by endings of paths.

    What has no such ending is constant: as in `constants`, 1 for the scales of norms, else 0.
    """
    constants = {**dict(constants), "/scale": 1, "": 0}
    flat = traverse_util.flatten_dict(variables, sep="/")
    assert {path: x.shape for path, x in flat.items()} == {path: x.shape for path, x in abstract(model).items()}
    kernels = [path for path in flat if path.endswith("kernel")]
    assert len({np.asarray(flat[path]).tobytes() for path in kernels}) == len(kernels)  # no two are the same draw
    for path, x in flat.items():
        std = next((std for ending, std in stds.items() if path.endswith(ending)), None)
        if std is None:
            constant = next(value for ending, value in constants.items() if path.endswith(ending))
            np.testing.assert_array_equal(x, np.full(x.shape, constant, x.dtype), err_msg=path)
        else:
            assert abs(np.std(x) / std - 1) < 4 * x.size**-0.5, f"{path}: {np.std(x):.4f}, should be {std}"
