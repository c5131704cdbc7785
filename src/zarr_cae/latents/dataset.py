"""Read patches of latents by number, to train on an archive directly."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
from zarr.buffer import cpu

from zarr_cae.errors import CAEConfigurationError, CAEDataError
from zarr_cae.latents.metadata import ATTRIBUTE

if TYPE_CHECKING:
    import zarr


def as_torch_dataset(
    array: zarr.Array[Any],
    patch: int | tuple[int, int] = 16,
    *,
    step: int | tuple[int, int] | None = None,
    labels: Sequence[Any] | npt.NDArray[Any] | None = None,
    missing: float | None = None,
) -> LatentPatches:
    """Return the latents of an array as a map-style dataset for `torch.utils.data.DataLoader`.

    Parameters
    ----------
    array
        An array of latents from `open_bottleneck`, or a copy of one that kept its attributes.
    patch
        Rows and columns of a patch, in latent positions (one position is 16 x 16 pixels).
    step
        Rows and columns from one patch to the next. The default is `patch`, so that patches do not overlap.
    labels
        One label for each patch.
    missing
        The value for latents that were never written; by default reading them raises CAEDataError.

    Returns
    -------
    LatentPatches
        A sequence of patches.

    Raises
    ------
    CAEConfigurationError
        If `array` holds no latents, or the sizes or the number of labels do not fit.

    Examples
    --------
    >>> patches = zarr_cae.as_torch_dataset(zarr_cae.open_bottleneck("photo.zarr"), 16)  # doctest: +SKIP
    >>> batches = torch.utils.data.DataLoader(patches, batch_size=64, shuffle=True)  # doctest: +SKIP
    """
    return LatentPatches(array, patch, step=step, labels=labels, missing=missing)


class LatentPatches:
    """Patches of an array of latents, numbered by batch axes, then rows, then columns.

    Item i is a float32 array (K, rows, columns), where K is the length of the latent axis; with labels it is the pair
    (array, labels[i]). Patches that would reach beyond the array are left out.

    This class needs no torch, and the workers of a DataLoader may fork or spawn. Each item reads the chunks that it
    touches. Patches of the size of a chunk (16 positions are 256 pixels) or of several whole chunks read no chunk
    twice. Items are NumPy arrays in host memory, also after `zarr.config.enable_gpu()`.

    Parameters
    ----------
    array
        An array of latents from `open_bottleneck`, or a copy of one that kept its attributes.
    patch
        Rows and columns of a patch, in latent positions (one position is 16 x 16 pixels).
    step
        Rows and columns from one patch to the next. The default is `patch`, so that patches do not overlap.
    labels
        One label for each patch.
    missing
        The value for latents that were never written. By default, reading them raises CAEDataError, since they read
        as NaN, and one NaN turns all parameters of a network in training to NaN. `missing=float("nan")` keeps NaN.

    Attributes
    ----------
    array, labels, missing
        As given.
    patch, step
        As given, as pairs (rows, columns).

    Raises
    ------
    CAEConfigurationError
        If `array` holds no latents, or the sizes or the number of labels do not fit.
    CAEDataError
        When an item is read that has latents that were never written, unless `missing` is given.

    Examples
    --------
    >>> latents = zarr_cae.open_bottleneck("archive.zarr")  # doctest: +SKIP
    >>> patches = zarr_cae.LatentPatches(latents, 16, labels=labels)  # doctest: +SKIP
    >>> loader = torch.utils.data.DataLoader(patches, batch_size=32, shuffle=True)  # doctest: +SKIP
    """

    def __init__(
        self,
        array: zarr.Array[Any],
        patch: int | tuple[int, int] = 16,
        *,
        step: int | tuple[int, int] | None = None,
        labels: Sequence[Any] | npt.NDArray[Any] | None = None,
        missing: float | None = None,
    ) -> None:
        mapping = array.attrs.get(ATTRIBUTE)
        if not isinstance(mapping, dict):
            raise CAEConfigurationError(f"cae: {array} has no latents; open it with open_bottleneck")
        self.array, self.labels, self.missing = array, labels, missing
        self.patch = _pair(patch)
        self.step = self.patch if step is None else _pair(step)
        self._axes = cast("list[str]", mapping["axes"])
        sides = [array.shape[self._axes.index(role)] for role in ("rows", "columns")]
        if min(*self.patch, *self.step) < 1 or self.patch[0] > sides[0] or self.patch[1] > sides[1]:
            raise CAEConfigurationError(
                f"cae: a patch has 1 to {sides[0]} rows and 1 to {sides[1]} columns of these latents, and a step is at "
                f"least 1; got patch {self.patch} and step {self.step}"
            )
        batch = [length for length, role in zip(array.shape, self._axes, strict=True) if role == "batch"]
        counts = [(n - size) // step + 1 for n, size, step in zip(sides, self.patch, self.step, strict=True)]
        self._grid = (*batch, *counts)
        if labels is not None and len(labels) != len(self):
            raise CAEConfigurationError(f"cae: {len(self)} patches need {len(self)} labels; got {len(labels)}")

    def __len__(self) -> int:
        return math.prod(self._grid)

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"cae: patch {index} of {len(self)}")
        *batch, row, column = (int(number) for number in np.unravel_index(index % len(self), self._grid))
        item = self._checked(self._read(batch, row * self.step[0], column * self.step[1]), index)
        return item if self.labels is None else (item, self.labels[index])

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of patches along rows and columns."""
        rows, columns = self._grid[-2:]
        return rows, columns

    def _checked(self, item: npt.NDArray[np.float32], index: int) -> npt.NDArray[np.float32]:
        """Replace latents that were never written by `missing`, or raise CAEDataError."""
        absent = np.isnan(item)
        if absent.any():
            if self.missing is None:
                raise CAEDataError(
                    f"cae: patch {index} has latents that were never written: zarr does not store a chunk that is all "
                    "fill value; give missing=0 (or another number), or write the archive with "
                    "config={'write_empty_chunks': True}"
                )
            item[absent] = self.missing
        return item

    def _read(self, batch: Sequence[int], row: int, column: int) -> npt.NDArray[np.float32]:
        """Return the patch (K, rows, columns) at a position of the batch axes and a first row and column."""
        images = iter(batch)
        rows, columns = slice(row, row + self.patch[0]), slice(column, column + self.patch[1])
        windows = {"rows": rows, "columns": columns, "latents": slice(None)}
        selection = tuple(next(images) if role == "batch" else windows[role] for role in self._axes)
        values = np.asarray(self.array.get_basic_selection(selection, prototype=cpu.buffer_prototype))
        roles = [role for role in self._axes if role != "batch"]
        return np.ascontiguousarray(values.transpose([roles.index(role) for role in ("latents", "rows", "columns")]))


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    try:
        rows, columns = map(operator.index, value if isinstance(value, Iterable) else (value, value))
    except (TypeError, ValueError) as error:
        raise CAEConfigurationError(
            f"cae: sizes must be one or two whole numbers of positions; got {value!r}"
        ) from error
    return rows, columns
