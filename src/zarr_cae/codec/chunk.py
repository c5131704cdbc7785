"""Encode and decode whole chunks: from pixels to the frame and back.

The route of a chunk that is written, by "go to definition":

1. `CAECodec._encode_single` (codec/cae.py): zarr hands over one chunk.
2. `encode_chunk` (here): the plan; `run_async` (codec/plan.py) runs it.
3. `ChunkCoder.analyse_chunk` (here) asks the engine of the weights.
4. `Engine.analyse_chunk` (networks/engine.py): pixels to planes, and into the queue.
5. `to_planes` (pixels/convert.py): axes, value range, padding.
6. `MicroBatcher.submit` (networks/microbatch.py): concurrent chunks meet in a batch.
7. `Engine._code`: the analysis transform `Analysis` (networks/transforms.py), the gains, rounding to symbols.
8. `tiles.encode_streams` (coder/tiles.py): the symbols, cut into tiles.
9. `rans.encode` (coder/rans.py): one tile to one stream.
10. `frame.pack` (coder/frame.py): header, streams and checksums: the bytes that zarr stores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from zarr.abc.buffer import Buffer
from zarr.buffer import gpu

from zarr_cae._zarr import ArraySpec
from zarr_cae.codec.correct import Decoding, decoding, stored_areas
from zarr_cae.codec.effort import refined
from zarr_cae.codec.exact import Parts, mask_section, restore
from zarr_cae.codec.floor import calmed, is_unusual, measured_psnr, poor_tiles, reaches
from zarr_cae.codec.padding import find_padding, holds_only
from zarr_cae.codec.plan import Plan
from zarr_cae.codec.wear import note_decoded, note_encoded
from zarr_cae.codec.windows import enclosing
from zarr_cae.coder import tiles
from zarr_cae.coder.frame import STRIDE, FrameHeader, Symbols, pack, parse_frame
from zarr_cae.coder.tables import Tables
from zarr_cae.config import Settings, process_settings
from zarr_cae.pixels.convert import to_chunk, to_planes, to_root
from zarr_cae.pixels.correct import Area
from zarr_cae.pixels.layout import RGB, Chunk, Layout, Mask, PixelFormat, Planes, ValueRange, ValueTransform
from zarr_cae.pixels.mask import fill, find_mask
from zarr_cae.threads import lazy_property
from zarr_cae.weights.file import Weights, trade_off

if TYPE_CHECKING:
    from zarr_cae.networks.engine import Engine


@dataclass(frozen=True)
class ChunkCoder:
    """Everything that coding the chunks of one array needs: their layout, the weights and the engine."""

    layout: Layout
    spec: ArraySpec
    value_range: ValueRange
    quality: int
    load: Callable[[], Weights]
    """Returns the verified weights; called only when something is coded."""
    nodata: float | None = None
    """The value of pixels without data, which are stored as a mask; None if there is no such value."""
    transform: ValueTransform = None
    """The value transform between pixels and planes: "sqrt" or none."""
    min_psnr: float | None = None
    """The PSNR in dB of the value range that each chunk must reach; None if there is no such demand."""

    @lazy_property
    def weights(self) -> Weights:
        """Find the weights. Raise WeightsNotFoundError if they are not on this machine."""
        return self.load()

    @lazy_property
    def settings(self) -> Settings:
        """Read the settings of this process from `zarr.config`."""
        return process_settings()

    @lazy_property
    def engine(self) -> Engine:
        """Return the engine that runs the networks. The first call in a process imports torch."""
        from zarr_cae.networks.engine import engine_for

        return engine_for(self.weights, self.settings)

    @property
    def format(self) -> PixelFormat:
        """The pixels of a whole chunk, for the engine."""
        stays = issubclass(self.spec.prototype.nd_buffer, gpu.NDBuffer)  # after `zarr.config.enable_gpu()`
        return PixelFormat(self.layout, self.dtype, self.value_range, stays, self.transform)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the chunk."""
        return self.spec.dtype.to_native_dtype()

    @property
    def components(self) -> int:
        """Components of a plane: 3 for RGB, 1 for grey."""
        return 1 if self.layout.grey else RGB

    @property
    def row(self) -> int:
        """The row of the weights file for the quality."""
        return self.weights.row(self.quality)

    @property
    def tables(self) -> Tables:
        """The frequency tables of the quality."""
        return self.weights.tables[self.row]

    @property
    def geometry(self) -> FrameHeader:
        """The header of the chunk's frame, known without the weights: all but its version counts."""
        layout = self.layout
        return FrameHeader(layout.planes, layout.height, layout.width, layout.grey)

    @property
    def header(self) -> FrameHeader:
        """The header that the chunk's frame must have; the weights say its version, or it is 3."""
        return replace(self.geometry, version=self.tables.frame_version)

    @property
    def exact_header(self) -> FrameHeader:
        """The header of a new frame that can hold a mask and exact tiles."""
        return replace(self.geometry, version=3, row=self.row)

    def of_frame(self, header: FrameHeader) -> ChunkCoder:
        """Return the coder of the quality that coded a frame.

        Raises
        ------
        FrameError
            If the weights do not have the row that the header names.
        """
        row = header.row_of(len(self.weights.tables), self.row)
        return self.of_quality(self.weights.info.qualities[row])

    def of_quality(self, quality: int) -> ChunkCoder:
        """Return the coder of another quality of the same weights."""
        return self if quality == self.quality else replace(self, quality=quality, load=lambda: self.weights)

    @property
    def candidates(self) -> list[ChunkCoder]:
        """The coders of the qualities to try for a chunk, the cheapest one (this coder) first."""
        if self.min_psnr is None:
            return [self]
        return [self.of_quality(one) for one in sorted(self.weights.info.qualities) if one >= self.quality]

    @property
    def corrects(self) -> bool:
        """Whether whole chunks are decoded when they are written, and corrected: see the setting `cae.effort`."""
        return self.settings.effort > 0 and trade_off(self.weights.info, self.quality) is not None

    def analyse_chunk(self, pixels: Any) -> Future[Symbols]:
        """Queue a whole chunk for the analysis transform; see `Engine.analyse_chunk`."""
        return self.engine.analyse_chunk(pixels, self.format, self.quality, self.settings)

    def synthesise_chunk(self, symbols: Symbols, areas: Sequence[Area] = ()) -> Future[Any]:
        """Queue the symbols of a whole chunk for the synthesis transform; see `Engine.synthesise_chunk`."""
        return self.engine.synthesise_chunk(symbols, self.format, self.quality, self.settings, areas)

    def analyse(self, planes: Planes) -> Future[Symbols]:
        """Queue planes (N, 3 or 1, H, W) for the analysis transform; see `Engine.analyse`."""
        return self.engine.analyse(planes, self.quality, self.settings)

    def synthesise(self, symbols: Symbols, areas: Sequence[Area] = ()) -> Future[Planes]:
        """Queue symbols (N, M, h, w) for the synthesis transform; see `Engine.synthesise`."""
        return self.engine.synthesise(symbols, self.quality, self.components, self.settings, areas)

    def to_planes(self, pixels: Chunk, layout: Layout, padding: Mask | None = None) -> Planes:
        """Return pixels as planes (N, 3 or 1, H, W): the whole chunk, or a box of it with this layout.

        Pixels without data, and the padding of a chunk without a nodata value, are filled smoothly. `padding` is true
        there, and has the shape of the pixels.
        """
        mask = padding if self.nodata is None else find_mask(pixels, self.nodata)
        if mask is None:
            planes = to_planes(pixels, layout, self.value_range)
        else:
            planes = to_planes(np.where(mask, self.dtype.type(self.value_range[0]), pixels), layout, self.value_range)
            if mask.any():
                fill(planes, to_planes(mask.view(np.uint8), layout, (0, 1)) > 0.5)
        return to_root(planes, self.value_range) if self.transform == "sqrt" else planes

    def to_pixels(self, planes: Planes, layout: Layout) -> Chunk:
        """Return planes as pixels: the inverse of `to_planes`."""
        return to_chunk(planes, layout, self.dtype, self.value_range, self.transform)

    def to_samples(self, pixels: npt.NDArray[Any], layout: Layout) -> npt.NDArray[Any]:
        """Return values of pixels, or of a mask, as a copy in the order of sample planes (S, H, W), without padding."""
        return pixels.transpose(layout.channels_first).reshape(-1, layout.height, layout.width).copy()

    def from_samples(self, samples: npt.NDArray[Any], layout: Layout) -> npt.NDArray[Any]:
        """Return sample planes (S, H, W) in the order of pixels: the inverse of `to_samples`."""
        order = layout.channels_first
        ordered = samples.reshape([layout.shape[axis] for axis in order])
        return np.ascontiguousarray(ordered.transpose(np.argsort(order)))

    def to_buffer(self, frame: bytes) -> Buffer:
        """Return a frame as a buffer of zarr."""
        return self.spec.prototype.buffer.from_bytes(frame)


def encode_chunk(coder: ChunkCoder, pixels: Any) -> Plan[Buffer]:
    """Return the frame of a whole chunk, a NumPy array or an array on a GPU.

    Padding of a latent position or more is stored as a mask, so that it costs no latents.

    The chunk is decoded as well, unless the setting `cae.effort` is 0. What it decodes to gives the corrections of its
    tiles (see `codec.correct`), and shows tiles that are worse than their mean. With a larger effort the symbols are
    refined (see `codec.effort`), except in chunks with exact tiles.

    If the array has a least PSNR, qualities from its own upwards are tried until one reaches it. Tiles that miss it at
    the best quality, or that decode to something worse than their mean, are stored exactly (see `codec.floor`).
    """
    mask = None
    if coder.nodata is not None or coder.min_psnr is not None:
        pixels = on_host(pixels, coder.spec)
    padding = find_padding(coder, pixels)
    if coder.nodata is not None:
        mask = coder.to_samples(find_mask(pixels, coder.nodata), coder.layout)
    elif padding is not None and padding.is_wide:
        pixels, mask = on_host(pixels, coder.spec), padding.samples
    used = None if padding is None else (-(-padding.height // STRIDE), -(-padding.width // STRIDE))
    for tried in coder.candidates:
        # Pixels on a GPU stay there, and their planes are made there.
        queue = (
            tried.analyse_chunk(pixels) if mask is None
            else tried.analyse(tried.to_planes(pixels, tried.layout, tried.from_samples(mask, tried.layout)))
        )  # fmt: skip
        found: Decoding | None = None
        symbols = yield queue
        unusual = is_unusual(symbols, tried, used)
        if unusual or tried.corrects or tried.min_psnr is not None:
            pixels = on_host(pixels, tried.spec)
            found = yield from decoding(tried, pixels, symbols, mask)
        if tried.min_psnr is None or (found is not None and reaches(tried, pixels, found.pixels, mask)):
            break
    exact = {} if found is None else poor_tiles(tried, tried.geometry, pixels, found.pixels, mask)
    if found is not None and unusual and found.corrections:  # which would turn garbage into the mean
        exact = {**poor_tiles(tried, tried.geometry, pixels, found.plain, mask), **exact}
    if tried.settings.effort > 1 and not exact:
        pixels = on_host(pixels, tried.spec)
        symbols, found = yield from refined(tried, pixels, symbols, found, mask)
    symbols = yield from calmed(tried, tried.geometry, pixels, symbols, exact)
    psnr = None
    if tried.min_psnr is not None and found is not None:
        psnr = measured_psnr(tried, pixels, found.pixels, mask, exact)
    corrections = {} if found is None else {n: one for n, one in found.corrections.items() if n not in exact}
    plain = mask is None and not exact and psnr is None and not corrections
    header = tried.header if plain else tried.exact_header
    streams = tiles.encode_streams(symbols, header, tried.tables)
    frame = pack(header, streams, mask=mask_section(coder, mask), exact=exact, psnr=psnr, corrections=corrections)
    note_encoded(coder, pixels, frame)
    return coder.to_buffer(frame)


def decode_chunk(coder: ChunkCoder, frame: memoryview) -> Plan[Any]:
    """Return the pixels of a whole chunk's frame; a tensor if both zarr's arrays and the engine are on a GPU."""
    found = parse_frame(frame, coder.header)
    coder = coder.of_frame(found.header)
    parts = Parts.of(found)
    symbols = tiles.decode_streams(found.header, found.streams, coder.tables)
    areas = stored_areas(coder, found.header, found.corrections)
    if not parts.exact and parts.mask is None and coder.nodata is None:
        pixels = yield coder.synthesise_chunk(symbols, areas)
    else:
        planes = yield coder.synthesise(symbols, areas)
        pixels = restore(coder, coder.to_pixels(planes, coder.layout), enclosing((), coder.layout), parts)
    note_decoded(coder, frame, pixels)
    return pixels


def on_host(pixels: Any, spec: ArraySpec) -> npt.NDArray[Any]:
    """Return an array as a NumPy array, wherever it is."""
    if isinstance(pixels, np.ndarray):
        return pixels
    return np.asarray(spec.prototype.nd_buffer.from_ndarray_like(pixels).as_numpy_array())


def is_all_fill(pixels: Any, spec: ArraySpec) -> bool:
    """Return whether zarr keeps no chunk that has only these pixels: all have the fill value."""
    return not spec.config.write_empty_chunks and holds_only(pixels, spec.fill_value)
