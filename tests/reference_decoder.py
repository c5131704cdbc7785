"""A second decoder of the codec `cae`, written from its specification alone: slow, plain NumPy, for tests."""
# ruff: noqa: PT018

import itertools
import json
import math
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import crc32c
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

TOTAL = 4096


@dataclass
class Reader:
    data: bytes
    at: int = 0

    def take(self, count: int) -> bytes:
        assert 0 <= count <= len(self.data) - self.at, "too short"
        self.at += count
        return self.data[self.at - count : self.at]

    def integer(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def varint(self) -> int:
        value = shift = 0
        while (byte := self.integer(1)) >= 128:
            value, shift = value + ((byte - 128) << shift), shift + 7
        assert (byte or shift == 0) and shift <= 28 and value + (byte << shift) < 1 << 32, "bad varint"
        return value + (byte << shift)

    def signed(self) -> int:
        value = self.varint()
        return -(value + 1) // 2 if value & 1 else value // 2

    def bits(self, count: int) -> np.ndarray:
        bits = np.unpackbits(np.frombuffer(self.take(-(-count // 8)), np.uint8), bitorder="little").astype(bool)
        assert bits[:count].any() and not bits[count:].any(), "bad bits"
        return bits[:count]

    def checksum(self, count: int, *, only_if: bool) -> None:
        assert not only_if or crc32c.crc32c(self.data[self.at - count : self.at]) == self.integer(4), "checksum differs"


class Frame(NamedTuple):
    version: int
    grey: bool
    shape: tuple[int, int, int]  # N, H, W
    row: int | None
    mask: bytes  # empty without a mask, as are the corrections and pixel sections of tiles
    tiles: list[tuple]  # (plane, top, left, rows, columns) in latent positions, correction, stream, pixel section


def parse_frame(data: bytes) -> Frame:
    r, tiles = Reader(data), []
    magic, version, flags = r.take(4), r.integer(1), r.integer(1)
    assert magic == b"ZCAE" and version in {1, 2, 3} and flags < (32 if version == 3 else 2), "not a known frame"
    n, height, width, log_edge = r.varint(), r.varint(), r.varint(), r.integer(1)
    assert min(n, height, width) >= 1 and log_edge <= 10, "bad sizes"
    row = r.integer(1) if version == 3 else None
    h, w, e = math.ceil(height / 16), math.ceil(width / 16), 1 << log_edge
    corners = list(itertools.product(range(n), range(0, h, e), range(0, w, e)))
    r.take(2 if flags & 8 else 0)  # the measured PSNR
    mask_length = r.varint() if flags & 2 else 0
    is_exact = r.bits(len(corners)) if flags & 4 else np.zeros(len(corners), bool)
    lengths = [r.varint() for _ in corners]
    exact_lengths = [r.varint() if exact else 0 for exact in is_exact]
    assert (mask_length > 0) == bool(flags & 2) and np.all(np.greater(exact_lengths, 0) == is_exact), "empty section"
    r.checksum(r.at, only_if=version > 1)
    mask = r.take(mask_length)
    r.checksum(mask_length, only_if=mask_length > 0)
    for (p, y, x), length, exact_length in zip(corners, lengths, exact_lengths, strict=True):
        t = Reader(r.take(length + exact_length))
        correction = t.take(t.varint() if flags & 16 else 0)
        tiles.append(((p, y, x, min(e, h - y), min(e, w - x)), correction, t.take(length - t.at), t.take(exact_length)))
        r.checksum(len(t.data), only_if=version > 1)
    r.checksum(r.at, only_if=version == 1)
    assert r.at == len(data), "bytes after the frame"
    return Frame(version, bool(flags & 1), (n, height, width), row, mask, tiles)


def read_weights(data: bytes) -> dict:
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    metadata = {name: json.loads(text) for name, text in header.pop("__metadata__").items() if text[0] in "[{"}
    weights = {"qualities": np.array(metadata["qualities"]), "margin": metadata["architecture"].get("margin", 0)}
    types = {"F16": "<f2", "F32": "<f4", "I16": "<i2", "I32": "<i4", "U8": "u1", "U16": "<u2"}
    for name, t in header.items():
        weights[name] = np.frombuffer(data[end:][slice(*t["data_offsets"])], types[t["dtype"]]).reshape(t["shape"])
    return weights


def zero_frequency(f0: int, positions: int) -> int:
    power, base = 1 << 32, min(f0, TOTAL) << 20
    for bit in reversed(f"{positions:b}"):
        power, base = power * base >> 32 if bit == "1" else power, base * base >> 32
    return min(power >> 20, TOTAL - 1)


def decode_stream(data: bytes, tables: dict, rows: int, columns: int, version: int) -> np.ndarray:
    """The symbols (M, rows, columns) of a tile."""
    r, number, minimum, frequency = Reader(data), itertools.count(), tables["minimum"], tables["frequency"]
    if "zero" not in tables:  # no contexts
        zero = [f[-m] if 0 <= -m < len(f) - 1 else 0 for m, f in zip(minimum, frequency, strict=True)]
        none = np.zeros((len(zero), 0), np.int64)
        tables = {"source": none, "weight": none, "threshold": none, "predicted": np.zeros(len(zero)), "zero": zero}
    states = [r.integer(4) for _ in range(1 << r.integer(1))]
    assert len(states) <= 32 and min(states) >= 1 << 16, "bad lanes"

    def decide(frequencies: list[int]) -> int:
        lane, entry = next(number) % len(states), 0
        high, slot = divmod(states[lane], TOTAL)
        while slot >= frequencies[entry]:
            slot, entry = slot - frequencies[entry], entry + 1
        x = frequencies[entry] * high + slot
        states[lane] = x << 16 | r.integer(2) if x < 1 << 16 else x
        return entry

    zeros = [zero_frequency(f0, rows * columns) if version == 3 or f0 < TOTAL else 0 for f0 in map(int, tables["zero"])]
    is_coded = [16 * z < 15 * TOTAL or decide([z, TOTAL - z]) == 1 for z in zeros]
    symbols = np.zeros((len(is_coded), rows, columns), np.int64)
    around, escapes = np.zeros_like(symbols), []
    for c in np.flatnonzero(is_coded):
        sources = zip(tables["source"][c], tables["weight"][c], strict=True)
        score = sum((weight * around[s] for s, weight in sources if s >= 0), np.zeros((rows, columns), np.int64))
        classes = (tables["threshold"][c][:, None, None] <= score).sum(0)
        for (y, x), row in np.ndenumerate(c * (len(minimum) // len(is_coded)) + classes):
            entry = decide(frequency[row])
            symbols[c, y, x] = minimum[row] + entry
            if entry == len(frequency[row]) - 1:
                escapes.append((c, y, x, row))
        activity = np.pad(np.minimum(abs(symbols[c]), 15), 1)
        around[c] = np.tensordot(sliding_window_view(activity, (3, 3)), [[1, 2, 1], [2, 4, 2], [1, 2, 1]])
    assert all(x == 1 << 16 for x in states), "wrong end states"
    for c, y, x, row in escapes:
        symbols[c, y, x] = value = r.signed()
        assert -32768 <= value < 32768 and not 0 <= value - minimum[row] < len(frequency[row]) - 1, "bad escape"
    assert r.at == len(data), "bytes after the stream"
    for c, y, x in itertools.product(np.flatnonzero(tables["predicted"] * is_coded), range(rows), range(columns)):
        left, upper = symbols[c, y, x - 1] if x else 0, symbols[c, y - 1, x] if y else 0
        guess = (left + upper + 1) >> 1 if x and y else left + upper
        symbols[c, y, x] = (symbols[c, y, x] + guess + 32768) % 65536 - 32768
    return symbols


def decode_latents(frame: Frame, weights: dict, quality: int) -> np.ndarray:
    row = weights["qualities"].tolist().index(quality) if frame.row is None else frame.row
    minimum, lengths = weights["tables.minimum"][row].tolist(), weights["tables.length"]
    ends = int(lengths[:row].sum()) + np.cumsum(lengths[row])
    frequency = [weights["tables.frequency"][e - n : e].tolist() for e, n in zip(ends, lengths[row], strict=True)]
    tables = {name[9:]: v[row].astype(np.int64) for name, v in weights.items() if name.startswith("contexts.")}
    tables |= {"minimum": minimum, "frequency": frequency}
    n, height, width = frame.shape
    symbols = np.zeros((n, weights["step"].shape[1], math.ceil(height / 16), math.ceil(width / 16)), np.float32)
    for (p, y, x, rows, columns), _, stream, _ in frame.tiles:
        symbols[p, :, y : y + rows, x : x + columns] = decode_stream(stream, tables, rows, columns, frame.version)
    return symbols * weights["step"][row][:, None, None] + weights["offset"][row][:, None, None]


def synthesise(x: np.ndarray, weights: dict) -> np.ndarray:
    """The components (3, 16 h, 16 w) of one plane's latents (M, h, w)."""
    get = {name[10:]: tensor.astype(np.float64) for name, tensor in weights.items() if name.startswith("synthesis.")}

    def conv(x: np.ndarray, name: str) -> np.ndarray:
        windows = sliding_window_view(np.pad(x, ((0, 0), (1, 1), (1, 1)), "edge"), (3, 3), axis=(1, 2))
        return np.tensordot(get[name + ".weight"], windows, ((1, 2, 3), (0, 3, 4))) + get[name + ".bias"][:, None, None]

    def residual(x: np.ndarray, name: str) -> np.ndarray:
        return x + conv(np.maximum(y := conv(x, name + ".reduce"), 0.01 * y), name + ".expand")

    def igdn(x: np.ndarray, name: str, k: int = 1) -> np.ndarray:
        return x * (get[name + ".beta"][:, None, None] + np.tensordot(get[name + ".gamma"], abs(x) ** k, 1)) ** (1 / k)

    def up(x: np.ndarray, name: str, s: int, edge: int = 1) -> np.ndarray:
        weight, (h, w), p = get[name + ".weight"], x.shape[1:], np.pad(x, ((0, 0), (edge, edge), (edge, edge)), "edge")
        y = np.zeros((weight.shape[1], s * (h + 3), s * (w + 3)))
        for a, b in np.ndindex(weight.shape[2:]):
            y[:, a : a + s * p.shape[1] : s, b : b + s * p.shape[2] : s] += np.tensordot(weight[..., a, b].T, p, 1)
        cut = s + edge * (s // 2)
        return y[:, cut : cut + s * h, cut : cut + s * w] + get[name + ".bias"][:, None, None]

    if "0.weight" in get:  # bmshj2018-factorized
        x = np.pad(x, ((0, 0), (m := weights["margin"], m), (m, m)), "reflect")
        for layer, gdn in ("01", "23", "45"):
            x = igdn(up(x, layer, 2, edge=0), gdn, k=2)
        return up(x, "6", 2, edge=0)[:, 16 * m : -16 * m or None, 16 * m : -16 * m or None]
    x = up(residual(x, "residual3"), "conv3", 2)
    x = up(igdn(residual(x, "residual2"), "gdn2"), "conv2", 2)
    return up(igdn(residual(x, "residual1"), "gdn1"), "conv1", 4) + 0.5


def correct(plane: np.ndarray, corrections: list[tuple]) -> np.ndarray:
    """A plane (C, 16 h, 16 w) with the corrections of tiles at these places."""
    v, corrected, (count, height, width) = np.clip(plane, 0, 1), plane.copy(), plane.shape
    padded = [np.pad(v, ((0, 0), (e, e), (e, e)), "edge") for e in (1, 3)]
    m3, m7 = (sliding_window_view(p, (k, k), axis=(1, 2)).mean((3, 4)) for p, k in zip(padded, (3, 7), strict=True))
    soft = sum(np.clip(np.roll(padded[0], d, a)[:, 1:-1, 1:-1] - v, -3 / 255, 3 / 255) for d in (-1, 1) for a in (1, 2))
    for (_, y, x, rows, columns), section in corrections:
        form, limit = (r := Reader(section)).take(2)
        numbers = np.array([r.signed() for _ in range(count * (count + 11))]).reshape(count, -1)
        here = np.zeros((height // 16, width // 16), bool)
        here[y : y + rows, x : x + columns] = r.bits(rows * columns).reshape(rows, columns) if form & 2 else True
        here = here.repeat(16, axis=0).repeat(16, axis=1)
        assert form < 4 and limit and abs(numbers).max() <= 32767 and r.at == len(section), "bad correction"
        for c in range(count):
            change = np.interp(8 * (np.sqrt(v[c]) if form & 1 else v[c]), range(9), numbers[c, :9]) / (8 * 255)
            others = [*np.delete(v, c, axis=0), m3[c], m7[c], v[c] + soft[c]]
            change += sum(n / 64 * (other - v[c]) for n, other in zip(numbers[c, 9:], others, strict=True))
            corrected[c][here] = (v[c] + np.clip(change, -limit / 255, limit / 255))[here]
    return corrected


def inflate(data: bytes, most: int) -> bytes:
    z = zlib.decompressobj()
    out = z.decompress(data, most + 1)
    assert len(out) <= most and z.eof and not z.unused_data, "bad zlib stream"
    return out


def exact_samples(section: bytes, shape: tuple[int, int, int], dtype: np.dtype) -> np.ndarray:
    (c, rows, columns), b = shape, dtype.itemsize
    assert section[0] <= 2, "unknown predictor"
    split = np.frombuffer(inflate(section[1:], c * b * rows * columns), np.uint8).reshape(c, b, rows, columns)
    v = np.ascontiguousarray(split.transpose(0, 2, 3, 1)).view(f"<u{b}")[..., 0]
    for axis in (2, 1)[: section[0]]:
        v = np.cumsum(v, axis=axis, dtype=v.dtype)
    return v.view(dtype.newbyteorder("<"))


def contours(data: bytes, rows: int, width: int) -> np.ndarray:
    r, changes, top = Reader(data), np.zeros((rows, width), bool), 0
    while top < rows:
        n, k = r.varint(), r.varint()
        assert 1 <= n <= rows - top, "bad group of rows"
        first = [np.cumsum([r.varint() for _ in range(k)])]
        columns = np.cumsum(first + [[r.signed() for _ in range(k)] for _ in range(n - 1)], axis=0, dtype=np.int64)
        assert ((columns >= 0) & (columns < width)).all() and (np.diff(columns) > 0).all(), "bad columns"
        changes[np.arange(top, top + n)[:, None], columns] = True
        top += n
    assert r.at == len(data), "bytes after the contours"
    return np.logical_xor.accumulate(changes, axis=1)


def mask_bits(section: bytes, shape: tuple[int, ...]) -> np.ndarray:
    *outer, w = shape
    packed = (*outer, math.ceil(w / 8))
    if section[0] == 1:
        changed = contours(inflate(section[1:], math.prod(packed)), math.prod(outer), w).reshape(shape)
    else:
        content = np.frombuffer(inflate(section, math.prod(packed)), np.uint8).reshape(packed)
        bits = np.unpackbits(np.bitwise_xor.accumulate(content, axis=2), axis=3, bitorder="little")
        assert not bits[..., w:].any(), "bits after the last column"
        changed = bits[..., :w].astype(bool)
    mask = np.logical_xor.accumulate(changed, axis=1)
    assert mask.any(), "empty mask"
    return mask


def decode(frame: Frame, weights: dict, configuration: dict, dtype: np.dtype, images: int = 1) -> np.ndarray:
    """The samples (I, D, H, W) of a frame of so many images; (N, C, H, W) without colour."""
    low, high = configuration.get("value_range", [0, 255])
    (n, height, width), extent, colour = frame.shape, high - low, configuration.get("colour")
    groups = [(p, [0] if frame.grey else [0, 1, 2]) for p in range(n)]  # image and channels of each plane
    if colour is not None:
        others = ([c] for c in range(n // images + 2) if c not in colour)
        groups = list(itertools.product(range(images), [colour, *others]))
    value = np.zeros((groups[-1][0] + 1, 1 + max(max(group) for _, group in groups), height, width))
    for p, latents in enumerate(decode_latents(frame, weights, configuration["quality"])):
        (i, group), v = groups[p], synthesise(latents, weights)
        corrections = [tile[:2] for tile in frame.tiles if tile[0][0] == p and tile[1]]
        value[i, group] = correct(v if len(group) == 3 else v.mean(0)[None], corrections)[:, :height, :width]
    if configuration.get("value_transform") == "sqrt":
        a = math.sqrt(3 / 8)
        value = ((np.clip(value, 0, 1) * (math.sqrt(extent + 3 / 8) - a) + a) ** 2 - 3 / 8) / extent
    value = np.clip(low + extent * value, low, high)
    samples = (np.rint(value) if dtype.kind in "iu" else value).astype(dtype)
    for (p, y, x, rows, columns), _, _, section in frame.tiles:
        if section:
            i, group = groups[p]
            part = samples[i, :, 16 * y : 16 * (y + rows), 16 * x : 16 * (x + columns)]
            part[group] = exact_samples(section, (len(group), *part.shape[1:]), dtype)
    mask = mask_bits(frame.mask, samples.shape) if frame.mask else np.zeros(samples.shape, bool)
    if "nodata" not in configuration:
        samples[mask] = dtype.type(configuration.get("fill_value", 0))
        return samples
    nodata = dtype.type(float(configuration["nodata"]) if dtype.kind == "f" else configuration["nodata"])
    up = -1 if nodata >= high else 1
    beside = np.nextafter(nodata, dtype.type(up * np.inf)) if dtype.kind == "f" else int(nodata) + up
    normal = np.copysign(np.finfo(dtype).tiny, beside) if dtype.kind == "f" else beside
    beside = normal if abs(beside) < abs(normal) and low <= normal <= high else beside
    samples[samples == nodata] = beside
    samples[mask] = nodata
    return samples
