"""A second decoder of the codec `cae`, written from its specification alone: slow, plain NumPy, for tests."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

TOTAL = 4096


class FormatError(ValueError):
    """The bytes are not as the specification says."""


def need(condition: object, message: str) -> None:
    if not condition:
        raise FormatError(message)


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)  # noqa: PLW2901
        table.append(value)
    return table


CRC_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC_TABLE[(crc ^ byte) & 255] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


@dataclass
class Reader:
    data: bytes
    at: int = 0

    def take(self, count: int) -> bytes:
        need(self.at + count <= len(self.data), "too short")
        self.at += count
        return self.data[self.at - count : self.at]

    def integer(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def varint(self, longest: int = 5) -> int:
        value = 0
        for k in range(longest):
            byte = self.integer(1)
            value |= (byte & 127) << (7 * k)
            if byte < 128:
                need(byte or k == 0, "varint ends with a zero byte")
                need(value < 1 << 32, "varint too large")
                return value
        raise FormatError("varint too long")

    def checksum(self, start: int) -> None:
        computed = crc32c(self.data[start : self.at])
        need(self.integer(4) == computed, "checksum differs")


@dataclass
class Frame:
    version: int
    grey: bool
    shape: tuple[int, int, int]  # N, H, W
    edge: int
    row: int | None = None
    psnr: int | None = None
    mask: bytes | None = None
    streams: list[bytes] = field(default_factory=list)
    exact: dict[int, bytes] = field(default_factory=dict)

    def tiles(self) -> list[tuple[int, int, int, int, int]]:
        """Plane, first row, first column, rows and columns of each tile, in latent positions."""
        n, height, width = self.shape
        h, w, e = -(-height // 16), -(-width // 16), self.edge
        return [
            (p, y, x, min(e, h - y), min(e, w - x)) for p in range(n) for y in range(0, h, e) for x in range(0, w, e)
        ]


def parse_frame(data: bytes) -> Frame:  # noqa: C901
    r = Reader(data)
    need(r.take(4) == b"ZCAE", "no magic")
    version, flags = r.integer(1), r.integer(1)
    need(version in {1, 2, 3}, "unknown version")
    need(flags < (16 if version == 3 else 2), "unknown flags")
    n, height, width, log_edge = r.varint(), r.varint(), r.varint(), r.integer(1)
    need(min(n, height, width) >= 1 and log_edge <= 10, "bad sizes")
    frame = Frame(version, bool(flags & 1), (n, height, width), 1 << log_edge)
    count = n * math.ceil(height / 16 / frame.edge) * math.ceil(width / 16 / frame.edge)
    mask_length, exact = 0, []
    if version == 3:
        frame.row = r.integer(1)
    if flags & 8:
        frame.psnr = r.integer(2)
    if flags & 2:
        mask_length = r.varint()
        need(mask_length, "empty mask")
    if flags & 4:
        bits = np.unpackbits(np.frombuffer(r.take(-(-count // 8)), np.uint8), bitorder="little")
        need(bits[:count].any() and not bits[count:].any(), "bad bits of exact tiles")
        exact = np.flatnonzero(bits).tolist()
    lengths = [r.varint() for _ in range(count)]
    pixel_lengths = {tile: r.varint() for tile in exact}
    need(all(pixel_lengths.values()), "empty pixel section")
    if version > 1:
        r.checksum(0)
    if mask_length:
        start = r.at
        frame.mask = r.take(mask_length)
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
    need(r.at == len(data), "bytes after the frame")
    return frame


class Weights:
    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        self.digest = "sha256:" + hashlib.sha256(data).hexdigest()
        n = int.from_bytes(data[:8], "little")
        header: dict[str, Any] = json.loads(data[8 : 8 + n])
        metadata = header.pop("__metadata__")
        need(metadata["format"] == "zarr-cae-weights-1" and metadata["model"] == "cae-v1", "unknown weights")
        self.qualities: list[int] = json.loads(metadata["qualities"])
        types = {"F16": "<f2", "F32": "<f4", "I16": "<i2", "I32": "<i4", "U8": "u1", "U16": "<u2"}
        self.tensors: dict[str, np.ndarray] = {}
        for name, entry in header.items():
            start, stop = (8 + n + k for k in entry["data_offsets"])
            self.tensors[name] = np.frombuffer(data[start:stop], types[entry["dtype"]]).reshape(entry["shape"])

    def tables(self, row: int) -> Tables:
        t = self.tensors
        lengths = t["tables.length"]
        start = int(lengths[:row].sum())
        ends = start + np.cumsum(lengths[row])
        frequencies = [t["tables.frequency"][b - k : b].tolist() for b, k in zip(ends, lengths[row], strict=True)]
        contexts = {k.split(".")[1]: v[row].astype(np.int64) for k, v in t.items() if k.startswith("contexts.")}
        return Tables(t["step"].shape[1], t["tables.minimum"][row].tolist(), frequencies, contexts)


@dataclass
class Tables:
    channels: int
    minimum: list[int]
    frequency: list[list[int]]
    contexts: dict[str, np.ndarray] = field(default_factory=dict)

    def zero(self, channel: int) -> int:
        if self.contexts:
            return int(self.contexts["zero"][channel])
        k = -self.minimum[channel]
        return self.frequency[channel][k] if 0 <= k < len(self.frequency[channel]) - 1 else 0


def zero_frequency(f0: int, positions: int) -> int:
    power, base, n = 1 << 32, min(f0, TOTAL) << 20, positions
    while n:
        if n & 1:
            power = power * base >> 32
        base = base * base >> 32
        n >>= 1
    return min(power >> 20, TOTAL - 1)


def around(activity: np.ndarray) -> np.ndarray:
    p = np.pad(activity, 1)
    rows = p[:-2] + 2 * p[1:-1] + p[2:]
    return rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]


def wrap(value: int) -> int:
    return (value + 32768) % 65536 - 32768


def unpredict(coded: np.ndarray) -> np.ndarray:
    v = coded.copy()
    for y, x in np.ndindex(*v.shape):
        left, upper = int(v[y, x - 1]) if x else 0, int(v[y - 1, x]) if y else 0
        prediction = (left + upper + 1) >> 1 if x and y else left + upper
        v[y, x] = wrap(int(v[y, x]) + prediction)
    return v


def decode_stream(data: bytes, tables: Tables, rows: int, columns: int, version: int) -> np.ndarray:  # noqa: C901
    """The symbols (M, rows, columns) of a tile."""
    r = Reader(data)
    log_lanes = r.integer(1)
    need(log_lanes <= 5, "too many lanes")
    states = [r.integer(4) for _ in range(1 << log_lanes)]
    need(min(states) >= 1 << 16, "state too small")
    number = 0

    def decide(frequencies: list[int]) -> int:
        nonlocal number
        lane = number % len(states)
        number += 1
        slot, entry = states[lane] % TOTAL, 0
        high = states[lane] // TOTAL
        while slot >= frequencies[entry]:
            slot -= frequencies[entry]
            entry += 1
        x = frequencies[entry] * high + slot
        states[lane] = x << 16 | r.integer(2) if x < 1 << 16 else x
        return entry

    m, ctx = tables.channels, tables.contexts
    per_channel = len(tables.minimum) // m
    is_coded = []
    for f0 in map(tables.zero, range(m)):
        z = zero_frequency(f0, rows * columns)
        flagged = 16 * z >= 15 * TOTAL and (version == 3 or f0 < TOTAL)
        is_coded.append(not flagged or decide([z, TOTAL - z]) == 1)
    coded = np.zeros((m, rows, columns), np.int64)
    neighbourhoods = np.zeros((m, rows, columns), np.int64)
    escapes = []
    for c in range(m):
        if not is_coded[c]:
            continue
        classes = np.zeros((rows, columns), np.int64)
        if ctx:
            sources = zip(ctx["source"][c], ctx["weight"][c], strict=True)
            score = sum(weight * neighbourhoods[s] for s, weight in sources if s >= 0)
            classes = np.broadcast_to((ctx["threshold"][c][:, None, None] <= score).sum(0), (rows, columns))
        for y, x in np.ndindex(rows, columns):
            row = c * per_channel + int(classes[y, x])
            entry = decide(tables.frequency[row])
            coded[c, y, x] = tables.minimum[row] + entry
            if entry == len(tables.frequency[row]) - 1:
                escapes.append((c, y, x, row))
        neighbourhoods[c] = around(np.minimum(abs(coded[c]), 15))
    need(all(x == 1 << 16 for x in states), "wrong end states")
    for c, y, x, row in escapes:
        u = r.varint(3)
        value = -(u + 1) // 2 if u & 1 else u // 2
        inside = 0 <= value - tables.minimum[row] < len(tables.frequency[row]) - 1
        need(wrap(value) == value and not inside, "bad escape")
        coded[c, y, x] = value
    need(r.at == len(data), "bytes after the stream")
    if ctx:
        for c in np.flatnonzero(ctx["predicted"]):
            if is_coded[c]:
                coded[c] = unpredict(coded[c])
    return coded


def decode_symbols(frame: Frame, tables: Tables) -> np.ndarray:
    n, height, width = frame.shape
    symbols = np.zeros((n, tables.channels, -(-height // 16), -(-width // 16)), np.int64)
    for stream, (p, y, x, rows, columns) in zip(frame.streams, frame.tiles(), strict=True):
        tile = decode_stream(stream, tables, rows, columns, frame.version)
        symbols[p, :, y : y + rows, x : x + columns] = tile
    return symbols


def decode_latents(frame: Frame, weights: Weights, quality: int) -> np.ndarray:
    row = weights.qualities.index(quality) if frame.row is None else frame.row
    need(row < len(weights.qualities), "no such row")
    step, offset = (weights.tensors[k][row][:, None, None] for k in ("step", "offset"))
    return decode_symbols(frame, weights.tables(row)).astype(np.float32) * step + offset
