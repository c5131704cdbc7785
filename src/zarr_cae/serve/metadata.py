"""Rewrite `zarr.json` documents so that CAE arrays appear with standard codecs, and map the keys of their chunks.

How a CAE array appears
-----------------------
Shape, data type, fill value, attributes and names of axes do not change. The codecs are `bytes` and one compressor.
Sharding and transposes are undone: each inner chunk of a shard is a chunk with a key of its own, so that a reader
decodes no more than it asks for. Arrays of latents (`cae_bottleneck`) appear in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numcodecs

from zarr_cae.codec.cae import NAME as CAE
from zarr_cae.errors import CAEConfigurationError
from zarr_cae.latents.codec import NAME as LATENTS
from zarr_cae.latents.metadata import SHARDING, codec_entry, has_codec

Compressor = Literal["zstd", "blosc", "gzip"]
_NUMBER = re.compile(r"0|[1-9][0-9]{0,18}")
_ZSTD_LEVEL, _GZIP_LEVEL, _BLOSC_LEVEL = 1, 1, 5
"""Fast levels: decoded pixels hold noise that no level compresses much further."""


def compressor_metadata(name: Compressor, itemsize: int) -> dict[str, Any]:
    """Return the entry of a compressor in `zarr.json`."""
    if name == "blosc":
        shuffle = "shuffle" if itemsize > 1 else "bitshuffle"
        own: dict[str, Any] = {"typesize": itemsize, "cname": "zstd", "clevel": _BLOSC_LEVEL, "shuffle": shuffle}
        return {"name": name, "configuration": {**own, "blocksize": 0}}
    if name == "gzip":
        return {"name": name, "configuration": {"level": _GZIP_LEVEL}}
    return {"name": name, "configuration": {"level": _ZSTD_LEVEL, "checksum": False}}


def compressor(name: Compressor, itemsize: int) -> Any:
    """Return the numcodecs codec that `compressor_metadata` describes."""
    if name == "blosc":
        shuffle = numcodecs.Blosc.SHUFFLE if itemsize > 1 else numcodecs.Blosc.BITSHUFFLE
        return numcodecs.Blosc(cname="zstd", clevel=_BLOSC_LEVEL, shuffle=shuffle)
    return numcodecs.GZip(_GZIP_LEVEL) if name == "gzip" else numcodecs.Zstd(_ZSTD_LEVEL)


@dataclass(frozen=True)
class ChunkKeys:
    """How the keys of chunks are written: zarr's chunk key encodings `default` and `v2`.

    `axes` is the number of coordinates in a key.
    """

    name: str
    separator: str
    axes: int

    @classmethod
    def of(cls, encoding: object, axes: int) -> ChunkKeys:
        """Return the keys for the entry `chunk_key_encoding` of a `zarr.json` document."""
        name, configuration = codec_entry(encoding)
        separator = configuration.get("separator", "/" if name == "default" else ".")
        if name not in {"default", "v2"} or separator not in {"/", "."}:
            raise CAEConfigurationError(f"cae: chunk key encoding must be 'default' or 'v2'; got {encoding!r}")
        return cls(name, separator, axes)

    def key(self, chunk: Sequence[int]) -> str:
        """Return the key of a chunk, below the path of its array."""
        numbers = map(str, chunk)
        return self.separator.join(["c", *numbers] if self.name == "default" else numbers)

    def chunk(self, key: str) -> tuple[int, ...] | None:
        """Return the coordinates in a key; None if the key is not one of these."""
        parts = key.split(self.separator)
        if self.name == "default" and parts.pop(0) != "c":
            return None
        if len(parts) != self.axes or not all(map(_NUMBER.fullmatch, parts)):
            return None
        return tuple(map(int, parts))


@dataclass(frozen=True)
class DecodedGrid:
    """The chunks of a CAE array as they appear with standard codecs, and as they are stored."""

    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    """Shape of a chunk as it appears."""
    stored_chunk_shape: tuple[int, ...]
    """Shape of the chunk, or shard, under one key of the store beneath, with the axes of the array."""
    keys: ChunkKeys
    stored_keys: ChunkKeys

    @property
    def keeps_keys(self) -> bool:
        """Whether each chunk appears under the key under which it is stored."""
        return self.chunk_shape == self.stored_chunk_shape and self.keys == self.stored_keys

    def window(self, chunk: Sequence[int]) -> tuple[slice, ...] | None:
        """Return the part of the array that a chunk covers; None if the chunk lies outside the array."""
        starts = [number * length for number, length in zip(chunk, self.chunk_shape, strict=True)]
        if any(start >= length for start, length in zip(starts, self.shape, strict=True)):
            return None
        return tuple(
            slice(start, min(start + size, length))
            for start, size, length in zip(starts, self.chunk_shape, self.shape, strict=True)
        )

    def stored_key(self, chunk: Sequence[int]) -> str:
        """Return the key, below the path of the array, under which a chunk is stored."""
        sizes = zip(chunk, self.chunk_shape, self.stored_chunk_shape, strict=True)
        return self.stored_keys.key([number * own // stored for number, own, stored in sizes][: self.stored_keys.axes])

    def chunks_in(self, stored_key: str) -> list[tuple[int, ...]]:
        """Return the chunks that lie under a key of the store beneath; none if the key is not that of a chunk."""
        stored = self.stored_keys.chunk(stored_key)
        if stored is None:
            return []
        result: list[tuple[int, ...]] = [()]
        stored = stored + (0,) * (len(self.shape) - len(stored))
        for number, own, outer, length in zip(
            stored, self.chunk_shape, self.stored_chunk_shape, self.shape, strict=True
        ):
            end = min((number + 1) * outer, length)
            result = [(*chunk, i) for chunk in result for i in range(number * outer // own, -(-end // own))]
        return result


def is_cae(array: Mapping[str, Any]) -> bool:
    """Return whether a document describes an array that only this package decodes."""
    codecs = array.get("codecs")
    return has_codec(codecs, CAE) or has_codec(codecs, LATENTS)


def decoded_grid(array: Mapping[str, Any]) -> DecodedGrid:
    """Return the chunks of a CAE array from its `zarr.json` document.

    Raises
    ------
    CAEConfigurationError
        If its chunk grid is not regular, or the document is malformed.
    """
    try:
        return _grid(array)
    except CAEConfigurationError:
        raise
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise CAEConfigurationError(f"cae: the metadata of the array are malformed: {error!r}") from error


def _grid(array: Mapping[str, Any]) -> DecodedGrid:
    name, grid = codec_entry(array["chunk_grid"])
    if name != "regular":
        raise CAEConfigurationError(
            f"cae: an array with chunk grid {name!r} can't be shown with standard codecs; rewrite it with a regular one"
        )
    shape, stored = (tuple(map(int, lengths)) for lengths in (array["shape"], grid["chunk_shape"]))
    chunk = _inner_chunk(array["codecs"], tuple(range(len(shape))), stored)
    if min(chunk) < 1 or any(outer % own for outer, own in zip(stored, chunk, strict=True)):
        raise CAEConfigurationError(f"cae: chunks of shape {chunk} do not fill shards of shape {stored}")
    encoding, stored_axes = array["chunk_key_encoding"], len(shape)
    if codec_entry(encoding)[0] == LATENTS:  # see WithoutLatentAxis
        encoding, stored_axes = encoding["configuration"]["encoding"], stored_axes - 1
    return DecodedGrid(shape, chunk, stored, ChunkKeys.of(encoding, len(shape)), ChunkKeys.of(encoding, stored_axes))


def _inner_chunk(codecs: Sequence[Any], axes: tuple[int, ...], chunk: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the smallest pieces that are coded on their own, with the axes of the array.

    Axis i of `chunk` is axis axes[i] of the array.
    """
    for name, configuration in map(codec_entry, codecs):
        if name == "transpose":
            order = configuration["order"]
            axes, chunk = (tuple(item[i] for i in order) for item in (axes, chunk))
        elif name == SHARDING:
            return _inner_chunk(configuration["codecs"], axes, configuration["chunk_shape"])
        elif name in {CAE, LATENTS}:
            break
    lengths = dict(zip(axes, map(int, chunk), strict=True))
    return tuple(lengths[axis] for axis in range(len(lengths)))


def rewrite_array(array: Mapping[str, Any], name: Compressor) -> Mapping[str, Any]:
    """Return the rewritten document of a CAE array, or the same object for other arrays.

    Raises
    ------
    CAEConfigurationError
        As `decoded_grid`.
    """
    if not is_cae(array):
        return array
    grid = decoded_grid(array)
    itemsize = _itemsize(array.get("data_type"))
    to_bytes = {"name": "bytes", "configuration": {"endian": "little"}} if itemsize > 1 else {"name": "bytes"}
    encoding = {"name": grid.keys.name, "configuration": {"separator": grid.keys.separator}}
    return {
        **array,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(grid.chunk_shape)}},
        "chunk_key_encoding": encoding,
        "codecs": [to_bytes, compressor_metadata(name, itemsize)],
    }


def _itemsize(data_type: object) -> int:
    """Return the bytes of one element; all data types of CAE arrays end in their number of bits."""
    found = re.fullmatch(r"(?:u?int|float)(8|16|32|64)", data_type) if isinstance(data_type, str) else None
    if found is None:
        raise CAEConfigurationError(f"cae: data_type must be an integer or a float of a fixed size; got {data_type!r}")
    return int(found[1]) // 8
