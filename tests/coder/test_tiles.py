"""Symbols to frames and back, on several cores."""

import multiprocessing
import os
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zarr_cae.coder import tiles
from zarr_cae.coder.frame import FrameHeader, pack, unpack
from zarr_cae.coder.tables import Tables
from zarr_cae.errors import FrameError, StreamError

CHANNELS = 5
TABLES = Tables(np.full(CHANNELS, -2), np.full(CHANNELS, 6), np.tile([10, 200, 3500, 300, 80, 6], CHANNELS))


def latents(header, seed=0):
    shape = (header.planes, CHANNELS, *header.latent_shape)
    return np.rint(np.random.default_rng(seed).laplace(size=shape) * 0.6).astype(np.int16)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 300), st.integers(1, 300), st.booleans(), st.sampled_from([1, 4, 32]))
def test_there_and_back(planes, height, width, grey, tile):
    header = FrameHeader(planes, height, width, grey, tile)
    symbols = latents(header)
    frame = tiles.encode(symbols, header, TABLES)
    np.testing.assert_array_equal(tiles.decode(frame, header, TABLES), symbols)


def test_tiles_are_those_of_the_frame():
    header = FrameHeader(2, 20 * 16, 40 * 16, grey=False, tile=16)
    symbols = latents(header)
    _, streams = unpack(tiles.encode(symbols, header, TABLES), header)
    assert len(streams) == header.tile_count == 2 * 2 * 3
    last = tiles.decode(
        pack(small := FrameHeader(1, 4 * 16, 8 * 16, grey=False, tile=16), [streams[-1]]), small, TABLES
    )
    np.testing.assert_array_equal(last[0], symbols[1, :, 16:, 32:])


def test_read_only_symbols_can_be_encoded():
    header = FrameHeader(1, 64, 64, grey=True)
    symbols = latents(header)
    symbols.setflags(write=False)
    tiles.encode(symbols, header, TABLES)


def test_frames_of_another_shape_and_damaged_streams_are_refused():
    header = FrameHeader(1, 64, 64, grey=True)
    frame = tiles.encode(latents(header), header, TABLES)
    with pytest.raises(FrameError):
        tiles.decode(frame, FrameHeader(1, 64, 80, grey=True), TABLES)
    _, streams = unpack(frame, header)
    with pytest.raises(StreamError):
        tiles.decode(pack(header, [bytes(streams[0])[:-2]]), header, TABLES)


def _decode_in_child(frame, header, queue):
    queue.put(int(tiles.decode(frame, header, TABLES).sum()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_the_pool_survives_a_fork():
    header = FrameHeader(3, 600, 600, grey=False)
    symbols = latents(header)
    frame = tiles.encode(symbols, header, TABLES)  # the parent's pool is running
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_decode_in_child, args=(frame, header, queue))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of every fork with threads
        child.start()
    assert queue.get(timeout=60) == symbols.sum()
    child.join(60)
    assert child.exitcode == 0
