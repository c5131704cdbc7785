"""Patches of a slide: positions, and glass is left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr

from zarr_cae import open_bottleneck
from zarr_cae.cli import main
from zarr_cae.errors import CAEConfigurationError, CAEDataError
from zarr_cae.slides.patches import slide_patches, tissue_mask


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, tissue: np.ndarray) -> Path:
    folder = tmp_path_factory.mktemp("image")
    np.save(folder / "a.npy", tissue)
    options = ["-q", "2", "--chunks", "64", "--shards", "128", "--levels", "3"]
    assert main(["convert", str(folder / "a.npy"), str(folder / "a.ome.zarr"), *options]) == 0
    return folder / "a.ome.zarr"


def test_patches_lie_on_tissue(image: Path, tissue: np.ndarray) -> None:
    patches = slide_patches(image, 4)
    assert 0 < len(patches) < len(slide_patches(image, 4, tissue=False)) == 4 * 6
    latents = open_bottleneck(image)["0"]
    for index, (row, column) in enumerate(patches.positions):
        part = tissue[row : row + 64, column : column + 64]
        assert (np.abs(part.astype(int) - 255).max(axis=-1) > 25).mean() > 0.1
        expected = latents[:, row // 16 : row // 16 + 4, column // 16 : column // 16 + 4]
        np.testing.assert_array_equal(np.nan_to_num(patches[index]), np.nan_to_num(expected))
    outside = np.ones(tissue.shape[:2], bool)
    for row, column in patches.positions:
        outside[row : row + 64, column : column + 64] = False
    assert (np.abs(tissue[outside].astype(int) - 255).max(axis=-1) > 25).mean() < 0.1


def test_level_region_and_labels(image: Path) -> None:
    region = (slice(32, 128), slice(None))
    patches = slide_patches(image, 2, level=1, region=region, tissue=False, labels=lambda row, column: (row, column),
                            missing=0)  # fmt: skip
    rows, columns = patches.positions.T
    assert (rows.min(), rows.max() + 32) == (32, 128)
    assert set(columns) == set(range(0, 192 + 1, 32)) - {192 + 32}
    item, label = patches[3]
    assert item.shape[1:] == (2, 2)
    assert label == tuple(patches.positions[3])
    with pytest.raises(CAEConfigurationError, match="labels"):
        slide_patches(image, 2, labels=[0])
    for level in (3, -1):
        with pytest.raises(CAEConfigurationError, match=f"no level {level}; its levels are 0: 420 x 300, 1: 210 x 150"):
            slide_patches(image, 2, level=level)
    for patch in (-1, 0, 20):
        with pytest.raises(CAEConfigurationError, match="1 to 19 rows and 1 to 27 columns"):
            slide_patches(image, patch)


def test_glass_is_not_stored(image: Path) -> None:
    patches = slide_patches(image, 4, tissue=False)
    with pytest.raises(CAEDataError, match="never written"):
        patches[0]
    assert (slide_patches(image, 4, tissue=False, missing=0)[0] == 0).all()


def test_mask(image: Path) -> None:
    mask = tissue_mask(zarr.open_array(image / "0", mode="r"))
    assert mask.shape == (300, 420)
    assert not mask[:60].any()
    assert mask[100:200, 100:300].mean() > 0.8


@pytest.mark.slow
def test_workers_of_a_data_loader_spawn(image: Path) -> None:
    from torch.utils.data import DataLoader

    patches = slide_patches(image, 4, missing=0)
    loader = DataLoader(patches, batch_size=3, num_workers=1, multiprocessing_context="spawn")
    assert sum(len(batch) for batch in loader) == len(patches)
