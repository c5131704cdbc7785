"""A second decoder of the codec `cae`, written from its specification alone: slow, plain NumPy, for tests."""
# ruff: noqa: C901, PT018

import itertools
import json
import math
import zlib
from dataclasses import dataclass, field

import crc32c
import numpy as np

TOTAL = 4096


@dataclass
class Reader:
    data: bytes
    at: int = 0

    def take(self, count: int) -> bytes:
        assert self.at + count <= len(self.data), "too short"
        self.at += count
        return self.data[self.at - count : self.at]

    def integer(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def varint(self) -> int:
        value = shift = 0
        while (byte := self.integer(1)) >= 128:
            value, shift = value + ((byte - 128) << shift), shift + 7
        assert byte or shift == 0, "varint ends with a zero byte"
        assert shift <= 28 and value + (byte << shift) < 1 << 32, "varint too large"
        return value + (byte << shift)

    def signed(self) -> int:
        value = self.varint()
        return -(value + 1) // 2 if value & 1 else value // 2

    def checksum(self, start: int) -> None:
        assert crc32c.crc32c(self.data[start : self.at]) == self.integer(4), "checksum differs"


@dataclass
class Frame:
    version: int
    grey: bool
    shape: tuple[int, int, int]  # N, H, W
    edge: int
    row: int | None = None
    mask: bytes | None = None
    streams: list[bytes] = field(default_factory=list)
    exact: dict[int, bytes] = field(default_factory=dict)

    def tiles(self) -> list[tuple[int, int, int, int, int]]:
        """Plane, first row, first column, rows and columns of each tile, in latent positions."""
        (n, height, width), e = self.shape, self.edge
        h, w = math.ceil(height / 16), math.ceil(width / 16)
        corners = itertools.product(range(n), range(0, h, e), range(0, w, e))
        return [(p, y, x, min(e, h - y), min(e, w - x)) for p, y, x in corners]


def parse_frame(data: bytes) -> Frame:
    r = Reader(data)
    magic, version, flags = r.take(4), r.integer(1), r.integer(1)
    assert magic == b"ZCAE" and version in {1, 2, 3} and flags < (16 if version == 3 else 2), "not a known frame"
    n, height, width, log_edge = r.varint(), r.varint(), r.varint(), r.integer(1)
    assert min(n, height, width) >= 1 and log_edge <= 10, "bad sizes"
    frame = Frame(version, bool(flags & 1), (n, height, width), 1 << log_edge, r.integer(1) if version == 3 else None)
    count = n * math.ceil(height / 16 / frame.edge) * math.ceil(width / 16 / frame.edge)
    r.take(2 if flags & 8 else 0)  # the measured PSNR
    mask_length = r.varint() if flags & 2 else None
    bits = np.unpackbits(np.frombuffer(r.take(-(-count // 8) if flags & 4 else 0), np.uint8), bitorder="little")
    assert bits[:count].any() == bool(flags & 4) and not bits[count:].any(), "bad bits of exact tiles"
    lengths = [r.varint() for _ in range(count)]
    pixel_lengths = {tile: r.varint() for tile in np.flatnonzero(bits).tolist()}
    assert mask_length != 0 and all(pixel_lengths.values()), "empty section"
    if version > 1:
        r.checksum(0)
    if mask_length:
        start, frame.mask = r.at, r.take(mask_length)
        r.checksum(start)
    for tile, length in enumerate(lengths):
        start = r.at
        frame.streams.append(r.take(length))
        if tile in pixel_lengths:
            frame.exact[tile] = r.take(pixel_lengths[tile])
        if version > 1:
            r.checksum(start)
    if version == 1:
        r.checksum(0)
    assert r.at == len(data), "bytes after the frame"
    return frame


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
            slot -= frequencies[entry]
            entry += 1
        x = frequencies[entry] * high + slot
        states[lane] = x << 16 | r.integer(2) if x < 1 << 16 else x
        return entry

    is_coded = []
    for f0 in map(int, tables["zero"]):
        z = zero_frequency(f0, rows * columns)
        flagged = 16 * z >= 15 * TOTAL and (version == 3 or f0 < TOTAL)
        is_coded.append(not flagged or decide([z, TOTAL - z]) == 1)
    symbols = np.zeros((len(is_coded), rows, columns), np.int64)
    around, escapes = np.zeros_like(symbols), []
    for c in np.flatnonzero(is_coded):
        score = np.zeros((rows, columns), np.int64)
        for source, weight in zip(tables["source"][c], tables["weight"][c], strict=True):
            score += weight * around[source] if source >= 0 else 0
        classes = (tables["threshold"][c][:, None, None] <= score).sum(0)
        for y, x in np.ndindex(rows, columns):
            row = c * (len(minimum) // len(is_coded)) + classes[y, x]
            entry = decide(frequency[row])
            symbols[c, y, x] = minimum[row] + entry
            if entry == len(frequency[row]) - 1:
                escapes.append((c, y, x, row))
        p = np.pad(np.minimum(abs(symbols[c]), 15), 1)
        p = p[:-2] + 2 * p[1:-1] + p[2:]
        around[c] = p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]
    assert all(x == 1 << 16 for x in states), "wrong end states"
    for c, y, x, row in escapes:
        value = r.signed()
        assert -32768 <= value < 32768 and not 0 <= value - minimum[row] < len(frequency[row]) - 1, "bad escape"
        symbols[c, y, x] = value
    assert r.at == len(data), "bytes after the stream"
    for c in np.flatnonzero(tables["predicted"] * is_coded):
        for y, x in np.ndindex(rows, columns):
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
    step, offset = (weights[name][row][:, None, None] for name in ("step", "offset"))
    n, height, width = frame.shape
    symbols = np.zeros((n, len(step), math.ceil(height / 16), math.ceil(width / 16)), np.float32)
    for stream, (p, y, x, rows, columns) in zip(frame.streams, frame.tiles(), strict=True):
        symbols[p, :, y : y + rows, x : x + columns] = decode_stream(stream, tables, rows, columns, frame.version)
    return symbols * step + offset


def synthesise(x: np.ndarray, weights: dict) -> np.ndarray:
    """The components (3, 16 h, 16 w) of one plane's latents (M, h, w)."""
    get = {name[10:]: tensor.astype(np.float64) for name, tensor in weights.items() if name.startswith("synthesis.")}

    def conv(x: np.ndarray, name: str) -> np.ndarray:
        weight, (h, w), p = get[name + ".weight"], x.shape[1:], np.pad(x, ((0, 0), (1, 1), (1, 1)), "edge")
        y = sum(np.tensordot(weight[..., a, b], p[:, a : a + h, b : b + w], 1) for a, b in np.ndindex(3, 3))
        return y + get[name + ".bias"][:, None, None]

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
    for plane, (i, group) in zip(decode_latents(frame, weights, configuration["quality"]), groups, strict=True):
        made = synthesise(plane, weights)
        value[i, group] = (made if len(group) == 3 else made.mean(0))[..., :height, :width]
    if configuration.get("value_transform") == "sqrt":
        a = math.sqrt(3 / 8)
        value = ((np.clip(value, 0, 1) * (math.sqrt(extent + 3 / 8) - a) + a) ** 2 - 3 / 8) / extent
    value = np.clip(low + extent * value, low, high)
    samples = (np.rint(value) if dtype.kind in "iu" else value).astype(dtype)
    for number, section in frame.exact.items():
        p, y, x, rows, columns = frame.tiles()[number]
        i, group = groups[p]
        part = samples[i, :, 16 * y : 16 * (y + rows), 16 * x : 16 * (x + columns)]
        part[group] = exact_samples(section, (len(group), *part.shape[1:]), dtype)
    if "nodata" not in configuration:
        assert frame.mask is None, "a mask without nodata"
        return samples
    nodata = dtype.type(float(configuration["nodata"]) if dtype.kind == "f" else configuration["nodata"])
    up = not nodata >= high
    if dtype.kind == "f":
        beside = np.nextafter(nodata, dtype.type(np.inf if up else -np.inf))
        normal = np.copysign(np.finfo(dtype).tiny, beside)
        beside = normal if abs(beside) < abs(normal) and low <= normal <= high else beside
    else:
        beside = int(nodata) + (1 if up else -1)
    samples[samples == nodata] = beside
    if frame.mask is not None:
        samples[mask_bits(frame.mask, samples.shape)] = nodata
    return samples
