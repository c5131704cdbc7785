"""Densities that several test modules draw symbols from."""

import numpy as np


def laplace(scale, limit, mean=0.0):
    """Return the probabilities of the integers -limit to limit under a Laplace density."""
    edges = np.arange(-limit, limit + 2) - 0.5 - mean
    tail = 0.5 * np.exp(-np.abs(edges) / scale)
    inner = np.where(edges < 0, tail, 1 - tail)
    mass = np.where(edges[:-1] >= 0, tail[:-1] - tail[1:], inner[1:] - inner[:-1])
    return np.maximum(mass, 1e-300)
