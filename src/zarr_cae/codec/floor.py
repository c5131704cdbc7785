"""A floor for the quality of decoded pixels: no tile is worse than its mean, no chunk worse than the array demands.

Patterns of period 2, such as raw Bayer mosaics and ordered dither, give latents that the networks never saw in
training. The inverse GDN can turn them into values far outside the value range. Such patterns can be recognised by
their symbols: many lie outside the alphabets of the tables, where photographs have hardly any. Tiles of such symbols
that decode to garbage are stored exactly.

By default every chunk that is written whole is decoded, so that its tiles can be corrected (see `codec.correct`). A
tile that is worse than its mean even then is stored exactly, too. Without decoding (the setting `cae.effort` is 0, or
the weights are for MS-SSIM) the encoder counts symbols outside the alphabets, which is cheap, and decodes only where
there are many. Faint patterns of period 3 or 4 have usual symbols: at quality 1 they may then decode to something up to
14 % worse than their mean.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Iterable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from zarr_cae.codec.exact import tile_pixels
from zarr_cae.codec.padding import find_padding
from zarr_cae.coder.frame import NO_ERROR, FrameHeader, Symbols
from zarr_cae.coder.lossless import encode_pixels
from zarr_cae.coder.tiles import Tile, tiles
from zarr_cae.networks.pieces import HALO
from zarr_cae.pixels.layout import Mask
from zarr_cae.pixels.smooth import smoothed
from zarr_cae.threads import over_cores

if TYPE_CHECKING:
    from zarr_cae.codec.chunk import ChunkCoder

_UNUSUAL, _UNUSUAL_SHARE = 64, 1e-3
"""Most symbols outside their alphabets, as a number and as a share, that a tile may have without being checked.
Photographs have at most one in 5,000; patterns that decode to garbage have one in 200 to one in 2."""
_SMOOTHING = (2, 4)
"""Levels of smoothing for the latents of exact tiles, as log2 of the edges of blocks. The second is used if the first
is not enough."""
_WORSE = 1.02
"""A tile whose mean squared error is above this multiple of its variance is worse than its mean (by 0.1 dB)."""
_MARGIN = 0.999
"""Two decodings of the same latents differ a little, so the encoder asks for a little more than the least PSNR."""


def is_unusual(symbols: Symbols, coder: ChunkCoder, used: tuple[int, int] | None = None) -> bool:
    """Return whether a chunk or a tile has more symbols outside the alphabets than photographs have.

    Then it must be decoded and compared with its pixels.

    Parameters
    ----------
    symbols
        (N, M, h, w).
    coder
        Codes the chunks of the array.
    used
        The rows and columns of latent positions that the symbols are counted against, from the upper left corner;
        by default all. Symbols of padding are usual, and must not make room for others.
    """
    rows, columns = symbols.shape[2:] if used is None else used
    tables = coder.tables
    # As int16, which the symbols are: all alphabets lie within it, and mixed types would be compared as int32.
    lowest = tables.minimum.reshape(tables.channels, -1).min(1).astype(np.int16)[:, None, None]
    highest = tables.largest.reshape(tables.channels, -1).max(1).astype(np.int16)[:, None, None]
    edge = coder.geometry.tile
    for top in range(0, symbols.shape[2], edge):
        for left in range(0, symbols.shape[3], edge):
            some = symbols[:, :, top : top + edge, left : left + edge]
            outside = (some < lowest) | (some > highest)
            positions = max(1, min(rows - top, edge)) * max(1, min(columns - left, edge))
            most = min(_UNUSUAL, _UNUSUAL_SHARE * positions * symbols.shape[1])
            if any(np.count_nonzero(plane) > most for plane in outside):
                return True
    return False


def poor_tiles(
    coder: ChunkCoder,
    header: FrameHeader,
    pixels: Any,
    decoded: Any,
    mask: Mask | None,
    candidates: Sequence[Tile] | None = None,
) -> dict[int, bytes]:
    """Return the pixel sections of the tiles that must be stored exactly, by number.

    Parameters
    ----------
    coder
        Codes the chunks of the array.
    header
        The header of the frame that has the tiles.
    pixels, decoded
        The pixels of a whole chunk, as they should be and as they are decoded.
    mask
        Sample planes (S, H, W), true for samples without data, which do not count; None if there are none.
    candidates
        The tiles in question, numbered within the chunk; by default all.
    """
    original = coder.to_samples(pixels, coder.layout)
    result = coder.to_samples(decoded, coder.layout)
    masks = _masks(coder, pixels, mask)
    poor = []
    planes = header.tile_grid[0] * header.tile_grid[1]
    for found in tiles(header) if candidates is None else candidates:
        tile = found._replace(plane=found.number // planes)  # its plane in the chunk
        both = (_errors(coder, header, tile, original, result, one) for one in masks)
        if not all(error <= _allowed(coder, variance) for error, variance in both):  # also for NaN
            poor.append(tile)
    return dict(over_cores(lambda tile: (tile.number, encode_pixels(_cut(coder, header, tile, original))), poor))


def reaches(coder: ChunkCoder, pixels: Any, decoded: Any, mask: Mask | None) -> bool:
    """Return whether decoded pixels of a whole chunk reach the PSNR that the array demands; see `poor_tiles`."""
    return _mean_error(coder, pixels, decoded, mask, ()) <= _demanded(coder)


def calmed(
    coder: ChunkCoder, header: FrameHeader, pixels: Any, symbols: Symbols, exact: Collection[int]
) -> Generator[Future[Symbols], Symbols, Symbols]:
    """Return the symbols of a chunk with those of unusual exact tiles replaced by symbols of smoothed pixels.

    The pixels of exact tiles do not come from their symbols, and unusual symbols take many bytes. Symbols that take
    part in pixels of other tiles stay.

    Parameters
    ----------
    coder, header, pixels
        As for `poor_tiles`.
    symbols
        (N, M, h, w), of these pixels.
    exact
        The numbers of the exact tiles.
    """
    every = tiles(header)
    wild = [every[one] for one in sorted(exact) if is_unusual(_symbols_of(every[one], symbols), coder)]
    if not wild:
        return symbols
    free = _free_positions(header, [every[one] for one in exact])
    planes = sorted({tile.plane for tile in wild})
    sharp = coder.to_planes(pixels, coder.layout)[planes]
    symbols = symbols.copy()
    for levels in _SMOOTHING:
        smooth = yield coder.analyse(smoothed(sharp, levels))
        for tile in wild:
            own, place = _symbols_of(tile, symbols), planes.index(tile.plane)
            new = smooth[place : place + 1, :, tile.patch.rows, tile.patch.columns]
            np.copyto(own, new, where=free[tile.plane, tile.patch.rows, tile.patch.columns])
        wild = [tile for tile in wild if is_unusual(_symbols_of(tile, symbols), coder)]
        if not wild:
            break
    return symbols


def _symbols_of(tile: Tile, symbols: Symbols) -> Symbols:
    """Return a view of the symbols (1, M, h, w) of a tile in those of its chunk."""
    return symbols[tile.plane : tile.plane + 1, :, tile.patch.rows, tile.patch.columns]


def _free_positions(header: FrameHeader, exact: Iterable[Tile]) -> npt.NDArray[np.bool_]:
    """Return the latent positions (N, h, w) that take part in pixels of exact tiles only."""
    free: npt.NDArray[np.bool_] = np.zeros((header.planes, *header.latent_shape), np.bool_)
    for tile in exact:
        free[tile.plane, tile.patch.rows, tile.patch.columns] = True
    for axis in (1, 2):
        padded = np.pad(free, [(HALO, HALO) if one == axis else (0, 0) for one in range(3)], constant_values=True)
        free = np.logical_and.reduce(np.lib.stride_tricks.sliding_window_view(padded, 2 * HALO + 1, axis), axis=-1)
    return free


def measured_psnr(coder: ChunkCoder, pixels: Any, decoded: Any, mask: Mask | None, exact: Iterable[int]) -> int:
    """Return the PSNR of a whole chunk with exact tiles, as a frame stores it: in hundredths of dB, rounded down.

    The arguments are those of `poor_tiles`; `exact` has the numbers of the exact tiles.
    """
    error = _mean_error(coder, pixels, decoded, mask, exact)
    if error == 0:
        return NO_ERROR
    return min(max(0, math.floor(1000 * math.log10(_extent(coder) ** 2 / error))), NO_ERROR - 1)


def _mean_error(coder: ChunkCoder, pixels: Any, decoded: Any, mask: Mask | None, exact: Iterable[int]) -> float:
    """Return the mean squared error of a chunk, with or without its padding: the larger one. It is 0 without data."""
    squares = _squares(*(coder.to_samples(one, coder.layout) for one in (decoded, pixels)))
    every = tiles(coder.geometry)
    for number in exact:
        own = tile_pixels(coder.geometry, every[number])
        squares[coder.layout.samples_of(every[number].plane), own.rows, own.columns] = 0
    errors = []
    for holes in _masks(coder, pixels, mask):
        inside = np.ones(squares.shape, bool) if holes is None else ~holes
        errors.append(float(squares[inside].mean()) if inside.any() else 0.0)
    return max(errors)


def _masks(coder: ChunkCoder, pixels: Any, mask: Mask | None) -> list[Mask | None]:
    """Return the samples that do not count, twice: the masked ones, and these with the padding if there is any."""
    padding = find_padding(coder, pixels)
    if padding is None:
        return [mask]
    return [mask, padding.samples if mask is None else mask | padding.samples]


def _errors(
    coder: ChunkCoder,
    header: FrameHeader,
    tile: Tile,
    original: npt.NDArray[Any],
    result: npt.NDArray[Any],
    mask: Mask | None,
) -> tuple[float, float]:
    """Return the mean squared error of a tile, and the mean of the variances of its components."""
    errors, variances = [], []
    holes = None if mask is None else _cut(coder, header, tile, mask)
    values, known = (_cut(coder, header, tile, one) for one in (result, original))
    for component in range(len(known)):
        here = slice(None) if holes is None else ~holes[component]
        truth = known[component][here].astype(np.float64)
        if truth.size:
            errors.append(float(_squares(values[component][here], known[component][here]).mean()))
            variances.append(float(truth.var()))
    return (float(np.mean(errors)), float(np.mean(variances))) if errors else (0.0, 0.0)


def _allowed(coder: ChunkCoder, variance: float) -> float:
    """Return the largest mean squared error of a tile."""
    level = _extent(coder) / 255
    floor = _WORSE * variance + level**2
    return floor if coder.min_psnr is None else min(floor, _demanded(coder))


def _demanded(coder: ChunkCoder) -> float:
    """Return the mean squared error at the PSNR that the array demands."""
    assert coder.min_psnr is not None
    return _MARGIN * _extent(coder) ** 2 / 10 ** (coder.min_psnr / 10)


def _extent(coder: ChunkCoder) -> float:
    return float(coder.value_range[1] - coder.value_range[0])  # large integers are subtracted exactly


def _squares(values: npt.NDArray[Any], known: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    if known.dtype.kind == "f":
        difference = values.astype(np.float64) - known
    else:
        larger, smaller = np.maximum(values, known), np.minimum(values, known)  # float64 can't tell large ones apart
        unsigned = np.dtype(f"u{known.dtype.itemsize}")
        difference = (larger.view(unsigned) - smaller.view(unsigned)).astype(np.float64)
    squares: npt.NDArray[np.float64] = np.square(difference)
    return squares


def _cut(coder: ChunkCoder, header: FrameHeader, tile: Tile, samples: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the samples (C, rows, columns) of a tile."""
    pixels = tile_pixels(header, tile)
    return samples[coder.layout.samples_of(tile.plane), pixels.rows, pixels.columns]
