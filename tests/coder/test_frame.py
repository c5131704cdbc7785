"""The chunk frame: round trips, golden bytes, and one error for each malformation."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import crc32c
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from zarr_cae.coder.frame import FrameHeader, FrameIndex, pack, parse_frame, parse_index, unpack
from zarr_cae.coder.lossless import decode_mask, decode_pixels, encode_mask, encode_pixels
from zarr_cae.coder.tiles import tiles
from zarr_cae.errors import CAEConfigurationError, FrameError

GOLDEN = Path(__file__).parents[1] / "fixtures" / "frames"
GOLDEN_FRAMES = {
    "rgb": (FrameHeader(1, 256, 256, grey=False), [bytes(range(200))]),
    "grey_ragged": (FrameHeader(2, 33, 70, grey=True, tile=2), [bytes([n]) * n for n in range(12)]),
    "one_pixel": (FrameHeader(1, 1, 1, grey=True, tile=1024), [b"x"]),
    "rgb_2": (FrameHeader(1, 256, 256, grey=False, version=2), [bytes(range(200))]),
    "grey_ragged_2": (FrameHeader(2, 33, 70, grey=True, tile=2, version=2), [bytes([n]) * n for n in range(12)]),
    "rgb_3": (FrameHeader(1, 256, 256, grey=False, version=3, row=4), [bytes(range(200))]),
}
GOLDEN_3 = FrameHeader(2, 33, 70, grey=True, tile=2, version=3, row=2)
GOLDEN_3_STREAMS = [bytes([n]) * n for n in range(12)]
SMALL = FrameHeader(2, 40, 17, grey=True, tile=2)
SMALL_2 = replace(SMALL, version=2)
SMALL_3 = replace(SMALL, version=3, row=2)
PARTS_3 = {"mask": b"mask", "exact": {0: b"zero", 3: b"three"}}
CORRECTED_3 = {**PARTS_3, "corrections": {1: b"one", 3: b"c" * 130}}
SMALL_STREAMS = [b"\x01\x02\x03", b"", b"\xff" * 130, b"z"]


def make_golden_frames() -> None:
    """Run once by hand: python -c 'import test_frame as t; t.make_golden_frames()'. Never replaces a file."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name, (header, streams) in GOLDEN_FRAMES.items():
        with (GOLDEN / f"{name}.bin").open("xb") as file:
            file.write(pack(header, streams))
    with (GOLDEN / "grey_ragged_3.bin").open("xb") as file:
        file.write(pack(GOLDEN_3, GOLDEN_3_STREAMS, **golden_parts()))


def golden_pixels(tile: int) -> np.ndarray:
    """Return the pixels of an exact tile of the golden frame of version 3."""
    rows, columns = (
        slice(16 * side.start, min(16 * side.stop, edge))
        for side, edge in zip(
            (tiles(GOLDEN_3)[tile].patch.rows, tiles(GOLDEN_3)[tile].patch.columns), (33, 70), strict=True
        )
    )
    y, x = np.mgrid[rows, columns]
    return (y * y + 3 * x + tile)[None].astype(np.uint16)


def golden_mask() -> np.ndarray:
    """Return the mask of the golden frame of version 3."""
    plane, _, y, x = np.ogrid[:2, :1, :33, :70]
    return (y + plane) ** 2 + x**2 < 500


@pytest.mark.parametrize("psnr", [0, 3805, 65535])
def test_the_measured_psnr(psnr):
    frame = pack(SMALL_3, SMALL_STREAMS, **PARTS_3, psnr=psnr)
    index = parse_index(frame, SMALL_3)
    assert (index.psnr, index.header, index.frame_bytes) == (psnr, SMALL_3, len(frame))
    assert parse_index(pack(SMALL_3, SMALL_STREAMS), SMALL_3).psnr is None
    with pytest.raises(CAEConfigurationError, match="only frames of version 3"):
        pack(SMALL_2, SMALL_STREAMS, psnr=psnr)


def golden_parts() -> dict:
    return {"mask": encode_mask(golden_mask()), "exact": {n: encode_pixels(golden_pixels(n)) for n in (2, 5, 11)}}


def test_golden_frame_with_mask_and_exact_tiles():
    golden = (GOLDEN / "grey_ragged_3.bin").read_bytes()
    found = parse_frame(golden, replace(GOLDEN_3, version=2, row=None))
    assert found.header == GOLDEN_3
    assert list(map(bytes, found.streams)) == GOLDEN_3_STREAMS
    np.testing.assert_array_equal(decode_mask(found.mask, (2, 1, 33, 70)), golden_mask())
    assert sorted(found.exact) == [2, 5, 11]
    for tile, section in found.exact.items():
        pixels = golden_pixels(tile)
        np.testing.assert_array_equal(decode_pixels(section, pixels.shape, pixels.dtype), pixels)
    # zlib's bytes differ between its builds; all others do not
    assert pack(found.header, found.streams, mask=found.mask, exact=found.exact) == golden


def sealed(body: bytes | bytearray) -> bytes:
    return bytes(body) + crc32c.crc32c(bytes(body)).to_bytes(4, "little")


headers = (
    st.builds(
        FrameHeader,
        planes=st.integers(1, 4),
        height=st.integers(1, 300),
        width=st.integers(1, 300),
        grey=st.booleans(),
        tile=st.sampled_from([1, 2, 4, 8, 32, 1024]),
        version=st.sampled_from([1, 2, 3]),
    )
    .map(lambda header: replace(header, row=7) if header.version == 3 else header)
    .filter(lambda header: header.tile_count <= 400)
)


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
    assert index.parts(0, memoryview(frame)[index.offsets[0] : index.offsets[1]]).stream == streams[0]


@given(header=headers)
def test_tiles_cover_the_plane_once_in_order(header):
    rows, columns = header.latent_shape
    assert (rows, columns) == ((header.height + 15) // 16, (header.width + 15) // 16)
    found = tiles(header)
    assert [tile.number for tile in found] == list(range(header.tile_count))
    assert [tile.plane for tile in found] == sorted(tile.plane for tile in found)
    first = [(tile.patch.rows, tile.patch.columns) for tile in found if tile.plane == 0]
    assert len(first) == header.tile_grid[0] * header.tile_grid[1]
    covered = {(y, x) for r, c in first for y in range(r.start, r.stop) for x in range(c.start, c.stop)}
    assert len(covered) == rows * columns == sum((r.stop - r.start) * (c.stop - c.start) for r, c in first)
    assert first == sorted(first, key=lambda tile: (tile[0].start, tile[1].start))
    assert all(r.stop - r.start <= header.tile and c.stop - c.start <= header.tile for r, c in first)


@pytest.mark.parametrize("name", GOLDEN_FRAMES)
def test_golden_frames(name):
    header, streams = GOLDEN_FRAMES[name]
    golden = (GOLDEN / f"{name}.bin").read_bytes()
    assert pack(header, streams) == golden
    got, views = unpack(golden, header)
    assert (got, [bytes(view) for view in views]) == (header, streams)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_overhead_of_a_usual_chunk(version):
    header = FrameHeader(1, 256, 256, grey=False, version=version, row=0 if version == 3 else None)
    assert len(pack(header, [b"s" * 10_000])) - 10_000 - 2 <= 24


@pytest.mark.parametrize(
    ("expected", "parts"),
    [
        (SMALL, {}), (SMALL_2, {}), (SMALL_3, {}), (SMALL_3, PARTS_3), (SMALL_3, {"mask": b"m" * 200}),
        (SMALL_3, {"exact": {1: b"e" * 300}}), (SMALL_3, CORRECTED_3), (SMALL_3, {"corrections": {2: b"c"}}),
    ],
)  # fmt: skip
def test_index_from_prefixes_says_how_much_is_missing(expected, parts):
    frame = pack(expected, SMALL_STREAMS, **parts)
    whole = parse_index(frame, expected)
    assert isinstance(whole, FrameIndex)
    end = whole.mask[0] if whole.mask else whole.offsets[0]
    for size in range(1, len(frame)):
        index = parse_index(frame[:size], expected)
        if size >= end:
            assert index == whole
        else:
            assert isinstance(index, int)
            assert 1 <= index <= end - size
    size = reads = 1
    while isinstance(missing := parse_index(frame[:size], expected), int):
        size, reads = size + missing, reads + 1
    assert reads <= 8


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
                whole.parts(tile, memoryview(damaged)[whole.offsets[tile] : whole.offsets[tile + 1]])


def test_truncation_of_version_2_at_each_byte_and_a_tail():
    frame = pack(SMALL_2, SMALL_STREAMS)
    for size in range(len(frame)):
        with pytest.raises(FrameError, match=r"^cae: frame"):
            unpack(frame[:size], SMALL_2)
    with pytest.raises(FrameError, match="extra bytes"):
        unpack(frame + b"\0", SMALL_2)


# The small frame: magic 0-3, version 4, flags 5, planes 6, height 7, width 8, tile 9, lengths 10-14.
MALFORMED = {
    "no frame": (slice(0, 4), b"\x89PNG", "not a cae frame"),
    "newer version": (slice(4, 5), b"\x04", "upgrade zarr-cae"),
    "other weights": (slice(4, 5), b"\x02", "version must be 1 or 3, which the weights of the array call for; got 2"),
    "version 0": (slice(4, 5), b"\x00", "version must be one of \\(1, 2, 3\\); got 0"),
    "unknown flag": (slice(5, 6), b"\x03", "flags must be 0 to 1 in version 1; got 3"),
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
    "other tile": (slice(9, 10), b"\x00", "extra bytes|too early|length of tile"),
    "length short by one": (slice(10, 11), b"\x02", "extra bytes"),
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


def test_round_trip_of_masks_and_exact_tiles():
    frame = pack(SMALL_3, SMALL_STREAMS, **PARTS_3)
    found = parse_frame(frame, SMALL)
    assert (found.header, list(map(bytes, found.streams))) == (SMALL_3, SMALL_STREAMS)
    assert bytes(found.mask) == b"mask"
    assert {tile: bytes(section) for tile, section in found.exact.items()} == PARTS_3["exact"]
    assert unpack(frame, SMALL_2)[1] == SMALL_STREAMS
    index = parse_index(frame, SMALL)
    assert isinstance(index, FrameIndex)
    assert index.frame_bytes == len(frame)
    assert index.mask_section(memoryview(frame)[slice(*index.mask)]) == b"mask"
    for tile, stream in enumerate(SMALL_STREAMS):
        got = index.parts(tile, memoryview(frame)[index.offsets[tile] : index.offsets[tile + 1]])
        assert got.stream == stream
        assert (None if got.pixels is None else bytes(got.pixels)) == PARTS_3["exact"].get(tile)
        assert got.correction is None


def test_round_trip_of_corrections():
    """Corrections beside exact tiles, and in a tile that is exact itself; whole frames and parts."""
    for parts in (CORRECTED_3, {"corrections": {2: b"c"}}):
        frame, wanted = pack(SMALL_3, SMALL_STREAMS, **parts), parts["corrections"]
        found = parse_frame(frame, SMALL)
        assert (found.header, list(map(bytes, found.streams))) == (SMALL_3, SMALL_STREAMS)
        assert {tile: bytes(section) for tile, section in found.corrections.items()} == wanted
        assert {tile: bytes(section) for tile, section in found.exact.items()} == parts.get("exact", {})
        assert unpack(frame, SMALL_2)[1] == SMALL_STREAMS
        index = parse_index(frame, SMALL)
        assert isinstance(index, FrameIndex)
        assert (index.corrected, index.frame_bytes) == (True, len(frame))
        for tile, stream in enumerate(SMALL_STREAMS):
            got = index.parts(tile, memoryview(frame)[index.offsets[tile] : index.offsets[tile + 1]])
            assert got.stream == stream
            assert (None if got.correction is None else bytes(got.correction)) == wanted.get(tile)
    assert pack(SMALL_3, SMALL_STREAMS, corrections={}) == pack(SMALL_3, SMALL_STREAMS)


def test_each_flipped_bit_of_corrected_tiles_in_parts():
    frame = pack(SMALL_3, SMALL_STREAMS, **CORRECTED_3)
    whole = parse_index(frame, SMALL)
    assert isinstance(whole, FrameIndex)
    for tile, (begin, end) in enumerate(pairwise(whole.offsets)):
        for bit in range(8 * (end - begin)):
            damaged = bytearray(frame[begin:end])
            damaged[bit // 8] ^= 1 << bit % 8
            with pytest.raises(FrameError, match=f"tile {tile}'s checksum must be"):
                whole.parts(tile, memoryview(damaged))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "ends 1 bytes before the end of its correction"),
        (b"\x80", "ends 1 bytes before the end of its correction"),
        (b"\x04abc", "ends 1 bytes before the end of its correction"),
        (b"\xff\xff\xff\xff\x0fabc", "ends 4294967292 bytes before the end of its correction"),
        (b"\x80\x00abc", "length of the correction of tile 0 has a superfluous last byte"),
        (b"\x80\x80\x80\x80\x80\x01", "length of the correction of tile 0 must have at most 5 bytes"),
        (b"\xff\xff\xff\xff\x1f", "length of the correction of tile 0 must be below 2\\^32"),
    ],
)
@pytest.mark.parametrize("exact", [None, b"pixels"])
def test_malformed_corrections_with_valid_checksum(content, message, exact):
    """The length of a correction never reaches into the pixel section behind the stream."""
    header = FrameHeader(1, 16, 16, grey=True, version=3, row=0)
    frame = bytearray(pack(header, [content], exact=exact and {0: exact}))
    body = len(frame) - len(content) - len(exact or b"") - 8
    frame[5] |= 16
    frame = sealed(frame[:body]) + bytes(frame[body + 4 :])
    with pytest.raises(FrameError, match=message):
        parse_frame(frame, header)
    index = parse_index(frame, header)
    assert isinstance(index, FrameIndex)
    with pytest.raises(FrameError, match=message):
        index.parts(0, memoryview(frame)[index.offsets[0] :])


@pytest.mark.parametrize("parts", [PARTS_3, CORRECTED_3], ids=["without corrections", "with corrections"])
def test_each_flipped_bit_and_truncation_of_version_3(parts):
    frame = pack(SMALL_3, SMALL_STREAMS, **parts)
    for bit in range(8 * len(frame)):
        damaged = bytearray(frame)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FrameError, match=r"^cae: frame"):
            parse_frame(bytes(damaged), SMALL)
    for size in range(len(frame)):
        with pytest.raises(FrameError, match=r"^cae: frame"):
            parse_frame(frame[:size], SMALL)
    with pytest.raises(FrameError, match="extra bytes"):
        parse_frame(frame + b"\0", SMALL)


# Version 3 of the small frame: magic 0-3, version 4, flags 5, planes 6, height 7, width 8, tile 9, row 10, length of
# the mask 11, bits of exact tiles 12, lengths of 4 tiles 13-17 and of 2 pixel sections 18-19.
MALFORMED_3 = {
    "unknown flag": (slice(5, 6), b"\x27", "flags must be 0 to 31 in version 3; got 39"),
    "flag of version 2": (slice(4, 5), b"\x02", "flags must be 0 to 1 in version 2; got 7"),
    "mask of no bytes": (slice(11, 12), b"\x00", "mask must have at least one byte"),
    "no exact tile": (slice(12, 13), b"\x00", "at least one of 4 tiles and no other"),
    "exact tile that does not exist": (slice(12, 13), b"\x19", "at least one of 4 tiles and no other"),
    "one exact tile more": (slice(12, 13), b"\x0b", "checksum|too early|must have at least"),
    "pixels of no bytes": (slice(18, 19), b"\x00", "pixel section of tile 0 must have at least one byte"),
    "overlong length": (slice(18, 19), b"\x84\x00", "length of the pixels of tile 0 has a superfluous"),
    "huge mask": (slice(11, 12), b"\xff\xff\xff\xff\x0f", "too early"),
    "shorter mask": (slice(11, 12), b"\x03", "mask's checksum|extra bytes"),
    "longer pixels": (slice(18, 19), b"\x05", "too early|tile 0's checksum"),
    "pixels moved to the stream": (slice(18, 20), b"\x05\x04", "tile 0's checksum"),
}


@pytest.mark.parametrize("name", MALFORMED_3)
def test_malformed_field_of_version_3_with_valid_checksum(name):
    where, what, message = MALFORMED_3[name]
    frame = pack(SMALL_3, SMALL_STREAMS, **PARTS_3)
    head, rest = bytearray(frame[:20]), frame[24:]
    assert sealed(head) + rest == frame
    head[where] = what
    with pytest.raises(FrameError, match=message):
        parse_frame(sealed(head) + rest, SMALL_2)


def test_frames_of_version_3_only_where_they_are_expected():
    frame = pack(SMALL_2, SMALL_STREAMS)
    with pytest.raises(FrameError, match="version must be 3, which"):
        parse_frame(frame, SMALL_3)


@pytest.mark.parametrize(
    ("header", "parts", "message"),
    [
        (SMALL_2, {"mask": b"m"}, "only frames of version 3"),
        (SMALL, {"exact": {0: b"x"}}, "only frames of version 3"),
        (SMALL_3, {"exact": {4: b"x"}}, "tiles must be in"),
        (SMALL_3, {"exact": {-1: b"x"}}, "tiles must be in"),
        (SMALL_3, {"exact": {0: b""}}, "must not be empty"),
        (SMALL_3, {"mask": b""}, "must not be empty"),
        (SMALL_2, {"corrections": {0: b"c"}}, "only frames of version 3"),
        (SMALL_3, {"corrections": {4: b"c"}}, "tiles must be in"),
        (SMALL_3, {"corrections": {-1: b"c"}}, "tiles must be in"),
        (SMALL_3, {"corrections": {0: b""}}, "must not be empty"),
        (replace(SMALL, version=3), {}, "needs the row"),
    ],
)
def test_impossible_parts(header, parts, message):
    with pytest.raises(CAEConfigurationError, match=message):
        pack(header, SMALL_STREAMS, **parts)


@pytest.mark.parametrize("changed", [{"row": 0}, {"version": 3, "row": 256}, {"version": 3, "row": -1}])
def test_impossible_rows(changed):
    with pytest.raises(CAEConfigurationError, match="frame's row must be"):
        replace(SMALL, **changed)


def test_the_row_of_a_frame():
    assert SMALL_2.row_of(5, default=3) == 3
    assert SMALL_3.row_of(5, default=3) == 2
    with pytest.raises(FrameError, match="row must be below 2, the qualities"):
        SMALL_3.row_of(2, default=0)
