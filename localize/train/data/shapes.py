"""A computed data set: each image has two outlines, and the class is whether they are of the same kind.

Circles, squares, diamonds and triangles are equally frequent in both classes; positions, sizes, grey values and noise
are random. Neither single pixels nor a single outline reveal the class. A network needs layers that see the outlines,
followed by one that compares them.
"""

from __future__ import annotations

import numpy as np

NUM_CLASSES = 2
"""Class 0: outlines of two kinds; class 1: of one kind."""

SIZE = 32
TRAIN, TEST = 10_000, 2_000

_STROKE = 1.3
"""Half the width of an outline in pixels, up to where it has faded out."""


def make_shapes() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Draw the training and the test images: uint8 (N, 32, 32), and class ids (N,), as many of each class.

    The images never change: numpy guarantees the stream of ``RandomState``, and only operations are used whose rounding
    IEEE 754 fixes.
    """
    return _draw(np.random.RandomState(1), TRAIN), _draw(np.random.RandomState(2), TEST)


def _draw(random: np.random.RandomState, count: int) -> tuple[np.ndarray, np.ndarray]:
    def between(low: float, high: float) -> np.ndarray:
        return low + (high - low) * random.random_sample(count)

    labels = random.permutation(np.arange(count) % NUM_CLASSES)
    first = random.randint(len(_KINDS), size=count)
    another = (first + random.randint(1, len(_KINDS), size=count)) % len(_KINDS)
    images = 0.15 * random.random_sample((count, SIZE, SIZE))
    # One outline in the left half, one in the right; half of the images are then transposed.
    for kind, left in ((first, 7.5), (np.where(labels == 1, first, another), 23.0)):
        radius, x, y = between(4.5, 6.5), between(left, left + 0.5), between(7.5, 23.5)
        images += between(0.45, 0.85)[:, None, None] * _outlines(kind, radius, x, y)
    turned = random.random_sample(count) < 0.5
    images[turned] = images[turned].transpose(0, 2, 1)
    return np.rint(images.clip(0.0, 1.0) * 255).astype(np.uint8), labels


def _outlines(kind: np.ndarray, radius: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the ink (N, H, W), 0..1, of one outline around (x, y), in pixels, in each image."""
    grid = np.arange(SIZE, dtype=np.float64)
    across, down = grid[None, None, :] - x[:, None, None], grid[None, :, None] - y[:, None, None]
    ink = np.empty((len(kind), SIZE, SIZE))
    for number, distance in enumerate(_KINDS):
        of = kind == number
        ink[of] = 1.0 - np.abs(distance(across[of], down[of], radius[of, None, None])) / _STROKE
    return ink.clip(0.0, 1.0)


def _circle(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Return the distance in pixels of (x, y) outside the outline; the other shapes do the same."""
    return np.sqrt(x * x + y * y) - r


def _square(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.85 * r


def _diamond(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    return (np.abs(x) + np.abs(y) - 1.2 * r) * 0.7071


def _triangle(x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    return np.maximum(y - 0.7 * r, 0.8944 * np.abs(x) - 0.4472 * y - 0.5367 * r)


_KINDS = (_circle, _square, _diamond, _triangle)
