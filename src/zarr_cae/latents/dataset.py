"""Patches of latents, numbered, for training straight from an archive."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
from zarr.core.buffer import cpu

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
    """The latents of an array as a map-style dataset for `torch.utils.data.DataLoader`; see `LatentPatches`."""
    return LatentPatches(array, patch, step=step, labels=labels, missing=missing)


class LatentPatches:
    """Windows of an array of latents, numbered by batch axes, then rows, then columns.

    Item i is a float32 array (K, rows, columns), K the length of the latents' axis, or (item, labels[i]). It needs
    no torch; workers of a DataLoader may fork or spawn. Each item reads the chunks it touches: a patch of the size of
    a chunk (16 positions are 256 pixels), or whole chunks, reads nothing twice. Items are arrays of numpy also after
    `zarr.config.enable_gpu()`: latents are made on the host.

    Parameters
    ----------
    array
        As `open_bottleneck` returns it, or a copy with its attributes.
    patch
        Rows and columns of a window in latent positions.
    step
        From a window to the next; by default the patch, without overlap. Windows that would stick out are left out.
    labels
        One for each item.
    missing
        What stands for latents that were never written. By default reading them raises CAEDataError: as NaN, a single
        one silently turns a whole network to NaN. NaN leaves them as they are.

    Raises
    ------
    CAEConfigurationError
        If `array` has no latents, or sizes or the number of labels don't fit.
    CAEDataError
        From reading an item with latents that were never written, unless `missing` is given.
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
            raise CAEConfigurationError(f"cae: patches {self.patch} by {self.step} do not fit latents of {sides}")
        batch = [length for length, role in zip(array.shape, self._axes, strict=True) if role == "batch"]
        places = [(n - size) // step + 1 for n, size, step in zip(sides, self.patch, self.step, strict=True)]
        self._grid = (*batch, *places)
        if labels is not None and len(labels) != len(self):
            raise CAEConfigurationError(f"cae: {len(self)} patches need as many labels; got {len(labels)}")

    def __len__(self) -> int:
        return math.prod(self._grid)

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"cae: patch {index} of {len(self)}")
        *batch, row, column = (int(place) for place in np.unravel_index(index % len(self), self._grid))
        corner = {"rows": row * self.step[0], "columns": column * self.step[1]}
        size = dict(zip(("rows", "columns"), self.patch, strict=True))
        images = iter(batch)
        window = tuple(
            next(images) if role == "batch"
            else slice(None) if role == "latents"
            else slice(corner[role], corner[role] + size[role])
            for role in self._axes
        )  # fmt: skip
        roles = [role for role in self._axes if role != "batch"]
        found = np.asarray(self.array.get_basic_selection(window, prototype=cpu.buffer_prototype))
        item = np.ascontiguousarray(found.transpose([roles.index(role) for role in ("latents", "rows", "columns")]))
        absent = np.isnan(item)
        if absent.any():
            if self.missing is None:
                raise CAEDataError(
                    f"cae: patch {index} has latents that were never written: zarr stores no chunk that is all fill "
                    "value; give missing=0 (or another number), or write the archive with "
                    "config={'write_empty_chunks': True}"
                )
            item[absent] = self.missing
        return item if self.labels is None else (item, self.labels[index])


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    try:
        rows, columns = map(operator.index, value if isinstance(value, Iterable) else (value, value))
    except (TypeError, ValueError) as error:
        raise CAEConfigurationError(f"cae: sizes are one or two whole numbers of positions; got {value!r}") from error
    return rows, columns
