"""`LatentPatches`: numbering, labels, latents that were never written, and workers."""

import numpy as np
import pytest
from archives import create

from zarr_cae import CAECodec, CAEConfigurationError, CAEDataError, as_torch_dataset, open_bottleneck


def test_patches(small, photograph, pipeline):
    view = open_bottleneck(create(small, (32, 32, 3)).store)
    whole = view[...].transpose(2, 0, 1)
    data = as_torch_dataset(view, 2, labels="abcdef")
    assert len(data) == 6
    for i, (item, label) in enumerate(data):
        row, column = 2 * (i // 3), 2 * (i % 3)
        assert np.array_equal(item, whole[:, row : row + 2, column : column + 2])
        assert item.flags.c_contiguous
        assert label == "abcdef"[i]
    assert np.array_equal(data[-1][0], data[5][0])
    overlapping = as_torch_dataset(view, (np.int64(3), 2), step=np.array([1, 2]))
    assert len(overlapping) == 2 * 3
    assert np.array_equal(overlapping[4], whole[:, 1:4, 2:4])
    with pytest.raises(IndexError):
        data[6]


def test_patches_of_batches(small, pipeline):
    data = np.stack([small, small[::-1]]).transpose(3, 0, 1, 2)  # (3, t, y, x)
    codec = CAECodec(quality=2, channel_axis=0)
    view = open_bottleneck(create(data, (3, 1, 32, 32), serializer=codec).store)
    assert view.attrs["cae_bottleneck"]["axes"] == ["latents", "batch", "rows", "columns"]
    patches = as_torch_dataset(view, (4, 2))
    assert len(patches) == 2 * 3
    assert np.array_equal(patches[4], view[:, 1, :, 2:4])


def test_missing_patches(small):
    array = create(small, (32, 32, 3))
    array[:32, :32] = 0
    view = open_bottleneck(array.store)
    data = as_torch_dataset(view, 2)
    with pytest.raises(CAEDataError, match=r"patch 0 .*never written.*missing=0"):
        data[0]
    assert np.isfinite(data[1]).all()
    assert np.isnan(as_torch_dataset(view, 2, missing=np.nan)[0]).all()
    assert (as_torch_dataset(view, 2, missing=0)[0] == 0).all()


def test_blank_chunks_have_latents_if_they_are_written(small):
    data = np.zeros_like(small)
    array = create(data, (32, 32, 3), config={"write_empty_chunks": True})
    assert np.isfinite(open_bottleneck(array.store)[...]).all()


def test_patches_that_do_not_fit(small):
    array = create(small, (32, 32, 3))
    view = open_bottleneck(array.store)
    for keywords in (
        {"patch": 5}, {"patch": 0}, {"patch": 2, "step": 0}, {"patch": 2, "labels": [1]}, {"patch": (2, 2, 2)},
        {"patch": 1.5}, {"patch": "ab"},
    ):  # fmt: skip
        with pytest.raises(CAEConfigurationError):
            as_torch_dataset(view, **keywords)
    with pytest.raises(CAEConfigurationError, match="open_bottleneck"):
        as_torch_dataset(array)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a machine with one core
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.slow
def test_workers_of_a_data_loader(archive, start):
    from torch.utils.data import DataLoader

    folder, expected = archive
    data = as_torch_dataset(open_bottleneck(folder, path="photo"), 2, labels=range(6))
    data[0]  # the threads that reading starts must not break the fork
    loader = DataLoader(data, batch_size=3, num_workers=2, multiprocessing_context=start, timeout=120)
    batches = list(loader)
    assert [batch.tolist() for _, batch in batches] == [[0, 1, 2], [3, 4, 5]]
    assert np.array_equal(batches[1][0][2].numpy(), expected[2:4, 4:6].transpose(2, 0, 1))
