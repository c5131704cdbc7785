"""From latents to pixels, for the second decoder (`reference_decoder`)."""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
from reference_decoder import Frame, Reader, Weights, decode_latents, need

if TYPE_CHECKING:
    from collections.abc import Callable


def inflate(data: bytes, size: int | None, most: int = 0) -> np.ndarray:
    z = zlib.decompressobj()
    out = z.decompress(data, (size or most) + 1)
    need((len(out) <= most if size is None else len(out) == size) and z.eof and not z.unused_data, "bad zlib stream")
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


def contours(data: bytes, rows: int, width: int) -> np.ndarray:
    r, changes = Reader(data), np.zeros((rows, width), bool)
    top = 0
    while top < rows:
        n, k = r.varint(), r.varint()
        need(1 <= n <= rows - top, "bad group of rows")
        columns = np.cumsum([r.varint() for _ in range(k)])
        for y in range(top, top + n):
            if y > top:
                moves = [r.varint() for _ in range(k)]
                columns = columns + [-(u + 1) // 2 if u & 1 else u // 2 for u in moves]
            need(not k or (columns[0] >= 0 and columns[-1] < width and (np.diff(columns) > 0).all()), "bad columns")
            changes[y, columns.astype(int)] = True
        top += n
    need(r.at == len(data), "bytes after the contours")
    return np.logical_xor.accumulate(changes, axis=1)


def mask_bits(section: bytes, shape: tuple[int, ...]) -> np.ndarray:
    n, c, h, w = shape
    k = -(-w // 8)
    if section[0] == 1:
        changed = contours(inflate(section[1:], None, n * c * h * k).tobytes(), n * c * h, w).reshape(shape)
    else:
        packed = inflate(section, n * c * h * k).reshape(n, c, h, k)
        bits = np.unpackbits(np.bitwise_xor.accumulate(packed, axis=2), axis=3, bitorder="little")
        need(not bits[..., w:].any(), "bits after the last column")
        changed = bits[..., :w].astype(bool)
    mask = np.logical_xor.accumulate(changed, axis=1)
    need(mask.any(), "empty mask")
    return mask


def components(frame: Frame, colour: list[int] | None, images: int) -> list[tuple[int, list[int]]]:
    """The image and the channels of each plane."""
    n = frame.shape[0]
    if colour is None:
        return [(p, [0] if frame.grey else [0, 1, 2]) for p in range(n)]
    others = [[c] for c in range(n // images + 2) if c not in colour]
    return [(i, group) for i in range(images) for group in [colour, *others]]


def decode_planes(
    frame: Frame, weights: Weights, configuration: dict[str, Any], dtype: np.dtype, images: int = 1
) -> np.ndarray:
    """The samples (I, D, H, W) of a frame; (N, C, H, W) without colour."""
    low, high = configuration.get("value_range", [0, 255])
    (_, height, width), extent = frame.shape, high - low
    latents = decode_latents(frame, weights, configuration["quality"])

    def get(name: str) -> np.ndarray:
        return weights.tensors["synthesis." + name].astype(np.float64)

    groups = components(frame, configuration.get("colour"), images)
    shape = (groups[-1][0] + 1, max(max(group) for _, group in groups) + 1, height, width)
    value = np.zeros(shape)
    for plane, (i, group) in zip(latents.astype(np.float64), groups, strict=True):
        made = synthesise(plane, get)[:, :height, :width]
        value[i, group] = made if len(group) == 3 else made.mean(0)
    if configuration.get("value_transform") == "sqrt":
        a = math.sqrt(3 / 8)
        value = ((np.clip(value, 0, 1) * (math.sqrt(extent + 3 / 8) - a) + a) ** 2 - 3 / 8) / extent
    value = np.clip(low + extent * value, low, high)
    samples = (np.rint(value) if dtype.kind in "iu" else value).astype(dtype)
    tiles = frame.tiles()
    for number, section in frame.exact.items():
        p, y, x, rows, columns = tiles[number]
        i, group = groups[p]
        part = samples[i, :, 16 * y : 16 * (y + rows), 16 * x : 16 * (x + columns)]
        part[group] = exact_samples(section, (len(group), *part.shape[1:]), dtype)
    need("nodata" in configuration or frame.mask is None, "a mask without nodata")
    if "nodata" in configuration:
        nodata = dtype.type(float(configuration["nodata"]) if dtype.kind == "f" else configuration["nodata"])
        up = not nodata >= high
        if dtype.kind == "f":
            beside = np.nextafter(nodata, dtype.type(np.inf if up else -np.inf))
            normal = np.copysign(np.finfo(dtype).tiny, beside)
            beside = normal if abs(beside) < abs(normal) and low <= normal <= high else beside
        else:
            beside = dtype.type(int(nodata) + (1 if up else -1))
        samples[samples == nodata] = beside
        if frame.mask is not None:
            samples[mask_bits(frame.mask, samples.shape)] = nodata
    return samples
