"""zarr's own hypothesis strategies: shapes, chunks, shards and selections of every kind, on every codec pipeline.

The mask of pixels without data is exact, so it shows whether each pixel went to its place.
"""

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.storage import MemoryStore
from zarr.testing.strategies import basic_indices, chunk_shapes, orthogonal_indices, shard_shapes

from zarr_cae import CAECodec

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::zarr_cae.CAEWearWarning"),  # small chunks of many examples have equal frames
]
NODATA = 0
EXAMPLES = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@st.composite
def cases(draw):
    """Return an array of the codec, and the pixels that were written to it, many of them without data."""
    shape = draw(npst.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=8))
    chunks = draw(chunk_shapes(shape=shape))
    shards = draw(st.none() | shard_shapes(shape=shape, chunk_shape=chunks))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pixels = random.integers(1, 256, shape).astype(np.uint8)
    pixels[random.random(shape) < 0.4] = NODATA
    array = zarr.create_array(
        MemoryStore(), shape=shape, chunks=chunks, shards=shards, dtype="uint8", fill_value=NODATA, compressors=None,
        serializer=CAECodec(quality=1, channel_axis=None, nodata=NODATA),
    )  # fmt: skip
    array[...] = pixels
    return array, pixels


def is_like(found, whole):
    """Return whether the mask is the same, and pixels are within one grey level."""
    found, whole = np.asarray(found), np.asarray(whole)
    assert found.shape == whole.shape
    same_mask = np.array_equal(found == NODATA, whole == NODATA)
    return same_mask and not (np.abs(found.astype(int) - whole.astype(int)) > 1).any()


@EXAMPLES
@given(cases(), st.data())
def test_basic_selections(pipeline, case, data):
    array, pixels = case
    whole = array[...]
    assert np.array_equal(whole == NODATA, pixels == NODATA)
    index = data.draw(basic_indices(shape=pixels.shape))
    assert is_like(array[index], whole[index])
    value = data.draw(st.sampled_from([NODATA, 200]))
    array[index] = value
    pixels[index] = value
    assert np.array_equal(array[...] == NODATA, pixels == NODATA)


@EXAMPLES
@given(cases(), st.data())
def test_orthogonal_selections(pipeline, case, data):
    array, pixels = case
    whole = array[...]
    index, same = data.draw(orthogonal_indices(shape=pixels.shape))
    assert is_like(array.oindex[index], whole[same])
    value = data.draw(st.sampled_from([NODATA, 200]))
    array.oindex[index] = value
    pixels[same] = value
    assert np.array_equal(array[...] == NODATA, pixels == NODATA)


@EXAMPLES
@given(cases(), st.data())
def test_coordinates_and_masks(pipeline, case, data):
    array, pixels = case
    whole = array[...]
    chosen = data.draw(npst.arrays(bool, pixels.shape))
    if chosen.any():
        assert is_like(array.vindex[np.nonzero(chosen)], whole[chosen])
        assert is_like(array.get_mask_selection(chosen), whole[chosen])
        array.set_mask_selection(chosen, NODATA)
        pixels[chosen] = NODATA
    assert np.array_equal(array[...] == NODATA, pixels == NODATA)


@EXAMPLES
@given(cases(), st.data())
def test_growing_and_shrinking(pipeline, case, data):
    array, pixels = case
    shape = data.draw(npst.array_shapes(min_dims=pixels.ndim, max_dims=pixels.ndim, max_side=10))
    array.resize(shape)
    kept = tuple(map(slice, np.minimum(shape, pixels.shape)))
    expected = np.full(shape, NODATA, np.uint8)
    expected[kept] = pixels[kept]
    assert np.array_equal(array[kept] == NODATA, expected[kept] == NODATA)
