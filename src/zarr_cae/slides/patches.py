"""Patches of latents of a slide: of one level, of a region, and of tissue only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import StoreLike

from zarr_cae.coder.frame import STRIDE
from zarr_cae.errors import CAEConfigurationError
from zarr_cae.latents.dataset import LatentPatches
from zarr_cae.latents.metadata import ATTRIBUTE
from zarr_cae.latents.store import open_bottleneck

__all__ = ["SlidePatches", "slide_patches", "tissue_mask"]

RowsAndColumns = tuple[slice, slice]
Labels = Sequence[Any] | npt.NDArray[Any] | Callable[[int, int], Any]
_THRESHOLD = 0.1
_LEAST_PIXELS = 4


class SlidePatches(LatentPatches):
    """Patches of an array of latents at chosen places.

    Item i is a float32 array (K, rows, columns), where K is the length of the latent axis; with labels it is the pair
    (array, label). No torch is needed, and the workers of a DataLoader may spawn. zarr's remote stores do not work
    after a fork: give the DataLoader `multiprocessing_context="spawn"` for a URL.

    Parameters
    ----------
    array
        An array of latents of one plane, from `open_bottleneck`.
    positions
        First row and column of each patch in pixels of its level, (N, 2) int64, multiples of 16.
    patch
        Rows and columns of a patch, in latent positions (one position is 16 x 16 pixels).
    labels
        A label for each patch in the order of `positions`, or a function of the first row and column in pixels.
    missing
        The value for latents that were never written; by default reading them raises CAEDataError.

    Attributes
    ----------
    positions
        As given.

    Raises
    ------
    CAEConfigurationError
        If `array` holds no latents or several planes, or the size of a patch or the number of labels does not fit.
    """

    def __init__(
        self,
        array: zarr.Array[Any],
        positions: npt.NDArray[np.int64],
        patch: tuple[int, int],
        *,
        labels: Labels | None = None,
        missing: float | None = None,
    ) -> None:
        super().__init__(array, patch, missing=missing)
        if self._grid[:-2] and max(self._grid[:-2]) > 1:
            raise CAEConfigurationError(f"cae: patches of a slide need one plane; the array has {self._grid[:-2]}")
        self.positions = positions
        if labels is not None and not callable(labels) and len(labels) != len(positions):
            raise CAEConfigurationError(
                f"cae: {len(positions)} patches need {len(positions)} labels; got {len(labels)}"
            )
        self._labels = labels

    def __len__(self) -> int:
        return len(self.positions) if hasattr(self, "positions") else super().__len__()

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"cae: patch {index} of {len(self)}")
        row, column = (int(place) for place in self.positions[index])
        item = self._checked(self._read([0] * len(self._grid[:-2]), row // STRIDE, column // STRIDE), index)
        if self._labels is None:
            return item
        return item, self._labels(row, column) if callable(self._labels) else self._labels[index]


def slide_patches(
    slide: StoreLike,
    patch: int | tuple[int, int] = 16,
    *,
    level: int = 0,
    region: RowsAndColumns | None = None,
    tissue: bool | float = True,
    step: int | tuple[int, int] | None = None,
    labels: Labels | None = None,
    missing: float | None = None,
    storage_options: dict[str, Any] | None = None,
) -> SlidePatches:
    """Return patches of latents of an OME-Zarr image, as `zarr-cae convert` writes it, for a torch DataLoader.

    Parameters
    ----------
    slide
        A path, a URL or a Store with the image at its root.
    patch, step
        Rows and columns of a patch, and from one patch to the next, in latent positions of 16 x 16 pixels. The default
        of `step` is `patch`.
    level
        Number of the level in the pyramid; 0 is the largest.
    region
        Rows and columns in pixels of this level; only patches that lie wholly inside are taken.
    tissue
        True: only patches of which at least a quarter is tissue (see `tissue_mask`), judged on a small level. A number
        from 0 to 1: the least part of a patch that must be tissue. False: all patches.
    labels
        A label for each patch in the order of `positions`, or a function of the first row and column in pixels.
    missing
        The value for latents that were never written: `convert` does not store chunks that are all background. By
        default reading them raises CAEDataError.
    storage_options
        Options for the file system of a URL.

    Returns
    -------
    SlidePatches
        A sequence of patches, by rows of the slide.

    Raises
    ------
    CAEConfigurationError
        If there is no such level, its chunks are not multiples of 16 pixels, or the sizes do not fit.

    Examples
    --------
    >>> patches = zarr_cae.slide_patches("slide.zarr", 16, level=1)  # doctest: +SKIP
    >>> batches = torch.utils.data.DataLoader(patches, batch_size=64, shuffle=True)  # doctest: +SKIP
    """
    options: dict[str, Any] = {} if storage_options is None else {"storage_options": storage_options}
    latents = open_bottleneck(slide, **options)
    pixels = zarr.open_group(slide, mode="r", **options)
    paths = _paths(pixels)
    if not 0 <= level < len(paths):
        sizes = (cast("zarr.Array[Any]", pixels[path]).shape for path in paths)
        levels = ", ".join(f"{index}: {size[-1]} x {size[-2]}" for index, size in enumerate(sizes))
        raise CAEConfigurationError(f"cae: {pixels.store_path} has no level {level}; its levels are {levels}")
    array = cast("zarr.Group", latents)[paths[level]]
    if not isinstance(array, zarr.Array) or ATTRIBUTE not in array.attrs:
        raise CAEConfigurationError(f"cae: level {level} is not stored with the codec 'cae', so it has no latents")
    plain = LatentPatches(array, patch, step=step)
    rows, columns = (range(0, n * size, size) for n, size in zip(plain.counts, plain.step, strict=True))
    grid = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2).astype(np.int64) * STRIDE
    extent = np.array(plain.patch) * STRIDE
    grid = grid if region is None else _inside(grid, extent, region)
    if tissue is not False:
        least = 0.25 if tissue is True else float(tissue)
        grid = grid[_tissue_parts(pixels, paths, level, grid, extent) >= least]
    return SlidePatches(array, grid, plain.patch, labels=labels, missing=missing)


def tissue_mask(array: zarr.Array[Any], threshold: float = _THRESHOLD) -> npt.NDArray[np.bool_]:
    """Return where a level differs from the background, (rows, columns).

    Parameters
    ----------
    array
        A level of an image that `convert` wrote; its fill value is the background. All of it is read.
    threshold
        The least difference in any channel, as a part of the range of values.
    """
    pixels = np.asarray(array[...]).astype(np.float64)
    low, high = _range(array)
    different = np.abs(pixels - float(cast("Any", array.fill_value))) > threshold * (high - low)
    return np.asarray(different.reshape(-1, *array.shape[-2:]).any(axis=0))


def _range(array: zarr.Array[Any]) -> tuple[float, float]:
    if array.dtype.kind in "ui":
        bounds = np.iinfo(array.dtype)
        return float(bounds.min), float(bounds.max)
    return 0.0, 1.0


def _paths(group: zarr.Group) -> list[str]:
    ome = group.attrs.asdict().get("ome")
    try:
        return [str(dataset["path"]) for dataset in cast("Any", ome)["multiscales"][0]["datasets"]]
    except (KeyError, IndexError, TypeError) as error:
        raise CAEConfigurationError(f"cae: {group.store_path} is no OME-Zarr 0.5 image") from error


def _inside(
    grid: npt.NDArray[np.int64], extent: npt.NDArray[np.int64], region: RowsAndColumns
) -> npt.NDArray[np.int64]:
    kept = np.ones(len(grid), bool)
    for axis, part in enumerate(region):
        if part.step not in (None, 1):
            raise CAEConfigurationError(f"cae: a region is a window without steps; got {part}")
        kept &= grid[:, axis] >= (part.start or 0)
        if part.stop is not None:
            kept &= grid[:, axis] + extent[axis] <= part.stop
    return grid[kept]


def _tissue_parts(
    group: zarr.Group, paths: list[str], level: int, grid: npt.NDArray[np.int64], extent: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Return the part of each patch that is tissue, judged on the smallest level in which a patch has some pixels."""
    smaller = level
    while smaller + 1 < len(paths) and int(extent.min()) >> (smaller + 1 - level) >= _LEAST_PIXELS:
        smaller += 1
    array = group[paths[smaller]]
    assert isinstance(array, zarr.Array)
    mask = tissue_mask(array)
    sums = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int64)
    sums[1:, 1:] = mask.cumsum(0).cumsum(1)
    factor = 2 ** (smaller - level)
    first = grid // factor
    last = np.minimum((grid + extent + factor - 1) // factor, mask.shape)
    top, left, bottom, right = first[:, 0], first[:, 1], last[:, 0], last[:, 1]
    counts = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    return np.asarray(counts / np.maximum(1, (bottom - top) * (right - left)))
