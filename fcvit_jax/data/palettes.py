"""Colours for classes: ADE20K's own, and colours that people who see few colours can tell apart as well."""

import numpy as np

# The 150 colours of ADE20K's toolkit, three hexadecimal bytes each.
ADE20K = """
787878b4787806e6e650323204c8037878508c8c8ccc05ffe6e6e604fa07e005ffebff0796053d78784608ff33ff06528fff8cccff04ff3307cc4603
0066c83de6faff06330b66ffff0747ff09e00907e6dcdcdcff095c7009ff08ffd607ffe0ffb8060aff47ff290a07ffffe0ff086608ffff3d06ffc207
ff7a0800ff14ff0829ff05990633ffeb0cffa0961400a3ff8c8c8cfa0a0f14ff001fff00ff1f00ffe00099ff000000ffff470000ebff00adff1f00ff
0bc8c8ff520000fff5003dff00ff7000ff85ff0000ffa300ff6600c2ff00008fff33ff000052ff00ff2900ffad0a00ffadff0000ff99ff5c00ff00ff
ff00f5ff0066ffad00ff0014ffb8b8001fff00ff3d0047ffff00cc00ffc200ff52000aff0070ff3300ff00c2ff007aff00ffa3ff990000ff0aff7000
8fff005200ffa3ff00ffeb0008b8aa8500ff00ff5cb800ffff001f00b8ff00d6ffff00705cff0000e0ff70e0ff46b8a0a300ff9900ff47ff00ff00a3
ffcc00ff008f00ffeb85ff00ff00ebf500ffff007afff5000abed4d6ff0000ccff1400ffffff000099ff0029ff00ffcc2900ff29ff00ad00ff00f5ff
4700ff7a00ff00ffb8005cffb8ff000085ffffd60019c2c266ff005c00ff
"""
# Linear RGB as seen without red, and without green, receptors (Machado, Oliveira and Fernandes, 2009, severity 1).
PROTANOPIA = ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998))
DEUTERANOPIA = ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881))
# Linear sRGB to CIE XYZ, divided by the white point D65.
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def ade20k() -> np.ndarray:
    """ADE20K's colours of its 150 classes: uint8 (150, 3), RGB."""
    return np.frombuffer(bytes.fromhex(ADE20K), np.uint8).reshape(150, 3)


def distinct(num_colours: int, first: np.ndarray | None = None) -> np.ndarray:
    """Chooses colours one by one, each as far as possible from black, white and the colours before it.

    The distance of two colours is the smallest that they have in CIELAB to normal sight, to sight without red and to
    sight without green receptors. More colours begin with the same ones.

    Example::

        distinct(20)[0]     # RGB of the first class

    Args:
      num_colours: up to 510.
      first: (n, 3) in 0 to 255, RGB, what to begin with; None: nothing.

    Returns:
      uint8 (num_colours, 3), RGB.
    """
    levels = np.linspace(0, 255, 8).round()
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    white, candidates = len(candidates) - 1, candidates if first is None else np.concatenate([candidates, first])
    seen = [_lab(_linear(candidates) @ np.transpose(sight)) for sight in (np.eye(3), PROTANOPIA, DEUTERANOPIA)]

    def distances(index: int) -> np.ndarray:
        return np.min([np.linalg.norm(lab - lab[index], axis=-1) for lab in seen], axis=0)

    nearest = np.minimum(distances(0), distances(white))  # 0 is black
    chosen = []
    for number in range(num_colours):
        chosen.append(white + 1 + number if white + 1 + number < len(candidates) else int(nearest.argmax()))
        nearest = np.minimum(nearest, distances(chosen[-1]))
        nearest[chosen[-1]] = -1  # not again, where others seem equal to a sight
    return candidates[chosen].astype(np.uint8)


def _linear(rgb: np.ndarray) -> np.ndarray:
    rgb = rgb / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def _lab(linear: np.ndarray) -> np.ndarray:
    xyz = linear.clip(0, 1) @ (XYZ / XYZ.sum(1, keepdims=True)).T
    x, y, z = np.moveaxis(np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)
