"""Made pictures for tests of measures."""

import numpy as np


def picture(height=200, width=232):
    y, x = np.mgrid[:height, :width] / 40.0
    waves = np.stack([np.sin(x + y), np.cos(2 * x - y), np.sin(x * y / 3)], axis=-1)
    return np.round(127.5 + 100 * waves).astype(np.uint8)


def noisy(image, sigma, seed=0):
    noise = np.random.default_rng(seed).normal(0, sigma, image.shape)
    return np.clip(np.round(image + noise), 0, 255).astype(np.uint8)
