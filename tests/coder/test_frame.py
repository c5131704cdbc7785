"""The chunk frame: round trips, golden bytes, and one error for each malformation."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import crc32c
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from zarr_cae.coder.frame import FrameHeader, FrameIndex, pack, parse_index, unpack
from zarr_cae.errors import CAEConfigurationError, FrameError

GOLDEN = Path(__file__).parents[1] / "fixtures" / "frames"
GOLDEN_FRAMES = {
    "rgb": (FrameHeader(1, 256, 256, grey=False), [bytes(range(200))]),
    "grey_ragged": (FrameHeader(2, 33, 70, grey=True, tile=2), [bytes([n]) * n for n in range(12)]),
    "one_pixel": (FrameHeader(1, 1, 1, grey=True, tile=1024), [b"x"]),
    "rgb_2": (FrameHeader(1, 256, 256, grey=False, version=2), [bytes(range(200))]),
    "grey_ragged_2": (FrameHeader(2, 33, 70, grey=True, tile=2, version=2), [bytes([n]) * n for n in range(12)]),
}
SMALL = FrameHeader(2, 40, 17, grey=True, tile=2)
SMALL_2 = replace(SMALL, version=2)
SMALL_STREAMS = [b"\x01\x02\x03", b"", b"\xff" * 130, b"z"]


def make_golden_frames() -> None:
    """Run once by hand: python -c 'import test_framing as t; t.make_golden_frames()'. Never replaces a file."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name, (header, streams) in GOLDEN_FRAMES.items():
        with (GOLDEN / f"{name}.bin").open("xb") as file:
            file.write(pack(header, streams))


def sealed(body: bytes | bytearray) -> bytes:
    return bytes(body) + crc32c.crc32c(bytes(body)).to_bytes(4, "little")


headers = st.builds(
    FrameHeader,
    planes=st.integers(1, 4),
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    grey=st.booleans(),
    tile=st.sampled_from([1, 2, 4, 8, 32, 1024]),
    version=st.sampled_from([1, 2]),
).filter(lambda header: header.tile_count <= 400)


@settings(max_examples=60, deadline=None)
@given(header=headers, data=st.data())
def test_round_trip(header, data):
    streams = [bytes([n % 256]) * data.draw(st.sampled_from([0, 1, 5, 127, 128])) for n in range(header.tile_count)]
    frame = pack(header, streams)
    for given_frame in (frame, bytearray(frame), memoryview(frame)):
        got, views = unpack(given_frame, header)
        assert got == header
        assert [bytes(view) for view in views] == streams
    index = parse_index(frame, header)
    assert isinstance(index, FrameIndex)
    assert index.frame_bytes == len(frame)
    assert index.stream(0, memoryview(frame)[index.offsets[0] : index.offsets[1]]) == streams[0]


@given(header=headers)
def test_tiles_cover_the_plane_once_in_order(header):
    rows, columns = header.latent_shape
    assert (rows, columns) == ((header.height + 15) // 16, (header.width + 15) // 16)
    tiles = list(header.tiles())
    assert len(tiles) * header.planes == header.tile_count
    assert len(tiles) == header.tile_grid[0] * header.tile_grid[1]
    covered = {(y, x) for r, c in tiles for y in range(r.start, r.stop) for x in range(c.start, c.stop)}
    assert len(covered) == rows * columns == sum((r.stop - r.start) * (c.stop - c.start) for r, c in tiles)
    assert tiles == sorted(tiles, key=lambda tile: (tile[0].start, tile[1].start))
    assert all(r.stop - r.start <= header.tile and c.stop - c.start <= header.tile for r, c in tiles)


@pytest.mark.parametrize("name", GOLDEN_FRAMES)
def test_golden_frames(name):
    header, streams = GOLDEN_FRAMES[name]
    golden = (GOLDEN / f"{name}.bin").read_bytes()
    assert pack(header, streams) == golden
    got, views = unpack(golden, header)
    assert (got, [bytes(view) for view in views]) == (header, streams)


@pytest.mark.parametrize("version", [1, 2])
def test_overhead_of_a_usual_chunk(version):
    assert len(pack(FrameHeader(1, 256, 256, grey=False, version=version), [b"s" * 10_000])) - 10_000 - 2 <= 24


@pytest.mark.parametrize("expected", [SMALL, SMALL_2])
def test_index_from_prefixes_says_how_much_is_missing(expected):
    frame = pack(expected, SMALL_STREAMS)
    whole = parse_index(frame, expected)
    assert isinstance(whole, FrameIndex)
    for size in range(1, len(frame)):
        index = parse_index(frame[:size], expected)
        if size >= whole.offsets[0]:
            assert index == whole
        else:
            assert isinstance(index, int)
            assert 1 <= index <= whole.offsets[0] - size
    size = reads = 1
    while isinstance(missing := parse_index(frame[:size], expected), int):
        size, reads = size + missing, reads + 1
    assert reads <= 6


@pytest.mark.parametrize("checksum", ["stale", "recomputed"])
def test_truncation_at_each_byte(checksum):
    frame = pack(SMALL, SMALL_STREAMS)
    for size in range(len(frame)):
        with pytest.raises(FrameError, match=r"^cae: frame"):
            unpack(frame[:size] if checksum == "stale" else sealed(frame[: min(size, len(frame) - 5)]), SMALL)


def test_each_flipped_bit():
    frame = pack(SMALL, SMALL_STREAMS)
    for bit in range(8 * len(frame)):
        damaged = bytearray(frame)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FrameError, match=r"checksum|must begin with"):
            unpack(bytes(damaged), SMALL)


def test_each_flipped_bit_of_version_2_also_in_parts():
    frame = pack(SMALL_2, SMALL_STREAMS)
    whole = parse_index(frame, SMALL_2)
    assert isinstance(whole, FrameIndex)
    for bit in range(8 * len(frame)):
        damaged = bytearray(frame)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FrameError, match=r"^cae: frame"):
            unpack(bytes(damaged), SMALL_2)
        if bit // 8 < whole.offsets[0]:
            with pytest.raises(FrameError, match=r"^cae: frame"):
                assert isinstance(parse_index(bytes(damaged), SMALL_2), FrameIndex)
        else:
            (tile,) = (n for n in range(4) if whole.offsets[n] <= bit // 8 < whole.offsets[n + 1])
            with pytest.raises(FrameError, match=f"tile {tile}'s checksum must be"):
                whole.stream(tile, memoryview(damaged)[whole.offsets[tile] : whole.offsets[tile + 1]])


def test_truncation_of_version_2_at_each_byte_and_a_tail():
    frame = pack(SMALL_2, SMALL_STREAMS)
    for size in range(len(frame)):
        with pytest.raises(FrameError, match=r"^cae: frame"):
            unpack(frame[:size], SMALL_2)
    with pytest.raises(FrameError, match="foreign tail"):
        unpack(frame + b"\0", SMALL_2)


# The small frame: magic 0-3, version 4, flags 5, planes 6, height 7, width 8, tile 9, lengths 10-14.
MALFORMED = {
    "no frame": (slice(0, 4), b"\x89PNG", "not a cae frame"),
    "newer version": (slice(4, 5), b"\x03", "upgrade zarr-cae"),
    "other weights": (slice(4, 5), b"\x02", "version must be 1, which the weights of the array call for; got 2"),
    "version 0": (slice(4, 5), b"\x00", "version must be one of \\(1, 2\\); got 0"),
    "unknown flag": (slice(5, 6), b"\x03", "flags must be 0 or 1; got 3"),
    "RGB for grey": (slice(5, 6), b"\x00", "2 RGB planes of 40 x 17: it is of another array"),
    "other planes": (slice(6, 7), b"\x03", "got 3 grey planes of 40 x 17"),
    "no planes": (slice(6, 7), b"\x00", "got 0 grey planes of 40 x 17"),
    "other height": (slice(7, 8), b"\x29", "got 2 grey planes of 41 x 17"),
    "other width": (slice(8, 9), b"\x12", "got 2 grey planes of 40 x 18"),
    "huge planes": (slice(6, 7), b"\xff\xff\xff\xff\x0f", "got 4294967295 grey planes"),
    "planes beyond 32 bits": (slice(6, 7), b"\xff\xff\xff\xff\x10", "plane count must be below 2\\^32"),
    "endless varint": (slice(6, 7), b"\x80\x80\x80\x80\x80\x80", "plane count must have at most 5 bytes"),
    "overlong planes": (slice(6, 7), b"\x82\x00", "plane count has a superfluous last byte"),
    "overlong height": (slice(7, 8), b"\xa8\x00", "height has a superfluous last byte"),
    "overlong width": (slice(8, 9), b"\x91\x00", "width has a superfluous last byte"),
    "tile too big": (slice(9, 10), b"\x0b", "tile size must be 0 to 10; got 11"),
    "other tile": (slice(9, 10), b"\x00", "foreign tail|too early|length of tile"),
    "length short by one": (slice(10, 11), b"\x02", "foreign tail"),
    "length long by one": (slice(10, 11), b"\x04", "ends at least 1 bytes too early"),
    "huge length": (slice(10, 11), b"\xff\xff\xff\xff\x0f", "too early"),
    "overlong length": (slice(10, 11), b"\x83\x00", "length of tile 0 has a superfluous last byte"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_field_with_valid_checksum(name):
    where, what, message = MALFORMED[name]
    body = bytearray(pack(SMALL, SMALL_STREAMS)[:-4])
    body[where] = what
    with pytest.raises(FrameError, match=message):
        unpack(sealed(body), SMALL)


def test_more_tiles_than_bytes_is_refused_without_a_loop():
    huge = FrameHeader(2**32 - 1, 2**32 - 1, 2**32 - 1, grey=True, tile=1)
    dimension = b"\xff\xff\xff\xff\x0f"
    with pytest.raises(FrameError, match="too early"):
        unpack(sealed(b"ZCAE\x01\x01" + 3 * dimension + b"\x00" + b"\x01" * 50), huge)


@pytest.mark.parametrize("junk", [b"", b"Z", b"ZCAE", b"ZCAE\x01", b"ZCAE\x01\x00\x00\x00", bytes(100)])
def test_junk(junk):
    with pytest.raises(FrameError, match=r"^cae: frame"):
        unpack(junk, SMALL)


@settings(max_examples=300, deadline=None)
@given(tail=st.binary(max_size=60), keep=st.integers(0, 15))
@example(tail=b"", keep=15)
def test_arbitrary_bytes_with_valid_checksum(tail, keep):
    prefix = pack(SMALL, SMALL_STREAMS)[:keep]
    with contextlib.suppress(FrameError):
        header, streams = unpack(sealed(prefix + tail), SMALL)
        assert header.tile_count == len(streams)
    with contextlib.suppress(FrameError):
        index = parse_index(prefix + tail, SMALL)
        assert isinstance(index, FrameIndex) or index > 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"planes": 0}, "planes"), ({"height": 0}, "height"), ({"width": 1 << 32}, "width"), ({"tile": 3}, "tile")],
)
def test_impossible_headers(changed, message):
    with pytest.raises(CAEConfigurationError, match=f"frame's {message} must be"):
        FrameHeader(**{"planes": 1, "height": 5, "width": 5, "grey": True, **changed})


def test_pack_wants_a_stream_per_tile():
    with pytest.raises(CAEConfigurationError, match="needs 4 tile streams; got 1"):
        pack(SMALL, [b"one"])
