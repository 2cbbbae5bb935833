"""OpenCV's arithmetic on uint8 images, as integer NumPy: what `augment.paired` must compute on every processor."""

import numpy as np


def _taps(length, new_length):
    """For every new position along one axis: the position before it, and the share of the next one, float32."""
    step = 1 / (new_length / length)
    at = ((np.arange(new_length) + 0.5) * step - 0.5).astype(np.float32)
    before = np.floor(at).astype(int)
    return before, at - before.astype(np.float32)


def _weights(share):
    share = share.astype(np.float32)
    return np.rint(2048 * (np.float32(1) - share)).astype(int), np.rint(2048 * share).astype(int)


def resize(image, size):
    """Bilinear; image (H, W, 3) uint8, size (width, height)."""
    (height, width), (new_width, new_height) = image.shape[:2], size
    if (width, height) == size:
        return image.copy()
    x = image.astype(int)
    if (width, height) == (2 * new_width, 2 * new_height):
        return ((x[::2, ::2] + x[::2, 1::2] + x[1::2, ::2] + x[1::2, 1::2] + 2) >> 2).astype(np.uint8)
    k, share = _taps(width, new_width)
    share = np.where((k < 0) | (k >= width - 1), 0, share)
    k = k.clip(0, width - 1)
    w0, w1 = (w[:, None] for w in _weights(share))
    x = w0 * x[:, k] + w1 * x[:, np.minimum(k + 1, width - 1)]
    k, share = _taps(height, new_height)
    w0, w1 = (w[:, None, None] for w in _weights(share))
    top, bottom = x[k.clip(0, height - 1)], x[(k + 1).clip(0, height - 1)]
    return ((((w0 * (top >> 4)) >> 16) + ((w1 * (bottom >> 4)) >> 16) + 2) >> 2).astype(np.uint8)


def resize_labels(labels, size):
    """Nearest; labels (H, W) uint8, size (width, height)."""

    def indices(length, new_length):
        step = 1 / (new_length / length)
        return np.minimum(np.floor(np.arange(new_length) * step).astype(int), length - 1)

    return labels[indices(labels.shape[0], size[1])][:, indices(labels.shape[1], size[0])]


def rgb_to_hsv(image):
    """(..., 3) uint8 -> (..., 3) uint8, hue in 0 to 179."""
    r, g, b = np.moveaxis(image.astype(int), -1, 0)
    value, i = image.max(-1).astype(int), np.arange(1, 256)
    difference = value - image.min(-1)
    inverse = np.concatenate([[0], np.rint((255 << 12) / i)]).astype(int)
    inverse_hue = np.concatenate([[0], np.rint((180 << 12) / (6 * i))]).astype(int)
    saturation = (difference * inverse[value] + 2048) >> 12
    sector = np.where(value == r, g - b, np.where(value == g, b - r + 2 * difference, r - g + 4 * difference))
    hue = (sector * inverse_hue[difference] + 2048) >> 12
    return np.stack([np.where(hue < 0, hue + 180, hue), saturation, value], -1).astype(np.uint8)


def hsv_to_rgb(image):
    """(..., 3) uint8, hue in 0 to 179 -> (..., 3) uint8."""
    h, s, v = np.moveaxis(image.astype(np.float32), -1, 0)
    h, s, v = h * np.float32(6 / 180), s * np.float32(1 / 255), v * np.float32(1 / 255)
    sector = np.trunc(h).astype(int)
    g = h - sector.astype(np.float32)

    def one_minus(x, y):
        """1 - x y, rounded once to float32."""
        return (1 - x.astype(float) * y).astype(np.float32)

    p, q, t = v * (1 - s), v * one_minus(s, g), v * one_minus(s, np.float32(1) - g)
    of_sector = [(v, t, p), (q, v, p), (p, v, t), (p, q, v), (t, p, v), (v, p, q)]
    rgb = [np.select([sector == z for z in range(6)], [x[i] for x in of_sector]) for i in range(3)]
    return (np.stack(rgb, -1).astype(np.float32) * np.float32(255)).astype(np.uint8)


def distort(image, brightness=None, contrast=None, saturation=None, hue=None, contrast_last=False):
    def linear(x, factor=1.0, added=0.0):
        return (x.astype(np.float32) * np.float32(factor) + np.float32(added)).clip(0, 255).astype(np.uint8)

    if brightness is not None:
        image = linear(image, added=brightness)
    if contrast is not None and not contrast_last:
        image = linear(image, contrast)
    if saturation is not None:
        hsv = rgb_to_hsv(image)
        hsv[..., 1] = linear(hsv[..., 1], saturation)
        image = hsv_to_rgb(hsv)
    if hue is not None:
        hsv = rgb_to_hsv(image)
        hsv[..., 0] = (hsv[..., 0].astype(int) + hue) % 180
        image = hsv_to_rgb(hsv)
    if contrast is not None and contrast_last:
        image = linear(image, contrast)
    return image
