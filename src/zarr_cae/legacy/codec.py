"""`ConvolutionalAutoencoder`: caecodec's codec of zarr v2, with its name and its parameters.

It reads the chunks that caecodec wrote (`chunk`). What it writes are the frames of this package (`coder.frame`), which
begin with another magic; caecodec itself can't read those.
"""

from __future__ import annotations

from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
from numcodecs.abc import Codec
from numcodecs.compat import ensure_contiguous_ndarray, ndarray_copy

from zarr_cae.coder import tiles
from zarr_cae.coder.frame import MAGIC, STRIDE, FrameHeader, Symbols
from zarr_cae.config import process_settings
from zarr_cae.errors import CAEConfigurationError, CAEDataError, FrameError
from zarr_cae.legacy import chunk as caecodec
from zarr_cae.legacy import weights as legacy_weights
from zarr_cae.pixels.convert import to_chunk, to_planes
from zarr_cae.pixels.layout import RGB, Layout
from zarr_cae.weights import registry
from zarr_cae.weights.file import METRICS, QUALITIES, Weights

__all__ = ["ConvolutionalAutoencoder"]

_LARGEST_VARINT = 5


class ConvolutionalAutoencoder(Codec):  # type: ignore[misc]
    """RGB chunks of zarr v2 as the entropy-coded latents of CompressAI's `bmshj2018-factorized`; lossy.

    Parameters
    ----------
    quality
        1 (smallest) to 8 (best).
    metric
        "mse" or "ms-ssim".
    patch_size
        Edge in pixels of the patches in which caecodec coded a chunk; chunks of this package have none.
    partial_decompress
        Whether `decode` returns latents, float32 (rows, columns, M), instead of pixels. Arrays ignore it: zarr always
        reads their pixels, and `zarr_cae.open_bottleneck` opens their latents.
    gpu
        Kept in metadata, without effect: `zarr_cae.configure(device=...)` says where the networks run.
    bottleneck_channels
        M, the number of latent channels. None takes the number of the weights.
    downsampling_factor
        16.
    weights
        `sha256:...`, the digest of the weights file. None takes the weights that were imported for this quality and
        metric; arrays of caecodec do not name theirs.

    Raises
    ------
    CAEConfigurationError
        For a parameter out of range; WeightsNotFoundError for weights that are not on this machine.
    """

    codec_id = "cae"

    def __init__(
        self,
        quality: int = 8,
        metric: str = "mse",
        patch_size: int = 256,
        partial_decompress: bool = False,
        gpu: bool = True,
        bottleneck_channels: int | None = None,
        downsampling_factor: int | None = STRIDE,
        weights: str | None = None,
    ) -> None:
        self._set(quality, metric, patch_size, partial_decompress, gpu, bottleneck_channels, downsampling_factor)
        found = legacy_weights.find(quality, metric, weights)
        self.weights: str | None = found.digest
        self.bottleneck_channels = bottleneck_channels or found.architecture.get("latent")
        self._gives_latents = partial_decompress

    def _set(
        self,
        quality: int,
        metric: str,
        patch_size: int,
        partial_decompress: bool,
        gpu: bool,
        channels: int | None,
        factor: int | None,
    ) -> None:
        if type(quality) is not int or quality not in QUALITIES or metric not in METRICS:
            raise CAEConfigurationError(
                f"cae: quality must be 1 to 8 and metric one of {METRICS}; got {quality!r} and {metric!r}"
            )
        if type(patch_size) is not int or patch_size < STRIDE or patch_size % STRIDE:
            raise CAEConfigurationError(f"cae: patch_size must be a positive multiple of {STRIDE}; got {patch_size!r}")
        if factor not in (None, STRIDE):
            raise CAEConfigurationError(f"cae: downsampling_factor must be {STRIDE}; got {factor!r}")
        if channels is not None and (type(channels) is not int or channels < 1):
            raise CAEConfigurationError(f"cae: bottleneck_channels must be a positive integer; got {channels!r}")
        self.quality, self.metric, self.patch_size = quality, metric, patch_size
        self.partial_decompress, self.gpu = bool(partial_decompress), bool(gpu)
        self.bottleneck_channels = channels
        self.downsampling_factor = STRIDE

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Return the codec that an array's metadata describe. Its weights are needed only when chunks are read."""
        known = {**_DEFAULTS, **config}
        known.pop("id", None)
        unknown = sorted(set(known) - set(_DEFAULTS))
        if unknown:
            raise CAEConfigurationError(f"cae: codec of zarr v2 has unknown fields {unknown}; install a newer zarr-cae")
        codec = cls.__new__(cls)
        codec._set(*(known[name] for name in _DEFAULTS if name != "weights"))  # noqa: SLF001
        codec.weights = known["weights"]
        codec._gives_latents = False  # noqa: SLF001
        return codec

    def get_config(self) -> dict[str, Any]:
        """Return the metadata of an array: caecodec's fields, and the digest of the weights if it is known."""
        config = {"id": self.codec_id, **{name: getattr(self, name) for name in _DEFAULTS}}
        if self.weights is None:
            del config["weights"]
        return config

    def loaded(self) -> Weights:
        """Return the verified weights. Raise WeightsNotFoundError if they are not on this machine."""
        weights = registry.load(legacy_weights.find(self.quality, self.metric, self.weights).path)
        if self.bottleneck_channels not in (None, weights.latent_channels):
            raise CAEConfigurationError(
                f"cae: the array has {self.bottleneck_channels} latent channels; weights {weights.info.digest} have "
                f"{weights.latent_channels}: it was written with others"
            )
        return weights

    def encode(self, buf: npt.NDArray[np.uint8]) -> bytes:
        """Return the frame of a chunk.

        Parameters
        ----------
        buf
            uint8 (rows, columns, 3), in C order.

        Raises
        ------
        CAEDataError
            If the chunk has another dtype, shape or order.
        """
        pixels = np.asarray(buf)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != RGB or not pixels.size:
            raise CAEDataError(
                f"cae: the codec of zarr v2 takes chunks (rows, columns, 3) of uint8; got {pixels.dtype} of shape "
                f"{pixels.shape}: create a zarr v3 array with zarr_cae.CAECodec for others"
            )
        if not pixels.flags.c_contiguous:
            raise CAEDataError("cae: the codec of zarr v2 takes chunks in C order; create the array with order='C'")
        from zarr_cae.networks.engine import engine_for

        weights, settings = self.loaded(), process_settings()
        layout = Layout(pixels.shape, 2)
        planes = to_planes(pixels, layout, (0, 255))
        symbols = engine_for(weights, settings).analyse(planes, self.quality, settings).result()
        tables = weights.tables[weights.row(self.quality)]
        header = FrameHeader(1, layout.height, layout.width, grey=False, version=tables.frame_version)
        return tiles.encode(symbols, header, tables)

    def decode(self, buf: Any, out: Any = None) -> Any:
        """Return the pixels of a chunk, uint8 (rows, columns, 3); its latents after `partial_decompress=True`.

        Parameters
        ----------
        buf
            The bytes of a chunk that caecodec or this package wrote.
        out
            An array of the same size in bytes, to be filled and returned.

        Raises
        ------
        FrameError, StreamError
            If the chunk is malformed.
        CAEConfigurationError
            If its weights are not on this machine.
        """
        view = memoryview(ensure_contiguous_ndarray(buf)).cast("B")
        values = self.latents(view) if self._gives_latents else self._pixels(view)
        return values if out is None else ndarray_copy(values, out)

    def _pixels(self, view: memoryview) -> npt.NDArray[np.uint8]:
        weights, settings = self.loaded(), process_settings()
        if view[: len(MAGIC)] != MAGIC:
            header, symbols = caecodec.symbols(view, legacy_weights.cumulative_tables(weights))
            return caecodec.synthesise(header, symbols, weights, self.quality, self.patch_size, settings)
        from zarr_cae.networks.engine import engine_for

        shape, symbols = self._own_symbols(view, weights)
        planes = engine_for(weights, settings).synthesise(symbols[None], self.quality, RGB, settings).result()
        return to_chunk(planes, Layout((*shape, RGB), 2), np.dtype(np.uint8), (0, 255))

    def symbols(self, view: memoryview, weights: Weights) -> tuple[tuple[int, int], Symbols]:
        """Return the height and width of a chunk in pixels, and its symbols.

        Parameters
        ----------
        view
            The bytes of a chunk that caecodec or this package wrote.
        weights
            From `loaded`.

        Returns
        -------
        tuple of int, int16 (M, ceil(height / 16), ceil(width / 16))
            Without the positions that caecodec's padding adds.

        Raises
        ------
        FrameError, StreamError
            If the chunk is malformed.
        """
        if view[: len(MAGIC)] == MAGIC:
            return self._own_symbols(view, weights)
        header, symbols = caecodec.symbols(view, legacy_weights.cumulative_tables(weights))
        rows, columns = -(-header.height // STRIDE), -(-header.width // STRIDE)
        return (header.height, header.width), symbols[:, :rows, :columns]

    def latents(self, view: memoryview) -> npt.NDArray[np.float32]:
        """Return a chunk's latents, (ceil(height / 16), ceil(width / 16), M). Raise the same errors as `decode`."""
        weights = self.loaded()
        row = weights.row(self.quality)
        step, offset = (weights.tensors[name][row].astype(np.float32) for name in ("step", "offset"))
        _, symbols = self.symbols(view, weights)
        values = np.ascontiguousarray(symbols.transpose(1, 2, 0), np.float32)
        values *= step
        values += offset
        return values

    def _own_symbols(self, view: memoryview, weights: Weights) -> tuple[tuple[int, int], Symbols]:
        tables = weights.tables[weights.row(self.quality)]
        height, width = _dimensions(view)
        if height * width * RGB >= 1 << 31:
            raise FrameError(f"cae: frame of {height} x {width} pixels is too large for zarr v2; it is damaged")
        expected = FrameHeader(1, height, width, grey=False, version=tables.frame_version)
        return (height, width), tiles.decode(view, expected, tables)[0]


_DEFAULTS: dict[str, Any] = {
    "quality": 8, "metric": "mse", "patch_size": 256, "partial_decompress": False, "gpu": True,
    "bottleneck_channels": None, "downsampling_factor": STRIDE, "weights": None,
}  # fmt: skip


def _dimensions(frame: memoryview) -> tuple[int, int]:
    """Return the height and width of a frame: numcodecs does not tell a codec the shape of its chunk."""
    numbers, value, shift = [], 0, 0
    for byte in frame[6 : 6 + 3 * _LARGEST_VARINT]:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            numbers.append(value)
            value, shift = 0, 0
        if len(numbers) == 3:
            break
    if len(numbers) < 3 or not 0 < numbers[1] < 1 << 31 or not 0 < numbers[2] < 1 << 31:
        raise FrameError("cae: frame's height and width can't be read: the stored chunk is truncated or damaged")
    return cast("tuple[int, int]", tuple(numbers[1:]))
