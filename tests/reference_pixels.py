"""From latents to pixels, for the second decoder (`reference_decoder`)."""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
from reference_decoder import Frame, Weights, decode_latents, need

if TYPE_CHECKING:
    from collections.abc import Callable


def inflate(data: bytes, size: int) -> np.ndarray:
    z = zlib.decompressobj()
    out = z.decompress(data, size + 1)
    need(len(out) == size and z.eof and not z.unused_data, "bad zlib stream")
    return np.frombuffer(out, np.uint8)


def pad(x: np.ndarray) -> np.ndarray:
    return np.pad(x, ((0, 0), (1, 1), (1, 1)), mode="edge")


def mix(matrix: np.ndarray, x: np.ndarray) -> np.ndarray:
    return (matrix @ x.reshape(len(x), -1)).reshape(-1, *x.shape[1:])


def synthesise(latents: np.ndarray, get: Callable[[str], np.ndarray]) -> np.ndarray:
    """The components (3, 16 h, 16 w) of one plane's latents (M, h, w)."""

    def conv(x: np.ndarray, name: str) -> np.ndarray:
        weight, (h, w), p = get(name + ".weight"), x.shape[1:], pad(x)
        y = sum(mix(weight[:, :, a, b], p[:, a : a + h, b : b + w]) for a in range(3) for b in range(3))
        return y + get(name + ".bias")[:, None, None]

    def residual(x: np.ndarray, name: str) -> np.ndarray:
        y = conv(x, name + ".reduce")
        return x + conv(np.where(y < 0, 0.01 * y, y), name + ".expand")

    def igdn(x: np.ndarray, name: str) -> np.ndarray:
        return x * (get(name + ".beta")[:, None, None] + mix(get(name + ".gamma"), abs(x)))

    def up(x: np.ndarray, name: str, s: int) -> np.ndarray:
        weight, (h, w), p = get(name + ".weight"), x.shape[1:], pad(x)
        y = np.zeros((weight.shape[1], s * (h + 3), s * (w + 3)))
        for a in range(2 * s):
            for b in range(2 * s):
                y[:, a : a + s * (h + 2) : s, b : b + s * (w + 2) : s] += mix(weight[:, :, a, b].T, p)
        cut = s + s // 2
        return y[:, cut : cut + s * h, cut : cut + s * w] + get(name + ".bias")[:, None, None]

    x = up(residual(latents, "residual3"), "conv3", 2)
    x = up(igdn(residual(x, "residual2"), "gdn2"), "conv2", 2)
    return up(igdn(residual(x, "residual1"), "gdn1"), "conv1", 4) + 0.5


def exact_samples(section: bytes, shape: tuple[int, int, int], dtype: np.dtype) -> np.ndarray:
    c, rows, columns = shape
    b = dtype.itemsize
    need(section[0] <= 2, "unknown predictor")
    split = inflate(section[1:], c * b * rows * columns).reshape(c, b, rows, columns)
    v = np.ascontiguousarray(split.transpose(0, 2, 3, 1)).view(f"<u{b}")[..., 0]
    if section[0] >= 1:
        v = np.cumsum(v, axis=2, dtype=v.dtype)
    if section[0] == 2:
        v = np.cumsum(v, axis=1, dtype=v.dtype)
    return v.view(dtype.newbyteorder("<"))


def mask_bits(section: bytes, shape: tuple[int, int, int, int]) -> np.ndarray:
    n, c, h, w = shape
    k = -(-w // 8)
    packed = inflate(section, n * c * h * k).reshape(n, c, h, k)
    packed = np.bitwise_xor.accumulate(np.bitwise_xor.accumulate(packed, axis=1), axis=2)
    bits = np.unpackbits(packed, axis=3, bitorder="little")
    need(bits.any() and not bits[..., w:].any(), "bad mask")
    return bits[..., :w].astype(bool)


def decode_planes(frame: Frame, weights: Weights, configuration: dict[str, Any], dtype: np.dtype) -> np.ndarray:
    """The samples (N, C, H, W) of a frame."""
    low, high = configuration.get("value_range", [0, 255])
    (_, height, width), extent = frame.shape, high - low
    latents = decode_latents(frame, weights, configuration["quality"])

    def get(name: str) -> np.ndarray:
        return weights.tensors["synthesis." + name].astype(np.float64)

    value = np.stack([synthesise(plane, get) for plane in latents.astype(np.float64)])[:, :, :height, :width]
    if frame.grey:
        value = value.mean(1, keepdims=True)
    if configuration.get("value_transform") == "sqrt":
        a = math.sqrt(3 / 8)
        value = ((np.clip(value, 0, 1) * (math.sqrt(extent + 3 / 8) - a) + a) ** 2 - 3 / 8) / extent
    value = np.clip(low + extent * value, low, high)
    samples = (np.rint(value) if dtype.kind in "iu" else value).astype(dtype)
    tiles = frame.tiles()
    for number, section in frame.exact.items():
        p, y, x, rows, columns = tiles[number]
        part = samples[p, :, 16 * y : 16 * (y + rows), 16 * x : 16 * (x + columns)]
        part[:] = exact_samples(section, part.shape, dtype)
    need("nodata" in configuration or frame.mask is None, "a mask without nodata")
    if "nodata" in configuration:
        nodata = dtype.type(float(configuration["nodata"]) if dtype.kind == "f" else configuration["nodata"])
        up = not nodata >= high
        if dtype.kind == "f":
            beside = np.nextafter(nodata, dtype.type(np.inf if up else -np.inf))
        else:
            beside = dtype.type(int(nodata) + (1 if up else -1))
        samples[samples == nodata] = beside
        if frame.mask is not None:
            samples[mask_bits(frame.mask, samples.shape)] = nodata
    return samples
